"""Whether the rows of a batch that is folded with another axis stand side by side.

A first axis of 8 may be two inputs with four heads each, or four heads with two inputs each; where there are as many
heads as positions, not even its length tells. So the model is run with inputs that differ from one another, all of
them and those of each body alone, and the numbers are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.dry_run import Inside, Place, run_dry
from nnsight_core.kinds import Derived
from nnsight_core.operations import is_operation
from nnsight_core.values import tensors_by_place

#: What the tokens of a language model are called among its arguments.
_TOKENS = ("input_ids", "decoder_input_ids")

#: By module, what has been found out: by the rest of the place, the shape and the sizes.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


def made_distinct(root: torch.nn.Module, call: Any) -> Any:
    """``call`` with other numbers in its tokens, or else in its floating-point arguments: no two rows are alike."""
    args, kwargs = call
    generator = torch.Generator().manual_seed(0)

    def noisy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value + torch.randn(value.shape, generator=generator).to(value)

    def tokens(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.is_floating_point() or not value.numel():
            return noisy(value)
        return torch.randint(0, _vocabulary(root, value), value.shape, generator=generator).to(value)

    first = tuple(tokens(each) if not index else noisy(each) for index, each in enumerate(args))
    return first, {name: (tokens if name in _TOKENS else noisy)(each) for name, each in kwargs.items()}


def _vocabulary(root: torch.nn.Module, ids: torch.Tensor) -> int:
    find = getattr(root, "get_input_embeddings", None)
    known = getattr(find() if find is not None else None, "num_embeddings", None)
    return int(known or ids.max() + 1)


def rows_follow(
    root: torch.nn.Module,
    calls: Sequence[Any],
    sizes: Sequence[int],
    place: Place,
    shape: tuple[int, ...],
    axis: tuple[int, int],
) -> bool:
    """Whether, in a tensor of ``shape`` at ``place``, the entries of each row stand side by side along the axis.

    Args:
        root: the model.
        calls: the call with all inputs, which are to differ, and with those of each body alone.
        sizes: how many rows each body has.
        place: where the tensor stands.
        shape: its shape in the call with all inputs.
        axis: its axis, and how many entries along it each row makes.
    """
    known, key = _known.setdefault(place[0], {}), (place[1:], shape, tuple(sizes), axis)
    if key not in known:
        known[key] = False
        counts = [sum(sizes), *sizes]
        try:
            whole, *alone = [
                _entries(root, call, place, axis[0], count * axis[1]) for call, count in zip(calls, counts, strict=True)
            ]
        except Exception:  # noqa: BLE001 - a model may raise anything at all; then nothing is known
            return False
        # What other modules have in such an axis is mostly asked for together with it.
        shown = {
            (where, its): _follow(together, [run.get(where, []) for run in alone], sizes, its, axis)
            for where, together in whole.items()
            for its in {each.shape for each in together}
        }
        for (where, its), follows in shown.items():
            # Where all entries are alike, as when a router sends all tokens to the same experts, the other tensors that
            # the module takes and gives tell.
            others = {shown[each] for each in shown if each[0][0] is where[0]} if follows is None else {follows}
            found = _known.setdefault(where[0], {})
            found[where[1:], its, tuple(sizes), axis] = others - {None} == {True}
    return known[key]


@dataclass(frozen=True)
class _Entries:
    """What is kept of a tensor: of its shape, and of each entry along an axis a few numbers that tell it from others.

    Args:
        shape: the tensor's.
        marks: (entry, mark).
        is_exact: whether it is not of a type with few digits, in which batches of different sizes differ visibly.
    """

    shape: tuple[int, ...]
    marks: torch.Tensor
    is_exact: bool


def _entries(root: torch.nn.Module, call: Any, place: Place, axis: int, length: int) -> dict[Place, list[_Entries]]:
    """The tensors with an axis of this length, where they stand, call by call: of operations, those at ``place`` and
    at the same of other modules.
    """
    module, kind, path = place
    derived = kind if isinstance(kind, Derived) else None
    is_inside = derived is not None or is_operation(kind)
    found: dict[Place, list[_Entries]] = {}

    def note(one: torch.nn.Module, its: str, value: Any, site: Any) -> None:
        if is_inside and its != kind:
            return
        for where, tensor in tensors_by_place(value):
            if tensor.ndim > axis and tensor.shape[axis] == length and (where == path or not is_inside):
                found.setdefault((one, its, where), []).append(_marked(tensor.detach(), axis))

    inside: Inside = module if derived is not None else type(module) if is_inside else None
    run_dry(root, call, note, None, inside, derived)
    return found


def _marked(tensor: torch.Tensor, axis: int) -> _Entries:
    rows = tensor.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
    numbers = torch.nan_to_num(rows.cpu().double(), nan=0.3, posinf=1.7, neginf=-1.7)
    generator = torch.Generator().manual_seed(0)
    chances = torch.randn(numbers.shape[1], 4, generator=generator, dtype=torch.double)
    is_exact = tensor.dtype not in (torch.bfloat16, torch.float16)
    return _Entries(tuple(tensor.shape), numbers @ chances, is_exact)


def _follow(
    whole: list[_Entries],
    alone: list[list[_Entries]],
    sizes: Sequence[int],
    shape: tuple[int, ...],
    axis: tuple[int, int],
) -> bool | None:
    """Whether each row's entries stand side by side; None where the numbers are the same if they do not."""
    each, total = axis[1], sum(sizes)
    if any(len(values) != len(whole) for values in alone):
        return False
    follows: bool | None = False
    for call, together in enumerate(whole):
        if together.shape != shape:
            continue
        start = 0
        for size, values in zip(sizes, alone, strict=True):
            rows = torch.arange(start, start + size)
            mine = (rows[:, None] * each + torch.arange(each)).flatten()
            across = (torch.arange(each)[:, None] * total + rows).flatten()
            own = values[call]
            if not _agree(together, mine, own):
                return False
            alike = _agree(together, across, own)
            follows = None if alike or follows is None else True
            start += size
    return follows


def _agree(one: _Entries, chosen: torch.Tensor, other: _Entries) -> bool:
    """Whether the ``chosen`` entries of one are those of the other: batches of different sizes are rounded
    differently, and in a type with few digits a token may go to another expert for it.
    """
    if len(chosen) != len(other.marks):
        return False
    apart = (one.marks[chosen] - other.marks).abs().amax(-1)
    near = apart <= (1e-2 if one.is_exact else 5e-2) * (other.marks - other.marks.mean(0)).abs().max()
    return bool(near.all()) if one.is_exact else float(near.double().mean()) >= 0.9
