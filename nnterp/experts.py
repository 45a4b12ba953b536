"""What a layer that routes tells: the logits of its router, the experts of each token, their weights, what they give.

A router hands each token's experts and their weights to a module of experts; what that module is called with is what
counts, so there it is read and set. Where a family does it otherwise, its specification names the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.values import entries_of, first_tensor, map_tensors, with_first_tensor
from nnterp.accessors import Place, StreamShape, ValueAccess
from nnterp.errors import RoutingError

if TYPE_CHECKING:
    from nnsight_core.envoy import Envoy
    from nnterp.rename_plan import LayerPlan, RenamePlan
    from nnterp.spec import ArchitectureSpec

__all__ = ["Experts", "RoutingAccess", "routing_of"]

#: Which accessor gives what, in the order in which a layer makes them.
NAMES = ("router_logits", "expert_indices", "expert_weights", "experts_output")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for _, entry in entries_of(value):
        yield from _tensors(entry)


def routing_of(value: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The experts that each token gets, and their weights, in what experts are called with: (tokens, k) each.

    >>> hidden, chosen, weights = torch.zeros(5, 8), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    >>> routing_of(((hidden, chosen, weights), {}))[0] is chosen
    True

    Raises:
        RoutingError: there are no whole numbers that could be experts.
    """
    tensors = [each for each in _tensors(value) if each.ndim > 1]
    indices = next((each for each in tensors if not each.is_floating_point() and each.dtype != torch.bool), None)
    if indices is None:
        raise RoutingError([tuple(each.shape) for each in tensors])
    alike = (each for each in tensors if each.is_floating_point() and each.shape == indices.shape)
    return indices, next(alike, None)


def _indices(value: Any) -> torch.Tensor:
    return routing_of(value)[0]


def _weights(value: Any) -> torch.Tensor:
    weights = routing_of(value)[1]
    if weights is None:
        raise RoutingError([tuple(each.shape) for each in _tensors(value)])
    return weights


def _putting(get: Callable[[Any], torch.Tensor]) -> Callable[[Any, Any], Any]:
    def put(value: Any, new: Any) -> Any:
        old = get(value)
        return map_tensors(lambda each: new if each is old else each, value)

    return put


class RoutingAccess(ValueAccess):
    """``router_logits[i]`` and its kin, (batch, position, k or experts), read and set."""

    def __init__(
        self, root: Envoy, name: str, places: tuple[Place | None, ...], why_not: str, spec: ArchitectureSpec
    ) -> None:
        super().__init__(root, name, places, (why_not,) * len(places), StreamShape())
        self._spec = spec

    def place(self, layer: int) -> Place:
        """Where layer ``layer``'s value stands.

        Raises:
            LayerIndexError: the model has no such layer.
            MissingPartError: the layer has no router.
            CannotError: the family has no such value.
        """
        place = super().place(layer)
        self._spec.refuse(self.name, place.label)
        if place.kind.startswith("source."):
            # Operations are counted from the start of a call: the module has to know before it runs.
            _ = self._root.get(place.path).source
        return place


class Experts:
    """The experts of a :class:`~nnterp.StandardizedTransformer`: all read and set, in the order in which they run.

    ``router_logits[i]`` (batch, position, experts) are made before a softmax or what else the router does; set them and
    it chooses by them. ``expert_indices[i]`` and ``expert_weights[i]`` (batch, position, k) are the experts that each
    token gets, counted from 0, and what their outputs are multiplied by; setting both forces a routing.
    ``experts_output[i]`` (batch, position, hidden) is the weighted sum, without experts that all tokens share.

    >>> from nnterp import StandardizedTransformer
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64, num_attention_heads=2)
    >>> model = StandardizedTransformer(MixtralForCausalLM(MixtralConfig(num_key_value_heads=1, **sizes)).eval())
    >>> with model.trace(torch.tensor([[3, 1, 4]])):
    ...     chosen = model.expert_indices[0].save()
    ...     model.expert_weights[0] = torch.tensor([1.0, 0.0]).expand(1, 3, 2)      # the first expert alone
    ...     logits = model.logits.save()
    >>> chosen.shape
    torch.Size([1, 3, 2])
    """

    router_logits: RoutingAccess
    expert_indices: RoutingAccess
    expert_weights: RoutingAccess
    experts_output: RoutingAccess
    _plan: RenamePlan
    _spec: ArchitectureSpec

    def _add_experts(self, root: Envoy) -> None:
        spec, layers = self._spec, self._plan.layers
        names_none = spec.absent.get("router", f"{spec.source} names no router.")
        why = "it has no router." if spec.layer.router else names_none
        for name in NAMES:
            places = tuple(self._routing_place(name, index, each) for index, each in enumerate(layers))
            setattr(self, name, RoutingAccess(root, name, places, why, spec))

    def _routing_place(self, name: str, index: int, layer: LayerPlan) -> Place | None:
        router, label, said = layer.router, f"{name}[{index}]", self._spec.layer
        if router is None:
            return None
        if name == "router_logits":
            if layer.router_logits:
                return Place(layer.router_logits, "output", label)
            return Place(router, "source.linear_0.output", label)
        if name == "experts_output":
            return Place(layer.experts, "output", label) if layer.experts else None
        operation, get = (
            (said.expert_indices, _indices) if name == "expert_indices" else (said.expert_weights, _weights)
        )
        if operation and name == "expert_weights":
            return Place(router, f"source.{operation}.output", label, first_tensor, with_first_tensor)
        if operation:
            return Place(router, f"source.{operation}.output", label, get, _putting(get))
        return Place(layer.experts, "input", label, get, _putting(get)) if layer.experts else None
