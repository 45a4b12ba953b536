"""Along which axis a value of a model has its batch, where its shape alone does not tell.

A tensor of shape (2, 2, 4) may be two inputs, two layers of a recurrent state, or two positions before the batch. So
the model is run dry: with all inputs, and with those of each body alone. What grows with the inputs is the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from nnsight_core.carried import standing
from nnsight_core.copies import with_tensors
from nnsight_core.dry_run import Inside, Place, run_dry
from nnsight_core.fold_order import made_distinct, rows_follow
from nnsight_core.kinds import Derived
from nnsight_core.operations import is_operation
from nnsight_core.shapes import ShapesOnly
from nnsight_core.values import tensors_by_place

#: The axis of the batch and how many entries along it each row makes; None for what belongs to all rows alike.
Axis = tuple[int, int] | None

#: By place, call by call, the shapes in each run: with all inputs, and with those of each body.
_Found = dict[Place, list[list[tuple[int, ...]]]]

#: Whether shapes in a model do not depend on its numbers, for those of which it was asked.
_static: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()

#: By module of such models, what has been found out: by the rest of the place, its shape and the batch.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Axis]] = weakref.WeakKeyDictionary()


class Axes(Protocol):
    """Who knows along which axis a value has its batch."""

    @property
    def spread(self) -> int:
        """How many rows of the model's batch each row of the inputs makes: with beams it is several."""

    @property
    def positions(self) -> int | None:
        """How many positions each row has; None where that is not known."""

    @property
    def of_inputs(self) -> Axes:
        """Who knows it of the inputs as they were given."""

    def serve(self, module: torch.nn.Module) -> bool:
        """Whether ``module`` is part of what can be tried out."""

    def of(self, place: Place, shape: tuple[int, ...]) -> Axis:
        """The axis of the batch in a tensor of this shape.

        Raises:
            LookupError: it cannot be told, or each row's entries do not stand side by side along it.
        """


class BatchAxes:
    """The axes of one call of a model, found out when they are first asked for.

    Args:
        root: the model.
        args: the arguments of the whole batch.
        kwargs: its keyword arguments.
        sizes: how many rows each input has.
        spread: how many rows of the batch each of these makes.
        positions: how many positions they have; None where that is not known.
        gives_rows: what the model gives has its rows in the first axis, so that a dry run without them has gone astray.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sizes: Sequence[int],
        spread: int = 1,
        positions: int | None = None,
        gives_rows: bool = False,
    ) -> None:
        self.spread = spread
        self.positions = positions
        self._root = root
        self._call: Any = (args, kwargs)
        self._sizes = tuple(sizes)
        self._gives_rows = gives_rows
        #: By what was looked into, None for the modules' own values; by whether every row was
        #: padded; and by what was worked out of their calls.
        self._found: dict[tuple[Inside, bool, Derived | None], _Found] = {}

    @property
    def of_inputs(self) -> Axes:
        """This object itself."""
        return self

    def serve(self, module: torch.nn.Module) -> bool:
        """Whatever is asked for."""
        return True

    def of(self, place: Place, shape: tuple[int, ...]) -> Axis:
        """The axis of the batch in a tensor of this shape.

        Raises:
            LookupError: it cannot be told, or each row's entries do not stand side by side along it.
        """
        *others, last = standing(place)
        for other in others:
            with suppress(LookupError):
                return self._kept_axis(other, shape)
        return self._kept_axis(last, shape)

    def _kept_axis(self, place: Place, shape: tuple[int, ...]) -> Axis:
        """The axis, which is the same in every such call of a model whose shapes do not depend on its numbers."""
        if self.positions is not None or not self._is_static():
            return self._sure_axis(place, shape)
        known, key = _known.setdefault(place[0], {}), (place[1:], shape, self._sizes, self._form())
        if key not in known:
            known[key] = self._sure_axis(place, shape)
        return known[key]

    def _is_static(self) -> bool:
        if self._root not in _static:
            _static[self._root] = _shapes(self._root, [self._call], True) is not None
        return _static[self._root]

    def _form(self) -> Any:
        """What the call is like, whatever its numbers."""
        return (
            weakref.ref(self._root),
            self._root.training,
            tuple((path, each.shape) for path, each in tensors_by_place(self._call)),
        )

    def _standing_axis(self, place: Place, shape: tuple[int, ...]) -> Axis:
        try:
            return self._axis(place, shape, self._call)
        except LookupError:
            # Models do without a mask where nothing is padded, and take other paths then.
            padded = all_padded(self._call)
            if padded is None:
                raise
        return self._axis(place, shape, padded)

    def _sure_axis(self, place: Place, shape: tuple[int, ...]) -> Axis:
        each = self.spread * (self.positions or 0)
        # As experts and routers have it. The numbers, which are compared once for all such calls, say whether it is so.
        may_be = len(shape) == 2 and each > self.spread and shape[0] == sum(self._sizes) * each != shape[1]
        if may_be and not is_operation(place[1]) and self._follow(place, shape, (0, each)):
            return 0, each
        axis = self._standing_axis(place, shape)
        if axis is not None and axis[1] != self.spread and not self._follow(place, shape, axis):
            raise LookupError
        return axis

    def _follow(self, place: Place, shape: tuple[int, ...], axis: tuple[int, int]) -> bool:
        """Whether each row's entries stand side by side along the axis."""
        if not _is_there(self._root):
            return False
        calls = self._calls(made_distinct(self._root, all_padded(self._call) or self._call))
        return rows_follow(self._root, calls, self._sizes, place, shape, axis)

    def _axis(self, place: Place, shape: tuple[int, ...], call: Any) -> Axis:
        # Layers of one kind are mostly asked about together, and are looked into together.
        derived = place[1] if isinstance(place[1], Derived) else None
        inside = place[0] if derived is not None else type(place[0]) if is_operation(place[1]) else None
        key = inside, call is not self._call, derived
        if key not in self._found:
            self._found[key] = self._observed(call, inside, derived)
        found, total = self._found[key], sum(self._sizes) * self.spread
        if (
            found
            and inside is None
            and shape[0] == total not in shape[1:]
            and all(each[0] != place[0] for each in found)
        ):
            # The model itself does not call the module: an edit or a body does, on what is there for all inputs.
            return 0, self.spread
        answers = {_axis(shapes, self._sizes) for shapes in found.get(place, ()) if shapes[0] == shape}
        if len(answers) != 1 or isinstance(answer := answers.pop(), str):
            raise LookupError
        return answer

    def _calls(self, call: Any) -> list[Any]:
        """The call with all inputs, and with those of each body alone."""
        total, start, calls = sum(self._sizes) * self.spread, 0, [call]
        for size in self._sizes:
            many = size * self.spread
            calls.append(with_tensors(call, _rows(start, many, total, self._gives_rows)))
            start += many
        return calls

    def _observed(self, call: Any, inside: Inside, derived: Derived | None) -> _Found:
        """For each place, the shapes in each run, call by call."""
        try:
            # Paths and shapes may depend on the numbers, and models take other paths where they see fake tensors.
            runs = _shapes(self._root, self._calls(call), not _is_there(self._root), inside, derived)
        except Exception:  # noqa: BLE001 - what a call holds may refuse to be copied
            runs = None
        found: _Found = {}
        for place, whole in runs[0].items() if runs else ():
            # A module that runs a different number of times for one input than for all says nothing.
            if all(len(run.get(place, ())) == len(whole) for run in runs or ()):
                found[place] = [[run[place][number] for run in runs or ()] for number in range(len(whole))]
        return {} if self._gives_rows and not self._is_sound(found) else found

    def _is_sound(self, found: _Found) -> bool:
        """Whether the model has given each body's rows for that body alone."""
        given = [shapes for (module, kind, _), shapes in found.items() if module is self._root and kind == "output"]
        return bool(given) and _axis(given[0][-1], self._sizes) == (0, self.spread)


