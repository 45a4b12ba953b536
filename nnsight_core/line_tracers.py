"""Tools that follow the lines of a program by a stack of calls of their own.

Coverage notes a line for the file on top of its stack, which grows with each call and shrinks with each return. The
model waits in the middle of its calls while the body goes on, so its calls are taken off that stack for the while, as
those of a generator are that has yielded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def stack_keeper() -> Callable[..., Any] | None:
    """The tracing function of this thread, if it is one that keeps a stack."""
    tracer = sys.gettrace()
    if tracer is None:
        return None
    owner = getattr(tracer, "__self__", tracer)
    return tracer if type(owner).__module__.partition(".")[0] == "coverage" else None


def calls_wait(tracer: Callable[..., Any]) -> None:
    """Take the calls that stand here, in this coroutine, off the stack of ``tracer``."""
    here = sys._getframe()
    for frame in _calls(here):
        tracer(frame, "return", None)
    tracer(here, "call", None)


def calls_go_on(tracer: Callable[..., Any]) -> None:
    """Put the calls that stand here back onto the stack of ``tracer``."""
    here = sys._getframe()
    tracer(here, "return", None)
    for frame in reversed(_calls(here)):
        tracer(frame, "call", None)


def _calls(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found
