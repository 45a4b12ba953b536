"""Along which axis a value of a model has its batch, where its shape alone does not tell.

A tensor of shape (2, 2, 4) may be two inputs, two layers of a recurrent state, or two positions before the batch. So
the model is run dry: with all inputs, and with those of each body alone. What grows with the inputs is the batch.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight_core.hooks import observing
from nnsight_core.operations import Memory, Tap, is_operation
from nnsight_core.shapes import ShapesOnly
from nnsight_core.twin import Twin
from nnsight_core.values import entries_of, map_tensors

#: Where a tensor stands: the module, "input", "output" or the same of an operation inside it, and the keys that lead
#: to it.
Place = tuple[torch.nn.Module, str, tuple[Any, ...]]
#: The axis of the batch and how many entries along it each row makes; None for what belongs to all rows alike.
Axis = tuple[int, int] | None

_SMALL = 2**30

#: Whether shapes in a model do not depend on its numbers, for those of which it was asked.
_static: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


class BatchAxes:
    """The axes of one batch, found out when they are first asked for.

    Args:
        root: the model.
        args: the arguments of the whole batch.
        kwargs: its keyword arguments.
        sizes: how many rows each input has.
    """

    def __init__(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sequence[int]
    ) -> None:
        self._root = root
        self._call: Any = (args, kwargs)
        self._sizes = tuple(sizes)
        #: By the class of the modules whose operations were looked at; None for the modules themselves.
        self._found: dict[type[torch.nn.Module] | None, dict[Place, list[list[tuple[int, ...]]]]] = {}

    @property
    def are_first(self) -> bool:
        """Whether a first axis as long as the batch is the batch: not where a module may get some of the rows only."""
        if None in self._found:
            return False
        if self._root not in _static:
            _static[self._root] = bool(_runs(self._root, [self._call], fake=True))
        return _static[self._root]

    def of(self, place: Place, shape: tuple[int, ...]) -> Axis:
        """The axis of the batch in a tensor of this shape.

        Raises:
            LookupError: it cannot be told.
        """
        # Layers of one kind are mostly asked about together, and are looked into together.
        inside = type(place[0]) if is_operation(place[1]) else None
        if inside not in self._found:
            self._found[inside] = _observed(self._root, self._call, self._sizes, inside)
        answers = {_axis(shapes, self._sizes) for shapes in self._found[inside].get(place, ()) if shapes[0] == shape}
        if len(answers) != 1 or isinstance(answer := answers.pop(), str):
            raise LookupError
        return answer


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


def _observed(
    root: torch.nn.Module, call: Any, sizes: tuple[int, ...], inside: type[torch.nn.Module] | None
) -> dict[Place, list[list[tuple[int, ...]]]]:
    """For each place, the shapes in each run, call by call."""
    total, start, calls = sum(sizes), 0, [call]
    for size in sizes:
        calls.append(map_tensors(_rows(start, size, total), call))
        start += size
    runs = _runs(root, calls, True, inside)
    if not runs and sum(each.nbytes for each in root.parameters()) <= _SMALL:
        # A path, or a shape, that depends on the numbers themselves can only be found with them.
        runs = _runs(root, calls, False, inside)
    found: dict[Place, list[list[tuple[int, ...]]]] = {}
    for place, whole in runs[0].items() if runs else ():
        # A module that runs a different number of times for one input than for all says nothing.
        if all(len(run.get(place, ())) == len(whole) for run in runs):
            found[place] = [[run[place][number] for run in runs] for number in range(len(whole))]
    return found


def _runs(
    root: torch.nn.Module, calls: list[Any], fake: bool, inside: type[torch.nn.Module] | None = None
) -> list[dict[Place, list[tuple[int, ...]]]]:
    try:
        return [_run(root, each, fake, inside) for each in calls]
    except Exception:  # noqa: BLE001 - a model may raise anything at all; then nothing is known
        return []


def _rows(start: int, size: int, total: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[start : start + size] if tensor.ndim and len(tensor) == total else tensor


def _run(
    root: torch.nn.Module, call: Any, fake: bool, inside: type[torch.nn.Module] | None
) -> dict[Place, list[tuple[int, ...]]]:
    # What a forward may write into is copied; parameters it does not.
    twin = Twin(root, ShapesOnly.here() if fake else None, shares_parameters=True)
    seen: dict[Place, list[tuple[int, ...]]] = {}

    def note(module: torch.nn.Module, kind: str, value: Any) -> None:
        for path, shape in shapes_in(value):
            seen.setdefault((twin.original(module), kind, path), []).append(shape)

    if inside is not None:
        for module in twin.module.modules():
            if type(module) is inside:
                _tap(module, note)
    args, kwargs = twin.own(call if fake else map_tensors(torch.Tensor.detach, call))
    with torch.random.fork_rng(devices=[]), observing(twin.module.modules(), note), torch.no_grad(), twin.running():
        twin.module(*args, **kwargs)
    return seen


def _tap(module: torch.nn.Module, note: Callable[[torch.nn.Module, str, Any], None]) -> None:
    """Let ``note`` be told of the operations of ``module``, which is a copy."""
    forward = module.forward

    @functools.wraps(forward)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        def visit(kind: str, value: Any, memory: Memory) -> None:
            note(module, kind, value)

        return Tap(module, visit).run(forward, args, kwargs)

    module.__dict__["forward"] = tapped


def shapes_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Where tensors stand in ``value``, and their shapes.

    >>> shapes_in({"a": (torch.zeros(2), None)})
    [(('a', 0), (2,))]
    """
    if isinstance(value, torch.Tensor):
        return [(path, tuple(value.shape))]
    return [found for key, entry in entries_of(value) for found in shapes_in(entry, (*path, key))]
