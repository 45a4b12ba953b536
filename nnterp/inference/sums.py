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

__all__ = ["Added", "find_sum", "Sum"]

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
    #: What the stream that it is added to is multiplied by.
    stream_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sum:
    """What is added to a layer's input, in order of beginning, and what the whole is multiplied by in the end."""

    added: tuple[Added, ...]
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Base:
    """What the values are added to: the layer's input, or what a norm made of it."""

    value: torch.Tensor
    norm: Call | None = None


def find_sum(flow: Flow) -> Sum | None:
    """How a layer's output is put together; None where nothing adds up."""
    steps = flow.steps()
    bases = [_Base(flow.given)]
    for norm in flow.norms():
        value = shaped_like(norm.made, flow.given)
        if value is not None and alike(norm.given, flow.given):
            bases.append(_Base(value, norm))
    for base in bases:
        parts = _parts(flow.made, base.value, steps)
        if parts is not None:
            return Sum(_in_order(parts, base))
    for scaled in (False, True):
        for base in bases:
            normed = _with_norms(flow, base, steps, scaled)
            if normed is not None:
                return Sum(normed)
        found = None if scaled else _first(_with_factors(flow, base, steps) for base in bases)
        if found is not None:
            return found
    return None


def _first(found: Iterable[Sum | None]) -> Sum | None:
    return next((each for each in found if each is not None), None)


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


def _with_norms(flow: Flow, base: _Base, steps: list[Call], scaled: bool) -> tuple[Added, ...] | None:
    """The stream itself goes through a norm after an addition: on its way, at the layer's end, or both."""
    norms = flow.norms()
    last = next((call for call in norms if alike(call.made, flow.made)), None)
    target = flow.made if last is None else shaped_like(last.given, flow.made)
    if target is None:
        return None
    if last is not None and not scaled:
        parts = _parts(target, base.value, steps)
        if parts is not None:
            return _in_order(parts, base, last)
    for middle in norms:
        before, after = shaped_like(middle.given, flow.given), shaped_like(middle.made, flow.given)
        if middle in (last, base.norm) or before is None or after is None:
            continue
        first = _one(before, base.value, [call for call in steps if call.end < middle.begin], scaled)
        second = _one(target, after, [call for call in steps if call.begin > middle.end], scaled)
        if first is None or second is None:
            continue
        first = dataclasses.replace(first, before=base.norm, after=middle if last else None)
        return first, dataclasses.replace(second, before=None if last else middle, after=last)
    return None


def _one(target: torch.Tensor, base: torch.Tensor, steps: list[Call], scaled: bool) -> Added | None:
    """The one step that makes `target` of `base`, with factors for both if need be."""
    if not scaled:
        parts = _parts(target, base, steps, most=1)
        return Added(parts[0]) if parts else None
    for call, value in _values(steps, base).items():
        found = factors(_sample(target), _sample(base), _sample(value))
        if found is not None and all(SMALLEST < abs(each) < LARGEST for each in found):
            whole = factors(target, base, value)
            if whole is not None:
                return Added(call, _tidy(whole[1]), stream_factor=_tidy(whole[0]))
    return None


def _tidy(factor: float) -> float:
    return 1.0 if abs(factor - 1) < 1e-4 else float(f"{factor:.6g}")


def _with_factors(flow: Flow, base: _Base, steps: list[Call]) -> Sum | None:
    """What is added is multiplied by numbers first, or the whole by one in the end."""
    values = _values(steps, flow.given)
    small = {call: _sample(value) for call, value in values.items()}
    own = {call: value for call, value in small.items() if call.parent is flow.layer}
    goal, start = _sample(flow.made), _sample(base.value)
    for count, among in ((1, small), (2, small), (3, own)):
        for chosen in _choices(among, count):
            if not _plausible(factors(goal, start, *(small[call] for call in chosen))):
                continue
            found = factors(flow.made, base.value, *(values[call] for call in chosen))
            if found is None or not _plausible(found):
                continue
            added = zip(_in_order(chosen, base), found[1:], strict=True)
            scaled = (dataclasses.replace(each, factor=_tidy(factor / found[0])) for each, factor in added)
            return Sum(tuple(scaled), _tidy(found[0]))
    return None


def _plausible(found: tuple[float, ...] | None) -> bool:
    """The factors are some that a model could have; the stream has one only if everything has it."""
    if found is None or not all(SMALLEST < abs(each) < LARGEST for each in found):
        return False
    return abs(found[0] - 1) < 1e-4 or all(abs(each / found[0] - 1) < 1e-3 for each in found)
