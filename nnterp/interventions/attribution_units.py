"""What one part adds to a logit, shared out among its heads or its neurons.

A direction in the residual stream is pulled back through whatever stands between the part's last matrix and the stream.
The matrix is linear, so each head's or neuron's share is a product of two numbers and no vector has to be made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.prompts import token_rows
from nnsight_core.values import first_tensor
from nnterp.errors import CannotError
from nnterp.norms import FrozenNorm, frozen, probes, rounding

if TYPE_CHECKING:
    from nnterp.rename_plan import PartPlan
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["at_end", "HeadShares", "last_matrices", "LastMatrix", "NeuronShares", "onward", "pulled_back", "Shares"]

#: How many tokens a model is watched with, to see which of an MLP's matrices is the last.
_WATCHED = 4


def pulled_back(norm: FrozenNorm | None, direction: torch.Tensor) -> torch.Tensor:
    """The direction before a frozen norm that has the product which ``direction`` has after it.

    >>> norm = FrozenNorm(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.full((1, 1, 1), 4.0), centers=False)
    >>> pulled_back(norm, torch.tensor([[1.0, 1.0]])).tolist()
    [[0.25, 0.5]]

    Args:
        norm: a norm with the scale of one position of each prompt, (prompt, 1, 1), or None.
        direction: (prompt, hidden), float64.
    """
    if norm is None:
        return direction
    found = direction * norm.weight.double().cpu() / norm.scale[:, -1].double().cpu()
    return found - found.mean(-1, keepdim=True) if norm.centers else found


def at_end(model: StandardizedTransformer, value: Any, prompts: int) -> torch.Tensor:
    """The last position of what a module gives, (prompt, 1, hidden): some hand all tokens on in one axis."""
    tensor = first_tensor(value)
    tensor = tensor.reshape(prompts, -1, tensor.shape[-1]) if tensor.ndim == 2 else tensor
    return model.mixers_output.shape.view(tensor)[:, -1:]


def onward(
    model: StandardizedTransformer, part: PartPlan, given: torch.Tensor, made: torch.Tensor
) -> FrozenNorm | None:
    """The norm between what a part gives and what is added to the stream, as it is in this pass; None without one.

    Args:
        model: the model.
        part: the part.
        given: what it gives at one position of each prompt, (prompt, 1, hidden).
        made: what is added to the stream there, likewise.

    Raises:
        CannotError: what stands between the two is no norm, nor anything else that is linear in the pass.
    """
    if part.contribution == part.output:
        return None
    module = model._module.get_submodule(part.contribution)
    with torch.no_grad():
        tried = module(probes(given))
    return frozen(given, made, tried, part.contribution)


@dataclass(frozen=True)
class LastMatrix:
    """The module that makes an MLP's output of its neurons.

    Args:
        path: where it stands.
        factor: what its output is multiplied by, still within the MLP.
    """

    path: str
    factor: float


def last_matrices(model: StandardizedTransformer, prompts: Sequence[str]) -> dict[int, LastMatrix]:
    """By layer the last matrix of each MLP, found by what the modules inside give; layers without an MLP have none.

    Raises:
        CannotError: an MLP is made of experts, or no one matrix gives its output.
    """
    asked = "logit_attribution(by='neuron')"
    parts: dict[int, PartPlan] = {}
    for layer, plan in enumerate(model._plan.layers):
        part = plan.part("mlp")
        if plan.router is not None:
            reason = f"in layer {layer} the MLP is made of experts, and which neurons there are depends on the token."
            raise CannotError(asked, f"{reason} by='part' can be had.", model._spec.where("layer.router"))
        if part is not None:
            parts[layer] = part
    inside = {layer: _matrices(model, part) for layer, part in parts.items()}
    wanted = {path for layer, part in parts.items() for path in (*inside[layer], part.output)}
    ids = torch.tensor([token_rows(model.tokenizer, prompts[:1], {})[0][:_WATCHED]])
    with torch.no_grad(), model.trace(ids) as tracer:
        cache = tracer.cache(modules=[model.get(path) for path in sorted(wanted)])
    made = {path: first_tensor(cache[path].output) for path in wanted if path in cache}
    found = {}
    for layer, part in parts.items():
        fits = ((path, _factor(made.get(path), made[part.output])) for path in inside[layer])
        one = next((LastMatrix(path, factor) for path, factor in fits if factor is not None), None)
        if one is None:
            reason = f"in layer {layer} no one matrix inside {part.module or part.output} gives the MLP's output."
            raise CannotError(asked, f"{reason} by='part' can be had.", model._spec.where("layer.mlp"))
        found[layer] = one
    return found


def _matrices(model: StandardizedTransformer, part: PartPlan) -> list[str]:
    """The modules of a part that have a matrix of their own, the last first."""
    if part.module is None:
        return [part.output]
    inside = model._module.get_submodule(part.module).named_modules()
    paths = [
        f"{part.module}.{name}" if name else part.module
        for name, module in inside
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    return paths[::-1]


def _factor(inner: Any, outer: torch.Tensor) -> float | None:
    """What ``inner`` is multiplied by to give ``outer``; None where it is not."""
    if inner is None or inner.shape[-1] != outer.shape[-1] or inner.numel() != outer.numel():
        return None
    here, there = inner.double().flatten(), outer.double().flatten()
    factor = float(here @ there / here.square().sum())
    apart = float((factor * here - there).abs().max())
    if not apart <= rounding(outer.dtype) * float(there.abs().max()):
        return None
    # Rounding is no multiplier.
    return 1.0 if abs(factor - 1) < rounding(outer.dtype) else factor


@dataclass(frozen=True)
class HeadShares:
    """The heads of one attention at the last position.

    Args:
        heads: what each adds to the attention's output, (prompt, head, hidden).
        given: the attention's output, (prompt, hidden).
    """

    heads: torch.Tensor
    given: torch.Tensor

    def along(self, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As for :class:`NeuronShares`, of heads: (head, prompt) and (prompt)."""
        heads = self.heads.double().cpu()
        bias = self.given.double().cpu() - heads.sum(1)
        return torch.einsum("phd,pd->hp", heads, direction), (bias * direction).sum(-1)


