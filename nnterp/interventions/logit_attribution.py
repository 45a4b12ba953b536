"""Direct logit attribution: how much does each part of the model add to a token's logit?

found = logit_attribution(model, "The Eiffel Tower is in the city of", " Paris")
dict(zip(found.names, found.scores[:, 0].tolist()))       # {"embeddings": ..., "attention 0": ..., "mlp 0": ..., ...}
logit_attribution(model, prompt, answer, by="head").by_layer()       # (layer, head, prompt)

The final norm is held as it is in this pass, and everything after it is linear, so that what is added to the residual
stream becomes what is added to the logit (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits",
https://transformer-circuits.pub/2021/framework).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from nnterp.additions import Addition
from nnterp.calling import config_of
from nnterp.errors import CannotError, UsageError
from nnterp.interventions.attribution_units import (
    HeadShares,
    NeuronShares,
    Shares,
    at_end,
    last_matrices,
    onward,
    pulled_back,
)
from nnterp.interventions.batching import as_prompts, in_batches
from nnterp.interventions.metrics import Answer, token_ids
from nnterp.multipliers import times
from nnterp.norms import rounding

if TYPE_CHECKING:
    from nnterp.multipliers import Multiplier
    from nnterp.norms import FrozenNorm
    from nnterp.rename_plan import PartPlan
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["logit_attribution", "LogitAttribution"]


#: How a model can be taken apart, and of what kind of part the pieces are that are taken apart once more.
WAYS = {"part": None, "layer": None, "head": "attention", "neuron": "mlp"}


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part adds to a logit, or to the difference of two.

    Args:
        names: what the parts are called, in forward order; the last is the bias of the final norm and the unembedding.
        scores: (part, prompt), float32 on the CPU, in units of the logits.
        units: by layer the rows of ``scores`` that are its heads or neurons.
    """

    names: tuple[str, ...]
    scores: torch.Tensor
    units: Mapping[int, range] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        """What the scores sum to: the logit at the last position, before soft-capping, (prompt)."""
        return self.scores.double().sum(0).float()

    def by_layer(self) -> torch.Tensor:
        """The scores of heads or neurons, (layer, head or neuron, prompt); NaN where a layer has none or fewer.

        Raises:
            UsageError: the model was not taken apart by head or by neuron.
        """
        if not self.units:
            raise UsageError("This attribution is not by head or neuron: ask for by='head' or by='neuron'.")
        shape = max(self.units) + 1, max(map(len, self.units.values())), self.scores.shape[1]
        whole = torch.full(shape, float("nan"))
        for layer, rows in self.units.items():
            whole[layer, : len(rows)] = self.scores[rows.start : rows.stop]
        return whole


@dataclass
class _Pieces:
    """What the last position of some prompts is the sum of.

    Args:
        names: what the pieces are called.
        stack: what each adds there, (prompt, 1, hidden).
        end: their sum, as the model has it.
        norm: the final norm of the pass.
        shares: of pieces that are taken apart once more, by their index, the layer and the heads or neurons.
    """

    names: list[str]
    stack: list[torch.Tensor]
    end: torch.Tensor
    norm: FrozenNorm | None
    shares: dict[int, tuple[int, Shares]] = field(default_factory=dict)


def logit_attribution(
    model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    answer: Answer,
    against: Answer | None = None,
    by: str = "part",
    batch_size: int = 32,
) -> LogitAttribution:
    """What each part of the model adds to the logit of ``answer`` after each prompt.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> found = logit_attribution(model, "The Eiffel Tower is in the city of", " Paris", against=" Rome")
    >>> len(found.names) == 2 + 2 * model.num_layers
    True
    >>> paris, rome = (model.tokenizer.encode(city)[0] for city in (" Paris", " Rome"))
    >>> with torch.no_grad(), model.trace("The Eiffel Tower is in the city of"):
    ...     logits = model.logits[:, -1].save()
    >>> torch.allclose(found.logits, logits[:, paris] - logits[:, rome], atol=1e-3)
    True

    Args:
        model: the model.
        prompts: one prompt or several.
        answer: the token, as text or id; one for all prompts or one for each.
        against: a second token, whose logit is taken away.
        by: ``"part"``: the embeddings, then what mixes positions (attention, or what a layer has in its place) and the
            MLP of each layer. ``"layer"``: the embeddings, then each layer as a whole. ``"head"``, ``"neuron"``: as by
            part, with each attention as its heads, or each MLP as its neurons, and the bias of their output matrix.
        batch_size: how many prompts go through the model at once.

    Raises:
        UsageError: ``by`` is something else, there is no prompt, or an answer is more than one token.
        CannotError: the family's logits are not linear in what its parts add, or an MLP is made of experts: the reason
            is given.
        MissingPartError: the model has no attention, or no MLP, that could be taken apart.
        ClosedProjectionError: by head, and the heads of this attention cannot be told apart.
        InputError: a prompt has no token, or more than the model has positions.
    """
    if by not in WAYS:
        raise UsageError(f"by={by!r} is no way to take the model apart: give one of {', '.join(map(repr, WAYS))}.")
    given = as_prompts(prompts)
    directions, biases = _directions(model, answer, against, len(given))
    taken = partial(_by_layer, model) if by == "layer" else _ByPart(model, by, given)
    rows = []
    for batch in in_batches(range(len(given)), batch_size, "logit attribution"):
        chosen = slice(batch[0], batch[-1] + 1)
        pieces = taken(given[chosen])
        _check(model, pieces)
        names, units, scores = _scores(model, pieces, directions[chosen], biases[chosen])
        rows.append(scores)
    return LogitAttribution(names, torch.cat(rows, 1).float(), units)


