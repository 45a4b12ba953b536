"""NNsight: wraps any PyTorch module so that its values can be read and set while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from nnsight_core.arguments import apply, unwrap
from nnsight_core.batching import joined
from nnsight_core.call import Call, Result
from nnsight_core.current import open_trace
from nnsight_core.editor import Editor, EditPart, EditSteps
from nnsight_core.edits import Edits
from nnsight_core.envoy import Envoy
from nnsight_core.errors import SessionError
from nnsight_core.input_errors import InputError, MissingInputError
from nnsight_core.options import invoker_options, refuse_options, refuse_unknown, without_old_options
from nnsight_core.passes import Part
from nnsight_core.renames import Rename, check_aliases, plan_renames
from nnsight_core.scan import Scan
from nnsight_core.session import Session
from nnsight_core.steps import Steps
from nnsight_core.tracer import Tracer
from nnsight_core.tree import Names, Tree, annotations_of
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
        rename: new names, which stand beside the old ones: ``{"layer1": "encoder"}`` for every module of that name,
            ``{"transformer.h": "layers"}`` for a path, ``{"layer1": ["encoder", "first"]}`` for several new names.
        aliases: extra names as a plan: for each parent path (``""`` is the root) a mapping from name to full path.

    Raises:
        RenameError: a name to rename fits no module, or a new name is taken.
        OptionError: an option that there is not.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        rename: Rename | None = None,
        aliases: Mapping[str, Names] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown, ("rename", "aliases"))
        super().__init__(module, "", Tree(module, self._planned(module, rename, aliases)))
        self._result = ResultEnvoy(Result(), "result", self._tree)

    def _planned(
        self, module: torch.nn.Module, rename: Rename | None, aliases: Mapping[str, Names] | None
    ) -> Mapping[str, Names]:
        if rename is None and not aliases:
            return {}
        modules = dict(module.named_modules(remove_duplicate=False))

        def hides(path: str, name: str) -> bool:
            envoy: type[Envoy] = Envoy if path else type(self)
            return hasattr(envoy, name) or name in annotations_of(envoy)

        def taken(path: str, name: str) -> bool:
            return hides(path, name) or hasattr(modules[path], name)

        check_aliases(aliases or {}, modules, hides)
        if rename is None:
            return aliases or {}
        return plan_renames(rename, modules, taken, aliases)

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

    def __getstate__(self) -> dict[str, Any]:
        # Whoever copies or writes a model wants it with its weights.
        self._tree.load()
        return self.__dict__

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

    def all(self) -> Any:
        """All generation steps of the trace or edit that is open here, as ``tracer.all()``."""
        return self.iter[:]

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
        if kind is Tracer:
            self._tree.load()
        call = prepare()
        with kind(self, lambda: call, self._combine, self._result, has_input=True, in_steps=call.runs_repeatedly):
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
            inputs: what the model is called with; none if that comes from invokes.
            trace: ``False`` runs the model at once, without a block, and gives its plain output.
            invoker_args: options for turning ``inputs`` into the model's arguments (a language model's tokenizer).
            kwargs: keyword arguments of the model's call. ``scan`` and ``validate`` of older scripts are accepted and
                change nothing.

        Raises:
            MissingInputError: there is nothing to run on.
            OptionError: an option that nobody knows, or that would do nothing.
            RemoteError: ``remote=True``.
        """
        return self._open(Tracer, inputs, trace, invoker_args, kwargs)

    def forward(self, *inputs: Any, invoker_args: Mapping[str, Any] | None = None, **kwargs: Any) -> Tracer:
        """Another spelling of :meth:`trace`, after which the model's output need not have been saved:

        >>> import torch
        >>> from nnsight_core import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> with model.forward() as runner:
        ...     with runner.invoke(torch.ones(1, 4)) as invoker:
        ...         hidden = model[0].output.save()
        >>> torch.equal(runner.output, hidden.value)
        True
        """
        tracer: Tracer = self._open(Tracer, inputs, True, invoker_args, kwargs, keeps_output=True)
        return tracer

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
        scan: Scan = self._open(Scan, inputs, True, invoker_args, kwargs)
        return scan

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
        self,
        kind: type[Tracer],
        inputs: tuple[Any, ...],
        trace: bool,
        invoker_args: Mapping[str, Any] | None,
        given: dict[str, Any],
        keeps_output: bool = False,
    ) -> Any:
        kwargs = without_old_options(unwrap(given), self._module.forward) if given else {}
        options = invoker_options(invoker_args)
        has_input = bool(inputs) or self._is_input(kwargs)
        if has_input or not trace:
            prepare = partial(self._prepare, unwrap(inputs), kwargs, options)
        else:
            prepare = partial(self._prepare_input, options=options, defaults=kwargs)
        if trace:
            return kind(self, prepare, self._combine, self._result, has_input, keeps_output=keeps_output)
        return self._run(prepare)

    def _is_input(self, kwargs: dict[str, Any]) -> bool:
        """Whether these keyword arguments are themselves what the model is to run on, and not options beside it."""
        return bool(kwargs)

    def _prepare_input(
        self,
        *inputs: Any,
        options: dict[str, Any],
        defaults: dict[str, Any],
        invoker_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Call:
        """The call for one input; ``options`` and ``defaults`` were given to the trace, the rest to its invoke."""
        kwargs = without_old_options(unwrap(kwargs), self._module.forward)
        return self._prepare(unwrap(inputs), {**defaults, **kwargs}, {**options, **invoker_options(invoker_args)})

    def _prepare(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Call:
        """The call that the trace is to make; subclasses turn text and the like into arguments here."""
        if options:
            refuse_options(options, "this model takes its inputs as they are")
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
