"""Two sides of one thread: the body of a live trace and the model's forward pass, which take turns.

Each side keeps its own thread-local state of torch, and the model's side is a coroutine. Who waits for what is not
known here.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from sys import gettrace
from types import FrameType
from typing import NoReturn

from greenlet import getcurrent
from torch.overrides import TorchFunctionMode

from nnsight_core import thread_state
from nnsight_core.errors import WrongThreadError
from nnsight_core.forward_pass import ForwardPass, Unwind
from nnsight_core.hooks import PlainCalls
from nnsight_core.line_tracers import calls_go_on, calls_wait, stack_keeper


class Turns:
    """The turns of one pass.

    Args:
        forward: the call of the model, and its coroutine; whoever made it owns it.
    """

    #: What ended the model's side, to be raised on the body's.
    _failure: BaseException | None = None

    def __init__(self, forward: ForwardPass) -> None:
        coroutine = forward.coroutine
        assert coroutine is not None
        self._forward = weakref.ref(forward)
        #: Gives the coroutine in which the model runs, as long as the pass has it.
        self.coroutine = weakref.ref(coroutine)
        self._body = getcurrent()
        self._thread = threading.get_ident()
        self._model_state = self._body_state = thread_state.snapshot()
        coroutine.gr_context = contextvars.copy_context()
        self._plain_calls = PlainCalls()

    # The model's side.

    def is_models(self) -> bool:
        """Whether it is the model that has its turn."""
        return getcurrent() is self.coroutine()

    def hand_over(self) -> None:
        """Let the body of the live trace have its turn, and come back when it asks for more."""
        self._model_state = now = thread_state.snapshot()
        guard = None
        if now != self._body_state:
            guard = thread_state.enter(self._body_state, now)
        tracer = None if gettrace() is None else stack_keeper()
        if tracer is not None:
            calls_wait(tracer)
        try:
            self._body.switch()
        finally:
            if tracer is not None:
                calls_go_on(tracer)
            if guard is not None:
                thread_state.leave(guard, self._model_state)

    def ended_by(self, error: Exception) -> Unwind:
        """What to raise from ``error`` to end the pass with it: the model might catch the error itself. The body gets
        the error.
        """
        self._failure = error
        return Unwind()

    def fail(self, error: Exception) -> NoReturn:
        """End the pass with ``error``."""
        raise self.ended_by(error) from error

    def failure_beside_model(self) -> BaseException | None:
        """What was to end the pass, where it is not the model that is at work, so that there is nothing to unwind and
        somebody's mistake is just that; else None.
        """
        if self._failure is None or self.is_models():
            return None
        failure, self._failure = self._failure, None
        return failure

    # The body's side.

    @property
    def has_begun(self) -> bool:
        """Whether the model has had a turn, or cannot have one any more."""
        forward = self._forward()
        return forward is None or forward.has_begun

    @property
    def body_records_gradients(self) -> bool:
        """Whether the body had grad mode on when it last gave the turn away."""
        return self._body_state[0]

    def run_here(self) -> bool:
        """Run the model where the body stands; False if it has begun, or if torch's state there is not the model's."""
        forward = self._forward()
        if forward is None or forward.has_begun or thread_state.snapshot() != self._model_state:
            return False
        forward.run()
        return True

    def unwind(self) -> None:
        """Let the forward pass leave every block that it is in."""
        forward = self._forward()
        if forward is not None and forward.is_under_way:
            self.check_thread()
            self.give_turn(Unwind())

    def end(self) -> None:
        """There are no more turns."""
        self._plain_calls.off()
        self._model_state = self._body_state
        forward = self._forward()
        if forward is not None and not forward.is_under_way and self.is_in_its_thread:
            forward.park()

    def give_turn(self, error: BaseException | None = None) -> bool:
        """Let the model run until it hands over or ends; False if it had ended before."""
        forward = self._forward()
        if forward is None or forward.has_ended:
            return False
        self._body = body = getcurrent()
        coroutine = forward.coroutine
        assert coroutine is not None
        coroutine.parent = body
        self._plain_calls.off()
        self._body_state = now = thread_state.snapshot()
        guard = None
        if now != self._model_state:
            guard = thread_state.enter(self._model_state, now)
        try:
            forward.resume(error)
        finally:
            ended = forward.has_ended
            if guard is not None or ended:
                thread_state.leave(guard, now)
            if not ended:
                self._plain_calls.on(body)
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
    def is_in_its_thread(self) -> bool:
        """Whether this is the thread that opened the trace."""
        return threading.get_ident() == self._thread

    # What is needed to look inside a module that is half-way through its call.

    def suspended_at(self) -> FrameType | None:
        """Where the forward pass stands while the body has its turn."""
        coroutine = self.coroutine()
        return None if coroutine is None else coroutine.gr_frame

    def put_under_model(self, mode: TorchFunctionMode) -> None:
        """Let ``mode`` be on when the model has its turn again, beneath the modes that are on already."""
        self._model_state = thread_state.with_function_mode(self._model_state, mode)
