"""Several inputs as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnsight_core.input_errors import InputError


def joined(values: Sequence[Any]) -> Any:
    """Tensors one below the other along their first axis, inside tuples, lists and dicts of the same form.

    >>> joined([{"x": torch.zeros(1, 2)}, {"x": torch.ones(2, 2)}])["x"].shape
    torch.Size([3, 2])

    Raises:
        InputError: the inputs are of different forms, or say different things that cannot hold for one call.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise InputError(f"The invokes of one trace take inputs of one form; these are {kinds}.")
    if isinstance(first, torch.Tensor):
        shapes = [tuple(value.shape) for value in values]
        if any(shape[1:] != shapes[0][1:] or not shape for shape in shapes):
            raise InputError(f"These inputs do not fit into one batch: their shapes are {shapes}.")
        return torch.cat(list(values))
    if isinstance(first, (tuple, list)):
        if len({len(value) for value in values}) > 1:
            raise InputError("The invokes of one trace take the same arguments; these differ in number.")
        return type(first)(joined(entries) for entries in zip(*values, strict=True))
    if isinstance(first, dict):
        names = {name for value in values for name in value}
        missing = sorted(name for name in names if any(name not in value for value in values))
        if missing:
            raise InputError(f"The invokes of one trace take the same arguments; not all of these have {missing}.")
        return {name: joined([value[name] for value in values]) for name in first}
    if any(value != first for value in values):
        raise InputError(f"The invokes of one trace are one call of the model, which cannot have both {values!r:.200}.")
    return first
