"""The axes of what layers and their parts take and give: (batch, position, hidden), or others in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnterp.inference.config_keys import ConfigKeys
from nnterp.inference.layer import LayerFinding, PartFinding
from nnterp.inference.probe import BATCH, POSITIONS, Call
from nnterp.inference.skeleton import LayerList

__all__ = ["Axes", "find_axes", "hidden_size"]

Axes = tuple[str, ...]
USUAL: Axes = ("batch", "position", "hidden")


#: What keys are called that say how many positions a model puts before the tokens.
PREFIX = ("prompt_length", "prefix_length", "length", "prompt", "prefix", "memory")


def hidden_size(layers: LayerList, findings: Sequence[LayerFinding]) -> int:
    """How wide one stream is: layers may hand on several side by side, of which their parts take one."""
    given = layers.calls[0].given
    assert given is not None
    parts = [part.input.given for part in _reading(findings) if part.input.given is not None]
    narrow = min((part.shape[-1] for part in parts), default=given.shape[-1])
    return int(narrow) if given.shape[-1] % narrow == 0 else int(given.shape[-1])


def _reading(findings: Sequence[LayerFinding]) -> list[PartFinding]:
    """The parts that read the stream; what else is added may be made of something else."""
    return [part for finding in findings for part in finding.parts if part.kind != "also_added"]


def find_axes(
    layers: LayerList, findings: Sequence[LayerFinding], embedding: Sequence[Call], keys: ConfigKeys
) -> dict[str, Axes | str]:
    """What a specification says of the stream, where it is not the usual."""
    hidden = hidden_size(layers, findings)
    parts = [part.input.given for part in _reading(findings)]
    found = {
        "layers": _axes(layers.calls[0].given, hidden),
        "parts": next((axes for part in parts if (axes := _axes(part, hidden))), None),
        "embeddings": _axes(embedding[-1].made, hidden) if embedding else None,
    }
    said: dict[str, Axes | str] = {name: axes for name, axes in found.items() if axes not in (None, USUAL)}
    given = layers.calls[0].given
    if found["layers"] is not None and "positions" in found["layers"] and given is not None:
        prefix = keys.holding(given.shape[1] - POSITIONS, PREFIX)
        if prefix is not None:
            said = {name: axes for name, axes in said.items() if "positions" not in axes}
            said["prefix"] = prefix
    return said


def _axes(tensor: torch.Tensor | None, hidden: int) -> Axes | None:
    shape = () if tensor is None else tuple(tensor.shape)
    last = "hidden" if shape and shape[-1] == hidden else "stream*hidden"
    if len(shape) == 3 and shape[-1] % hidden == 0:
        if shape[:2] == (BATCH, POSITIONS):
            return ("batch", "position", last)
        if shape[:2] == (POSITIONS, BATCH):
            return ("position", "batch", last)
        if shape[0] == BATCH and shape[1] > POSITIONS:
            return ("batch", "positions", last)
    if len(shape) == 4 and shape[:2] == (BATCH, POSITIONS):
        return ("batch", "position", "stream", "hidden")
    if len(shape) == 4 and shape[1:3] == (BATCH, POSITIONS):
        return ("stream", "batch", "position", "hidden")
    return None
