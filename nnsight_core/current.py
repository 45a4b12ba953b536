"""Which traces are open here: in this thread, and in this asyncio task."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Protocol

import torch

from nnsight_core.interleaver import Asked
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope


class OpenTrace(Protocol):
    """What a module needs to know of the trace that it is asked in."""

    @property
    def root(self) -> torch.nn.Module:
        """The model that is traced."""

    @property
    def scope(self) -> Scope:
        """Where the values live."""

    @property
    def step(self) -> int | None:
        """The run of the model that values are asked of, if they are counted."""

    def ask(self, asked: Asked) -> Proxy:
        """The value asked for, present or pending."""


# Weak, so that a trace that is dropped half-way is not kept alive by having been open.
_open: ContextVar[tuple[weakref.ref[OpenTrace], ...]] = ContextVar("nnsight_core_open_traces", default=())


def opened(trace: OpenTrace) -> None:
    """Make ``trace`` the innermost one."""
    _open.set((*_open.get(), weakref.ref(trace)))


def closed(trace: OpenTrace) -> None:
    """Take ``trace`` out, wherever it stands: generators and tasks do not close in reverse order."""
    _open.set(tuple(each for each in _open.get() if each() is not None and each() is not trace))


def open_trace(root: torch.nn.Module) -> OpenTrace | None:
    """The innermost open trace of the model ``root``, if there is one."""
    for reference in reversed(_open.get()):
        trace = reference()
        if trace is not None and trace.root is root:
            return trace
    return None
