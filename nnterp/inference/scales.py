"""The numbers that a model multiplies by or caps with outside of its modules, found by comparing what was before with
what was after."""

from __future__ import annotations

import dataclasses
import math

import torch

from nnterp.inference.config_keys import ConfigKeys
from nnterp.inference.numbers import distance, factors

__all__ = ["find_scale", "LogitScale", "scale_between"]

#: Beyond this cap, tanh changes less than rounding does.
LARGEST_CAP = 1e4
#: Rounding in tanh and in the division before it comes on top of what sums have.
CAPPED_ROUNDINGS = 64.0


@dataclasses.dataclass(frozen=True)
class LogitScale:
    """logits = cap * tanh(factor * x / cap), or factor * x where there is no cap."""

    factor: float = 1.0
    cap: float | None = None
    cap_key: str | None = None


def scale_between(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """The number that one activation was multiplied by to give the other; None where that is not what happened."""
    if before.shape != after.shape:
        return None
    found = factors(after, before)
    return None if found is None else 1.0 if abs(found[0] - 1) < 1e-4 else found[0]


def find_scale(before: torch.Tensor, logits: torch.Tensor, keys: ConfigKeys) -> LogitScale | None:
    """What makes the logits of what the last module gave; None where it is nothing of the kind."""
    factor = scale_between(before, logits)
    if factor is not None:
        return LogitScale(factor)
    if before.shape != logits.shape:
        return None
    for key, cap in keys.caps():
        found = _capped(before, logits, cap)
        if found is not None:
            return LogitScale(found, cap, key)
    solved = _solve(before, logits)
    return LogitScale(1.0, solved) if solved is not None and _capped(before, logits, solved) is not None else None


def _capped(before: torch.Tensor, logits: torch.Tensor, cap: float) -> float | None:
    """The factor with which cap * tanh(factor * x / cap) gives the logits."""
    inside = logits.double() / cap
    usable = inside.abs() < 0.9
    if not bool((inside.abs() <= 1).all()) or not bool(usable.any()):
        return None
    x, bent = before.double()[usable], torch.atanh(inside[usable]) * cap
    factor = float((x * bent).sum() / (x * x).sum())
    again = cap * torch.tanh(factor * before.double() / cap)
    unit = torch.finfo(logits.dtype).eps / torch.finfo(torch.float64).eps
    if distance(logits.double(), again) / unit > CAPPED_ROUNDINGS:
        return None
    return 1.0 if abs(factor - 1) < 1e-3 else factor


def _solve(before: torch.Tensor, logits: torch.Tensor) -> float | None:
    """The cap that takes the largest number to what became of it, by halving the interval that it lies in."""
    index = before.abs().flatten().argmax()
    x, y = abs(float(before.flatten()[index])), abs(float(logits.flatten()[index]))
    if not 0 < y < x:
        return None
    low, high = y, LARGEST_CAP
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
    return float(f"{low:.4g}")
