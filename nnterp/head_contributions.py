"""What each head of an attention adds to the residual stream: its share of what the output projection gives.

The projection is one linear map of all heads side by side, so that each head has columns of its own in it. What comes
to these columns is taken as it comes: after a gate or a norm, where a family has one between its heads and the map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from nnsight_core.kinds import Derived, Whole
from nnsight_core.values import first_argument, first_tensor, with_first_tensor
from nnterp.accessors import Place, StreamShape, ValueAccess
from nnterp.errors import UsageError
from nnterp.norms import rounding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nnsight_core.envoy import Envoy
    from nnterp.rename_plan import RenamePlan
    from nnterp.spec import ArchitectureSpec

__all__ = ["ClosedProjectionError", "contributions_of", "HeadContributionAccess", "HeadContributions"]


class ClosedProjectionError(UsageError):
    """What each head contributes, where that cannot be told apart."""

    def __init__(self, asked: str, why: str) -> None:
        super().__init__(
            f"{asked} was asked for, but {why}\n"
            "attentions_output has all heads together. Where another module is the output projection, a specification "
            "of your own names it, as `layer.attention.projection`."
        )


def contributions_of(module: torch.nn.Module, given: torch.Tensor, made: torch.Tensor, heads: int) -> torch.Tensor:
    """What each head makes of its own share of the projection's input, without the bias: (head, ..., hidden).

    >>> projection = torch.nn.Linear(6, 4)
    >>> given = torch.ones(1, 5, 6)
    >>> parts = contributions_of(projection, given, projection(given), heads=3)
    >>> parts.shape, torch.allclose(parts.sum(0) + projection.bias, projection(given), atol=1e-6)
    (torch.Size([3, 1, 5, 4]), True)

    Args:
        module: the projection. What is not a plain matrix (low-rank adapters, quantised weights) is called for each
            head with zeros in the place of all others.
        given: what it takes: (..., head * head_dim).
        made: what it gives for that: (..., hidden).
        heads: how many heads stand side by side in ``given``.

    Raises:
        ValueError: the projection does not add up over its heads.
    """
    if given.shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide the {given.shape[-1]} entries that come to it.")
    parts = given.unflatten(-1, (heads, -1))
    weight = _matrix(module, given)
    if weight is not None:
        return torch.einsum("...hd,ohd->h...o", parts, weight.unflatten(-1, (heads, -1)))
    # Not by way of the hooks that hang on it: these calls are nobody's but ours.
    nothing = first_tensor(module.forward(torch.zeros_like(given)))
    alone = []
    for head in range(heads):
        only = torch.zeros_like(parts)
        only[..., head, :] = parts[..., head, :]
        alone.append(first_tensor(module.forward(only.flatten(-2))) - nothing)
    stack = torch.stack(alone)
    _check(stack.sum(0) + nothing, made, module)
    return stack


def _matrix(module: torch.nn.Module, given: torch.Tensor) -> torch.Tensor | None:
    """The projection as a matrix (hidden, head * head_dim); None where it is not all there is to it."""
    if type(module) not in (torch.nn.Linear, Conv1D):
        return None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    # Under autocast, and where weights come only while the module runs, the module knows what it computes with.
    if weight.dtype != given.dtype or weight.device != given.device or torch.is_autocast_enabled(given.device.type):
        return None
    return weight.T if type(module) is Conv1D else weight


def _check(total: torch.Tensor, made: torch.Tensor, module: torch.nn.Module) -> None:
    total, made = total.detach(), made.detach()
    if made.is_meta or type(made).__name__ == "FakeTensor":
        return
    apart = float((total - made).abs().nan_to_num().max())
    if not apart <= rounding(made.dtype) * (1e-6 + float(made.abs().nan_to_num().max())):
        name = type(module).__name__
        raise ValueError(f"{name} is no linear map: what it gives for each head alone is off in sum by {apart:.3g}.")


class _Shares:
    """Works out of a projection's call what each head contributes, and puts back what is changed.

    Args:
        label: what the user calls it, in errors.
        heads: how many heads there are.
        shape: the axes of what the projection gives.
    """

    def __init__(self, label: str, heads: int, shape: StreamShape) -> None:
        self._label = label
        self._heads = heads
        self._shape = shape

    def get(self, whole: Whole) -> torch.Tensor:
        """(batch, head, position, hidden)."""
        module, call, result = whole
        given, made = first_argument(call), first_tensor(result)
        if made.ndim != 3:
            raise ClosedProjectionError(self._label, f"its projection gives all tokens in {made.ndim} axes, not 3.")
        try:
            parts = contributions_of(module, given, made, self._heads)
        except ValueError as error:
            raise ClosedProjectionError(self._label, str(error)) from error
        if self._shape.is_usual:
            return parts.movedim(0, 1)
        return torch.stack([self._shape.view(each) for each in parts], 1)

    def put(self, whole: Whole, before: torch.Tensor, after: torch.Tensor) -> Any:
        """What is changed in any head is added to what the projection gives; what is not stays to the bit."""
        result = whole[2]
        made = first_tensor(result)
        change = (after - before).sum(1)
        return with_first_tensor(result, self._shape.put(made, self._shape.view(made) + change).reshape(made.shape))


class HeadContributionAccess(ValueAccess):
    """``heads_contribution[i]``: what each head adds to the attention's output, (batch, head, position, hidden).

    They and the bias of the output projection add up to ``attentions_output[i]``, up to rounding. What comes between
    that and the residual stream is not in them: where ``attentions_contribution[i]`` is another value, because the
    family norms or multiplies the attention's output, it is that norm or multiple of the sum.

    What counts is what enters the projection. Where a family gates or norms its heads before, the gate and the norm are
    in the contributions, with the statistics of this pass.

    Set, and what the attention gives changes by the difference: a head that is set to 0 adds nothing, and all else
    stays as it was. It is computed when it is asked for, one of these per head in memory.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with torch.no_grad(), model.trace("The Eiffel Tower"):
    ...     heads = model.heads_contribution[1].save()
    ...     model.heads_contribution[1][:, 2] = 0       # without head 2 of layer 1
    ...     without = model.attentions_output[1].save()
    >>> torch.allclose(without, heads[:, :2].sum(1) + heads[:, 3:].sum(1), atol=1e-5)     # its projection has no bias
    True

    Raises:
        MissingPartError: the layer has no attention.
        CannotError: the family's heads cannot be told apart.
        ClosedProjectionError: this model's cannot.
        ShapeError: what is set has another shape.
    """

    NAME = "heads_contribution"

    def __init__(
        self,
        root: Envoy,
        plan: RenamePlan,
        why_not: tuple[str, ...],
        heads: int,
        shape: StreamShape,
        spec: ArchitectureSpec,
        doubts: Mapping[str, str],
    ) -> None:
        attentions = [each.part("attention") for each in plan.layers]
        places: list[Place | None] = []
        for index, part in enumerate(attentions):
            label = f"{self.NAME}[{index}]"
            shares = _Shares(label, heads, shape)
            path = part.projection or "" if part else ""
            kind = Derived(self.NAME, shares.get, shares.put)
            places.append(Place(path, kind, label, positions=2) if part else None)
        super().__init__(root, self.NAME, tuple(places), why_not, shape)
        self._spec = spec
        self._doubts = doubts

    def place(self, layer: int) -> Place:
        """Where layer ``layer``'s value stands.

        Raises:
            LayerIndexError: the model has no such layer.
            MissingPartError: the layer has no attention.
            CannotError: the family's heads cannot be told apart.
            ClosedProjectionError: this model's cannot.
        """
        place = super().place(layer)
        self._spec.refuse(self.name, place.label)
        if not place.path:
            raise ClosedProjectionError(place.label, "no module of the attention is known to be its output projection.")
        if place.path in self._doubts:
            why = f"{place.path} does not give what the attention gives: {self._doubts[place.path]}."
            raise ClosedProjectionError(place.label, why)
        return place


class HeadContributions:
    """The shares of heads of a :class:`~nnterp.StandardizedTransformer`; see :class:`HeadContributionAccess`."""

    heads_contribution: HeadContributionAccess
    attentions_output: ValueAccess
    num_heads: int
    _plan: RenamePlan
    _spec: ArchitectureSpec
    #: Projections that do not give what their attention gives, by path: what is otherwise.
    _doubtful_projections: Mapping[str, str]

    def _add_head_contributions(self, root: Envoy) -> None:
        output = self.attentions_output
        self.heads_contribution = HeadContributionAccess(
            root, self._plan, output._why_not, self.num_heads, output.shape, self._spec, self._doubtful_projections
        )
