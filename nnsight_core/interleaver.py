"""Whose turn it is: the clients of a pass and the model's forward pass take turns in one thread.

A client asks for values in order. The body of a live trace is one: it runs where it stands, and the forward pass runs
in a coroutine that hands over to it when a value is there. Tapes are others: they do what they have to do inside the
hook. Early, late and never are decided here and nowhere else.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from nnsight_core import thread_state
from nnsight_core.asked import Asked, Client
from nnsight_core.errors import (
    ModuleNotRunError,
    NNsightError,
    OutOfOrderError,
    StepNotRunError,
    TraceStoppedError,
    WrongThreadError,
)
from nnsight_core.events import Event
from nnsight_core.hooks import Deliver, HookBoard, PlainCalls
from nnsight_core.sites import Site, user_site

#: Called with a module, "input" or "output", and the value.
Observer = Callable[[torch.nn.Module, str, Any], None]


class _Unwind(BaseException):
    """Thrown into a suspended forward pass so that it leaves every block that it is in."""


class ForwardPass(greenlet):  # type: ignore[misc]  # greenlet ships no types for its class
    """The coroutine in which the model runs."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call

    def run(self) -> None:
        """Call the model; in the coroutine when it is switched to, or else where the caller stands."""
        call, self._call = self._call, None
        assert call is not None
        try:
            call()
        except _Unwind:
            return


#: Which modules are entered and left, in order, and what stands in the way of being sure.
Order = tuple[list[tuple[torch.nn.Module, str]], str]


def verdict(order: Order, asked: Asked, last: Asked | None) -> str:
    """Whether the value asked for came ``"before"`` or ``"never"``, or its module was ``"running"`` already when
    ``last`` was there.
    """
    seen, _ = order
    # A call that could have been skipped came when its input did.
    kind = "input" if asked.kind == "skip" else asked.kind
    if (asked.module, kind) not in seen:
        return "never"
    if last is None or kind == "input" or (last.module, last.kind) not in seen:
        return "before"
    here = seen.index((last.module, last.kind))
    runs = (asked.module, "input") in seen[:here] and (asked.module, "output") in seen[here:]
    return "running" if runs else "before"


