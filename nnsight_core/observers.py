"""Who writes down what modules take and give, without ever changing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnsight_core.rows import Rows

#: Called with a module, "input" or "output", and the value.
Note = Callable[[torch.nn.Module, str, Any], None]


class Observers:
    """Those who are told of values, module by module."""

    def __init__(self) -> None:
        #: Who is told of what; looked at for every value, so it is no property.
        self.notes: dict[tuple[torch.nn.Module, str], list[tuple[Note, Rows | None]]] = {}

    def __bool__(self) -> bool:
        return bool(self.notes)

    def add(self, module: torch.nn.Module, kind: str, note: Note, rows: Rows | None) -> None:
        """Tell ``note`` from now on, of ``rows`` of the batch."""
        self.notes.setdefault((module, kind), []).append((note, rows))

    def remove(self, module: torch.nn.Module, kind: str, note: Note) -> None:
        """Tell ``note`` no more."""
        left = [each for each in self.notes.pop((module, kind), ()) if each[0] is not note]
        if left:
            self.notes[module, kind] = left

    def tell(self, module: torch.nn.Module, kind: str, value: Any, ran_on: Rows | None) -> None:
        """A module took or gave ``value``; ``ran_on`` are the rows of the batch that it holds, None for all."""
        for note, rows in list(self.notes.get((module, kind), ())):
            if ran_on is None:
                note(module, kind, value if rows is None else rows.take(value, (module, kind, ())))
            elif rows is None or rows == ran_on:
                note(module, kind, value)

    def clear(self) -> None:
        """Tell nobody."""
        self.notes.clear()
