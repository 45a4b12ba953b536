"""Is this number that one, or the sum of those? Told apart from chance by what rounding alone could do.

    alike(a, b)                        # equal up to rounding
    sums_to(y, x, attention, mlp)      # y == x + attention + mlp, up to rounding
    factors(y, x, attention, mlp)      # y == 1.0 * x + 0.2 * attention + 0.2 * mlp -> (1.0, 0.2, 0.2)

Tensors here are activations of one probe: (batch, position, hidden), or (batch * position, hidden).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["alike", "distance", "factors", "is_norm", "shaped_like", "sums_to"]

#: How many roundings, on the average, two ways to one number may lie apart.
ROUNDINGS = 8.0


def shaped_like(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor | None:
    """`tensor` in the shape of `other`, if all that differs is that batch and position are one axis, or have changed
    places."""
    if tensor is None or not tensor.is_floating_point() or tensor.numel() != other.numel():
        return None
    if tensor.ndim == 0 or tensor.shape[-1] != other.shape[-1]:
        return None
    if tensor.shape == other.shape or tensor.ndim == 2 or other.ndim == 2:
        return tensor.reshape(other.shape)
    if tensor.ndim == 3 and tensor.shape[:2] == (other.shape[1], other.shape[0]):
        return tensor.transpose(0, 1)
    return None


def distance(seen: torch.Tensor, *parts: torch.Tensor) -> float:
    """How far `seen` is from the sum of `parts`: the mean over entries, counted in roundings of the largest number met
    on the way to the entry. Some 1 where the sum is meant, and thousands where it is not."""
    total = torch.zeros_like(seen, dtype=torch.float64)
    size = seen.double().abs()
    for part in parts:
        total += part.double()
        size = torch.maximum(size, part.double().abs())
    # Rounding does not know the entry's own size alone: what made it may have been larger.
    size = torch.maximum(size, size.mean()).clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    unit = max(torch.finfo(each.dtype).eps for each in (seen, *parts))
    apart = ((seen.double() - total).abs() / (unit * size)).mean()
    return float(apart) if math.isfinite(apart) else math.inf


def alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two activations are the same numbers, one axis for batch and position or two."""
    if one is None or other is None:
        return False
    one = shaped_like(one, other)
    return one is not None and other.is_floating_point() and distance(one, other) <= ROUNDINGS


def sums_to(seen: torch.Tensor, *parts: torch.Tensor) -> bool:
    """Whether `seen` is the sum of `parts`."""
    return distance(seen, *parts) <= ROUNDINGS


def factors(seen: torch.Tensor, *parts: torch.Tensor) -> tuple[float, ...] | None:
    """The factors with which `parts` add up to `seen`, by least squares; None where none do."""
    matrix = torch.stack([part.double().flatten() for part in parts], dim=1)
    target = seen.double().flatten()
    if not bool(torch.isfinite(matrix).all()) or not bool(torch.isfinite(target).all()):
        return None
    found = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
    scaled = [factor * part.double() for factor, part in zip(found, parts, strict=True)]
    unit = max(torch.finfo(each.dtype).eps for each in (seen, *parts))
    off = distance(seen.double(), *scaled) * torch.finfo(torch.float64).eps / unit
    return tuple(found.tolist()) if off <= ROUNDINGS else None


def is_norm(module: torch.nn.Module, given: torch.Tensor, args: Sequence[object], kwargs: dict[str, object]) -> bool:
    """Whether a module takes out its input's scale and keeps its shape: a larger input gives the same."""
    if any(parameter.ndim > 1 for parameter in module.parameters()):
        return False

    def scaled(factor: float) -> torch.Tensor | None:
        def swap(value: object) -> object:
            return value * factor if value is given else value

        made = module(*[swap(arg) for arg in args], **{name: swap(arg) for name, arg in kwargs.items()})
        return made if isinstance(made, torch.Tensor) else None

    with torch.no_grad():
        # The small number that keeps a norm from dividing by zero must not count.
        size = given.double().square().mean().sqrt().clamp(min=1e-12)
        once, more = scaled(float(4 / size)), scaled(float(16 / size))
    if once is None or more is None or once.shape != given.shape or not once.is_floating_point():
        return False
    size = once.double().abs().mean()
    return bool((once.double() - more.double()).abs().mean() <= 2e-2 * size) and bool(size > 0)
