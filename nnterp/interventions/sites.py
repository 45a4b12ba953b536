"""The places that a sweep goes through: which value, in which layer, of which head, at which positions.

A kind of site is the name of an accessor: ``layers_output``, ``attentions_output``, ``heads_output``, ... Every layer
that has such a part, and every position or head of it, is a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.prompts import padded, token_rows
from nnterp.choices import HEADS, STREAMS
from nnterp.errors import PositionError, PromptPairError, UsageError, did_you_mean

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = [
    "activations",
    "axes_of",
    "chosen_kinds",
    "chosen_layers",
    "chosen_positions",
    "HEADS",
    "Prompts",
    "prompt_ids",
    "prompt_pair",
    "Site",
    "sites_of",
    "STREAMS",
    "token_texts",
]

#: Texts, or token ids of shape (prompt, position).
Prompts = str | Sequence[str] | torch.Tensor


@dataclass(frozen=True)
class Site:
    """One entry of a sweep.

    Args:
        layer: the layer, counted from 0.
        head: the head, None for all of the value.
        positions: the positions, counted from 0.
        index: where the entry stands in the result, without the axis of prompts.
    """

    layer: int
    head: int | None
    positions: tuple[int, ...]
    index: tuple[int, ...]

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The site's part of a value (prompt, position, hidden): (prompt, site's position, hidden)."""
        # Of a head it is the same: one head of (prompt, head, position, head_dim).
        whole = value if self.head is None else value[:, self.head]
        return whole[:, list(self.positions)]

    def put(self, value: torch.Tensor, source: torch.Tensor) -> None:
        """Write the site's part of ``source`` into ``value``, in place."""
        whole = value if self.head is None else value[:, self.head]
        whole[:, list(self.positions)] = self.of(source).to(whole)


def chosen_kinds(model: StandardizedTransformer, sites: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds of sites that were asked for.

    Raises:
        UsageError: there is no such kind, or none was given.
        MissingPartError: no layer of the model has such a part.
        ClosedAttentionError: the model's attention does not show its heads.
    """
    kinds = (sites,) if isinstance(sites, str) else tuple(sites)
    known = (*STREAMS, *HEADS)
    for kind in kinds:
        if kind not in known:
            hint = did_you_mean(kind, known) if isinstance(kind, str) else ""
            raise UsageError(f"There are no sites {kind!r}. {hint}\nGive some of: {', '.join(known)}.")
    if not kinds or len(set(kinds)) != len(kinds):
        raise UsageError(f"sites={sites!r}: give at least one kind of sites, and each once.")
    for kind in kinds:
        there = (layer for layer in range(model.num_layers) if getattr(model, kind).has(layer))
        # Says why not, if no layer has such a part or none that is open.
        getattr(model, kind).place(next(there, 0))
    return kinds


def chosen_layers(model: StandardizedTransformer, layers: Sequence[int] | int | None) -> tuple[int, ...]:
    """The layers that were asked for, one or several, counted from 0, ascending; all if None.

    Raises:
        LayerIndexError: the model has no such layer.
        UsageError: none was given.
    """
    wanted = range(model.num_layers) if layers is None else [layers] if isinstance(layers, int) else layers
    found = tuple(sorted({model.layers_output.position(layer) for layer in wanted}))
    if not found:
        raise UsageError("layers=[] leaves no layer to look at.")
    return found


def chosen_positions(length: int, positions: Sequence[int] | int | None) -> tuple[int, ...]:
    """The positions that were asked for, one or several, counted from 0, ascending; all if None.

    Raises:
        PositionError: the prompts have no such position.
        UsageError: none was given.
    """
    wanted = range(length) if positions is None else [positions] if isinstance(positions, int) else positions
    for position in wanted:
        if not -length <= position < length:
            raise PositionError(f"Position {position} is not there: the prompts have {length} tokens, counted from 0.")
    found = tuple(sorted({position % length for position in wanted}))
    if not found:
        raise UsageError("positions=[] leaves no position to look at.")
    return found


def prompt_ids(model: StandardizedTransformer, prompts: Prompts) -> torch.Tensor:
    """Token ids of prompts of one length, (prompt, position).

    Raises:
        PromptPairError: the prompts differ in length.
        InputError: a prompt has no token.
    """
    rows = token_rows(model.tokenizer, prompts, {})
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise PromptPairError(f"The prompts have {lengths} tokens.")
    return padded(rows, 0)["input_ids"]


def prompt_pair(
    model: StandardizedTransformer, clean: Prompts, corrupted: Prompts
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of clean and corrupted prompts, each (prompt, position).

    Raises:
        PromptPairError: they differ in number or in length.
    """
    both = prompt_ids(model, clean), prompt_ids(model, corrupted)
    if len(both[0]) != len(both[1]):
        raise PromptPairError(f"There are {len(both[0])} clean and {len(both[1])} corrupted prompts.")
    if both[0].shape != both[1].shape:
        texts = [
            f"  {name:<9}  {token_texts(model, ids)}" for name, ids in zip(("clean", "corrupted"), both, strict=True)
        ]
        lengths = [each.shape[1] for each in both]
        raise PromptPairError(
            "\n".join([f"The clean prompt has {lengths[0]} tokens, the corrupted one {lengths[1]}.", *texts])
        )
    return both


def token_texts(model: StandardizedTransformer, ids: torch.Tensor) -> tuple[str, ...]:
    """The text of each token of the first prompt; without a tokenizer its id."""
    return tuple(str(each) if model.tokenizer is None else model.token_text(each) for each in ids[0].tolist())


def activations(
    model: StandardizedTransformer, ids: torch.Tensor, kind: str, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """The values of one kind, by layer, of the layers that have such a part; without gradients."""
    accessor = getattr(model, kind)
    with torch.no_grad(), model.trace(ids) as tracer:
        found = {layer: accessor[layer].value for layer in layers if accessor.has(layer)}
        tracer.stop()
    return found


def axes_of(kind: str, each_position: bool | None) -> tuple[str, ...]:
    """The axes of a result, without that of prompts."""
    heads = kind in HEADS
    by_position = not heads if each_position is None else each_position
    return ("layer", *(("head",) if heads else ()), *(("position",) if by_position else ()))


def sites_of(
    kind: str,
    values: Mapping[int, torch.Tensor],
    layers: Sequence[int],
    positions: tuple[int, ...],
    axes: Sequence[str],
) -> tuple[list[Site], tuple[int, ...]]:
    """Every site of a kind, and the shape of the result, without the axis of prompts.

    Args:
        kind: the kind of site.
        values: a value of each layer that has such a part.
        layers: the layers.
        positions: the positions.
        axes: the axes of the result: with ``position`` each position is a site, without it all of them are one.
    """
    heads = max((value.shape[1] for value in values.values()), default=0) if kind in HEADS else None
    parts = [(each,) for each in positions] if "position" in axes else [positions]
    sites = []
    for row, layer in enumerate(layers):
        if layer not in values:
            continue
        for head in (None,) if heads is None else range(values[layer].shape[1]):
            for column, part in enumerate(parts):
                index: Any = (row, *(() if head is None else (head,)), *((column,) if "position" in axes else ()))
                sites.append(Site(layer, head, part, index))
    shape = (len(layers), *(() if heads is None else (heads,)), *((len(parts),) if "position" in axes else ()))
    return sites, shape
