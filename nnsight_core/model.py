"""NNsight: wraps any PyTorch module so that its values can be read and set while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from nnsight_core.arguments import unwrap
from nnsight_core.batching import joined
from nnsight_core.envoy import Envoy, Names, Tree
from nnsight_core.errors import InputError, MissingInputError, SessionError
from nnsight_core.passes import Call, Result
from nnsight_core.scan import Scan
from nnsight_core.session import Session
from nnsight_core.tracer import Tracer
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
        self._tree.load()
        call = self._prepare(unwrap(inputs), unwrap(kwargs), dict(invoker_args or {}))
        return call.function(*call.args, **call.kwargs)

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
