"""The body of a live trace as a client of the interleaver."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnsight_core.asked import Asked
from nnsight_core.counting import CallCounter
from nnsight_core.errors import NNsightError
from nnsight_core.events import Event, PastEvent
from nnsight_core.hooked_calls import given_before
from nnsight_core.interleaver import Interleaver
from nnsight_core.joining import join_running_call
from nnsight_core.operations import is_operation
from nnsight_core.rows import Rows

#: What a module's own call takes and gives.
_OF_CALLS = ("output", "input")


class LiveClient:
    """The body of a trace, which runs where it stands."""

    #: It sees the whole batch.
    rows: Rows | None = None

    def __init__(self, interleaver: Interleaver) -> None:
        self._interleaver = interleaver
        self.last_read: Asked | None = None
        self.given: dict[tuple[torch.nn.Module, str], PastEvent] = {}
        self._answer: Event | NNsightError | None = None

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
        may_fit = event is not None and (event.module is asked.module or asked.otherwise is not None)
        if event is not None and may_fit and interleaver.fits(asked, event):
            self.last_read = asked
            return event
        if self.given and (past := given_before(interleaver, self, asked)) is not None:
            return past
        if interleaver.stopped_at is not None:
            raise interleaver.missing(self, asked)
        interleaver.turns.check_thread()
        if asked.kind not in _OF_CALLS and is_operation(asked.kind):
            join_running_call(interleaver, asked, self.last_read)
        interleaver.expect(self, asked)
        interleaver.turns.give_turn()
        answer, self._answer = self._answer, None
        if answer is None:
            interleaver.give_up(self)
            raise interleaver.missing(self, asked)
        if isinstance(answer, NNsightError):
            raise answer
        return answer

    def keeps(self, module: torch.nn.Module, kind: str) -> bool:
        """Whether it may yet ask for what a call gives: nobody knows what a body does next."""
        return True

    def announce(self, module: torch.nn.Module, ancestors: Sequence[torch.nn.Module]) -> None:
        """Operations inside ``module`` are going to be asked for."""
        self._interleaver.hooks.announce(module, ancestors)

    def count(self, counter: CallCounter, asked: Asked) -> None:
        """Let ``counter`` count the calls of the module that is ``asked`` for.

        Raises:
            CallsNotCountedError: the pass is under way, and the module may have been called already.
        """
        self._interleaver.count(asked.module, counter, asked)

    def is_in_step(self, step: int) -> bool:
        """Whether the model is in its run number ``step``, or beyond it."""
        now = self._interleaver.step
        return now is not None and now >= step

    @property
    def is_stopped(self) -> bool:
        """Whether the pass was stopped, so that nothing more comes."""
        return self._interleaver.stopped_at is not None

    def advance(self, event: Event) -> None:
        """The model's side: the value is there."""
        self._answer = event
        self._interleaver.turns.hand_over()

    def missed(self, error: NNsightError) -> None:
        """The model's side: the value cannot come any more."""
        self._answer = error
        self._interleaver.turns.hand_over()
