"""What ``model.layers_output[i]`` and its kin are: one value of the standard names, read and written.

Every value is looked up in what the module hands on at that moment, tensor or tuple, and is of shape
(batch, position, hidden) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.arguments import is_same_value
from nnsight_core.envoy import Envoy
from nnsight_core.scope import Scope
from nnsight_core.sites import Site, user_site
from nnsight_core.values import first_tensor, with_first_tensor
from nnterp.errors import LayerIndexError, MissingPartError, ShapeError


@dataclass(frozen=True)
class Place:
    """Where in the model a value stands.

    Args:
        path: the module's full path.
        kind: ``"input"`` or ``"output"`` of its call.
        label: what the user calls it, in errors.
        get: finds the value in what the module hands on.
        put: gives what the module is to hand on instead, from what it hands on and the new value.
    """

    path: str
    kind: str
    label: str
    get: Callable[[Any], Any] = first_tensor
    put: Callable[[Any, Any], Any] = with_first_tensor


def read(root: Envoy, place: Place, setting: bool = False, site: Site | None = None) -> Any:
    """The value at ``place`` as a proxy; what is written into the proxy reaches the model."""

    def get(value: Any, scope: Scope) -> Any:
        return _by_prompt(place.get(value), scope)

    def put(value: Any, part: Any) -> Any:
        old = place.get(value)
        # Where nothing has to be changed it stays the very same tensor.
        return place.put(value, part if part.shape == old.shape else part.reshape(old.shape))

    return root.get(place.path).read(place.kind, place.label, setting, site or user_site(), (get, put))


def write(root: Envoy, place: Place, value: Any) -> None:
    """Let the model go on with ``value`` at ``place``; a plain number fills the whole of it.

    Raises:
        ShapeError: ``value`` has another shape than what stands there.
    """
    current = read(root, place, setting=True)
    # After `layers_output[i] += x` Python assigns the very proxy that was read and changed in place.
    if not is_same_value(current, value):
        current.update_value(_fitted, place.label, value)


def _fitted(old: torch.Tensor, label: str, new: Any) -> torch.Tensor:
    if isinstance(new, (int, float)):
        return torch.full_like(old, new)
    if not isinstance(new, torch.Tensor) or new.shape != old.shape:
        raise ShapeError(label, new, old)
    return new.to(device=old.device, dtype=old.dtype)


def _by_prompt(tensor: torch.Tensor, scope: Scope) -> torch.Tensor:
    """Some layers hand all tokens to their MLP in one axis: (batch * position, hidden)."""
    ids = scope.inputs.get("input_ids")
    if tensor.ndim != 2 or ids is None:
        return tensor
    return tensor.reshape(ids.shape[0], -1, tensor.shape[-1])


class Layers:
    """A model's layers, or a part of each, by index; negative indices count from the last layer.

    Args:
        name: what the user calls it: ``layers``, ``attentions``, ...
        count: the number of layers.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self._count = count

    def __len__(self) -> int:
        return self._count

    def position(self, layer: int) -> int:
        """The layer's index counted from 0.

        Raises:
            LayerIndexError: the model has no such layer.
        """
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"{self.name}[...] takes the number of a layer, not {layer!r}.")
        if not -self._count <= layer < self._count:
            raise LayerIndexError(self.name, layer, self._count)
        return layer % self._count


class ModuleAccess(Layers):
    """``attentions[i]``, ``mlps[i]``: the module that plays a part in layer ``i``.

    Args:
        paths: the module's full path for each layer, None where a layer has no such part.
        why_not: the reason, for layers that have none.
    """

    def __init__(self, root: Envoy, name: str, paths: tuple[str | None, ...], why_not: str) -> None:
        super().__init__(name, len(paths))
        self._root = root
        self._paths = paths
        self._why_not = why_not

    def __getitem__(self, layer: int) -> Envoy:
        index = self.position(layer)
        path = self._paths[index]
        if path is None:
            raise MissingPartError(f"{self.name}[{index}]", self._why_not)
        return self._root.get(path)

    def __iter__(self) -> Iterator[Envoy]:
        return (self[index] for index in range(len(self)))


class ValueAccess(Layers):
    """``layers_output[i]`` and its kin: a value of shape (batch, position, hidden), read and set.

    Args:
        places: where the value stands in each layer, None where a layer has no such part.
        why_not: the reason, for layers that have none.
    """

    def __init__(self, root: Envoy, name: str, places: tuple[Place | None, ...], why_not: str) -> None:
        super().__init__(name, len(places))
        self._root = root
        self._places = places
        self._why_not = why_not

    def place(self, layer: int) -> Place:
        """Where layer ``layer``'s value stands.

        Raises:
            LayerIndexError: the model has no such layer.
            MissingPartError: the layer has no such part.
        """
        index = self.position(layer)
        place = self._places[index]
        if place is None:
            raise MissingPartError(f"{self.name}[{index}]", self._why_not)
        return place

    def get_module(self, layer: int) -> Envoy:
        """The module whose input or output the value is."""
        return self._root.get(self.place(layer).path)

    def __getitem__(self, layer: int) -> Any:
        return read(self._root, self.place(layer), site=user_site())

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        write(self._root, self.place(layer), value)


def logits_of(output: Any) -> Any:
    """The logits in what a causal language model gives back, whether a ``ModelOutput`` or a tuple."""
    return output.logits if hasattr(output, "logits") else first_tensor(output)


def with_logits(output: Any, logits: Any) -> Any:
    """What the model gives back, with other logits."""
    if not hasattr(output, "logits"):
        return with_first_tensor(output, logits)
    output.logits = logits
    return output
