"""Activation patching: which values, put from one run into another, bring back what the other run lost?

result = activation_patching(model, clean, corrupted, logit_difference(model, " Mary", " John"))
result.recovered("layers_output")           # (layer, position): 0 as corrupted, 1 as clean
activation_patching(model, clean, corrupted, metric, "heads_output")      # by (layer, head)

The model runs on the corrupted prompt, and one site at a time has the value that it has in the clean run: causal
mediation analysis (Vig et al. 2020, https://arxiv.org/abs/2004.12265), causal tracing (Meng et al. 2022,
https://arxiv.org/abs/2202.05262), and for heads Wang et al. 2022 (https://arxiv.org/abs/2211.00593). For the other
direction, which values break a clean run, swap the two prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from nnterp.choices import DEFAULT_SITES
from nnterp.errors import UsageError
from nnterp.interventions.metrics import Metric
from nnterp.interventions.sites import (
    Prompts,
    activations,
    chosen_kinds,
    chosen_layers,
    chosen_positions,
    prompt_pair,
    token_texts,
)
from nnterp.interventions.sweep import SweepResult, base_metric, sweep

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["activation_patching", "DEFAULT_SITES", "PatchingResult", "unpatched"]


@dataclass(frozen=True, eq=False)
class PatchingResult(SweepResult):
    """What a metric came to on the corrupted prompts when one site at a time had its clean value.

    Args:
        clean: the metric of the clean prompts, (prompt); ``before`` is that of the corrupted ones.
        clean_tokens: the text of each token of the first clean prompt; ``tokens`` are those of the corrupted one.
    """

    clean: torch.Tensor
    clean_tokens: tuple[str, ...]

    @property
    def corrupted(self) -> torch.Tensor:
        """The metric of the corrupted prompts, (prompt)."""
        return self.before

    def recovered(self, kind: str) -> torch.Tensor:
        """Which part of what was lost is back: 0 as corrupted, 1 as clean; (layer, position) or as ``axes`` says.

        The means over the prompts are taken first, so that a prompt that lost almost nothing counts for little.

        Raises:
            UsageError: clean and corrupted prompts have the same metric, so nothing was lost.
        """
        lost = self.clean.mean() - self.before.mean()
        if lost == 0:
            raise UsageError(
                f"The metric is {float(self.clean.mean()):g} on the clean and on the corrupted prompts: "
                "nothing was lost that could be recovered. result.effect(...) gives the change itself."
            )
        return self.effect(kind) / lost


def activation_patching(
    model: StandardizedTransformer,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    sites: str | Sequence[str] = DEFAULT_SITES,
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    each_position: bool | None = None,
    batch_size: int = 32,
) -> PatchingResult:
    """Run the corrupted prompts with one site at a time as in the clean run.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_difference
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> clean = "John and Mary went to the store. John handed the milk to"
    >>> corrupted = "John and Mary went to the store. Mary handed the milk to"
    >>> result = activation_patching(model, clean, corrupted, logit_difference(model, " Mary", " John"))
    >>> result["layers_output"].shape == (model.num_layers, len(result.tokens))
    True
    >>> bool(result.recovered("layers_output")[-1, -1] > 0.99)      # the last layer at the last position is the answer
    True

    Sites are rows of a batch, so the sweep takes (sites * prompts / batch_size) passes. No gradients are kept.

    Args:
        model: the model.
        clean: the prompts from which values are taken: one text, several, or token ids (prompt, position).
        corrupted: the prompts that are run, one for each clean one and with as many tokens.
        metric: from logits (prompt, position, vocab) to (prompt); see :mod:`nnterp.interventions.metrics`.
        sites: names of accessors. The residual stream: ``layers_output``, ``layers_input``; attention:
            ``attentions_output`` (or ``mixers_output``, which layers without attention have too); ``mlps_output``; the
            inputs of those. By head: ``heads_output``, ``queries``, ``keys``, ``values`` (``num_kv_heads`` of these).
        layers: one layer or several; all if None. Negative ones count from the last.
        positions: the positions; likewise.
        each_position: each position by itself, or all of ``positions`` together; if None together for heads alone.
        batch_size: how many rows go through the model at once.

    Returns:
        For each kind of site the metric, ``(prompt, layer[, head][, position])``; NaN where a layer has no such part.

    Raises:
        PromptPairError: the prompts differ in number or in their number of tokens.
        UsageError: there are no such sites, the metric gives something else than one number for each prompt, or the
            model is in training mode and its dropout makes each pass another.
        LayerIndexError, PositionError: the model has no such layer, the prompts no such position.
        MissingPartError: no layer of the model has such a part.
        ClosedAttentionError: heads are asked for, and the model's attention does not show them.
    """
    kinds = chosen_kinds(model, sites)
    ids, corrupted_ids, result = unpatched(model, clean, corrupted, metric, layers, positions)
    for kind in kinds:
        sources = activations(model, ids, kind, result.layers)
        run = partial(sweep, model, corrupted_ids, metric, kind, sources=sources, batch_size=batch_size)
        result = result.having(kind, sources, each_position, run)
    return result


def unpatched(
    model: StandardizedTransformer,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    layers: Sequence[int] | int | None,
    positions: Sequence[int] | int | None,
) -> tuple[torch.Tensor, torch.Tensor, PatchingResult]:
    """The token ids of both kinds of prompts, (prompt, position), and a result with their metrics, and no sites yet."""
    pair = prompt_pair(model, clean, corrupted)
    wanted, places = chosen_layers(model, layers), chosen_positions(pair[0].shape[1], positions)
    after, before = (base_metric(model, ids, metric) for ids in pair)
    tokens, others = (token_texts(model, ids) for ids in reversed(pair))
    return *pair, PatchingResult({}, {}, before, wanted, places, tokens, after, others)
