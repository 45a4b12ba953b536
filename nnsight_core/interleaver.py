"""Whose turn it is: the clients of a pass and the model's forward pass take turns in one thread.

A client asks for values in order. The body of a live trace is one: it runs where it stands, and the forward pass runs
in a coroutine that hands over to it when a value is there. Tapes are others: they do what they have to do inside the
hook. Early, late and never are decided here and nowhere else.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet

from nnsight_core import thread_state
from nnsight_core.errors import (
    ModuleNotRunError,
    NNsightError,
    OutOfOrderError,
    StepNotRunError,
    TraceStoppedError,
    WrongThreadError,
)
from nnsight_core.events import Event
from nnsight_core.hooks import HookBoard, PlainCalls
from nnsight_core.sites import Site, user_site


class _Unwind(BaseException):
    """Thrown into a suspended forward pass so that it leaves every block that it is in."""


class Asked:
    """A value that a client waits for.

    Args:
        module: whose value.
        kind: ``"input"`` or ``"output"`` of its call.
        label: what the user calls it.
        site: the user's line.
        ancestors: the modules inside whose calls it runs.
        step: the run of the model in which it is wanted, counted from 0; None if it belongs to no run in particular.
        otherwise: something else that would do as well, whichever comes first.
    """

    __slots__ = ("ancestors", "kind", "label", "module", "otherwise", "site", "step")

    def __init__(
        self,
        module: torch.nn.Module,
        kind: str,
        label: str,
        site: Site,
        ancestors: Iterable[torch.nn.Module],
        step: int | None = None,
        otherwise: Asked | None = None,
    ) -> None:
        self.module = module
        self.kind = kind
        self.label = label
        self.site = site
        self.ancestors = ancestors
        self.step = step
        self.otherwise = otherwise


class Client(Protocol):
    """Somebody who asks for values of a pass."""

    #: The last value that it got: its name, and where it was asked for.
    last_read: tuple[str, Site] | None

    def advance(self, event: Event) -> None:
        """``event`` is what the client waits for: do what is to be done with it, and wait for the next, or not."""

    def missed(self, error: NNsightError) -> None:
        """What the client waits for cannot come any more."""


class ForwardPass(greenlet):  # type: ignore[misc]  # greenlet ships no types for its class
    """The coroutine in which the model runs."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(self._run_call)
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None

    def _run_call(self) -> None:
        call, self._call = self._call, _nothing
        try:
            self.result = call()
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
    """The turns of one pass.

    Args:
        call: runs the model; it is called once, in a coroutine, at the first value asked for or at the end.
        witness: asked for the order of modules when a value did not come.
        root: the model, if its runs are to be counted: one pass may run it several times.
    """

    def __init__(self, call: Callable[[], Any], witness: OrderWitness, root: torch.nn.Module | None = None) -> None:
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
        self.plain_calls = PlainCalls(lambda: getcurrent() is self._body)
        self.event: Event | None = None
        self._waiting: dict[Client, Asked] = {}
        self._order: dict[Client, int] = {}
        self._stopped_at: Site | None = None
        self._failure: BaseException | None = None
        #: The run of the model that has begun last, counted from 0; None before the first.
        self.step: int | None = None
        self._counts_steps = root is not None
        if root is not None:
            self.hooks.follow(root, self._step_begins)

    def own(self) -> ForwardPass:
        """Hand the coroutine over to its owner."""
        forward, self.forward_pass = self.forward_pass, None
        assert forward is not None
        return forward

    def _is_ours(self) -> bool:
        return getcurrent() is self._forward()

    # What clients do.

    def wait(self, client: Client, asked: Asked) -> None:
        """Let ``client`` have its turn when what it asks for is there. It may be there now."""
        # Clients have their turn in the order in which they came to the pass, at every value anew.
        self._order.setdefault(client, len(self._order))
        event = self.event
        if event is not None and self.fits(asked, event):
            client.last_read = asked.label, asked.site
            client.advance(event)
            return
        self._waiting[client] = asked
        each: Asked | None = asked
        while each is not None:
            self.hooks.watch(each.module, each.kind, each.ancestors)
            each = each.otherwise

    def fits(self, asked: Asked, event: Event | None) -> bool:
        """Whether ``event`` is what is asked for."""
        return event is not None and self._matches(asked, event.module, event.kind)

    def _matches(self, asked: Asked | None, module: torch.nn.Module, kind: str) -> bool:
        while asked is not None:
            in_time = asked.step is None or not self._counts_steps or asked.step == self.step
            if in_time and asked.module is module and asked.kind == kind:
                return True
            asked = asked.otherwise
        return False

    def give_up(self, client: Client) -> None:
        """``client`` does not wait any more."""
        self._waiting.pop(client, None)

    # The model's side.

    def _arrived(self, module: torch.nn.Module, kind: str, value: Any) -> tuple[Any] | None:
        clients = [client for client, asked in self._waiting.items() if self._matches(asked, module, kind)]
        if not clients:
            return None
        clients.sort(key=self._order.__getitem__)
        first = self._waiting[clients[0]]
        self.event = event = Event(module, kind, first.label, value, first.site)
        del value
        try:
            for client in clients:
                asked = self._waiting.pop(client)
                event.label, event.site = asked.label, asked.site
                client.last_read = asked.label, asked.site
                client.advance(event)
        except Exception as error:
            # The model might catch what a client raises; unwinding cannot be caught by mistake.
            self._failure = error
            raise _Unwind from error
        finally:
            event.current = False
            self.event = None
            wanted = {(each.module, each.kind) for each in self._asked()}
            if (module, kind) not in wanted:
                self.hooks.unwatch(module, kind)
        changed = (event.value,) if event.replaced else None
        event.value = None
        return changed

    def _asked(self) -> Iterator[Asked]:
        for asked in self._waiting.values():
            each: Asked | None = asked
            while each is not None:
                yield each
                each = each.otherwise

    def hand_over(self) -> None:
        """The model's side: let the body of the live trace have its turn, and come back when it asks for more."""
        self._model_state = now = thread_state.snapshot()
        guard = thread_state.enter(self._body_state, now) if now != self._body_state else None
        try:
            self._body.switch()
        finally:
            if guard is not None:
                thread_state.leave(guard, now)

    def _step_begins(self) -> None:
        if not self._is_ours():
            return
        # Whoever still waits for something in the run before this one waits in vain.
        late = [c for c, asked in self._waiting.items() if asked.step is not None and asked.step <= (self.step or 0)]
        if self.step is not None:
            for client in sorted(late, key=self._order.__getitem__):
                try:
                    client.missed(self.missing(client, self._waiting.pop(client)))
                except Exception as error:
                    self._failure = error
                    raise _Unwind from error
        self.step = 0 if self.step is None else self.step + 1

    # The body's side.

    def give_turn(self, error: BaseException | None = None) -> bool:
        """Let the model run until it hands over or ends; False if it had ended before."""
        forward = self._forward()
        if forward is None or forward.dead:
            return False
        if threading.get_ident() != self._thread:
            raise WrongThreadError()
        forward.parent = self._body = getcurrent()
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
            if guard is not None or forward.dead:
                thread_state.leave(guard, now)
            if not forward.dead:
                self.plain_calls.on()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return True

    @property
    def stopped_at(self) -> Site | None:
        """Where ``stop`` was called, if it was."""
        return self._stopped_at

    def missing(self, client: Client, asked: Asked) -> NNsightError:
        """Why ``asked`` did not come: too late, or never."""
        if self._stopped_at is not None:
            return TraceStoppedError(asked.label, asked.site, self._stopped_at)
        if asked.step is not None and self._counts_steps and asked.step > (-1 if self.step is None else self.step):
            return StepNotRunError(asked.label, asked.site, asked.step, 0 if self.step is None else self.step + 1)
        if client.last_read is None and asked.step in (0, None):
            return ModuleNotRunError(asked.label, asked.site)
        ran, doubt = self._witness.ran_before(asked.module, asked.kind)
        if ran and client.last_read is not None:
            return OutOfOrderError(asked.label, asked.site, *client.last_read)
        return ModuleNotRunError(asked.label, asked.site, doubt)

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
            self.give_turn(_Unwind())
        self.end()

    def finish(self) -> None:
        """Let the forward pass run to its end, and all clients have their turns.

        Raises:
            Exception: whatever the model raises on the way.
            OrderError: a client waits for what did not come.
        """
        if not self._waiting:
            self.hooks.clear()
        try:
            if self._stopped_at is None:
                self.give_turn()
            for client in sorted(self._waiting, key=self._order.__getitem__):
                client.missed(self.missing(client, self._waiting.pop(client)))
        finally:
            self.end()

    def end(self) -> None:
        """Remove the hooks, without a further turn for the model."""
        self.plain_calls.off()
        self.hooks.clear()
        self._waiting.clear()
        self.event = None


