"""Several bodies with inputs of their own become one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nnsight_core.batch_axes import Axes, BatchAxes
from nnsight_core.call import Call
from nnsight_core.input_errors import MissingInputError
from nnsight_core.passes import Part
from nnsight_core.rows import rows_of
from nnsight_core.run_axes import RunAxes

#: Makes one call of several, and says how many rows each has.
Combine = Callable[["list[Call]"], "tuple[Call, list[int]]"]


def put_together(parts: Sequence[Part], combine: Combine, root: torch.nn.Module | None) -> Call:
    """The call that serves all ``parts``, which are told where in its batch they stand.

    Args:
        parts: the bodies; those without an input see the whole batch.
        combine: makes one call of several.
        root: the model, if it may be tried out where shapes do not tell which axis is the batch.

    Raises:
        MissingInputError: none of them has an input.
    """
    calls = [part.call for part in parts if part.call is not None]
    if not calls:
        raise MissingInputError(alone=True)
    if len(calls) == 1:
        batch = calls[0]
        for part in parts:
            part.place(None, batch)
        return batch
    batch, sizes = combine(calls)
    # With beams, one prompt makes any number of rows.
    positions = batch.prompt_length or None
    flattened = None if batch.runs_repeatedly else (positions,) if positions else ()
    axes: Axes | None = None
    if root is not None and batch.runs_repeatedly:
        axes = RunAxes(root, batch.kwargs, sizes, positions)
    elif root is not None:
        axes = BatchAxes(root, batch.args, batch.kwargs, sizes, positions=positions)
    rows = iter(rows_of(sizes, flattened, axes))
    for part in parts:
        part.place(None if part.call is None else next(rows), batch)
    return batch
