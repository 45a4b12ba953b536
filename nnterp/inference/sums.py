"""How a layer's output is put together: which calls' values are added to its input, and what norms the sum meets.

    found = find_sum(Flow(layer))
    [each.call.path for each in found.added]      # ['model.layers.0.self_attn', 'model.layers.0.mlp']

Tried in this order: the fewest values that add up to the output as they are; the same with norms of the stream itself
before, between and after the additions; the same with factors. What is found adds up to rounding, or is not found.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch

from nnterp.inference.flow import Flow
from nnterp.inference.numbers import ROUNDINGS, alike, distance, factors, shaped_like, sums_to
from nnterp.inference.probe import Call

__all__ = ["Added", "find_sum"]

#: Sums are looked for on this many numbers of each activation before they are tried on all.
SAMPLE = 2048
#: Factors that no model has: a fit with one of these is an accident.
SMALLEST, LARGEST = 1e-3, 1e3


@dataclasses.dataclass(frozen=True)
class Added:
    """One value that is added to the stream.

    `before` is the norm that the stream itself goes through before what follows, `after` the one after the addition.
    """

    call: Call
    factor: float = 1.0
    before: Call | None = None
    after: Call | None = None


@dataclasses.dataclass(frozen=True)
class _Base:
    """What the values are added to: the layer's input, or what a norm made of it."""

    value: torch.Tensor
    norm: Call | None = None


def find_sum(flow: Flow) -> tuple[Added, ...] | None:
    """What is added to a layer's input, in order of beginning; None where nothing adds up."""
    steps = flow.steps()
    bases = [_Base(flow.given)]
    for norm in flow.norms():
        value = shaped_like(norm.made, flow.given)
        if value is not None and alike(norm.given, flow.given):
            bases.append(_Base(value, norm))
    for base in bases:
        parts = _parts(flow.made, base.value, steps)
        if parts is not None:
            return _in_order(parts, base)
    for base in bases:
        normed = _with_norms(flow, base, steps)
        if normed is not None:
            return normed
    return next((found for base in bases if (found := _with_factors(flow, base, steps)) is not None), None)


def _in_order(parts: Iterable[Call], base: _Base, after: Call | None = None) -> tuple[Added, ...]:
    ordered = sorted(parts, key=lambda call: call.begin)
    found = [Added(call) for call in ordered]
    found[0] = dataclasses.replace(found[0], before=base.norm)
    found[-1] = dataclasses.replace(found[-1], after=after)
    return tuple(found)


def _sample(value: torch.Tensor) -> torch.Tensor:
    flat = value.flatten()
    return flat[torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), device=flat.device).long()]


def _values(steps: Iterable[Call], like: torch.Tensor) -> dict[Call, torch.Tensor]:
    return {call: value for call in steps if (value := shaped_like(call.made, like)) is not None}


def _parts(target: torch.Tensor, base: torch.Tensor, steps: list[Call], most: int = 3) -> tuple[Call, ...] | None:
    """The fewest steps that make `target` when they are added to `base`."""
    values = _values(steps, base)
    small = {call: _sample(value) for call, value in values.items()}
    goal, start = _sample(target), _sample(base)
    for count in range(1, most + 1):
        fits = [
            (off, chosen)
            for chosen in _choices(small, count)
            if (off := distance(goal, start, *(small[call] for call in chosen))) <= ROUNDINGS
        ]
        for _, chosen in sorted(fits, key=lambda fit: fit[0]):
            if sums_to(target, base, *(values[call] for call in chosen)):
                return chosen
    return None


def _choices(steps: Mapping[Call, torch.Tensor], count: int) -> Iterator[tuple[Call, ...]]:
    """Steps of which none was made inside another: what is inside is in the outer one's value already."""
    for chosen in itertools.combinations(steps, count):
        if not any(one.holds(other) or other.holds(one) for one, other in itertools.combinations(chosen, 2)):
            yield chosen


def _with_norms(flow: Flow, base: _Base, steps: list[Call]) -> tuple[Added, ...] | None:
    """The stream itself goes through a norm after an addition: on its way, at the layer's end, or both."""
    norms = flow.norms()
    last = next((call for call in norms if alike(call.made, flow.made)), None)
    target = flow.made if last is None else shaped_like(last.given, flow.made)
    if target is None:
        return None
    if last is not None:
        parts = _parts(target, base.value, steps)
        if parts is not None:
            return _in_order(parts, base, last)
    for middle in norms:
        before, after = shaped_like(middle.given, flow.given), shaped_like(middle.made, flow.given)
        if middle in (last, base.norm) or before is None or after is None:
            continue
        first = _parts(before, base.value, [call for call in steps if call.end < middle.begin], most=1)
        second = _parts(target, after, [call for call in steps if call.begin > middle.end], most=1)
        if first and second and last is not None:
            return Added(first[0], before=base.norm, after=middle), Added(second[0], after=last)
        if first and second:
            return Added(first[0], before=base.norm), Added(second[0], before=middle)
    return None


def _with_factors(flow: Flow, base: _Base, steps: list[Call]) -> tuple[Added, ...] | None:
    """What is added is multiplied by numbers first."""
    values = _values(steps, flow.given)
    small = {call: _sample(value) for call, value in values.items()}
    goal, start = _sample(flow.made), _sample(base.value)
    for count in (1, 2):
        for chosen in _choices(small, count):
            if not _plausible(factors(goal, start, *(small[call] for call in chosen))):
                continue
            found = factors(flow.made, base.value, *(values[call] for call in chosen))
            if found is not None and _plausible(found):
                added = zip(_in_order(chosen, base), found[1:], strict=True)
                return tuple(dataclasses.replace(each, factor=float(f"{factor:.6g}")) for each, factor in added)
    return None


def _plausible(found: tuple[float, ...] | None) -> bool:
    """The stream goes on as it is, and the factors are some that a model could have."""
    return found is not None and abs(found[0] - 1) < 1e-4 and all(SMALLEST < abs(each) < LARGEST for each in found)
