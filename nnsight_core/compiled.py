"""Modules that torch has compiled show nothing of their inside: passes that need to see it run them uncompiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch has compiled the calls of a module, in its place or in a module around it."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


class Eager:
    """Passes that need to see inside compiled modules are counted: while there are any, no compiled code is used."""

    _lock = threading.Lock()
    _count = 0
    _stance: Any = None

    @classmethod
    def begin(cls) -> None:
        """One more pass needs it."""
        with cls._lock:
            # Before torch 2.6 there is no such switch; what is inside does not come then, and that is an error.
            if cls._count == 0 and hasattr(torch.compiler, "set_stance"):
                cls._stance = torch.compiler.set_stance("force_eager")
                cls._stance.__enter__()
            cls._count += 1

    @classmethod
    def end(cls) -> None:
        """One pass fewer needs it."""
        with cls._lock:
            cls._count -= 1
            if cls._count == 0 and cls._stance is not None:
                stance, cls._stance = cls._stance, None
                stance.__exit__(None, None, None)

    @classmethod
    @contextmanager
    def on(cls) -> Iterator[None]:
        """While it lasts, one pass more needs it."""
        cls.begin()
        try:
            yield
        finally:
            cls.end()

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """While it lasts, one pass that needs it does not: compiled code is used again, unless others need it too."""
        cls.end()
        try:
            yield
        finally:
            cls.begin()