class Interleaver:
    """The turns of one pass.

    Args:
        forward: runs the model, from the first value asked for on, or at the end. Only a weak reference is kept:
            hooks and suspended frames hold the interleaver, and were it to hold the coroutine too, a trace that is
            abandoned half-way could never be collected. Whoever opened the trace owns the coroutine.
        observe: finds out, once something has gone wrong, in which order the model runs its modules.
        root: the model, if its runs are to be counted: one pass may run it several times.
        board: makes the hooks of the pass.
    """

    event: Event | None = None
    _stopped_at: Site | None = None
    _failure: BaseException | None = None
    _somebody_missed = False

    def __init__(
        self,
        forward: ForwardPass,
        observe: Callable[[], Order],
        root: torch.nn.Module | None = None,
        board: Callable[[Callable[[], Any], Deliver], HookBoard] = HookBoard,
    ) -> None:
        self._forward = weakref.ref(forward)
        self._observe: Callable[[], Order] | None = observe
        self._body = getcurrent()
        self._thread = threading.get_ident()
        self._model_state = self._body_state = thread_state.snapshot()
        forward.gr_context = contextvars.copy_context()
        self.hooks = board(self._forward, self._arrived)
        self.plain_calls = PlainCalls()
        self._waiting: dict[Client, Asked] = {}
        self._order: dict[Client, int] = {}
        self._observers: dict[tuple[torch.nn.Module, str], list[Observer]] = {}
        #: The run of the model that has begun last, counted from 0, -1 before the first; None if they are not counted.
        self.step: int | None = None if root is None else -1
        if root is not None:
            self.hooks.follow(root, self._step_begins)

    # What clients do.

    def wait(self, client: Client, asked: Asked) -> None:
        """Let ``client`` have its turn when what it asks for is there. It may be there now."""
        # Clients have their turn in the order in which they came to the pass, at every value anew.
        self._order.setdefault(client, len(self._order))
        event = self.event
        if event is not None and self.fits(asked, event):
            client.last_read = asked
            client.advance(event)
            return
        self._waiting[client] = asked
        each: Asked | None = asked
        while each is not None:
            self.hooks.watch(each.module, each.kind, each.ancestors)
            each = each.otherwise

    def observe(self, module: torch.nn.Module, kind: str, ancestors: Sequence[torch.nn.Module], note: Observer) -> None:
        """Call ``note(module, kind, value)`` at every call of ``module``, with what the model goes on with."""
        self._observers.setdefault((module, kind), []).append(note)
        self.hooks.watch(module, kind, ancestors)

    def fits(self, asked: Asked, event: Event | None) -> bool:
        """Whether ``event`` is what is asked for."""
        return event is not None and asked.is_answered_by(event.module, event.kind, self.step)

    def give_up(self, client: Client) -> None:
        """``client`` does not wait any more."""
        self._waiting.pop(client, None)

    # The model's side.

    def _arrived(self, module: torch.nn.Module, kind: str, value: Any) -> tuple[Any] | None:
        step = self.step
        clients = [each for each, asked in self._waiting.items() if asked.is_answered_by(module, kind, step)]
        if not clients:
            if self._observers:
                self._observed(module, kind, value)
            return None
        if len(clients) > 1:
            clients.sort(key=self._order.__getitem__)
        first = self._waiting[clients[0]]
        self.event = event = Event(module, kind, first.label, value, first.site)
        del value
        try:
            for client in clients:
                asked = self._waiting.pop(client)
                event.label, event.site = asked.label, asked.site
                client.last_read = asked
                client.advance(event)
        except _Unwind:
            # A stop here does not take back that the value was there.
            self._observed(module, kind, event.value)
            raise
        except Exception as error:
            # The model might catch what a client raises; unwinding cannot be caught by mistake.
            self._failure = error
            raise _Unwind from error
        finally:
            event.current = False
            self.event = None
        if self._observers:
            self._observed(module, kind, event.value)
        changed = (event.value,) if event.replaced else None
        event.value = None
        return changed

    def _observed(self, module: torch.nn.Module, kind: str, value: Any) -> None:
        for note in self._observers.get((module, kind), ()):
            note(module, kind, value)

    def hand_over(self) -> None:
        """The model's side: let the body of the live trace have its turn, and come back when it asks for more."""
        self._model_state = now = thread_state.snapshot()
        guard = None
        if now != self._body_state:
            guard = thread_state.enter(self._body_state, now)
        try:
            self._body.switch()
        finally:
            if guard is not None:
                thread_state.leave(guard, now)

    def _step_begins(self) -> None:
        if getcurrent() is not self._forward():
            return
        # Whoever still waits for something in the run before this one waits in vain.
        assert self.step is not None
        late = [c for c, asked in self._waiting.items() if asked.step is not None and asked.step <= self.step]
        for client in sorted(late, key=self._order.__getitem__):
            try:
                client.missed(self.missing(client, self._waiting.pop(client)))
            except Exception as error:
                self._failure = error
                raise _Unwind from error
        self.step += 1

    # The body's side.

    def give_turn(self, error: BaseException | None = None) -> bool:
        """Let the model run until it hands over or ends; False if it had ended before."""
        forward = self._forward()
        if forward is None or forward.dead:
            return False
        self._body = body = getcurrent()
        forward.parent = body
        self.plain_calls.off()
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
            ended = forward.dead
            if guard is not None or ended:
                thread_state.leave(guard, now)
            if not ended:
                self.plain_calls.on(body)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            try:
                raise failure
            finally:
                # Its traceback holds this frame.
                del failure
        return True

    def check_thread(self) -> None:
        """Raises:
        WrongThreadError: this is not the thread that opened the trace.
        """
        if threading.get_ident() != self._thread:
            raise WrongThreadError()

    @property
    def stopped_at(self) -> Site | None:
        """Where ``stop`` was called, if it was."""
        return self._stopped_at

    def missing(self, client: Client, asked: Asked) -> NNsightError:
        """Why ``asked`` did not come: too late, or never."""
        if self._stopped_at is not None:
            return TraceStoppedError(asked.label, asked.site, self._stopped_at)
        if asked.step is not None and self.step is not None and asked.step > self.step:
            return StepNotRunError(asked.label, asked.site, asked.step, self.step + 1)
        last = client.last_read
        if last is None and asked.step in (0, None) and not self._somebody_missed:
            self._somebody_missed = True
            return ModuleNotRunError(asked.label, asked.site)
        self._somebody_missed = True
        order = ([], "") if self._observe is None else self._observe()
        found = verdict(order, asked, last)
        if found == "running" and last is not None:
            return OutOfOrderError(asked.label, asked.site, last.label, last.site, runs_inside=True)
        if found == "before":
            label, site = ("the end of the forward pass", None) if last is None else (last.label, last.site)
            return OutOfOrderError(asked.label, asked.site, label, site, setting=asked.setting)
        return ModuleNotRunError(asked.label, asked.site, order[1])

    def stop(self) -> None:
        """End the forward pass where it stands; values that have arrived stay."""
        if self._stopped_at is None:
            self._stopped_at = user_site()
        self.unwind()

    def unwind(self) -> None:
        """Let the forward pass leave every block that it is in, and remove the hooks."""
        forward = self._forward()
        self.hooks.clear()
        self._waiting.clear()
        if forward is not None and not forward.dead and bool(forward):
            self.check_thread()
            self.give_turn(_Unwind())
        self.end()

    def finish(self) -> None:
        """Let the forward pass run to its end, and all clients have their turns.

        Raises:
            Exception: whatever the model raises on the way.
            OrderError: a client waits for what did not come.
        """
        if not self._waiting and not self._observers:
            self.hooks.clear()
        try:
            if self._stopped_at is None and not self._run_here():
                self.check_thread()
                self.give_turn()
            if self._waiting:
                for client in sorted(self._waiting, key=self._order.__getitem__):
                    client.missed(self.missing(client, self._waiting.pop(client)))
        finally:
            self.end()

    def _run_here(self) -> bool:
        """Run the model without a coroutine, if nobody asks it for anything; False if it is not to be run so."""
        forward = self._forward()
        if self._waiting or self._observers or forward is None or bool(forward) or forward.dead:
            return False
        if thread_state.snapshot() != self._model_state:
            return False
        forward.run()
        return True

    def end(self) -> None:
        """Remove the hooks, without a further turn for the model."""
        self.plain_calls.off()
        self.hooks.clear()
        self._waiting.clear()
        self._observers.clear()
        self._order.clear()
        # It holds the inputs, and this object may wait a while for the garbage collector.
        self._observe = None
        self.event = None
        # It holds a method of this object, which the collector alone could take apart.
        self.hooks.release()
