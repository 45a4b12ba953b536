"""One change at a time, many at once: a sweep over sites, with the sites as rows of a batch.

Each row of the batch is a prompt of its own in which one site has been given another value. A row's numbers do not
depend on the other rows, so a batch gives what as many single passes would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from nnterp.errors import UsageError
from nnterp.interventions.batching import in_batches
from nnterp.interventions.metrics import Metric, measured
from nnterp.interventions.sites import Site, axes_of, sites_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["base_metric", "batches", "filled", "sweep", "SweepResult"]


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a metric came to when one site at a time was changed.

    Args:
        values: by kind of site the metric, (prompt, layer, position) or as ``axes`` says; NaN where a layer has no such
            part. float32, on the CPU.
        axes: by kind of site the axes after that of the prompts: ``("layer", "position")``, ``("layer", "head")``, ...
        before: the metric of the prompts as they are, (prompt).
        layers: the layers of the layer axis.
        positions: the positions of the position axis, or those that were changed together.
        tokens: the text of each token of the first of the changed prompts.
    """

    values: Mapping[str, torch.Tensor]
    axes: Mapping[str, tuple[str, ...]]
    before: torch.Tensor
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]

    def __getitem__(self, kind: str) -> torch.Tensor:
        """The metric of one kind of site, mean over the prompts: (layer, position) or as ``axes`` says."""
        return self._of(kind).mean(0)

    def effect(self, kind: str) -> torch.Tensor:
        """How much the metric changed, mean over the prompts: (layer, position) or as ``axes`` says."""
        return self[kind] - self.before.mean()

    def having(
        self,
        kind: str,
        sources: Mapping[int, torch.Tensor],
        each_position: bool | None,
        run: Callable[[Sequence[Site]], torch.Tensor],
    ) -> Self:
        """The same with one more kind of site.

        Args:
            kind: the kind.
            sources: for each layer the values that are put, which show how many heads there are.
            each_position: each position by itself, or all together; if None together for heads alone.
            run: the metric when one site at a time is changed, (prompt, site).
        """
        axes = axes_of(kind, each_position)
        sites, shape = sites_of(kind, sources, self.layers, self.positions, axes)
        values = {**self.values, kind: filled(run(sites), sites, shape)}
        return replace(self, values=values, axes={**self.axes, kind: axes})

    def _of(self, kind: str) -> torch.Tensor:
        if kind not in self.values:
            raise UsageError(f"This result has no sites {kind!r}; it has {', '.join(self.values)}.")
        return self.values[kind]


def batches(sites: Sequence[Site], prompts: int, batch_size: int, title: str) -> Sequence[Sequence[Site]]:
    """The sites in batches of at most ``batch_size`` rows, but at least one site, with a progress bar.

    Raises:
        UsageError: the batch size is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: give 1 or more.")
    return in_batches(sites, max(1, batch_size // prompts), title)


def base_metric(model: StandardizedTransformer, ids: torch.Tensor, metric: Metric) -> torch.Tensor:
    """The metric of the prompts as they are: (prompt), on the CPU.

    Raises:
        UsageError: the model is in training mode, and another pass over the same prompts gives something else.
    """
    found = _measure(model, ids, metric)
    if any(module.training for module in model._module.modules()):
        again = _measure(model, ids, metric)
        if not torch.allclose(found, again, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise UsageError(
                f"The model is in training mode, and the metric of the same prompts is {found.tolist()} in one pass "
                f"and {again.tolist()} in the next: dropout changes every pass, so that no two can be compared. "
                "Say model.eval() first."
            )
    return found


def _measure(model: StandardizedTransformer, ids: torch.Tensor, metric: Metric) -> torch.Tensor:
    with torch.no_grad(), model.trace(ids):
        found = measured(metric, model.logits.value).cpu()
    return found


def sweep(
    model: StandardizedTransformer,
    ids: torch.Tensor,
    metric: Metric,
    kind: str,
    sites: Sequence[Site],
    sources: Mapping[int, torch.Tensor],
    batch_size: int,
) -> torch.Tensor:
    """The metric for each site, when that site alone has the value that it has in ``sources``: (prompt, site).

    Args:
        model: the model.
        ids: the prompts that are run, (prompt, position).
        metric: the metric.
        kind: the kind of the sites.
        sites: the sites.
        sources: for each layer the values to put, with the axes of the kind.
        batch_size: how many rows go through the model at once; at least all prompts of one site do.
    """
    accessor = getattr(model, kind)
    prompts = len(ids)
    found: list[torch.Tensor] = []
    for part in batches(sites, prompts, batch_size, kind):
        with torch.no_grad(), model.trace(ids.repeat(len(part), 1)):
            for layer in sorted({site.layer for site in part}):
                value = accessor[layer].value.clone()
                for number, site in enumerate(part):
                    if site.layer == layer:
                        site.put(value[number * prompts : (number + 1) * prompts], sources[layer])
                accessor[layer] = value
            found.extend(measured(metric, rows).cpu() for rows in model.logits.value.split(prompts))
    return torch.stack(found, 1) if found else torch.empty(prompts, 0)


def filled(found: torch.Tensor, sites: Sequence[Site], shape: Sequence[int]) -> torch.Tensor:
    """The numbers of a sweep, (prompt, site), at their places: (prompt, *shape), NaN where there is no site."""
    whole = torch.full((*shape, len(found)), float("nan"))
    for number, site in enumerate(sites):
        whole[site.index] = found[:, number]
    return whole.movedim(-1, 0)
