"""The rows of a batch that belong to one of its inputs, wherever a module keeps them."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nnsight_core.batch_axes import Axes, Axis
from nnsight_core.dry_run import Place
from nnsight_core.errors import RowsError
from nnsight_core.sites import user_site
from nnsight_core.values import entries_of, is_dataclass_value, like_tuple, share_storage, with_attribute, with_entry


@dataclass(frozen=True)
class Rows:
    """``size`` rows from ``start`` on, of a batch of ``total``.

    A tensor whose first axis is the batch is cut along it, and so is one in which the batch is folded with another
    axis, as mixture-of-experts layers have it with positions. Where a shape may mean several things, ``axes`` knows.
    What has no axis of the batch belongs to all rows alike.

    >>> Rows(1, 2, 3).take(torch.tensor([10, 20, 30]))
    tensor([20, 30])
    """

    start: int
    size: int
    total: int
    #: How many rows of a flattened tensor one row of the batch may make: its positions. None where that is not known.
    multiples: tuple[int, ...] | None = ()
    #: Knows the axis of the batch where shapes do not tell.
    axes: Axes | None = field(default=None, compare=False, repr=False)

    def _range(self, tensor: torch.Tensor, place: Place | None = None) -> tuple[slice, ...] | None:
        """The index of these rows in ``tensor``; None if it belongs to all alike."""
        axis = self._obvious(tuple(tensor.shape), place)
        if axis == "unclear":
            try:
                axis = None if self.axes is None or place is None else self.axes.of(place, tuple(tensor.shape))
            except LookupError:
                # Of a list of numbers nobody would know what it lists; it is shown as it is.
                if tensor.ndim > 1:
                    raise RowsError(
                        f"Which rows of a tensor {tuple(tensor.shape)} belong to which input is not clear.", user_site()
                    ) from None
                axis = None
        if axis is None or isinstance(axis, str):
            return None
        number, each = axis
        return (*[slice(None)] * number, slice(self.start * each, (self.start + self.size) * each))

    def _obvious(self, shape: tuple[int, ...], place: Place | None) -> Axis | str:
        """The axis of the batch and how many entries each row makes along it, if the shape tells."""
        if not shape or 0 in shape:
            return None
        if self.axes is None or (place is not None and not self.axes.serve(place[0])):
            each, beyond = divmod(shape[0], self.total)
            # One axis alone, longer than the batch, is a list of positions and not of tokens.
            known = each == 1 or (len(shape) > 1 and (self.multiples is None or each in self.multiples))
            return (0, each) if not beyond and known else None
        spread, positions = self.axes.spread, self.axes.positions
        total = self.total * spread
        if positions is None:
            return "unclear" if any(not length % total for length in shape) else None
        rest, folds = shape[1:], (total, total * positions)
        # Positions, heads or what is folded may be as many as there are inputs.
        if total == positions or any(length in folds for length in rest):
            return "unclear"
        if shape[0] == total and positions in rest and (len(shape) == 2 or not set(rest) <= {1, positions}):
            return 0, spread
        # Positions, masks and distances that all inputs share.
        is_table = set(shape) <= {1, positions} or (shape[0] == 1 and len(shape) > 2)
        return None if is_table and all(each in (1, positions) or each % total for each in shape[:-1]) else "unclear"

    def of_first_axis(self, length: int) -> slice:
        """These rows along an axis that is known to be the batch, or (batch * sample), ``length`` long.

        >>> Rows(1, 2, 3).of_first_axis(6)
        slice(2, 6, None)
        """
        each = length // self.total
        return slice(self.start * each, (self.start + self.size) * each)

    def take(self, value: Any, place: Place | None = None) -> Any:
        """The part of ``value`` that belongs to these rows; ``place`` is where it comes from.

        Raises:
            RowsError: it cannot be told.
        """
        if self.size == self.total:
            return value
        if isinstance(value, torch.Tensor):
            chosen = self._range(value, place)
            return value if chosen is None else value[chosen]
        return _rebuilt(value, lambda entry, _, key: self.take(entry, _inside(place, key)), None)

    def put(self, value: Any, part: Any, place: Place | None = None) -> Any:
        """``value`` with ``part`` in the place of these rows; everybody else's rows keep every bit.

        Raises:
            RowsError: ``value`` belongs to all inputs alike.
        """
        if self.size == self.total or part is value:
            return part
        if isinstance(value, torch.Tensor):
            chosen = self._range(value, place)
            if chosen is None and value.ndim > 1 and value.shape[0] == 1:
                # What is one for all, to be added to each, becomes one for each.
                spread = 1 if self.axes is None else self.axes.spread
                value = value.expand(self.total * spread, *value.shape[1:])
                chosen = (slice(self.start * spread, (self.start + self.size) * spread),)
            if chosen is None or not isinstance(part, torch.Tensor):
                raise RowsError(_SHARED, user_site())
            changed = value.clone()
            changed[chosen] = part
            return changed
        if _may_be_written_into(value, place) and self._is_as_taken(value, part, place):
            return value
        return _rebuilt(value, lambda entry, other, key: self.put(entry, other, _inside(place, key)), part)

    def _is_as_taken(self, value: Any, part: Any, place: Place | None) -> bool:
        """Whether ``part`` is what :meth:`take` gives of ``value``, unchanged."""
        if isinstance(value, torch.Tensor):
            chosen = self._range(value, place)
            return part is value or (chosen is not None and _is_same_view(part, value[chosen]))
        entries, others = entries_of(value), dict(entries_of(part))
        if not entries:
            return part is value or (type(part) is type(value) and not others and part == value)
        return [key for key, _ in entries] == list(others) and all(
            self._is_as_taken(entry, others[key], _inside(place, key)) for key, entry in entries
        )

    def of_inputs(self) -> Rows:
        """The same rows of the inputs as they were given, whatever the model makes of them."""
        return self if self.axes is None else replace(self, axes=self.axes.of_inputs)

    def strictly(self) -> StrictRows:
        """The same rows of values of any form, where they can be told for sure."""
        return StrictRows(self.start, self.size, self.total, self.multiples, self.axes)


class StrictRows(Rows):
    """Rows of the values inside a module: heads, tables, weights and masks are among them, and any axis may be as long
    as the batch by coincidence. So a dry run decides; what it cannot tell for sure is an error.

    An axis that grows with the batch, row for row, is the batch; one of batch * positions is both. What does not grow
    belongs to all inputs alike, and then cannot be set for one of them.
    """

    def _range(self, tensor: torch.Tensor, place: Place | None = None) -> tuple[slice, ...] | None:
        is_parameter = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        shape = tuple(tensor.shape)
        if is_parameter or set(shape) <= {1}:
            return None
        try:
            axis = self._by_shape(shape) if self.axes is None or place is None else self.axes.of(place, shape)
        except LookupError:
            if len(shape) == 1 and shape[0] % self.total:
                return None
            raise RowsError(self._doubt(shape), user_site()) from None
        if axis is None:
            return None
        number, each = axis
        return (*[slice(None)] * number, slice(self.start * each, (self.start + self.size) * each))

    def _by_shape(self, shape: tuple[int, ...]) -> Axis:
        """Where the model may not be tried out: the first axis or none."""
        each, rest = divmod(shape[0], self.total)
        if shape[0] == 1 or (len(shape) == 1 and rest):
            return None
        # Whether (batch * head) or (head * batch), its length does not say.
        if rest or (each != 1 and each not in (self.multiples or ())):
            raise LookupError
        return 0, each

    def _doubt(self, shape: tuple[int, ...]) -> str:
        return f"A value of shape {shape} inside a module may or may not have rows of each of the {self.total} inputs."

    def put(self, value: Any, part: Any, place: Place | None = None) -> Any:
        """``value`` with ``part`` in the place of these rows."""
        if isinstance(value, torch.Tensor) and part is not value and self._range(value, place) is None:
            raise RowsError(_SHARED, user_site())
        return super().put(value, part, place)


_SHARED = "This value is one for all inputs of the batch, so that one invoke cannot change it for itself alone."


def _may_be_written_into(value: Any, place: Place | None) -> bool:
    """Whether ``value`` is an argument that the module may fill for others, such as a dict of what is cached: it has to
    stay who it is.
    """
    is_argument = place is not None and place[1].endswith("input") and len(place[2]) > 1
    return is_argument and isinstance(value, (list, MutableMapping))


def _is_same_view(one: Any, other: torch.Tensor) -> bool:
    return (
        share_storage(one, other)
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        and one.storage_offset() == other.storage_offset()
    )


def _inside(place: Place | None, key: Any) -> Place | None:
    return None if place is None else (place[0], place[1], (*place[2], key))


def _rebuilt(value: Any, change: Callable[[Any, Any, Any], Any], other: Any) -> Any:
    """``value`` with ``change(entry, entry of other, key)`` for each of its entries; all else as it is."""

    def beside(key: Any) -> Any:
        if other is None:
            return None
        return getattr(other, key) if is_dataclass_value(other) else other[key]

    entries = entries_of(value)
    if other is not None and [key for key, _ in entries] != [key for key, _ in entries_of(other)]:
        raise RowsError(
            f"An invoke cannot put a {type(other).__name__} in the place of a {type(value).__name__}.", user_site()
        )
    if isinstance(value, (tuple, list)):
        changed = [change(entry, beside(key), key) for key, entry in entries]
        return like_tuple(value, changed) if isinstance(value, tuple) else changed
    for key, entry in entries:
        if entry is not None:
            new = change(entry, beside(key), key)
            if new is not entry:
                value = with_attribute(value, key, new) if is_dataclass_value(value) else with_entry(value, key, new)
    if not entries and other is not None and other is not value:
        if type(other) is type(value) and isinstance(value, (int, float, str, bool)) and other == value:
            return value
        raise RowsError(_SHARED, user_site())
    return value


def rows_of(sizes: Sequence[int], multiples: tuple[int, ...] | None = (), axes: Axes | None = None) -> list[Rows]:
    """The rows of inputs of these sizes that stand one after the other in a batch.

    >>> rows_of([1, 2])
    [Rows(start=0, size=1, total=3, multiples=()), Rows(start=1, size=2, total=3, multiples=())]
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Rows(start, size, sum(sizes), multiples, axes) for start, size in zip(starts, sizes, strict=True)]
