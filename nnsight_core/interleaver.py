"""Whose turn it is: the clients of a pass and the model's forward pass take turns in one thread.

A client asks for values in order. The body of a live trace is one: it runs where it stands, and the forward pass runs
in a coroutine that hands over to it when a value is there. Tapes are others: they do what they have to do inside the
hook. Early, late and never are decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent

from nnsight_core.asked import Asked, Client
from nnsight_core.counting import CallCounter
from nnsight_core.errors import (
    CallsNotCountedError,
    ModuleNotRunError,
    NNsightError,
    OutOfOrderError,
    RecomputedError,
    SourceError,
    StepNotRunError,
    TraceStoppedError,
)
from nnsight_core.events import Event
from nnsight_core.forward_pass import ForwardPass, Unwind
from nnsight_core.handed_out import HandedOut
from nnsight_core.hooks import HookBoard
from nnsight_core.kernels import Shut
from nnsight_core.kinds import Derived, Whole
from nnsight_core.observers import Note, Observers
from nnsight_core.operations import Memory, is_operation, shares_memory
from nnsight_core.rows import Rows
from nnsight_core.sites import Site, is_run_again_for_gradients, user_site
from nnsight_core.taps import Deliver
from nnsight_core.turns import Turns
from nnsight_core.values import Pair, map_tensors
from nnsight_core.witness import Order, missing_operation, too_late_or_never


class Interleaver:
    """Who asks for what in one pass, and what comes.

    Args:
        forward: runs the model, from the first value asked for on, or at the end. Only a weak reference is kept:
            hooks and suspended frames hold the interleaver, and were it to hold the coroutine too, a trace that is
            abandoned half-way could never be collected. Whoever opened the trace owns the coroutine.
        observe: finds out, once something has gone wrong, in which order the model runs its modules.
        root: the model, if its runs are to be counted: one pass may run it several times.
        board: makes the hooks of the pass.
    """

    event: Event | None = None
    #: Where ``stop`` was called, if it was.
    stopped_at: Site | None = None
    _somebody_missed = False
    #: What runs in the coroutine now is a client's doing and not the model's.
    _is_aside = False
    #: How many modules clients have run as the model would, how many of them are under way, whose rows they are given,
    #: and everything inside them.
    _calls = 0
    _calls_under_way = 0
    _rows: Rows | None = None
    _called: frozenset[torch.nn.Module] = frozenset()

    def __init__(
        self,
        forward: ForwardPass,
        observe: Callable[[torch.nn.Module | None], Order],
        root: torch.nn.Module | None = None,
        board: Callable[[Callable[[], Any], Deliver], HookBoard] = HookBoard,
    ) -> None:
        self.turns = Turns(forward)
        self._observe: Callable[[torch.nn.Module | None], Order] | None = observe
        self.hooks = board(self.turns.coroutine, self._arrived)
        self._waiting: dict[Client, Asked] = {}
        self._order: dict[Client, int] = {}
        self._observers = Observers()
        #: Called with the number of each run of the model but the first, when it begins.
        self.at_steps: list[Callable[[int], None]] = []
        #: Called with the number and the arguments of each run, ahead of all who ask for values of it.
        self.at_runs: list[Callable[[int, tuple[Any, ...], dict[str, Any]], None]] = []
        #: The run of the model that has begun last, counted from 0, -1 before the first; None if they are not counted.
        self.step: int | None = None if root is None else -1
        self._handed_out = HandedOut()
        if root is not None:
            self.hooks.follow(root, self._step_begins, self._step_ends)

    # What clients do.

    def wait(self, client: Client, asked: Asked) -> None:
        """Let ``client`` have its turn when what it asks for is there. It may be there now."""
        # Clients have their turn in the order in which they came to the pass, at every value anew.
        self.enrol(client)
        event = self.event
        if event is not None and self.fits(asked, event) and self._is_seen_by(client.rows):
            client.last_read = asked
            client.advance(event)
        else:
            self.expect(client, asked)

    def expect(self, client: Client, asked: Asked) -> None:
        """Let ``client`` have its turn when what it asks for comes; it is not there now."""
        self.enrol(client)
        self._waiting[client] = asked
        each: Asked | None = asked
        while each is not None:
            self.hooks.watch(each.module, each.kind, each.ancestors)
            each = each.otherwise

    def enrol(self, client: Client) -> None:
        """Give ``client`` its place in the order of turns, ahead of all who come later."""
        self._order.setdefault(client, len(self._order))

    def observe(
        self,
        module: torch.nn.Module,
        kind: str,
        ancestors: Sequence[torch.nn.Module],
        note: Note,
        rows: Rows | None = None,
    ) -> None:
        """Call ``note(module, kind, value)`` at every call, with ``rows`` of what the model goes on with."""
        self._observers.add(module, kind, note, rows)
        self.hooks.watch(module, kind, ancestors)

    def ignore(self, module: torch.nn.Module, kind: str, note: Note) -> None:
        """Tell ``note`` no more."""
        self._observers.remove(module, kind, note)

    @contextmanager
    def calling(self, module: torch.nn.Module, rows: Rows | None) -> Iterator[None]:
        """While it lasts, what is called here counts as called by the model, on ``rows`` of the batch."""
        self._calls += 1
        self._called |= frozenset(module.modules())
        before = self._is_aside, self._rows, self._calls_under_way, self.hooks.coroutine
        self._is_aside, self._rows, self._calls_under_way = False, rows, self._calls_under_way + 1
        here = getcurrent()
        self.hooks.coroutine = lambda: here
        try:
            yield
        except Unwind:
            failure = self.turns.failure_beside_model()
            if failure is None:
                raise
            raise failure from None
        finally:
            self._is_aside, self._rows, self._calls_under_way, self.hooks.coroutine = before

    def fits(self, asked: Asked, event: Event | None) -> bool:
        """Whether ``event`` is what is asked for."""
        is_here = event is not None and asked.is_answered_by(event.module, event.kind, self.run_of_now)
        return is_here and (asked.call is None or not self._calls_under_way)

    @property
    def run_of_now(self) -> int | None:
        """The run of the model that values belong to; what runs before the first, an encoder, belongs to it."""
        return 0 if self.step == -1 else self.step

    def count(self, module: torch.nn.Module, counter: CallCounter, asked: Asked) -> None:
        """Let ``counter`` count the calls of ``module``.

        Raises:
            CallsNotCountedError: the pass is under way, and ``module`` may have been called already.
        """
        if self.turns.has_begun:
            raise CallsNotCountedError(asked.label, asked.site)
        self.count_from_start(module, counter)

    def count_from_start(self, module: torch.nn.Module, counter: CallCounter) -> None:
        """Let ``counter`` count the calls of ``module`` in a pass that has yet to begin."""
        self.hooks.count(module, counter, self._is_model_at_work)

    def _is_model_at_work(self) -> bool:
        """Whether what is called now is called by the model itself."""
        return not (self._is_aside or self._calls_under_way) and self.turns.is_models()

    def give_up(self, client: Client) -> None:
        """``client`` does not wait any more."""
        self._waiting.pop(client, None)

    # The model's side.

    def _arrived(
        self,
        module: torch.nn.Module,
        kind: str,
        value: Any,
        memory: Memory | None = None,
        call: Pair | None = None,
    ) -> tuple[Any] | None:
        if self._is_aside:
            return None
        if isinstance(kind, Derived):
            return self._derive(module, kind, value)
        return self._hand_round(module, kind, value, memory, call)

    def _derive(self, module: torch.nn.Module, kind: Derived, whole: Whole) -> tuple[Any] | None:
        """Hand round what ``kind`` works out of a call and its result; gives what the result is to be instead."""
        if not self._those_waiting(module, kind):
            return None
        self._is_aside = True
        try:
            before = kind.get(whole)
        except Exception as error:
            raise self.turns.ended_by(error) from error
        finally:
            self._is_aside = False
        # An alias: the way from the call to the loss then goes by what clients have in hand, and does so once.
        given = before.view_as(before)
        (after,) = self._hand_round(module, kind, given, None, None) or (given,)
        return None if after is given and not before.requires_grad else (kind.put(whole, before, after),)

    def _hand_round(
        self, module: torch.nn.Module, kind: str, value: Any, memory: Memory | None, call: Pair | None
    ) -> tuple[Any] | None:
        clients = self._those_waiting(module, kind)
        if not clients:
            if self._observers.notes:
                self._observers.tell(module, kind, value, self._rows)
            return None
        first = self._waiting[clients[0]]
        outer, calls = self.event, self._calls
        self.event = event = Event(module, kind, first.label, value, first.site, self._rows, memory, call)
        if first.written_over:
            # What others hold too has to stay in its memory: then clients get copies, and else the model does.
            event.is_copied = not (kind == "output" or memory == "own") or shares_memory(value, call)
        self._is_aside = True
        del value, call
        try:
            while clients:
                client = clients.pop(0)
                asked = self._waiting.pop(client)
                event.label, event.site = asked.label, asked.site
                if isinstance(event.value, Shut):
                    raise SourceError(asked.label, event.value.why, "", asked.site)
                client.last_read = asked
                client.advance(event)
                if self._calls != calls:
                    # Inside a module that this client has run, others may have come to this event.
                    clients, calls = self._those_waiting(module, kind), self._calls
        except Unwind:
            # A stop here does not take back that the value was there.
            self._observers.tell(module, kind, event.value, self._rows)
            raise
        except Exception as error:
            raise self.turns.ended_by(error) from error
        finally:
            event.current = False
            event.call = None
            self.event, self._is_aside = outer, False
        wants_gradients = event.replaced and (torch.is_grad_enabled() or self.turns.body_records_gradients)
        if wants_gradients and is_run_again_for_gradients():
            self.turns.fail(RecomputedError(event.label, event.site))
        if self._observers.notes:
            self._observers.tell(module, kind, event.value, self._rows)
        changed = (event.value,) if event.replaced else None
        if self.step is not None:
            self._handed_out.add(event.value)
        if first.written_over and (event.replaced or not event.is_copied):
            # What the clients hold stays as it was when they got it.
            changed = (map_tensors(torch.clone, event.value),)
        event.value = None
        return changed

    def _those_waiting(self, module: torch.nn.Module, kind: str) -> list[Client]:
        """Who waits for this value, in the order of turns."""
        step = 0 if self.step == -1 else self.step
        clients = [each for each, asked in self._waiting.items() if asked.is_answered_by(module, kind, step)]
        if self._calls_under_way:
            # The calls that have numbers are the model's own.
            clients = [each for each in clients if self._waiting[each].call is None and self._is_seen_by(each.rows)]
        if len(clients) > 1:
            clients.sort(key=self._order.__getitem__)
        return clients

    def _is_seen_by(self, rows: Rows | None) -> bool:
        """Whether what runs now is the business of whoever has ``rows`` of the batch."""
        return self._rows is None or rows is None or rows == self._rows

    def _step_begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_model_at_work():
            return
        # Whoever still waits for something in the run before this one waits in vain.
        assert self.step is not None
        late = [c for c, asked in self._waiting.items() if asked.step is not None and asked.step <= self.step]
        try:
            for client in sorted(late, key=self._order.__getitem__):
                client.missed(self.missing(client, self._waiting.pop(client)))
            self.step += 1
            self.hooks.reset_counters()
            self._handed_out.clear()
            for note in self.at_runs:
                note(self.step, args, kwargs)
            # Who does something in each run has asked for the first already.
            for begin in self.at_steps if self.step else ():
                begin(self.step)
        except Exception as error:
            raise self.turns.ended_by(error) from error

    def _step_ends(self, result: Any) -> Any:
        """What whoever runs the model again and again is to get of ``result``, to do with as it likes."""
        return self._handed_out.apart(result) if self._is_model_at_work() else None

    def missing(self, client: Client, asked: Asked) -> NNsightError:
        """Why ``asked`` did not come: too late, or never."""
        if self.stopped_at is not None:
            return TraceStoppedError(asked.label, asked.site, self.stopped_at)
        if asked.step is not None and self.step is not None and asked.step > self.step:
            return StepNotRunError(asked.label, asked.site, asked.step, self.step + 1)
        last = client.last_read
        if asked.module in self._called and last is not None:
            self._somebody_missed = True
            return OutOfOrderError(asked.label, asked.site, last.label, last.site, setting=asked.setting)
        if is_operation(asked.kind):
            return missing_operation(asked, last, self.hooks.operations_of(asked.module), self.order)
        if asked.call is not None and asked.call[1].now < asked.call[0]:
            times = asked.call[1].now + 1
            return ModuleNotRunError(asked.label, asked.site, hint=f"It was called {times} times, counted from 0.")
        is_first, self._somebody_missed = not self._somebody_missed, True
        if last is None and asked.call is None and asked.step in (0, None) and is_first:
            return ModuleNotRunError(asked.label, asked.site)
        return too_late_or_never(asked, last, self.order())

    def order(self, inside: torch.nn.Module | None = None) -> Order:
        """The order of modules, and of the operations in ``inside``, found by a dry run; and a doubt, if any."""
        return ([], "") if self._observe is None else self._observe(inside)

    def stop(self) -> None:
        """End the forward pass where it stands; values that have arrived stay."""
        if self.stopped_at is None:
            self.stopped_at = user_site()
        self.unwind()

    def unwind(self) -> None:
        """Let the forward pass leave every block that it is in, and remove the hooks."""
        self.hooks.clear()
        self._waiting.clear()
        self.turns.unwind()
        self.end()

    def finish(self, counts: bool = False) -> None:
        """Let the forward pass run to its end, and all clients have their turns.

        Args:
            counts: somebody wants to know how often the model ran.

        Raises:
            Exception: whatever the model raises on the way.
            OrderError: a client waits for what did not come.
        """
        if not self._waiting and not self._observers and not counts and not self.hooks.are_carrying:
            self.hooks.clear()
        try:
            is_asked = counts or self._waiting or self._observers
            if self.stopped_at is None and (is_asked or not self.turns.run_here()):
                self.turns.check_thread()
                self.turns.give_turn()
            if self._waiting:
                for client in sorted(self._waiting, key=self._order.__getitem__):
                    client.missed(self.missing(client, self._waiting.pop(client)))
        finally:
            self.end()

    def end(self) -> None:
        """Remove the hooks, without a further turn for the model."""
        self.turns.end()
        self.hooks.clear()
        if self._order or self._observers:
            self._waiting.clear()
            self._observers.clear()
            self._order.clear()
        self.at_steps.clear()
        self.at_runs.clear()
        self._called = frozenset()
        # It holds the inputs, and this object may wait a while for the garbage collector.
        self._observe = None
        self.event = None
        # It holds a method of this object, which the collector alone could take apart.
        self.hooks.release()
