"""Attribution patching: an estimate of every activation patch at once, from one gradient.

result = attribution_patching(model, clean, corrupted, metric)                # two forward passes, one backward
result = attribution_patching(model, clean, corrupted, metric, steps=8)       # integrated gradients: closer

To first order, a value ``a`` of the corrupted run that becomes its clean value changes the metric by
``(a_clean - a) * gradient`` (Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching;
Syed et al. 2023, https://arxiv.org/abs/2310.10348). Where the metric bends in between, the mean of the gradients on the
way from the corrupted to the clean token embeddings serves better (integrated gradients, Sundararajan et al. 2017,
https://arxiv.org/abs/1703.01365; for patching Hanna et al. 2024, https://arxiv.org/abs/2403.17806).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from nnterp.errors import UsageError
from nnterp.interventions.activation_patching import DEFAULT_SITES, PatchingResult, unpatched
from nnterp.interventions.batching import progress
from nnterp.interventions.metrics import Metric, check_gradients, measured
from nnterp.interventions.sites import Prompts, Site, activations, chosen_kinds

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["attribution_patching"]


def attribution_patching(
    model: StandardizedTransformer,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    sites: str | Sequence[str] = DEFAULT_SITES,
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    each_position: bool | None = None,
    steps: int | None = None,
) -> PatchingResult:
    """What :func:`~nnterp.interventions.activation_patching` would give, estimated from gradients.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_difference
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> clean = "John and Mary went to the store. John handed the milk to"
    >>> corrupted = "John and Mary went to the store. Mary handed the milk to"
    >>> result = attribution_patching(model, clean, corrupted, logit_difference(model, " Mary", " John"), steps=4)
    >>> result["attentions_output"].shape == (model.num_layers, len(result.tokens))
    True

    The gradients of the model's parameters stay as they are.

    Args:
        model: the model.
        clean: the prompts whose values are put, as for :func:`~nnterp.interventions.activation_patching`.
        corrupted: the prompts that are run, as there.
        metric: from logits (prompt, position, vocab) to (prompt), by differentiable operations.
        sites: names of accessors, as there. Of ``queries`` and ``keys`` it is poor where attention is all but settled.
        layers: the layers; all if None.
        positions: the positions; all if None.
        each_position: each position by itself, or all of ``positions`` together; if None together for heads alone.
        steps: None for the gradient of the corrupted run; a number for the mean of the gradients at so many points,
            evenly spread on the way to the clean embeddings (midpoints).

    Returns:
        The metric that each patch is estimated to give, ``(prompt, layer[, head][, position])``; NaN where none is.

    Raises:
        PromptPairError, UsageError, LayerIndexError, PositionError, MissingPartError, ClosedAttentionError: as there.
        CannotError: ``steps`` is given, and this family's token embeddings cannot be set.
    """
    check_gradients()
    if steps is not None and steps < 1:
        raise UsageError(f"steps={steps}: give 1 or more, or None for the gradient of the corrupted run.")
    kinds = chosen_kinds(model, sites)
    ids, corrupted_ids, result = unpatched(model, clean, corrupted, metric, layers, positions)
    way = None if steps is None else _way(model, ids, corrupted_ids, steps)
    for kind in kinds:
        there, here = (activations(model, each, kind, result.layers) for each in (ids, corrupted_ids))
        gradients = _mean_gradients(model, corrupted_ids, metric, kind, tuple(here), way)
        effects = {layer: ((there[layer] - here[layer]).float() * gradients[layer]) for layer in here}
        result = result.having(kind, here, each_position, partial(_estimates, result.before, effects))
    return result


def _estimates(before: torch.Tensor, effects: Mapping[int, torch.Tensor], sites: Sequence[Site]) -> torch.Tensor:
    """The metric that each site comes to, (prompt, site): what its numbers do adds up."""
    return torch.stack([before + site.of(effects[site.layer]).flatten(1).sum(1).cpu() for site in sites], 1)


def _way(
    model: StandardizedTransformer, clean: torch.Tensor, corrupted: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Token embeddings on the way from the corrupted to the clean ones, each (prompt, position, hidden)."""
    ends = []
    for ids in (clean, corrupted):
        with torch.no_grad(), model.trace(ids) as tracer:
            ends.append(model.token_embeddings.value)
            tracer.stop()
    shares = ((step + 0.5) / steps for step in range(steps))
    return [ends[1] + share * (ends[0] - ends[1]) for share in shares]


def _mean_gradients(
    model: StandardizedTransformer,
    ids: torch.Tensor,
    metric: Metric,
    kind: str,
    layers: Sequence[int],
    way: Sequence[torch.Tensor] | None,
) -> dict[int, torch.Tensor]:
    """The metric's gradient at each layer's value, float32; the mean over the embeddings on the way, if given."""
    points: Sequence[torch.Tensor | None] = [None] if way is None else way
    sums: dict[int, torch.Tensor] = {}
    for point in progress(points, kind, "step"):
        for layer, gradient in _gradients(model, ids, metric, kind, layers, point).items():
            sums[layer] = sums[layer] + gradient if layer in sums else gradient
    return {layer: total / len(points) for layer, total in sums.items()}


def _gradients(
    model: StandardizedTransformer,
    ids: torch.Tensor,
    metric: Metric,
    kind: str,
    layers: Sequence[int],
    embeddings: torch.Tensor | None,
) -> dict[int, torch.Tensor]:
    accessor = getattr(model, kind)
    values: list[torch.Tensor] = []
    with torch.enable_grad(), model.trace(ids):
        if embeddings is not None:
            model.token_embeddings = embeddings
        for layer in layers:
            value = accessor[layer].value
            # What comes before the first of the values needs no gradient, nor do the parameters: this is the leaf.
            value = value.view_as(value) if values else value.detach().requires_grad_()
            # What stands here may stand elsewhere too, as the input of a parallel MLP does. The copy goes on from here
            # alone, and the model may write into it.
            accessor[layer] = value.clone()
            values.append(value)
        total = measured(metric, model.logits.value).sum()
        if not total.requires_grad:
            raise UsageError(
                "The metric's result has no gradient: it leaves torch, or is made of operations that have none "
                "(argmax, comparisons). activation_patching takes such a metric."
            )
        found = torch.autograd.grad(total, values)
    return {layer: gradient.float() for layer, gradient in zip(layers, found, strict=True)}
