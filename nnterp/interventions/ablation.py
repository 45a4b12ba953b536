"""Ablation: what does the model lose without a part?

result = ablation(model, prompts, metric, "attentions_output")                        # to zero
result = ablation(model, prompts, metric, "mlps_output", "mean", reference=texts)
result.effect("mlps_output")                # (layer): how much the metric changed

One site at a time has another value: zero; the mean over reference prompts (Wang et al. 2022,
https://arxiv.org/abs/2211.00593); or what it has in a reference prompt drawn at random, the resample ablation of causal
scrubbing (Chan et al. 2022, https://www.alignmentforum.org/posts/JvZhhzycHu2Yd57RN/causal-scrubbing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from nnsight_core.prompts import token_rows
from nnterp.errors import PromptPairError, UsageError, did_you_mean
from nnterp.interventions.batching import in_batches
from nnterp.interventions.metrics import Metric
from nnterp.interventions.sites import (
    HEADS,
    Prompts,
    activations,
    chosen_kinds,
    chosen_layers,
    chosen_positions,
    prompt_ids,
    token_texts,
)
from nnterp.interventions.sweep import SweepResult, base_metric, sweep

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["ablation", "METHODS"]

METHODS = ("zero", "mean", "resample")


def ablation(
    model: StandardizedTransformer,
    prompts: Prompts,
    metric: Metric,
    sites: str | Sequence[str] = ("attentions_output", "mlps_output"),
    method: str = "zero",
    reference: Prompts | None = None,
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    each_position: bool = False,
    seed: int = 0,
    batch_size: int = 32,
) -> SweepResult:
    """Run the prompts with one site at a time ablated.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import probability
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> prompt = "The Eiffel Tower is in the city of"
    >>> result = ablation(model, prompt, probability(model, " Paris"))
    >>> result["mlps_output"].shape == (model.num_layers,)
    True

    Args:
        model: the model.
        prompts: one text, several with the same number of tokens, or token ids (prompt, position).
        metric: from logits (prompt, position, vocab) to (prompt).
        sites: names of accessors, as for :func:`~nnterp.interventions.activation_patching`.
        method: ``"zero"``; ``"mean"``: the mean over all tokens of the reference; ``"resample"``: the value at the same
            position of a reference prompt, drawn with ``seed`` for each prompt, the same for all sites.
        reference: the prompts for ``"mean"``, of any lengths, and ``"resample"``, with as many tokens as ``prompts``.
        layers: the layers; all if None.
        positions: the positions to ablate; all if None.
        each_position: ablate each position by itself instead of all of ``positions`` together.
        seed: for what is drawn.
        batch_size: how many rows go through the model at once.

    Returns:
        For each kind of site the metric, ``(prompt, layer[, head][, position])`` (with ``each_position``).

    Raises:
        UsageError: the method is unknown, or needs reference prompts, or has no use for them.
        PromptPairError: prompts differ in length.
        LayerIndexError, PositionError, MissingPartError, ClosedAttentionError: as in activation patching.
    """
    if method not in METHODS:
        raise UsageError(f"There is no ablation {method!r}. {did_you_mean(method, METHODS)} Give one of {METHODS}.")
    if (method == "zero") != (reference is None):
        raise UsageError(f"method={method!r} {'has no use for' if method == 'zero' else 'needs'} reference prompts.")
    ids = prompt_ids(model, prompts)
    kinds, wanted = chosen_kinds(model, sites), chosen_layers(model, layers)
    places = chosen_positions(ids.shape[1], positions)
    result = SweepResult({}, {}, base_metric(model, ids, metric), wanted, places, token_texts(model, ids))
    for kind in kinds:
        sources = _sources(model, ids, kind, wanted, method, reference, seed)
        run = partial(sweep, model, ids, metric, kind, sources=sources, batch_size=batch_size)
        result = result.having(kind, sources, each_position, run)
    return result


def _sources(
    model: StandardizedTransformer,
    ids: torch.Tensor,
    kind: str,
    layers: Sequence[int],
    method: str,
    reference: Prompts | None,
    seed: int,
) -> Mapping[int, torch.Tensor]:
    """What each layer's values are replaced by, in the shape of the values of ``ids``."""
    if method == "resample":
        assert reference is not None
        others = prompt_ids(model, reference)
        if others.shape[1] != ids.shape[1]:
            raise PromptPairError(
                f"The prompts have {ids.shape[1]} tokens, those that stand in for them {others.shape[1]}."
            )
        drawn = torch.randint(len(others), (len(ids),), generator=torch.Generator().manual_seed(seed))
        return activations(model, others[drawn], kind, layers)
    own = activations(model, ids, kind, layers)
    if method == "zero":
        return {layer: torch.zeros_like(value) for layer, value in own.items()}
    means = _means(model, reference, kind, layers)
    return {layer: means[layer].expand(value.shape).to(value.dtype) for layer, value in own.items()}


def _means(
    model: StandardizedTransformer, reference: Prompts | None, kind: str, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """The mean over all tokens of the reference, of each layer's values; in the shape of one position's value."""
    axis = 2 if kind in HEADS else 1
    rows = token_rows(model.tokenizer, reference, {})
    sums: dict[int, torch.Tensor] = {}
    # One prompt at a time, so that their lengths do not matter; in float32, for in half precision sums would not.
    for batch in in_batches(rows, 1, f"mean of {kind}", "prompt"):
        for layer, value in activations(model, torch.tensor(batch), kind, layers).items():
            total = value.float().sum((0, axis)).unsqueeze(axis - 1)[None]
            sums[layer] = sums[layer] + total if layer in sums else total
    count = sum(len(row) for row in rows)
    return {layer: total / count for layer, total in sums.items()}