def all_padded(call: Any) -> Any:
    """``call`` with every row padded, if some rows of it are and others are not; else None.

    >>> mask = torch.tensor([[0, 1], [1, 1]])
    >>> all_padded(((), {"attention_mask": mask}))[1]["attention_mask"]
    tensor([[0, 1],
            [0, 1]])
    """
    args, kwargs = call
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    is_padded = (mask == 0).any(-1)
    if not is_padded.any() or is_padded.all():
        return None
    padded, others = int(is_padded.int().argmax()), ~is_padded
    changed = dict(kwargs)
    for name in ("attention_mask", "position_ids"):
        given = kwargs.get(name)
        if isinstance(given, torch.Tensor) and len(given) == len(mask):
            changed[name] = given.clone()
            changed[name][others] = given[padded]
    return args, changed


def _is_there(root: torch.nn.Module) -> bool:
    """Whether the weights of ``root`` are in memory."""
    return not any(each.is_meta for each in (*root.parameters(), *root.buffers()))


def _axis(shapes: list[tuple[int, ...]], sizes: tuple[int, ...]) -> Axis | str:
    """What the shapes of a tensor in the runs say: of all inputs first, then of each alone."""
    whole, alone = shapes[0], shapes[1:]
    if any(len(each) != len(whole) for each in alone):
        return "unclear"
    axes = {axis for each in alone for axis in range(len(whole)) if each[axis] != whole[axis]}
    if not axes:
        return None
    axis, total = axes.pop(), sum(sizes)
    each = whole[axis] // total
    grows = all(shape[axis] == size * each for shape, size in zip(alone, sizes, strict=True))
    return "unclear" if axes or whole[axis] != total * each or not grows else (axis, each)


def _shapes(
    root: torch.nn.Module,
    calls: list[Any],
    fake: bool,
    inside: Inside = None,
    derived: Derived | None = None,
) -> list[dict[Place, list[tuple[int, ...]]]] | None:
    """The shapes at each place in runs of these calls; None if there is one that cannot be run."""
    runs = []
    try:
        for call in calls:
            seen: dict[Place, list[tuple[int, ...]]] = {}

            def note(module: torch.nn.Module, kind: str, value: Any, site: Any, seen: Any = seen) -> None:
                for path, tensor in tensors_by_place(value):
                    seen.setdefault((module, kind, path), []).append(tuple(tensor.shape))

            run_dry(root, call, note, ShapesOnly.here() if fake else None, inside, derived)
            runs.append(seen)
    except Exception:  # noqa: BLE001 - a model may raise anything at all; then nothing is known
        return None
    return runs


def _rows(start: int, size: int, total: int, without_lists: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    # In a generation a tensor with one axis counts positions.
    least = 2 if without_lists else 1
    return lambda each: each[start : start + size] if each.ndim >= least and len(each) == total else each
