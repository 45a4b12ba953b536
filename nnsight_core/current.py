"""Which traces are open here: in this thread, and in this asyncio task."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, Protocol

import torch

from nnsight_core.asked import Asked, View
from nnsight_core.counting import CallCounter
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope
from nnsight_core.sites import Site, user_frame


class OpenTrace(Protocol):
    """What a module needs to know of the trace that it is asked in."""

    @property
    def root(self) -> torch.nn.Module:
        """The model that is traced."""

    @property
    def scope(self) -> Scope:
        """Where the values live."""

    @property
    def is_alone(self) -> bool:
        """Whether no other input shares the batch."""

    def step_of(self, module: torch.nn.Module) -> int:
        """The run of the model that values of ``module`` are asked of, counted from 0."""

    def next_step_of(self, module: torch.nn.Module, increment: int, label: str) -> None:
        """From now on, ask ``module`` for the values of a later run; ``label`` is how errors are to call that."""

    def announce(self, module: torch.nn.Module, ancestors: Sequence[torch.nn.Module]) -> None:
        """Operations inside ``module`` are going to be asked for."""

    def operations(self, module: torch.nn.Module) -> list[tuple[str, Site]] | None:
        """The operations that ``module`` calls in this trace, with their lines; None if it is not called."""

    def counter_of(self, asked: Asked) -> CallCounter:
        """What counts the calls of the module that is ``asked`` for."""

    def running(self, module: torch.nn.Module) -> torch.nn.Module:
        """What runs in the place of ``module``; the module itself, but for dry runs."""

    def ask(self, asked: Asked, view: View | None = None) -> Any:
        """The value asked for, or the part of it that ``view`` shows, present or pending."""

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on the values of proxies, now or when they arrive."""

    def edited_value(self, edit: Any, number: int) -> Proxy | None:
        """What a step of an edit gives in this trace; None if the trace does not make this edit."""


_CAN_BE_LEFT = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class OpenSession(Protocol):
    """What a trace needs to know of the session that it is opened in."""

    def keep(self, scope: Scope) -> None:
        """Let the values of a trace that is over live as long as the session does."""


class _Entry:
    """An open trace or session, and the frame that its block stands in."""

    __slots__ = ("can_be_left", "frame", "trace")

    def __init__(self, trace: Any, body: FrameType) -> None:
        # A generator that a @contextmanager runs opens the trace for its caller.
        flags = body.f_code.co_flags
        while flags & inspect.CO_GENERATOR and _is_contextlib(body.f_back):
            body = user_frame(body.f_back)
            flags = body.f_code.co_flags
        # Weak, so that a trace that is dropped half-way is not kept alive by having been open.
        self.trace = weakref.ref(trace)
        # The frame lives as long as its block does, so its id will do and holds nothing.
        self.frame = id(body)
        self.can_be_left = bool(flags & _CAN_BE_LEFT)


def _is_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"


_open: ContextVar[tuple[_Entry, ...]] = ContextVar("nnsight_core_open_traces", default=())
_sessions: ContextVar[tuple[_Entry, ...]] = ContextVar("nnsight_core_open_sessions", default=())


def opened(trace: OpenTrace, body: FrameType) -> None:
    """Make ``trace`` the innermost one; ``body`` is the frame that its block stands in."""
    _open.set((*_open.get(), _Entry(trace, body)))


def closed(trace: OpenTrace) -> None:
    """Take ``trace`` out, wherever it stands: generators and tasks do not close in reverse order."""
    entries = _open.get()
    if len(entries) == 1 and entries[0].trace() is trace:
        _open.set(())
        return
    _open.set(tuple(each for each in entries if each.trace() is not None and each.trace() is not trace))


def open_trace(root: torch.nn.Module) -> OpenTrace | None:
    """The open trace of the model ``root`` whose block is the innermost here, if there is one.

    A generator's block is here only while the generator runs.
    """
    everywhere = _open.get()
    if len(everywhere) == 1 and not everywhere[0].can_be_left:
        trace = everywhere[0].trace()
        return trace if trace is not None and trace.root is root else None
    entries = [entry for entry in everywhere if (trace := entry.trace()) is not None and trace.root is root]
    return _innermost(entries) if entries else None


def session_opened(session: OpenSession, body: FrameType) -> None:
    """Make ``session`` the one of its block, which stands in the frame ``body``."""
    _sessions.set((*_sessions.get(), _Entry(session, body)))


def session_closed(session: OpenSession) -> None:
    """Take ``session`` out."""
    _sessions.set(tuple(each for each in _sessions.get() if each.trace() is not None and each.trace() is not session))


def open_session() -> OpenSession | None:
    """The session whose block is the innermost here, if there is one."""
    entries = [entry for entry in _sessions.get() if entry.trace() is not None]
    return _innermost(entries) if entries else None


def end_scope(scope: Scope, session: OpenSession | None) -> None:
    """The trace of ``scope`` is over: its values go, or live on in its ``session``."""
    scope.close(keep=session is not None)
    if session is not None:
        session.keep(scope)


def _innermost(entries: list[_Entry]) -> Any:
    if len(entries) == 1 and not entries[0].can_be_left:
        return entries[0].trace()
    by_frame = {entry.frame: entry for entry in entries}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame) in by_frame:
            return by_frame[id(frame)].trace()
        frame = frame.f_back
    # Opened by hand somewhere else, in an ExitStack or a fixture, say.
    return next((entry.trace() for entry in reversed(entries) if not entry.can_be_left), None)
