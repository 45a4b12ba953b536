"""Whether the rows of a batch that is folded with another axis stand side by side.

A first axis of 8 may be two inputs with four heads each, or four heads with two inputs each; where there are as many
heads as positions, not even its length tells. So the model is run with inputs that differ from one another, all of
them and those of each body alone, and the numbers are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from nnsight_core.dry_run import Place, run_dry
from nnsight_core.values import entries_of

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
        try:
            whole, *alone = [_values(root, call, place) for call in calls]
            known[key] = _follow(whole, alone, sizes, shape, axis)
        except Exception:  # noqa: BLE001 - a model may raise anything at all; then nothing is known
            known[key] = False
    return known[key]


def _values(root: torch.nn.Module, call: Any, place: Place) -> list[torch.Tensor]:
    """What stands at ``place``, call by call."""
    module, kind, path = place
    found: list[torch.Tensor] = []

    def note(one: torch.nn.Module, its: str, value: Any) -> None:
        if one is module and its == kind:
            for key in path:
                value = dict(entries_of(value))[key]
            found.append(value.detach().double())

    run_dry(root, call, note, None, type(module))
    return found


def _follow(
    whole: list[torch.Tensor],
    alone: list[list[torch.Tensor]],
    sizes: Sequence[int],
    shape: tuple[int, ...],
    axis: tuple[int, int],
) -> bool:
    (number, each), total = axis, sum(sizes)
    seen = 0
    for call, together in enumerate(whole):
        if tuple(together.shape) != shape:
            continue
        start = 0
        for size, values in zip(sizes, alone, strict=True):
            rows = torch.arange(start, start + size)
            mine = (rows[:, None] * each + torch.arange(each)).flatten()
            across = (torch.arange(each)[:, None] * total + rows).flatten()
            one, other = (together.index_select(number, index.to(together.device)) for index in (mine, across))
            # Where both orders give the same numbers, nothing has been shown.
            if not _agree(one, values[call]) or _agree(other, values[call]):
                return False
            seen, start = seen + 1, start + size
    return seen > 0


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    finite = other.isfinite()
    if one.shape != other.shape or not torch.equal(finite, one.isfinite()):
        return False
    one, other = one[finite], other[finite]
    if not one.numel():
        return True
    # Batches of different sizes are rounded differently.
    return float((one - other).abs().max()) <= 1e-3 * float((other - other.mean()).abs().max())