class LiveClient:
    """The body of a trace, which runs where it stands."""

    def __init__(self, interleaver: Interleaver) -> None:
        self._interleaver = interleaver
        self.last_read: tuple[str, Site] | None = None
        self._error: NNsightError | None = None

    def ask(self, asked: Asked) -> Event:
        """Let the model run until it has the value, and return it.

        Raises:
            OutOfOrderError: the forward pass has gone by it.
            ModuleNotRunError: the module does not run in this pass.
            StepNotRunError: the model does not run so often.
            TraceStoppedError: ``stop`` was called before.
        """
        interleaver = self._interleaver
        event = interleaver.event
        if event is None or not interleaver.fits(asked, event):
            if interleaver.stopped_at is not None:
                raise interleaver.missing(self, asked)
            interleaver.wait(self, asked)
            interleaver.give_turn()
            error, self._error = self._error, None
            if error is not None:
                raise error
            event = interleaver.event
            if event is None or not interleaver.fits(asked, event):
                interleaver.give_up(self)
                raise interleaver.missing(self, asked)
        self.last_read = asked.label, asked.site
        return event

    def advance(self, event: Event) -> None:
        """The model's side: the value is there."""
        self._interleaver.hand_over()

    def missed(self, error: NNsightError) -> None:
        """The model's side: the value cannot come any more."""
        self._error = error
        self._interleaver.hand_over()
