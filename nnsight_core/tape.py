"""A tape: what was done with values that cannot exist yet, to be done when they arrive.

A tape is a straight-line program in program order. Running it does to the values exactly what the body of a live trace
would have done, by way of the same proxies.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from nnsight_core import thread_state
from nnsight_core.arguments import PENDING, frozen, mapped
from nnsight_core.asked import Asked
from nnsight_core.errors import NNsightError, OrderError, RecordingError
from nnsight_core.events import Event, PastEvent
from nnsight_core.hooked_calls import given_before
from nnsight_core.interleaver import Interleaver
from nnsight_core.old_spellings import explain
from nnsight_core.proxy import Proxy
from nnsight_core.rows import Rows
from nnsight_core.scope import Scope, arrive
from nnsight_core.sites import Site, on_behalf_of, user_site


class Instruction:
    """One step of a tape.

    Args:
        asked: the value to wait for, if the step is to ask the model for one.
        function: what is called otherwise.
        args: its arguments, with proxies for what earlier steps give.
        kwargs: its keyword arguments.
        result: the pending proxy that stands for what the step gives; None in a program, which has no values.
        site: the user's line.
    """

    __slots__ = ("args", "asked", "entered", "function", "kwargs", "result", "site", "state", "versions")

    def __init__(
        self,
        asked: Asked | None,
        function: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Proxy | None,
        site: Site,
    ) -> None:
        self.asked = asked
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.result = result
        self.site = site
        if asked is not None:
            return
        #: torch's state in the body, under which the step is to be taken; and, where the step is to be taken at some
        #: other time, that in which its block was entered: only what the block changes is put on then.
        self.state = thread_state.snapshot()
        self.entered: thread_state.State | None = None
        self.versions = [(each, each._version) for each in _own_tensors((args, kwargs)) if not each.is_inference()]

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the step, with its arguments there.

        Raises:
            RecordingError: a tensor of the script's own has been changed since the step was written.
        """
        assert self.function is not None
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RecordingError("A tensor was changed after it had been used with a pending value.", self.site)
        now = thread_state.snapshot()
        state = self.state if self.entered is None else thread_state.blended(self.state, self.entered, now)
        guard = thread_state.enter(state, now) if now != state else None
        try:
            with on_behalf_of(self.site):
                result = self.function(*args, **kwargs)
        except AttributeError as error:
            explain(error, f"{self.site.short}: {self.site.source}")
            raise
        finally:
            if now != state:
                thread_state.leave(guard, now)
        self.answer(result)

    def answer(self, value: Any) -> None:
        """Let the step have given ``value``."""
        assert self.result is not None
        arrive(self.result, value)

    def again(self, asked: Asked | None, args: Any, kwargs: Any, result: Proxy) -> Instruction:
        """The same step with other values."""
        step = copy.copy(self)
        step.asked, step.args, step.kwargs, step.result = asked, args, kwargs, result
        return step


def _own_tensors(value: Any) -> list[torch.Tensor]:
    """The plain tensors in arguments; parameters change for good reasons, and are the model's."""
    if type(value) is torch.Tensor:
        return [value]
    if type(value) in (tuple, list):
        return [tensor for entry in value for tensor in _own_tensors(entry)]
    return [tensor for entry in value.values() for tensor in _own_tensors(entry)] if type(value) is dict else []


class Recorder(Protocol):
    """Who knows on which tape a step belongs, and what to do when Python looks at a pending value."""

    def tape_for(self, tape: Tape) -> Tape:
        """The tape that is being recorded now; ``tape`` itself if none is."""

    def force(self, tape: Tape) -> None:
        """Make the values of ``tape`` arrive."""