def _directions(
    model: StandardizedTransformer, answer: Answer, against: Answer | None, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each prompt the direction in the final norm's output, (prompt, hidden), and the bias, (prompt); float64."""

    def of(which: Answer) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.atleast_1d(token_ids(model, which)).cpu()
        if len(ids) not in (1, count):
            raise UsageError(f"There are {len(ids)} answers for {count} prompts: give one, or one for each.")
        ids = ids.expand(count)
        return model.unembedding_directions(ids).double().cpu(), model.unembedding_bias(ids).double().cpu()

    directions, biases = of(answer)
    if against is not None:
        others = of(against)
        directions, biases = directions - others[0], biases - others[1]
    return directions, biases


def _scores(
    model: StandardizedTransformer, pieces: _Pieces, directions: torch.Tensor, biases: torch.Tensor
) -> tuple[tuple[str, ...], dict[int, range], torch.Tensor]:
    """Names, the rows of units by layer, and scores, (part, prompt), float64."""
    names: list[str] = []
    units: dict[int, range] = {}
    rows: list[torch.Tensor] = []
    before = pulled_back(pieces.norm, directions)
    for index, (name, added) in enumerate(zip(pieces.names, pieces.stack, strict=True)):
        whole = (added[:, 0].double().cpu() * before).sum(-1)
        if index not in pieces.shares:
            names.append(name)
            rows.append(whole[None])
            continue
        layer, shares = pieces.shares[index]
        each, bias = shares.along(before)
        _check_shares(model, name, each.sum(0) + bias - whole, added, before)
        units[layer] = range(len(names), len(names) + len(each))
        unit = "head" if isinstance(shares.units, HeadShares) else "neuron"
        names += [f"{name} {unit} {number}" for number in range(len(each))] + [f"{name} bias"]
        rows += [each, bias[None]]
    constant = biases
    if pieces.norm is not None:
        constant = constant + directions @ pieces.norm.bias.double().cpu()
    return (*names, "bias"), units, torch.cat([*rows, constant[None]])


def _by_layer(model: StandardizedTransformer, prompts: list[str]) -> _Pieces:
    with torch.no_grad(), model.trace(prompts) as tracer:
        stream = [_last(model.layers_input[0])]
        stream += [_last(model.layers_output[layer]) for layer in range(model.num_layers)]
        end, norm = _end(model)
        tracer.stop()
    names = ["embeddings", *(f"layer {layer}" for layer in range(model.num_layers))]
    return _Pieces(names, [stream[0], *(after - before for before, after in pairwise(stream))], end, norm)


class _ByPart:
    """Takes a model apart into its parts, and those of one kind into their heads or neurons.

    Args:
        model: the model.
        by: one of :data:`WAYS`.
        prompts: some prompts, by which the last matrix of each MLP is found.
    """

    def __init__(self, model: StandardizedTransformer, by: str, prompts: Sequence[str]) -> None:
        self._model = model
        self._parts = [(layer, part) for layer, plan in enumerate(model._plan.layers) for part in plan.parts]
        _check_parts(model, self._parts, by)
        self._split = {layer: part for layer, part in self._parts if part.kind == WAYS[by]}
        if WAYS[by] and not self._split:
            # Says why there are none.
            (model.attentions_output if by == "head" else model.mlps_output).place(0)
        self._matrices = last_matrices(model, prompts) if by == "neuron" else {}

    def __call__(self, prompts: list[str]) -> _Pieces:
        """The pieces of some prompts."""
        model, paths = self._model, {part.contribution for _, part in self._parts}
        paths |= {part.output for part in self._split.values()}
        inside: dict[int, torch.Tensor] = {}
        with torch.no_grad(), model.trace(prompts) as tracer:
            # A cache, for parts that stand side by side may run in any order.
            cache = tracer.cache(modules=[model.get(path) for path in sorted(paths)])
            names, stack = ["embeddings"], [_last(model.layers_input[0])]
            for layer in self._split:
                inside[layer] = self._inside(layer, len(prompts))
            end, norm = _end(model)
            tracer.stop()
        made = {path: at_end(model, cache[path].output, len(prompts)) for path in paths}
        # What a number that stood in the stream from the start would be multiplied by up to the end, (hidden).
        ones, config = torch.ones_like(stack[0][0, 0]), config_of(model._module)
        factors, places = [ones], {}
        for layer, part in self._parts:
            plan, name = model._plan.layers[layer], f"{part.kind.replace('_', ' ')} {layer}"
            addition = Addition(part, config, model.get(plan.path)._module)
            if part.stream_bias:
                names.append(f"bias before {name}")
                stack, factors = [*stack, torch.zeros_like(stack[0])], [*factors, ones]
            before = _scaled(part.stream_multiplier, stack, addition)
            if part.stream_bias:
                before[-1] = addition.stream(stack[-1])
            names.append(name)
            stack = [*before, addition.contribution(made[part.contribution])]
            factors = [*_scaled(part.stream_multiplier, factors, addition), *_scaled(part.multiplier, [ones], addition)]
            if part is self._split.get(layer):
                places[layer] = len(stack) - 1, addition
            if part is plan.parts[-1]:
                stack, factors = (_scaled(plan.multiplier, each, addition) for each in (stack, factors))
        shares = {
            index: (layer, self._shares(layer, inside[layer], made, factors[index], addition))
            for layer, (index, addition) in places.items()
        }
        return _Pieces(names, [each.detach() for each in stack], end, norm, shares)

    def _inside(self, layer: int, prompts: int) -> torch.Tensor:
        """At the last position what each head gives, (prompt, head, hidden), or the neurons, (prompt, neuron)."""
        model = self._model
        if layer not in self._matrices:
            return model.heads_contribution[layer].value[:, :, -1].clone()  # type: ignore[no-any-return]
        taken = model.get(self._matrices[layer].path).input.value
        return at_end(model, taken, prompts)[:, 0].clone()

    def _shares(
        self,
        layer: int,
        inside: torch.Tensor,
        made: Mapping[str, torch.Tensor],
        factor: torch.Tensor,
        addition: Addition,
    ) -> Shares:
        part, matrix = self._split[layer], self._matrices.get(layer)
        units: HeadShares | NeuronShares
        if matrix is None:
            units = HeadShares(inside, made[part.output][:, 0])
        else:
            units = NeuronShares(self._model._module.get_submodule(matrix.path), matrix.factor, inside)
        norm = onward(self._model, part, made[part.output], made[part.contribution])
        bias = part.bias.value(addition.layer) if part.bias else None
        return Shares(units, norm, factor, bias)


def _scaled(multiplier: Multiplier | None, values: list[torch.Tensor], addition: Addition) -> list[torch.Tensor]:
    return [times(multiplier, each, addition.config, addition.layer) for each in values]


def _check_parts(model: StandardizedTransformer, parts: list[tuple[int, PartPlan]], by: str) -> None:
    asked = f"logit_attribution(by={by!r})"
    model._spec.refuse("contributions", asked)
    for layer, part in parts:
        where = part.stream or part.sum_norm
        if where:
            reason = f"in layer {layer} the residual stream itself goes through {where}: it is no sum any more."
            raise CannotError(asked, f"{reason} by='layer' can be had.", model._spec.where(f"layer.{part.kind}"))


def _end(model: StandardizedTransformer) -> tuple[torch.Tensor, FrozenNorm | None]:
    """What the final norm takes at the last position, (prompt, 1, hidden), and the norm itself."""
    end = model.layers_output.shape.joined(model.layers_output[-1].value)[:, -1:]
    norm = model.frozen_ln_final()
    return end, getattr(norm, "value", norm)


def _last(value: Any) -> torch.Tensor:
    last: torch.Tensor = value.value[:, -1:].clone()
    return last


def _check(model: StandardizedTransformer, pieces: _Pieces) -> None:
    end = pieces.end
    if any(each.ndim != 3 for each in (*pieces.stack, end)):
        reason = f"its residual stream is of shape {tuple(end.shape)}, not (batch, position, hidden)."
        raise CannotError("logit_attribution(...)", reason, model._spec.where("stream"))
    total = torch.stack([each.double() for each in pieces.stack]).sum(0)
    apart = float((total - end.double()).abs().max())
    if not apart <= rounding(end.dtype) * (1 + float(end.abs().max())):
        raise CannotError(
            "logit_attribution(...)",
            f"what the parts add is not the last layer's output: the two are up to {apart:.3g} apart.",
            model._spec.where("layer"),
        )


def _check_shares(
    model: StandardizedTransformer, name: str, apart: torch.Tensor, added: torch.Tensor, direction: torch.Tensor
) -> None:
    # Along a direction that the part adds nothing to, there is but rounding: it is held against what could have been.
    room = added[:, 0].double().cpu().norm(dim=-1) * direction.norm(dim=-1)
    if not bool((apart.abs() <= rounding(added.dtype) * (1e-6 + room)).all()):
        raise CannotError(
            "logit_attribution(...)",
            f"the pieces of {name!r} do not add up to it: they are up to {float(apart.abs().max()):.3g} apart.",
            model._spec.where("layer"),
        )
