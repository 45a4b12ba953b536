"""Which traces are open here: in this thread, and in this asyncio task."""

from __future__ import annotations

import weakref
from contextvars import ContextVar

import torch

from nnsight_core.interleaver import Interleaver
from nnsight_core.proxy import Scope


class OpenTrace:
    """What a module needs to know of the trace that it is asked in."""

    __slots__ = ("__weakref__", "interleaver", "root", "scope")

    def __init__(self, root: torch.nn.Module, interleaver: Interleaver, scope: Scope) -> None:
        self.root = root
        self.interleaver = interleaver
        self.scope = scope


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
