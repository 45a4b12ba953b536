"""NNsight: wraps any PyTorch module so that its values can be read and set while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from nnsight_core.arguments import apply, unwrap
from nnsight_core.batching import joined
from nnsight_core.current import open_trace
from nnsight_core.editor import Editor, EditPart, EditSteps
from nnsight_core.edits import Edits
from nnsight_core.envoy import Envoy
from nnsight_core.errors import InputError, MissingInputError, SessionError
from nnsight_core.passes import Call, Part, Result
from nnsight_core.scan import Scan
from nnsight_core.session import Session
from nnsight_core.steps import Steps
from nnsight_core.tracer import Tracer
from nnsight_core.tree import Names, Tree
from nnsight_core.values import NoTensorError, first_tensor

T = TypeVar("T", bound=Tracer)


class ResultEnvoy(Envoy):
    """What a whole pass gives: ``.output`` is a model's own output, or the tokens that were generated."""

    _is_result = True


class NNsight(Envoy):
    """Wrap a PyTorch module.

    >>> import torch
    >>> from nnsight_core import NNsight
    >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
    >>> with model.trace(torch.ones(1, 4)):
    ...     hidden = model[0].output.save()
    ...     model[1].output[:] = 0
    ...     result = model.output.save()
    >>> hidden.shape, result.sum().item()
    (torch.Size([1, 3]), 0.0)

    Args:
        module: the model.
        aliases: extra names: for each parent path (``""`` is the root) a mapping from name to full path.
    """

    def __init__(self, module: torch.nn.Module, aliases: Mapping[str, Names] | None = None) -> None:
        super().__init__(module, "", Tree(module, aliases))
        self._result = ResultEnvoy(Result(), "result", self._tree)

    def edit(self, name: str = "", *, inplace: bool = False, return_context: bool = False) -> Editor:
        """Open an edit: what is written in its block is done in every later trace of the edited model.

        The edited model is a copy that shares all modules with this one, and this one stays as it is; unless it is to
        be changed itself, ``inplace=True``. Edits are done in their order, ahead of the bodies of traces, once for the
        whole batch and in every run of the model. They hold by way of the wrapper alone: its module stays plain.

        >>> import torch
        >>> from nnsight_core import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
        >>> with model.edit() as edited:
        ...     edited[0].output[:] = 0
        ...     seen = edited[1].output.save()
        >>> with edited.trace(torch.ones(1, 4)):
        ...     result = edited.output.save()
        >>> torch.equal(result, model[1].bias[None]), torch.equal(seen, result)
        (True, True)

        Args:
            name: what to call it in lists.
            inplace: change this model, and not a copy.
            return_context: let the block have the editor: alone in place, else with the edited model.

        Raises:
            EditError: the edited model would be lost.
        """
        if not isinstance(name, str):
            raise TypeError(f"edit() takes a name, not {type(name).__name__}: it runs nothing, so it needs no input.")
        return Editor(self._itself if inplace else self._twin, name, inplace, return_context)

    def _itself(self) -> NNsight:
        return self

    def _twin(self) -> NNsight:
        """Another wrapper of the same modules; nothing is loaded or checked anew."""
        twin = object.__new__(type(self))
        tree = self._tree.twin()
        result = ResultEnvoy(self._result._module, "result", tree)
        twin.__dict__.update(self.__dict__, _tree=tree, _children={}, _result=result)
        if tree.unloaded is not None:
            tree.envoys.add(twin)
        return twin

    @property
    def edits(self) -> Edits:
        """The edits of this model, in order; their text shows the lines that they were written in."""
        return self._tree.edits

    def clear_edits(self) -> None:
        """Take back all edits of this model."""
        self._tree.edits = Edits()

    @property
    def iter(self) -> Any:
        """The generation steps of the trace or edit that is open here, as ``tracer.iter``."""
        here = self._trace("model.iter")
        if isinstance(here, EditPart):
            return EditSteps(here)
        assert isinstance(here, Part)
        return Steps(here, self._result, self._module)

    def all(self) -> Iterator[Any]:
        """All generation steps of the trace or edit that is open here, as ``tracer.all()``."""
        return iter(self.iter[:])

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Run the model, its edits included."""
        if hook or not self._tree.edits:
            return super().__call__(*args, hook=hook, **kwargs)
        here = open_trace(self._tree.root)
        is_dry = isinstance(here, Part) and here.twin is not None
        return apply(partial(self._run_edited, Scan if is_dry else Tracer), *args, **kwargs)

    def _run_edited(self, kind: type[Tracer], *args: Any, **kwargs: Any) -> Any:
        return self._run(lambda: Call(self._module, args, kwargs), kind)

    def _run(self, prepare: Callable[[], Call], kind: type[Tracer] = Tracer) -> Any:
        """Make the call plainly, the edits included."""
        if not self._tree.edits:
            self._tree.load()
            call = prepare()
            return call.function(*call.args, **call.kwargs)
        with kind(self, prepare, self._combine, self._result, has_input=True):
            return self._result.output.value

    def trace(
        self,
        *inputs: Any,
        trace: bool = True,
        invoker_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a trace: inside the ``with`` block the model's values can be asked for and set.

        Args:
            inputs: what the model is called with.
            trace: ``False`` runs the model at once, without a block, and gives its plain output.
            invoker_args: options for turning ``inputs`` into the model's arguments (a language model's tokenizer).
            kwargs: keyword arguments of the model's call.

        Raises:
            MissingInputError: there is nothing to run on.
        """
        if trace:
            return self._open(Tracer, inputs, kwargs, invoker_args)
        return self._run(partial(self._prepare, unwrap(inputs), unwrap(kwargs), dict(invoker_args or {})))

    def scan(self, *inputs: Any, invoker_args: Mapping[str, Any] | None = None, **kwargs: Any) -> Scan:
        """Open a trace for shapes, dtypes and devices alone: nothing is computed, and no weights are needed.

        Values are asked for and set as in a trace, and modules can be called; nothing of the model itself is touched.
        What the block gives are fake tensors: they have a shape, and looking at their numbers is an error.

        >>> import torch
        >>> from nnsight_core import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
        >>> with model.scan(torch.ones(5, 4)):
        ...     shape = model[0].output.shape
        >>> shape
        torch.Size([5, 3])

        Args:
            inputs: what the model would be called with, as for :meth:`trace`.
            invoker_args: options for turning ``inputs`` into the model's arguments.
            kwargs: keyword arguments of the model's call.

        Raises:
            ScanError: the block or the model asks for numbers.
        """
        return self._open(Scan, inputs, kwargs, invoker_args)

    def session(self, remote: bool = False) -> Session:
        """Open a session around traces that belong together: values of one may be used in the next without saving.

        >>> import torch
        >>> from nnsight_core import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
        >>> with model.session():
        ...     with model.trace(torch.ones(1, 4)):
        ...         hidden = model[0].output
        ...     with model.trace(torch.zeros(1, 4)):
        ...         model[0].output = hidden
        ...         result = model.output.save()

        What was not saved is let go when the session ends. Traces of other models inside belong to it as well.

        Args:
            remote: not available.

        Raises:
            SessionError: a session is open here already.
        """
        if remote:
            raise SessionError("session(remote=True): running on a remote server is not available.")
        return Session()

    def _open(
        self, kind: type[T], inputs: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any] | None
    ) -> T:
        if not inputs and not kwargs:
            return kind(self, self._prepare_invoke, self._combine, self._result, has_input=False)
        prepare = partial(self._prepare, unwrap(inputs), unwrap(kwargs), dict(options or {}))
        return kind(self, prepare, self._combine, self._result, has_input=True)

    def _prepare_invoke(self, *inputs: Any, invoker_args: Mapping[str, Any] | None = None, **kwargs: Any) -> Call:
        return self._prepare(unwrap(inputs), unwrap(kwargs), dict(invoker_args or {}))

    def _prepare(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Call:
        """The call that the trace is to make; subclasses turn text and the like into arguments here."""
        if not inputs and not kwargs:
            raise MissingInputError()
        return Call(self._module, inputs, kwargs)

    def _combine(self, calls: list[Call]) -> tuple[Call, list[int]]:
        """One call of several, their tensors one below the other, and how many rows each has."""
        forms = [(call.args, call.kwargs) for call in calls]
        try:
            sizes = [_rows_in(form) for form in forms[:1]]
            together = joined(forms)
            sizes += [_rows_in(form) for form in forms[1:]]
        except NoTensorError:
            what = "The inputs of invokes are put together along the first axis of a tensor; these hold none."
            raise InputError(what) from None
        return Call(calls[0].function, *together), sizes


def _rows_in(value: Any) -> int:
    tensor = first_tensor(value)
    return int(tensor.shape[0]) if tensor.ndim else 1
