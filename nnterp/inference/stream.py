"""The axes of what layers and their parts take and give: (batch, position, hidden), or some other order of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnterp.inference.layer import LayerFinding
from nnterp.inference.probe import BATCH, POSITIONS
from nnterp.inference.skeleton import LayerList

__all__ = ["find_axes"]

USUAL = ("batch", "position", "hidden")


def find_axes(layers: LayerList, findings: Sequence[LayerFinding]) -> dict[str, tuple[str, ...]]:
    """The axes of layers and of parts, where they are not the usual ones."""
    parts = [part.input.given for finding in findings for part in finding.parts]
    found = {"layers": _axes(layers.calls[0].given), "parts": next((a for t in parts if (a := _axes(t))), None)}
    return {name: axes for name, axes in found.items() if axes not in (None, USUAL)}  # type: ignore[misc]


def _axes(tensor: torch.Tensor | None) -> tuple[str, ...] | None:
    shape = () if tensor is None else tuple(tensor.shape)
    if len(shape) == 3:
        for order in (USUAL, ("position", "batch", "hidden")):
            if tuple(shape[order.index(axis)] for axis in ("batch", "position")) == (BATCH, POSITIONS):
                return order
    if len(shape) == 4 and shape[:2] == (BATCH, POSITIONS):
        return ("batch", "position", "stream", "hidden")
    if len(shape) == 4 and shape[1:3] == (BATCH, POSITIONS):
        return ("stream", "batch", "position", "hidden")
    return None