class Tape:
    """A recorded program.

    Args:
        scope: where its values live.
        recorder: asked when a step is to be recorded, or a pending value looked at.
    """

    def __init__(self, scope: Scope, recorder: Recorder) -> None:
        self.scope = scope
        self.instructions: list[Instruction] = []
        # Weak: suspended frames hold the tape, and a trace that is dropped half-way must not be held by them.
        self._recorder = weakref.ref(recorder)

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Proxy:
        """Note a call for later; gives the pending proxy of its result."""
        return self.current._add(None, function, frozen(args), frozen(kwargs))

    @property
    def current(self) -> Tape:
        """The tape that is being recorded now."""
        recorder = self._recorder()
        return self if recorder is None else recorder.tape_for(self)

    def ask(self, asked: Asked) -> Proxy:
        """Note a question to the model for later; gives the pending proxy of the answer."""
        return self._add(asked, None, (), {})

    def _add(
        self,
        asked: Asked | None,
        function: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Proxy:
        result = self.scope.pending(self, is_call=asked is not None and asked.is_call)
        site = asked.site if asked else user_site()
        self.instructions.append(Instruction(asked, function, args, kwargs, result, site))
        return result

    @property
    def questions(self) -> list[Asked]:
        """All that the model is asked for."""
        return [step.asked for step in self.instructions if step.asked is not None]

    def force(self) -> None:
        """Python looks at a pending value: let it arrive."""
        recorder = self._recorder()
        if recorder is not None:
            recorder.force(self)

    def look_at(self, proxy: Proxy) -> Any:
        """The value of ``proxy``, made to arrive."""
        self.force()
        return proxy._value

    def standing(self, proxy: Proxy) -> Proxy:
        """The proxy that ``proxy`` stands for where it is used now."""
        return proxy

    def save(self, proxy: Proxy) -> Proxy:
        """Keep the pending value beyond the end of the trace."""
        object.__setattr__(proxy, "_saved", True)
        return proxy


# The model's coroutine has a context of its own, so that a live body never sees the turn of a tape.
_turn: ContextVar[TapeClient | None] = ContextVar("turn", default=None)


def acting() -> TapeClient | None:
    """The recorded body whose steps are being taken; None while a body runs where it stands."""
    return _turn.get()


@contextmanager
def _turn_of(client: TapeClient) -> Iterator[None]:
    before = _turn.set(client)
    try:
        yield
    finally:
        _turn.reset(before)


class NotThereYet(Exception):
    """A step needs a value that another tape of the pass has not got yet."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self.proxy = proxy


def resolved(value: Any) -> Any:
    """``value`` with pending proxies replaced by what has arrived for them."""
    return mapped(value, _arrived)


def _arrived(value: Any) -> Any:
    if not issubclass(type(value), Proxy):
        return value
    if value._live is not None:
        return value._live
    if value._value is PENDING:
        raise NotThereYet(value)
    # It is there, or was saved in an earlier trace.
    return value


class TapeClient:
    """Runs one tape in a pass: as far as it gets, each time a value arrives.

    Args:
        tape: the program.
        interleaver: the turns of the pass.
        proxy: makes the live proxy of what an event gives, cut to the rows of this tape's input.
        rows: these rows; None if they are the whole batch.
    """

    #: Whether the gradients that it asks for may come with the backward pass of somebody else.
    shares_backward = False

    def __init__(
        self, tape: Tape, interleaver: Interleaver, proxy: Callable[[Event], Proxy], rows: Rows | None = None
    ) -> None:
        self.tape = tape
        self.rows = rows
        self.last_read: Asked | None = None
        self.given: dict[tuple[torch.nn.Module, str], PastEvent] = {}
        self._interleaver = interleaver
        self._proxy = proxy
        self._position = 0
        self._followers: list[TapeClient] = []
        #: It had to wait for a value of another tape, and may have been late for the model because of that.
        self.was_blocked = False
        #: It could not be done in this pass, and is to be done in another.
        self.deferred = False

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self._position == len(self.tape.instructions)

    def run(self, clients: dict[Tape, TapeClient]) -> None:
        """Take steps until one has to wait.

        Args:
            clients: who runs the other tapes of this pass.
        """
        self._clients = clients
        while not self.done and not self.deferred:
            step = self.tape.instructions[self._position]
            if step.asked is not None:
                event = self._here(step.asked)
                if event is None:
                    self._interleaver.wait(self, step.asked)
                    return
                self._answer(step, event)
                continue
            try:
                assert step.function is not None
                args, kwargs = resolved(step.args), resolved(step.kwargs)
            except NotThereYet as missing:
                self._wait_for(missing.proxy)
                return
            try:
                with _turn_of(self):
                    step.take(args, kwargs)
            except OrderError:
                if not self.was_blocked:
                    raise
                # Not the script's fault: it had to wait for another body, and the model went by meanwhile.
                self.deferred = True
                return
            except Exception as error:
                point_at(error, step.site)
                raise
            self._position += 1
            self._wake()

    def _here(self, asked: Asked) -> Event | None:
        """What is asked for, if it is there now."""
        interleaver, event = self._interleaver, self._interleaver.event
        if event is not None and interleaver.fits(asked, event) and (event.rows is None or event.rows == self.rows):
            return event
        return given_before(interleaver, self, asked) if self.given else None

    def keeps(self, module: torch.nn.Module, kind: str) -> bool:
        """Whether a later step asks for it."""
        steps = self.tape.instructions[self._position :]
        return any(each.asked and each.asked.module is module and each.asked.kind == kind for each in steps)

    def play(self, ask: Callable[[Asked], Proxy]) -> None:
        """Take all steps here and now, in a body that goes on live."""
        for step in self.tape.instructions:
            if step.asked is not None:
                step.answer(ask(step.asked))
            else:
                step.take(resolved(step.args), resolved(step.kwargs))
            self._position += 1
            self._wake()

    @property
    def waits_for(self) -> Asked | None:
        """What the next step asks the model for, if it does."""
        return None if self.done else self.tape.instructions[self._position].asked

    def _wait_for(self, proxy: Proxy) -> None:
        self.was_blocked = True
        other = self._clients.get(proxy._tape)
        if other is None or other.deferred:
            self.deferred = True
        else:
            other._followers.append(self)

    def _wake(self) -> None:
        followers, self._followers = self._followers, []
        for follower in followers:
            follower.run(self._clients)

    def _answer(self, step: Instruction, event: Event) -> None:
        assert step.asked is not None
        self.last_read = step.asked
        step.answer(self._proxy(event))
        self._position += 1
        self._wake()

    def advance(self, event: Event) -> None:
        """The value that the next step asks for is there."""
        self._answer(self.tape.instructions[self._position], event)
        self.run(self._clients)

    def missed(self, error: NNsightError) -> None:
        """The value that the next step asks for cannot come in this pass."""
        if not self.was_blocked:
            raise error
        self.deferred = True


def point_at(error: Exception, site: Site) -> None:
    """Say on which line of the user's the step stands: the traceback shows where it was run instead."""
    note = f"This step was written at {site.short}: {site.source}"
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
