"""Inside a module: the torch operations that its forward calls, each with a name, and values like a module's."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from nnsight_core.compiled import is_compiled
from nnsight_core.current import open_trace
from nnsight_core.errors import EditError, ModuleNotRunError, NoSuchOperationError, SourceError
from nnsight_core.kernels import INNER
from nnsight_core.operations import PREFIX, torch_names
from nnsight_core.order import observed_operations
from nnsight_core.sites import Site, user_site

_set = object.__setattr__


class _Place(Protocol):
    """What is needed of the module's envoy."""

    _module: torch.nn.Module
    _tree: Any

    @property
    def path(self) -> str:
        """Where the module stands."""

    def read(self, kind: str) -> Any:
        """A value of the module's."""

    def write(self, kind: str, value: Any) -> None:
        """Let the model go on with another value."""


class Operation:
    """One torch operation inside a module: ``model.h[0].attn.source.softmax_0``.

    In a trace ``.output``, ``.input`` and ``.inputs`` are its values, read and set as those of a module.
    """

    __slots__ = ("_name", "_site", "_source")

    def __init__(self, source: Source, name: str, site: Site | None = None) -> None:
        self._source = source
        self._name = name
        self._site = site

    @property
    def name(self) -> str:
        """The function's plain name, and which call of it this is in one call of the module: ``softmax_0``."""
        return self._name

    def _found(self) -> Site:
        if self._site is None:
            self._site = self._source.site_of(self._name)
        return self._site

    @property
    def file(self) -> str:
        """The file of the line that calls the operation."""
        return self._found().file

    @property
    def line(self) -> int:
        """The number of that line, counted from 1."""
        return self._found().line

    @property
    def text(self) -> str:
        """The text of that line; empty where the source is not at hand."""
        return self._found().source

    @property
    def output(self) -> Any:
        """What the operation gives; set it to replace it.

        An operation that changes a tensor in place gives that tensor, and what it is set to is written into it.
        """
        return self._source._envoy.read(f"{PREFIX}{self._name}.output")

    @output.setter
    def output(self, value: Any) -> None:
        self._source._envoy.write(f"{PREFIX}{self._name}.output", value)

    @property
    def input(self) -> Any:
        """The call of the operation: ``.input[0]`` are its arguments, ``.input[1]`` its keyword arguments, and
        everything else sees the first argument. Set it to replace the first argument, or the whole call by a pair.
        """
        return self._source._envoy.read(f"{PREFIX}{self._name}.input")

    @input.setter
    def input(self, value: Any) -> None:
        self._source._envoy.write(f"{PREFIX}{self._name}.input", value)

    inputs = input

    @property
    def scores(self) -> Any:
        """What attention's softmax takes, (..., head, query, key), scaled and masked; set it to replace it.

        Only for ``scaled_dot_product_attention`` and ``flex_attention``, which do not show it: it is computed again
        from ``.input``, in float32 at least. The kernel runs as well, and its result stays for queries whose
        probabilities stay.
        """
        return self._source._envoy.read(self._inner("scores"))

    @scores.setter
    def scores(self, value: Any) -> None:
        self._source._envoy.write(self._inner("scores"), value)

    @property
    def probabilities(self) -> Any:
        """What attention's softmax gives, (..., head, query, key), as :attr:`scores`; set it to replace it.

        Each query's add up to 1, and are all 0 where the mask lets it see nothing.
        """
        return self._source._envoy.read(self._inner("probabilities"))

    @probabilities.setter
    def probabilities(self, value: Any) -> None:
        self._source._envoy.write(self._inner("probabilities"), value)

    def _inner(self, what: str) -> str:
        if what not in INNER.get(self._name.rpartition("_")[0], ()):
            has = f"{self._name} has no {what}: of all operations, {' and '.join(INNER)} have."
            raise SourceError(f"{self._source._label}.{self._name}.{what}", has, "", user_site())
        return f"{PREFIX}{self._name}.{what}"

    def __repr__(self) -> str:
        site = self._found()
        return f"{self._name}   {site.short}   {site.source}".rstrip()


