"""One ``with`` block: the body runs live, and the model's forward pass runs when it is asked for values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from nnsight_core.current import OpenTrace, closed, opened
from nnsight_core.envoy import Envoy
from nnsight_core.interleaver import Interleaver, OrderWitness
from nnsight_core.order import observed_order
from nnsight_core.proxy import Scope, save


@dataclass(frozen=True)
class Call:
    """A call of the model, ready to be made.

    Args:
        function: what is called, the module itself as a rule.
        args: its arguments.
        kwargs: its keyword arguments.
        padding: how many padding tokens stand left of each prompt, if the input is a batch of prompts.
        prompt_length: the length of the padded prompts.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    padding: Sequence[int] | None = None
    prompt_length: int = 0


class Tracer:
    """What ``with model.trace(...) as tracer`` gives.

    It does nothing until the block is entered, and every way out of the block leaves the model as it was.

    Args:
        model: the root of the model that is traced.
        prepare: turns what the user gave into the call to make; runs when the block is entered.
    """

    def __init__(self, model: Envoy, prepare: Callable[[], Call]) -> None:
        self._model = model
        self._prepare = prepare
        self._thread = 0
        self._trace: OpenTrace | None = None
        self._forward: Any = None

    def __enter__(self) -> Tracer:
        if self._trace is not None:
            raise RuntimeError("This trace is open already. Call .trace(...) again for another one.")
        call = self._prepare()
        scope = Scope()
        scope.inputs = call.kwargs
        scope.padding, scope.prompt_length = call.padding, call.prompt_length
        root = self._model._tree.root
        run = partial(call.function, *call.args, **call.kwargs)
        witness = OrderWitness(partial(observed_order, root, call.function, call.args, call.kwargs))
        interleaver = Interleaver(run, witness)
        self._forward = interleaver.own()
        self._thread = threading.get_ident()
        self._trace = OpenTrace(root, interleaver, scope)
        opened(self._trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        trace = self._trace
        assert trace is not None
        try:
            if kind is None:
                trace.interleaver.finish()
            else:
                trace.interleaver.unwind()
        finally:
            self._close(trace)

    def _close(self, trace: OpenTrace) -> None:
        closed(trace)
        trace.scope.close()
        self._trace = None
        self._forward = None

    def __del__(self) -> None:
        trace = getattr(self, "_trace", None)
        if trace is None:
            return
        if threading.get_ident() == self._thread:
            trace.interleaver.unwind()
        else:
            # Only its own thread may resume the forward pass; the hooks can go from anywhere.
            trace.interleaver.abandon()
        self._close(trace)

    def stop(self) -> None:
        """End the forward pass here. Nothing that comes later in the model is computed; what was read stays."""
        assert self._trace is not None, "stop() belongs inside the trace."
        self._trace.interleaver.stop()

    @property
    def output(self) -> Any:
        """The model's own output, as ``model.output``."""
        return self._model.output

    def save(self, value: Any) -> Any:
        """Keep ``value``, or every proxy inside it, beyond the trace."""
        return save(value)

    def __getattr__(self, name: str) -> Any:
        # ``tracer.layer1`` is another spelling of ``model.layer1``.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)
