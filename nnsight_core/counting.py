"""How often a module has been called in a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _nothing() -> None:
    return None


class CallCounter:
    """Counts the calls of one module in a pass."""

    def __init__(self) -> None:
        #: The call that has begun last, counted from 0; -1 before the first.
        self.now = -1

    def reset(self) -> None:
        """Begin anew, with a pass or with a run of the model in it."""
        self.now = -1

    def begins(self) -> None:
        """A call begins."""
        self.now += 1


class Counting:
    """The hook that counts calls."""

    def __init__(self, counts: Callable[[], Any], counter: CallCounter) -> None:
        self._counts = counts
        self._counter = counter

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        if self._counts():
            self._counter.begins()

    def __reduce__(self) -> Any:
        return Counting, (_nothing, CallCounter())
