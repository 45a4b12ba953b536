"""Whose turn it is: the body of a trace and the model's forward pass take turns in one thread.

The body is ordinary Python that runs where it stands. The forward pass runs in a coroutine; asking for a value
switches to it until the module's hook fires, and the hook switches back with the value in hand. Early, late and never
are decided here and nowhere else.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from nnsight_core import thread_state
from nnsight_core.errors import ModuleNotRunError, NNsightError, OutOfOrderError, TraceStoppedError, WrongThreadError
from nnsight_core.events import Event
from nnsight_core.hooks import HookBoard, PlainCalls
from nnsight_core.sites import Site, user_site


class _Unwind(BaseException):
    """Thrown into a suspended forward pass so that it leaves every block that it is in."""


class ForwardPass(greenlet):  # type: ignore[misc]  # greenlet ships no types for its class
    """The coroutine in which the model runs."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(self._run_call)
        self._call = call
        self.result: Any = None
        self.finished = False

    def _run_call(self) -> None:
        call, self._call = self._call, _nothing
        try:
            self.result = call()
            self.finished = True
        except _Unwind:
            return


def _nothing() -> None:
    return None


class OrderWitness:
    """Finds out, once something has gone wrong, in which order a model runs its modules."""

    def __init__(self, observe: Callable[[], tuple[list[tuple[torch.nn.Module, str]], str]]) -> None:
        self._observe = observe

    def ran_before(self, module: torch.nn.Module, kind: str) -> tuple[bool, str]:
        """Whether the call of ``module`` is part of this pass at all, and what stands in the way of being sure."""
        seen, doubt = self._observe()
        return any(each is module and what == kind for each, what in seen), doubt


class Interleaver:
    """The turns of one trace.

    Args:
        call: runs the model; it is called once, in a coroutine, at the first value asked for or at the end.
        witness: asked for the order of modules when a value did not come.
    """

    def __init__(self, call: Callable[[], Any], witness: OrderWitness) -> None:
        forward = ForwardPass(call)
        # Hooks and suspended frames hold the interleaver; were it to hold the coroutine too, a trace that is
        # abandoned half-way could never be collected. Whoever opened the trace owns the coroutine.
        self.forward_pass: ForwardPass | None = forward
        self._forward = weakref.ref(forward)
        self._witness = witness
        self._body = getcurrent()
        self._thread = threading.get_ident()
        self._model_state = thread_state.snapshot()
        self._body_state = self._model_state
        forward.gr_context = contextvars.copy_context()
        self.hooks = HookBoard(self._is_ours, self._arrived)
        self._plain_calls = PlainCalls(lambda: getcurrent() is self._body)
        self._plain_calls.on()
        self.event: Event | None = None
        self._asked: tuple[str, Site] | None = None
        self._last_read: tuple[str, Site] | None = None
        self._stopped_at: Site | None = None

    def own(self) -> ForwardPass:
        """Hand the coroutine over to its owner."""
        forward, self.forward_pass = self.forward_pass, None
        assert forward is not None
        return forward

    def _is_ours(self) -> bool:
        return getcurrent() is self._forward()

    # The model's side.

    def _arrived(self, module: torch.nn.Module, kind: str, value: Any) -> tuple[Any] | None:
        assert self._asked is not None
        label, site = self._asked
        self.event = event = Event(module, kind, label, value, site)
        del value
        self._model_state = now = thread_state.snapshot()
        guard = thread_state.enter(self._body_state, now) if now != self._body_state else None
        try:
            self._body.switch()
        finally:
            if guard is not None:
                thread_state.leave(guard, now)
            event.current = False
            self.event = None
        changed = (event.value,) if event.replaced else None
        event.value = None
        return changed

    # The body's side.

    def ask(self, module: torch.nn.Module, kind: str, label: str, ancestors: Iterable[torch.nn.Module]) -> Event:
        """Let the model run until ``module`` has the value, and return it.

        Raises:
            OutOfOrderError: the forward pass has gone by it.
            ModuleNotRunError: the module does not run in this pass.
            TraceStoppedError: ``stop`` was called before.
        """
        event = self.event
        if event is not None and event.module is module and event.kind == kind:
            self._last_read = event.label, event.site
            return event
        site = user_site()
        if self._stopped_at is not None:
            raise TraceStoppedError(label, site, self._stopped_at)
        forward = self._forward()
        if forward is None or forward.dead:
            raise self._missing(module, kind, label, site)
        self.hooks.watch(module, kind, ancestors)
        self._asked = label, site
        self._give_turn(forward)
        event = self.event
        if event is None:
            self.hooks.unwatch(module, kind)
            raise self._missing(module, kind, label, site)
        self._last_read = label, site
        return event

    def _give_turn(self, forward: ForwardPass, error: BaseException | None = None) -> None:
        if threading.get_ident() != self._thread:
            raise WrongThreadError()
        forward.parent = self._body = getcurrent()
        self._plain_calls.off()
        self._body_state = now = thread_state.snapshot()
        guard = None
        if now != self._model_state:
            guard = thread_state.enter(self._model_state, now)
        try:
            if error is None:
                forward.switch()
            else:
                forward.throw(error)
        finally:
            if guard is not None or forward.dead:
                thread_state.leave(guard, now)
            if not forward.dead:
                self._plain_calls.on()

    def _missing(self, module: torch.nn.Module, kind: str, label: str, site: Site) -> NNsightError:
        if self._last_read is None:
            return ModuleNotRunError(label, site)
        ran, doubt = self._witness.ran_before(module, kind)
        if ran:
            return OutOfOrderError(label, site, *self._last_read)
        return ModuleNotRunError(label, site, doubt)

    def stop(self) -> None:
        """End the forward pass where it stands; values that have arrived stay."""
        if self._stopped_at is None:
            self._stopped_at = user_site()
        self.unwind()

    def unwind(self) -> None:
        """Let the forward pass leave every block that it is in, and remove the hooks."""
        forward = self._forward()
        self.hooks.clear()
        if forward is not None and not forward.dead and bool(forward):
            self._give_turn(forward, _Unwind())
        self._end()

    def finish(self) -> None:
        """Let the forward pass run to its end.

        Raises:
            Exception: whatever the model raises on the way.
        """
        forward = self._forward()
        self.hooks.clear()
        try:
            if forward is not None and not forward.dead and self._stopped_at is None:
                self._give_turn(forward)
        finally:
            self._end()

    def abandon(self) -> None:
        """Remove the hooks without a further turn for the model, which its own thread will clean up."""
        self._end()

    def _end(self) -> None:
        self._plain_calls.off()
        self.hooks.clear()
        self.event = None