@dataclass(frozen=True)
class NeuronShares:
    """The neurons of one MLP at the last position, and the matrix that they go through.

    Args:
        module: the matrix.
        factor: what its output is multiplied by.
        neurons: what it takes, (prompt, neuron).
    """

    module: torch.nn.Module
    factor: float
    neurons: torch.Tensor

    def along(self, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each neuron adds along a direction of the MLP's output, and what the matrix's bias does.

        Args:
            direction: (prompt, hidden), float64.

        Returns:
            (neuron, prompt) and (prompt), float64.
        """
        with torch.enable_grad():
            leaf = self.neurons.detach().clone().requires_grad_()
            made = first_tensor(self.module(leaf))
            (weights,) = torch.autograd.grad(made, leaf, grad_outputs=direction.to(made))
        with torch.no_grad():
            bias = first_tensor(self.module(torch.zeros_like(leaf))).double().cpu()
        shares = self.neurons.double().cpu() * weights.double().cpu() * self.factor
        return shares.T, self.factor * (bias * direction).sum(-1)


@dataclass(frozen=True)
class Shares:
    """Heads or neurons of one part, and what stands between that part and the residual stream.

    Args:
        units: the heads or neurons.
        norm: the norm that the part's output goes through, with the scale of the last position; None without one.
        factor: what comes out of that is multiplied by up to the last layer's end, (hidden).
        bias: what is added to it before, (hidden); None without one.
    """

    units: HeadShares | NeuronShares
    norm: FrozenNorm | None
    factor: torch.Tensor
    bias: torch.Tensor | None = None

    def along(self, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each head or neuron adds along a direction of the residual stream, and what the biases do.

        Args:
            direction: (prompt, hidden), float64.

        Returns:
            (unit, prompt) and (prompt), float64.
        """
        scaled = self.factor.detach().double().cpu() * direction
        shares, bias = self.units.along(pulled_back(self.norm, scaled))
        for added in (None if self.norm is None else self.norm.bias, self.bias):
            if added is not None:
                bias = bias + scaled @ added.detach().double().cpu()
        return shares, bias
