"""Two sides of one thread: the body of a live trace and the model's forward pass, which take turns.

Each side keeps its own thread-local state of torch, and the model's side is a coroutine.
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
        forward: the coroutine in which the model runs; whoever made it owns it.
    """

    #: What ended the model's side, to be raised on the body's.
    _failure: BaseException | None = None

    def __init__(self, forward: ForwardPass) -> None:
        self._forward = weakref.ref(forward)
        self._body = getcurrent()
        self._thread = threading.get_ident()
        self._model_state = self._body_state = thread_state.snapshot()
        forward.gr_context = contextvars.copy_context()
        self.plain_calls = PlainCalls()

    def hand_over(self) -> None:
        """The model's side: let the body of the live trace have its turn, and come back when it asks for more."""
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
    def is_in_its_thread(self) -> bool:
        """Whether this is the thread that opened the trace."""
        return threading.get_ident() == self._thread

    # What is needed to look inside a module that is half-way through its call.

    def suspended_at(self) -> FrameType | None:
        """Where the forward pass stands while the body has its turn."""
        forward = self._forward()
        return None if forward is None else forward.gr_frame

    def put_under_model(self, mode: TorchFunctionMode) -> None:
        """Let ``mode`` be on when the model has its turn again, beneath the modes that are on already."""
        self._model_state = thread_state.with_function_mode(self._model_state, mode)

    def fail(self, error: Exception) -> NoReturn:
        """The model's side: end the pass with ``error``, which the model cannot catch."""
        self._failure = error
        raise Unwind from error