class Source:
    """``module.source``: the operations that the module's own forward calls, in order.

    Operations in plain functions that the forward calls are among them; those in its children are the children's.
    A name is looked up when the model runs. Whatever needs the whole list (``print``, ``len``, ``in``, a loop) runs a
    copy of the model up to the end of the module, on the input of the open trace, or else on two tokens.

    >>> from nnsight_core import NNsight
    >>> model = NNsight(torch.nn.Sequential(torch.nn.Softmax(dim=-1)))
    >>> with model.trace(torch.zeros(1, 2)):
    ...     names = [operation.name for operation in model[0].source]
    ...     probabilities = model[0].source.softmax_0.output.save()
    >>> names, probabilities.tolist()
    (['softmax_0'], [[0.5, 0.5]])

    Args:
        envoy: the module's envoy.

    Raises:
        SourceError: the module is scripted or compiled, and its operations cannot be seen.
    """

    _envoy: Any
    _listed: dict[str, Site] | None
    _listed_for: weakref.ref[Any] | None

    def __init__(self, envoy: _Place) -> None:
        _set(self, "_envoy", envoy)
        _set(self, "_listed", None)
        _set(self, "_listed_for", None)
        trace = self._trace()
        self._check_visible()
        if trace is not None:
            # So that they can be counted from the start, should they be asked for when the module is half-way.
            trace.announce(envoy._module, envoy._tree.ancestors(envoy._module))

    def _trace(self) -> Any:
        return open_trace(self._envoy._tree.root)

    @property
    def _label(self) -> str:
        return f"{self._envoy.path or 'model'}.source"

    def _check_visible(self) -> None:
        module = self._envoy._module
        if isinstance(module, torch.jit.ScriptModule):
            why, mend = "torch.jit runs this module outside Python.", "Wrap the module as it was before scripting."
            raise SourceError(self._label, why, mend, user_site())
        for each in (module, *self._envoy._tree.ancestors(module)):
            if is_compiled(each):
                what = "this module" if each is module else f"the {type(each).__name__} around it"
                why = f"{what} is compiled, and compiled code does not call the operations of its source one by one."
                mend = "Trace the module that was given to torch.compile, or load the model without compiling it."
                raise SourceError(self._label, why, mend, user_site())

    # Names.

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Operation:
        """The operation of this name.

        Raises:
            NoSuchOperationError: there is none; says the nearest names. A name that could be one in other cases
                (``softmax_7``) is looked for when the model runs, and the error comes then.
        """
        if not isinstance(name, str):
            raise TypeError(f"Operations have names, {self._label}['softmax_0']; for the n-th, list({self._label})[n].")
        base, _, number = name.rpartition("_")
        if self._trace() is None or not number.isdecimal() or base not in torch_names():
            return Operation(self, name, self.site_of(name))
        return Operation(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Set what the operation gives, or is called with: {self._label}.{name}.output = ...")

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._list()})

    # The whole list.

    def _list(self) -> dict[str, Site]:
        trace = self._trace()
        known_for = None if self._listed_for is None else self._listed_for()
        if self._listed is None or known_for is not trace:
            _set(self, "_listed", self._observed(trace))
            _set(self, "_listed_for", None if trace is None else weakref.ref(trace))
        assert self._listed is not None
        return self._listed

    def _observed(self, trace: Any) -> dict[str, Site]:
        module, tree = self._envoy._module, self._envoy._tree
        call = None
        if trace is None:
            call = tree.example(tree.root)
            if call is None:
                why = "the operations are found by running the model, and there is no input to run it on."
                mend = f"Give it one:\n    with model.trace(inputs):\n        print({self._label})"
                raise SourceError(self._label, why, mend, user_site())
        try:
            if call is None:
                found = trace.operations(module)
            else:
                found = observed_operations(tree.root, call[0], call[1], module)
        except EditError:
            raise
        except Exception as error:
            why = f"a run of a copy of the model, which was to find the operations, stopped with {error!r:.300}."
            mend = "See whether the model runs on this input at all."
            raise SourceError(self._label, why, mend, user_site()) from error
        if found is None:
            raise ModuleNotRunError(self._label, user_site())
        return dict(found)

    def site_of(self, name: str) -> Site:
        """The line that calls the operation ``name``.

        Raises:
            NoSuchOperationError: there is no such operation.
        """
        listed = self._list()
        if name not in listed:
            raise NoSuchOperationError(name, self._label, listed, user_site())
        return listed[name]

    def __iter__(self) -> Iterator[Operation]:
        return iter([Operation(self, name, site) for name, site in self._list().items()])

    def __len__(self) -> int:
        return len(self._list())

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: object) -> bool:
        return name in self._list()

    def __repr__(self) -> str:
        listed = self._list()
        head = f"{self._label}: {len(listed)} operations of {type(self._envoy._module).__name__}"
        wide = max((len(name) for name in listed), default=0)
        far = max((len(site.short) for site in listed.values()), default=0)
        lines = [f"  {name:<{wide}}   {site.short:<{far}}   {site.source}".rstrip() for name, site in listed.items()]
        return "\n".join([head, *lines])
