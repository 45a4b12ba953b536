"""The rows of a batch that belong to one of its inputs, wherever a module keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from nnsight_core.values import is_dataclass_value, with_attribute, with_entry


@dataclass(frozen=True)
class Rows:
    """``size`` rows from ``start`` on, of a batch of ``total``.

    A tensor whose first axis is the batch is cut along it. One of two axes or more whose first is a multiple of the
    batch is taken for (batch * position, ...), as mixture-of-experts layers have it. All others belong to all alike.

    >>> Rows(1, 2, 3).take(torch.tensor([10, 20, 30]))
    tensor([20, 30])
    """

    start: int
    size: int
    total: int
    #: How many rows of a flattened tensor one row of the batch may make: its positions. None where that is not known.
    multiples: tuple[int, ...] | None = ()

    def _range(self, tensor: torch.Tensor) -> slice | None:
        if tensor.ndim == 0 or tensor.shape[0] == 0 or tensor.shape[0] % self.total:
            return None
        each = tensor.shape[0] // self.total
        # One axis alone, longer than the batch, is a list of positions and not of tokens.
        if each != 1 and (tensor.ndim == 1 or (self.multiples is not None and each not in self.multiples)):
            return None
        return slice(self.start * each, (self.start + self.size) * each)

    def take(self, value: Any) -> Any:
        """The part of ``value`` that belongs to these rows."""
        if self.size == self.total:
            return value
        if isinstance(value, torch.Tensor):
            chosen = self._range(value)
            return value if chosen is None else value[chosen]
        return _rebuilt(value, lambda entry, _: self.take(entry), None)

    def put(self, value: Any, part: Any) -> Any:
        """``value`` with ``part`` in the place of these rows; everybody else's rows keep every bit."""
        if self.size == self.total:
            return part
        if isinstance(value, torch.Tensor):
            chosen = self._range(value)
            if chosen is None or not isinstance(part, torch.Tensor):
                return part
            changed = value.clone()
            changed[chosen] = part
            return changed
        return _rebuilt(value, self.put, part)


def _rebuilt(value: Any, change: Any, other: Any) -> Any:
    """``value`` with ``change(entry, entry of other)`` for each of its entries; all else as it is."""

    def beside(key: Any) -> Any:
        if other is None:
            return None
        return getattr(other, key) if isinstance(key, str) and not isinstance(other, Mapping) else other[key]

    if isinstance(value, (tuple, list)):
        entries = [change(entry, beside(index)) for index, entry in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*entries)
        return type(value)(entries) if type(value) in (tuple, list) else entries
    if is_dataclass_value(value):
        for field in fields(value):
            entry = getattr(value, field.name)
            if entry is not None:
                value = with_attribute(value, field.name, change(entry, beside(field.name)))
        return value
    if isinstance(value, Mapping):
        for key, entry in value.items():
            value = with_entry(value, key, change(entry, beside(key)))
        return value
    return value if other is None else other


def rows_of(sizes: Sequence[int], multiples: tuple[int, ...] | None = ()) -> list[Rows]:
    """The rows of inputs of these sizes that stand one after the other in a batch.

    >>> rows_of([1, 2])
    [Rows(start=0, size=1, total=3, multiples=()), Rows(start=1, size=2, total=3, multiples=())]
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Rows(start, size, sum(sizes), multiples) for start, size in zip(starts, sizes, strict=True)]
