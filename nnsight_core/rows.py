"""The rows of a batch that belong to one of its inputs, wherever a module keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from nnsight_core.errors import RowsError
from nnsight_core.sites import user_site
from nnsight_core.values import is_dataclass_value, like_tuple, with_attribute, with_entry


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

    def strictly(self) -> StrictRows:
        """The same rows of values of any form, where they can be told for sure."""
        return StrictRows(self.start, self.size, self.total, self.multiples)


class StrictRows(Rows):
    """Rows of the values inside a module: heads, tables, weights and masks are among them, and a first axis may be
    anything. What cannot be told for sure is an error.

    A first axis as long as the batch is the batch; one of batch * positions is both. Parameters and their views, single
    numbers, first axes of length 1, and lists whose length the batch does not divide belong to all inputs alike, and
    then cannot be set for one of them.
    """

    def _range(self, tensor: torch.Tensor) -> slice | None:
        is_parameter = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        if is_parameter or tensor.ndim == 0 or tensor.shape[0] == 1:
            return None
        each, rest = divmod(tensor.shape[0], self.total)
        if not rest and (each == 1 or each in (self.multiples or ())):
            return slice(self.start * each, (self.start + self.size) * each)
        if tensor.ndim == 1 and rest:
            return None
        raise RowsError(tuple(tensor.shape), self.total, user_site())

    def put(self, value: Any, part: Any) -> Any:
        """``value`` with ``part`` in the place of these rows."""
        if isinstance(value, torch.Tensor) and part is not value and self._range(value) is None:
            raise RowsError(tuple(value.shape), self.total, user_site(), setting=True)
        return super().put(value, part)


def _rebuilt(value: Any, change: Any, other: Any) -> Any:
    """``value`` with ``change(entry, entry of other)`` for each of its entries; all else as it is."""

    def beside(key: Any) -> Any:
        if other is None:
            return None
        return getattr(other, key) if isinstance(key, str) and not isinstance(other, Mapping) else other[key]

    if isinstance(value, (tuple, list)):
        entries = [change(entry, beside(index)) for index, entry in enumerate(value)]
        return like_tuple(value, entries) if isinstance(value, tuple) else entries
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
