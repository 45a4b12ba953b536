"""The block of one input of several."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from nnsight_core.call import Call
from nnsight_core.values import first_argument


class Opener(Protocol):
    """The trace that an invoke belongs to."""

    def _enter_invoke(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None: ...

    def _exit_invoke(self, failed: bool) -> None: ...

    def next(self, increment: int = 1) -> Any:
        """From now on, values are those of a later generation step."""


class Invoker:
    """What ``with tracer.invoke(...) as invoker`` gives.

    Args:
        tracer: the trace.
        inputs: what the model is to run on.
        kwargs: keyword arguments of the model's call, or options for reading text.
        around: the call of the trace, if that has an input already: the block then is a part of its body.
    """

    def __init__(
        self, tracer: Opener, inputs: tuple[Any, ...], kwargs: dict[str, Any], around: Call | None = None
    ) -> None:
        self._tracer = tracer
        self._inputs = inputs
        self._kwargs = kwargs
        self._around = around
        self._call = around

    def __enter__(self) -> Invoker:
        if self._around is None:
            self._call = self._tracer._enter_invoke(self._inputs, self._kwargs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._around is None:
            self._tracer._exit_invoke(failed=kind is not None)

    @property
    def inputs(self) -> tuple[Any, dict[str, Any]]:
        """This input as the model is called with it, ``(args, kwargs)``; a language model's batch is an argument:
        ``invoker.inputs[0][0]["input_ids"]``, or shorter ``invoker.inputs[0]["input_ids"]``.
        """
        if self._call is None:
            return Arguments(), {}
        if self._call.args:
            return Arguments(self._call.args), self._call.kwargs
        return Arguments([self._call.kwargs]), {}

    @property
    def input(self) -> Any:
        """The first argument of :attr:`inputs`: a tensor, or a language model's batch, a dict."""
        return first_argument(self.inputs) if self._call is not None else None

    def next(self, increment: int = 1) -> Any:
        """From now on, values are those of the next generation step."""
        return self._tracer.next(increment)


class Arguments(tuple[Any, ...]):
    """Positional arguments; a name looks into the first of them, a language model's batch."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and self and isinstance(self[0], Mapping):
            return self[0][key]
        return super().__getitem__(key)
