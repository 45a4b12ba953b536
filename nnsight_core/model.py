"""NNsight: wraps any PyTorch module so that its values can be read and set while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from nnsight_core.arguments import unwrap
from nnsight_core.batching import joined
from nnsight_core.envoy import Envoy, Names, Tree
from nnsight_core.errors import InputError, MissingInputError
from nnsight_core.passes import Call, Result
from nnsight_core.tracer import Tracer
from nnsight_core.values import NoTensorError, first_tensor


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
        if trace and not inputs and not kwargs:
            return Tracer(self, self._prepare_invoke, self._combine, self._result, has_input=False)
        prepare = partial(self._prepare, unwrap(inputs), unwrap(kwargs), dict(invoker_args or {}))
        if trace:
            return Tracer(self, prepare, self._combine, self._result, has_input=True)
        call = prepare()
        return call.function(*call.args, **call.kwargs)

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
