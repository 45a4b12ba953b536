"""Path patching: what reaches a part straight from an earlier one, with all that lies between held still.

result = path_patching(model, clean, corrupted, metric, receivers=[("mlps_input", 4)], senders="attentions_output")
result = path_patching(model, clean, corrupted, metric)             # from each part straight to the logits

Three runs for each sender (Wang et al. 2022, https://arxiv.org/abs/2211.00593, appendix B; Goldowsky-Dill et al. 2023,
https://arxiv.org/abs/2304.05969): the clean run gives the sender's value. In a run on the corrupted prompt the sender
has that value and every other part its corrupted one, and what the receivers take there is kept. In a second run on the
corrupted prompt the receivers take that, and everything else follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nnterp.accessors import Place, read, write
from nnterp.errors import UsageError
from nnterp.interventions.activation_patching import PatchingResult, unpatched
from nnterp.interventions.metrics import Metric, measured
from nnterp.interventions.sites import HEADS, Prompts, Site, activations, chosen_kinds
from nnterp.interventions.sweep import batches

if TYPE_CHECKING:
    from nnterp.rename_plan import PartPlan
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["path_patching", "Receiver", "RECEIVERS", "SENDERS"]

#: What adds to the residual stream.
SENDERS = ("attentions_output", "mixers_output", "mlps_output", "heads_output")

#: What a path may end at: what a part takes, or what a layer does.
RECEIVERS = (
    "layers_input",
    "attentions_input",
    "mixers_input",
    "mlps_input",
    "layers_output",
    "queries",
    "keys",
    "values",
)

#: A kind of site and a layer; of ``queries`` and the like also a head.
Receiver = tuple[str, int] | tuple[str, int, int]


def path_patching(
    model: StandardizedTransformer,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    senders: str | Sequence[str] = ("attentions_output", "mlps_output"),
    receivers: Sequence[Receiver] = (("layers_output", -1),),
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    each_position: bool | None = None,
    freeze_mlps: bool = True,
    batch_size: int = 32,
) -> PatchingResult:
    """Patch the direct path from one sender at a time to the receivers.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_difference
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> clean = "John and Mary went to the store. John handed the milk to"
    >>> corrupted = "John and Mary went to the store. Mary handed the milk to"
    >>> result = path_patching(model, clean, corrupted, logit_difference(model, " Mary", " John"))
    >>> result["mlps_output"].shape == (model.num_layers, len(result.tokens))
    True

    Args:
        model: the model.
        clean: the prompts that give the senders' values, as for :func:`~nnterp.interventions.activation_patching`.
        corrupted: the prompts that are run, as there.
        metric: from logits (prompt, position, vocab) to (prompt).
        senders: some of :data:`SENDERS`; ``heads_output`` sends one head at a time.
        receivers: some of :data:`RECEIVERS` with a layer, all patched together at all positions: ``("mlps_input", 3)``.
            Of ``queries``, ``keys`` and ``values`` also one head: ``("queries", 3, 0)``. The last layer's output, the
            default, is the direct path to the logits.
        layers: the senders' layers; all if None.
        positions: the senders' positions; all if None.
        each_position: each position by itself, or all of ``positions`` together; if None together for heads alone.
        freeze_mlps: hold the MLPs in between still (Goldowsky-Dill), or let them follow the sender, so that paths
            through MLPs count as direct (Wang).
        batch_size: how many rows go through the model at once.

    Returns:
        For each kind of sender the metric, ``(prompt, layer[, head][, position])``; as corrupted where the sender comes
        after all receivers, NaN where a layer has no such part.

    Raises:
        PromptPairError, UsageError, LayerIndexError, PositionError, MissingPartError, ClosedAttentionError: as there.
    """
    kinds, ends = _senders(model, senders), _receivers(model, receivers)
    ids, corrupted_ids, result = unpatched(model, clean, corrupted, metric, layers, positions)
    for kind in kinds:
        paths = _Paths(model, corrupted_ids, kind, ends, freeze_mlps)
        sources = activations(model, ids, kind, result.layers)
        result = result.having(kind, sources, each_position, partial(paths.swept, sources, metric, batch_size))
    return result


def _senders(model: StandardizedTransformer, given: str | Sequence[str]) -> tuple[str, ...]:
    kinds = chosen_kinds(model, given)
    if not set(kinds) <= set(SENDERS):
        raise UsageError(f"senders={given!r}: what adds to the residual stream is one of {', '.join(SENDERS)}.")
    return kinds


def _receivers(model: StandardizedTransformer, given: Sequence[Receiver]) -> dict[tuple[str, int], list[int] | None]:
    """By kind and layer, counted from 0, the heads that receive; None for all of the value."""
    found: dict[tuple[str, int], list[int] | None] = {}
    for each in given:
        if not isinstance(each, tuple) or len(each) not in (2, 3):
            raise UsageError(f"A receiver is a kind of site and a layer, such as ('mlps_input', 3), not {each!r}.")
        kind, layer, *heads = each
        if kind not in RECEIVERS:
            raise UsageError(f"A path does not end at {kind!r}. Give some of: {', '.join(RECEIVERS)}.")
        if heads and kind not in HEADS:
            raise UsageError(f"{each!r} names a head, but {kind} is of all heads together.")
        getattr(model, kind).place(layer)
        key = (kind, model.layers_output.position(layer))
        others = found.get(key, [])
        found[key] = [*others, *heads] if heads and others is not None else None
    if not found:
        raise UsageError("receivers=[] leaves nowhere for a path to end.")
    return found


@dataclass(frozen=True)
class _Held:
    """What a run holds still, but for the rows of the senders that it is about.

    Args:
        place: where it stands.
        layer: in which layer.
        sends: it is what senders of this layer send.
        follows: what it is made of sends, and so it follows in the rows of senders of this layer.
    """

    place: Place
    layer: int
    sends: bool = False
    follows: bool = False


class _Paths:
    """Runs on the corrupted prompts in which senders of one kind reach the receivers straight.

    Args:
        model: the model.
        ids: the corrupted prompts, (prompt, position).
        kind: the kind of the senders.
        receivers: by kind and layer the heads that receive.
        freeze_mlps: whether MLPs are held still.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        ids: torch.Tensor,
        kind: str,
        receivers: dict[tuple[str, int], list[int] | None],
        freeze_mlps: bool,
    ) -> None:
        self._model, self._ids, self._kind, self._receivers = model, ids, kind, receivers
        self._freeze_mlps = freeze_mlps
        root: Any = model
        self._root = root
        #: What a run comes by, in order: something to hold, or the kind and layer of a receiver.
        self._stops = [stop for layer in range(model.num_layers) for stop in self._stops_of(layer)]
        with torch.no_grad(), model.trace(ids) as tracer:
            self._announce()
            self._still = {stop.place: read(root, stop.place).value for stop in self._stops if isinstance(stop, _Held)}
            tracer.stop()

    def _announce(self) -> None:
        """Tell the open trace at once inside which modules it is to look: half-way through one, it costs a dry run."""
        for stop in self._stops:
            place = stop.place if isinstance(stop, _Held) else getattr(self._model, stop[0]).place(stop[1])
            if place.kind.startswith("source."):
                _ = self._root.get(place.path).source

    def _stops_of(self, layer: int) -> list[_Held | tuple[str, int]]:
        model, sender = self._model, getattr(self._model, self._kind)
        stops = self._ends(layer, "layers_input")
        for part in self._parts(layer):
            is_mixer = part is model._plan.layers[layer].mixer
            if part.kind == "attention":
                stops += self._ends(layer, "attentions_input")
            if is_mixer:
                stops += self._ends(layer, "mixers_input")
            if part.kind == "attention":
                stops += self._ends(layer, "queries", "keys", "values")
            if part.kind == "mlp":
                stops += self._ends(layer, "mlps_input")
            if part.kind == "attention" and self._kind in HEADS and sender.has(layer):
                # Holding the heads would not do: a gate may come after them, which takes what the layer takes.
                stops.append(_Held(sender.place(layer), layer, sends=True))
                stops.append(_Held(self._place(part, layer), layer, follows=True))
                continue
            sends = self._is_sender(part, layer)
            if self._freeze_mlps or part.kind not in ("mlp", "also_added") or sends:
                stops.append(_Held(self._place(part, layer), layer, sends))
        return stops + self._ends(layer, "layers_output")

    def _ends(self, layer: int, *kinds: str) -> list[_Held | tuple[str, int]]:
        return [(kind, layer) for kind in kinds if (kind, layer) in self._receivers]

    def _is_sender(self, part: PartPlan, layer: int) -> bool:
        sender = getattr(self._model, self._kind)
        return bool(sender.has(layer) and sender.place(layer).path == part.output)

    def _place(self, part: PartPlan, layer: int) -> Place:
        """Where what a part gives stands; the accessor's own place, where there is one."""
        for name, kind in (("attentions_output", "attention"), ("mlps_output", "mlp")):
            if part.kind == kind:
                return getattr(self._model, name).place(layer)  # type: ignore[no-any-return]
        label = f"{part.kind} of layer {layer}"
        return Place(part.output, "output", label, shape=self._model.mixers_output.shape)

    def _parts(self, layer: int) -> list[PartPlan]:
        """The parts of a layer in the order in which they run."""
        parts = self._model._plan.layers[layer].parts
        modules = [self._root.get(part.output) for part in parts]
        if len(parts) < 2:
            return list(parts)
        with torch.no_grad(), self._model.trace(self._ids[:1]) as tracer:
            cache = tracer.cache(modules=modules)
        order = list(cache.keys())
        return sorted(parts, key=lambda part: order.index(self._root.get(part.output).path))

    def swept(
        self, sources: Mapping[int, torch.Tensor], metric: Metric, batch_size: int, senders: Sequence[Site]
    ) -> torch.Tensor:
        """The metric for each sender, (prompt, sender)."""
        found: list[torch.Tensor] = []
        for part in batches(senders, len(self._ids), batch_size, self._kind):
            found.extend(self.measured(self.taken(part, sources), metric))
        return torch.stack(found, 1)

    def taken(
        self, senders: Sequence[Site], sources: Mapping[int, torch.Tensor]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """What the receivers take; the senders, each with all prompts, are rows one after the other."""
        model = self._model
        found: dict[tuple[str, int], torch.Tensor] = {}
        with torch.no_grad(), model.trace(self._ids.repeat(len(senders), 1)) as tracer:
            self._announce()
            for stop in self._stops:
                if isinstance(stop, _Held):
                    self._hold(stop, senders, sources)
                else:
                    found[stop] = getattr(model, stop[0])[stop[1]].value
            tracer.stop()
        return found

    def _hold(self, stop: _Held, senders: Sequence[Site], sources: Mapping[int, torch.Tensor]) -> None:
        still, prompts = self._still[stop.place], len(self._ids)
        value = still.repeat(len(senders), *(1,) * (still.ndim - 1))
        for number, site in enumerate(senders):
            rows = slice(number * prompts, (number + 1) * prompts)
            if site.layer == stop.layer and stop.sends:
                site.put(value[rows], sources[site.layer])
            elif site.layer == stop.layer and stop.follows:
                value[rows] = read(self._root, stop.place).value[rows]
        write(self._root, stop.place, value)

    def measured(self, taken: Mapping[tuple[str, int], torch.Tensor], metric: Metric) -> list[torch.Tensor]:
        """The metric of each sender, (prompt), when the receivers take what is given."""
        model, prompts = self._model, len(self._ids)
        rows = len(next(iter(taken.values()))) // prompts
        with torch.no_grad(), model.trace(self._ids.repeat(rows, 1)):
            for (kind, layer), value in taken.items():
                accessor, heads = getattr(model, kind), self._receivers[kind, layer]
                if heads is None:
                    accessor[layer] = value
                    continue
                there = value.shape[1]
                if not all(-there <= head < there for head in heads):
                    raise UsageError(f"{kind}[{layer}] has {there} heads, and a path is to end at one of {heads}.")
                accessor[layer][:, heads] = value[:, heads]
            found = [measured(metric, each).cpu() for each in model.logits.value.split(prompts)]
        return found
