"""Direct logit attribution: how much does each part of the model add to a token's logit?

found = logit_attribution(model, "The Eiffel Tower is in the city of", " Paris")
dict(zip(found.names, found.scores[:, 0].tolist()))       # {"embeddings": ..., "attention 0": ..., "mlp 0": ..., ...}

The final norm is held as it is in this pass, and everything after it is linear, so that what is added to the residual
stream becomes what is added to the logit (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits",
https://transformer-circuits.pub/2021/framework).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.values import first_tensor
from nnterp.additions import Addition
from nnterp.calling import config_of
from nnterp.errors import CannotError, UsageError
from nnterp.interventions.metrics import Answer, token_ids
from nnterp.interventions.sweep import as_prompts, in_batches
from nnterp.multipliers import times
from nnterp.norms import rounding

if TYPE_CHECKING:
    from nnterp.norms import FrozenNorm
    from nnterp.rename_plan import PartPlan
    from nnterp.standardized_transformer import StandardizedTransformer

    #: Names, contributions at the last position, their sum as the model has it, and the final norm of the pass.
    Pieces = tuple[list[str], list[torch.Tensor], torch.Tensor, FrozenNorm | None]

__all__ = ["logit_attribution", "LogitAttribution"]


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part adds to a logit, or to the difference of two.

    Args:
        names: what the parts are called, in forward order; the last is the bias of the final norm and the unembedding.
        scores: (part, prompt), float32 on the CPU, in units of the logits.
    """

    names: tuple[str, ...]
    scores: torch.Tensor

    @property
    def logits(self) -> torch.Tensor:
        """What the scores sum to: the logit at the last position, before soft-capping, (prompt)."""
        return self.scores.double().sum(0).float()


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
            MLP of each layer. ``"layer"``: the embeddings, then each layer as a whole.
        batch_size: how many prompts go through the model at once.

    Raises:
        UsageError: ``by`` is something else, there is no prompt, or an answer is more than one token.
        CannotError: the family's logits are not linear in what its parts add: the reason is given.
        InputError: a prompt has no token, or more than the model has positions.
    """
    if by not in ("part", "layer"):
        raise UsageError(f"by={by!r} is no way to take the model apart: give 'part' or 'layer'.")
    given = as_prompts(prompts)
    directions, biases = _directions(model, answer, against, len(given))
    rows = []
    for batch in in_batches(range(len(given)), batch_size, "logit attribution"):
        chosen = slice(batch[0], batch[-1] + 1)
        names, stack, frozen_bias = _contributions(model, given[chosen], by)
        scores = torch.einsum("cph,ph->cp", stack, directions[chosen])
        constant = torch.einsum("h,ph->p", frozen_bias, directions[chosen]) + biases[chosen]
        rows.append(torch.cat([scores, constant[None]]))
    return LogitAttribution((*names, "bias"), torch.cat(rows, 1).float())


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


def _contributions(
    model: StandardizedTransformer, prompts: list[str], by: str
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Names, contributions through the final norm, (part, prompt, hidden), and the norm's bias, (hidden); float64."""
    names, stack, end, norm = (_by_part if by == "part" else _by_layer)(model, prompts)
    if any(each.ndim != 3 for each in (*stack, end)):
        reason = f"its residual stream is of shape {tuple(end.shape)}, not (batch, position, hidden)."
        raise CannotError("logit_attribution(...)", reason, model._spec.where("stream"))
    stack = [each.double() for each in stack]
    _check(model, sum(stack), end.double(), end.dtype)
    whole = torch.stack(stack).cpu()
    if norm is None:
        return names, whole[:, :, 0], torch.zeros(whole.shape[-1], dtype=torch.float64)
    weight, scale = norm.weight.double().cpu(), norm.scale[:, -1:].double().cpu()
    if norm.centers:
        whole = whole - whole.mean(-1, keepdim=True)
    return names, (whole * weight / scale)[:, :, 0], norm.bias.double().cpu()


def _by_layer(model: StandardizedTransformer, prompts: list[str]) -> Pieces:
    with torch.no_grad(), model.trace(prompts) as tracer:
        stream = [_last(model.layers_input[0])]
        stream += [_last(model.layers_output[layer]) for layer in range(model.num_layers)]
        end, norm = _end(model)
        tracer.stop()
    names = ["embeddings", *(f"layer {layer}" for layer in range(model.num_layers))]
    return names, [stream[0], *(after - before for before, after in pairwise(stream))], end, norm


def _by_part(model: StandardizedTransformer, prompts: list[str]) -> Pieces:
    parts = [(layer, part) for layer, plan in enumerate(model._plan.layers) for part in plan.parts]
    _check_parts(model, parts)
    with torch.no_grad(), model.trace(prompts) as tracer:
        # A cache, for parts that stand side by side may run in any order.
        cache = tracer.cache(modules=[model.get(part.contribution) for _, part in parts])
        stack = [_last(model.layers_input[0])]
        end, norm = _end(model)
        tracer.stop()
    names, config = ["embeddings"], config_of(model._module)
    for layer, part in parts:
        plan, name = model._plan.layers[layer], f"{part.kind.replace('_', ' ')} {layer}"
        addition = Addition(part, config, model.get(plan.path)._module)
        if part.stream_bias:
            names.append(f"bias before {name}")
            stack.append(torch.zeros_like(stack[0]))
        before = [times(part.stream_multiplier, each, config, addition.layer) for each in stack]
        if part.stream_bias:
            before[-1] = addition.stream(stack[-1])
        names.append(name)
        added = addition.contribution(first_tensor(cache[part.contribution].output))
        shape = model.mixers_output.shape
        added = shape.view(added.reshape(len(prompts), -1, added.shape[-1]) if added.ndim == 2 else added)[:, -1:]
        stack = [*before, added]
        if part is plan.parts[-1]:
            stack = [times(plan.multiplier, each, config, addition.layer) for each in stack]
    return names, [each.detach() for each in stack], end, norm


def _check_parts(model: StandardizedTransformer, parts: list[tuple[int, PartPlan]]) -> None:
    asked = "logit_attribution(by='part')"
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


def _check(model: StandardizedTransformer, total: Any, end: torch.Tensor, dtype: torch.dtype) -> None:
    apart = float((total - end).abs().max())
    if apart > rounding(dtype) * (1 + float(end.abs().max())):
        raise CannotError(
            "logit_attribution(...)",
            f"what the parts add is not the last layer's output: the two are up to {apart:.3g} apart.",
            model._spec.where("layer"),
        )
