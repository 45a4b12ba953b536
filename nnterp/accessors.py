"""What ``model.layers_output[i]`` and its kin are: one value of the standard names, read and written.

Every value is looked up in what the module hands on at that moment, tensor or tuple, and is of shape
(batch, position, hidden) unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from nnsight_core.arguments import is_same_value
from nnsight_core.envoy import Envoy
from nnsight_core.scope import Scope
from nnsight_core.sites import Site, hide_package, user_site
from nnsight_core.token_index import positions_at
from nnsight_core.values import first_tensor, with_first_tensor
from nnterp.errors import LayerIndexError, MissingPartError, ShapeError
from nnterp.spec import USUAL_AXES, ArchitectureSpec

# Here and not in the package's face, which does without torch: no error comes of this package but through accessors.
hide_package("nnterp")

#: The axes of a value in the order in which accessors give them.
STREAM_AXES = ("batch", "position", "stream", "hidden")


@dataclass(frozen=True)
class StreamShape:
    """How a family's tensors stand to (batch, position, hidden), or (batch, position, stream, hidden).

    Args:
        axes: the axes as the model's tensors have them.
        hidden: the size of the hidden axis.
        prefix: how many positions the model itself puts before those of the tokens.
    """

    axes: tuple[str, ...] = USUAL_AXES
    hidden: int = 0
    prefix: int = 0

    @classmethod
    def of(cls, what: str, spec: ArchitectureSpec, config: Any, hidden: int) -> StreamShape:
        """The shape of ``"layers"``, ``"parts"`` or ``"embeddings"``."""
        prefix = int(spec.stream.prefix.value(config)) if spec.stream.prefix else 0
        return cls(getattr(spec.stream, what), hidden, prefix)

    @property
    def named(self) -> str:
        """The axes in a sentence."""
        return ", ".join(self.axes)

    @cached_property
    def is_usual(self) -> bool:
        """Whether there is nothing to do."""
        return self.axes == USUAL_AXES and not self.prefix

    def sizes(self, batch: int, positions: int, seen: torch.Size) -> tuple[int, ...]:
        """The shape that the model's own tensors ought to have; what nobody says is as it was ``seen``."""
        known = {"batch": batch, "position": positions + self.prefix, "hidden": self.hidden}
        return tuple(known.get(axis, size) for axis, size in zip(self.axes, seen, strict=False))

    @property
    def _order(self) -> tuple[int, ...]:
        """Where the axes in the order of accessors stand in the model's tensors, once all are axes of their own."""
        single = [name.replace("positions", "position") for axis in self.axes for name in axis.split("*")]
        return tuple(single.index(axis) for axis in STREAM_AXES if axis in single)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The model's tensor with the axes in the usual order, without what stands before the tokens."""
        if self.is_usual:
            return tensor
        if "stream*hidden" in self.axes:
            tensor = tensor.unflatten(self.axes.index("stream*hidden"), (-1, self.hidden))
        return tensor.permute(self._order)[:, self.prefix :]

    def joined(self, value: Any) -> Any:
        """A value with the axes of accessors as the modules after the layers take it: (..., hidden) as it is."""
        return value.flatten(-2) if "stream*hidden" in self.axes else value

    def put(self, tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The model's tensor with ``part`` in the place of what :meth:`view` gives of it."""
        if self.is_usual:
            return part
        order = self._order
        if self.prefix:
            part = torch.cat([tensor.permute(order)[:, : self.prefix], part], 1)
        return part.permute([order.index(axis) for axis in range(len(order))]).reshape(tensor.shape)


@dataclass(frozen=True)
class Place:
    """Where in the model a value stands.

    Args:
        path: the module's full path.
        kind: ``"input"`` or ``"output"`` of its call.
        label: what the user calls it, in errors.
        get: finds the value in what the module hands on.
        put: gives what the module is to hand on instead, from what it hands on and the new value.
        shape: the axes of the value.
        positions: which axis of the value its positions are.
    """

    path: str
    kind: str
    label: str
    get: Callable[[Any], Any] = first_tensor
    put: Callable[[Any, Any], Any] = with_first_tensor
    shape: StreamShape = StreamShape()
    positions: int = 1


def shown(place: Place, show: Callable[[Any], Any], stands: Callable[[Any], Any]) -> Place:
    """The same place, whose value is ``show`` of what stands there, and of which ``stands`` is the inverse."""
    return replace(
        place,
        get=lambda value: show(place.get(value)),
        put=lambda value, new: place.put(value, stands(new)),
    )


def read(root: Envoy, place: Place, setting: bool = False, site: Site | None = None) -> Any:
    """The value at ``place`` as a proxy; what is written into the proxy reaches the model."""

    def get(value: Any, scope: Scope) -> Any:
        return _by_prompt(place.shape.view(place.get(value)), scope)

    def put(value: Any, part: Any) -> Any:
        old = place.get(value)
        changed = place.shape.put(old, part)
        # Where nothing has to be changed it stays the very same tensor.
        return place.put(value, changed if changed.shape == old.shape else changed.reshape(old.shape))

    part = root.get(place.path).read(place.kind, place.label, setting, site or user_site(), (get, put))
    if not place.shape.is_usual or _is_reshaped(part):
        # Gradients reach what the model goes on with, and of a view that has to be the view itself.
        part.update_value(_itself)
    # A value of three axes has its positions where everybody looks for them.
    return part if place.positions == 1 and place.shape.is_usual else positions_at(part, place.positions)


def _itself(value: Any) -> Any:
    return value


def _is_reshaped(part: Any) -> bool:
    if part._is_pending:
        return False
    value = part.value
    return isinstance(value, torch.Tensor) and value.requires_grad and value._is_view()


def write(root: Envoy, place: Place, value: Any) -> None:
    """Let the model go on with ``value`` at ``place``; a plain number fills the whole of it.

    Raises:
        ShapeError: ``value`` has another shape than what stands there.
    """
    current = read(root, place, setting=True)
    # After `layers_output[i] += x` Python assigns the very proxy that was read and changed in place.
    if not is_same_value(current, value):
        current.update_value(fitted, place.label, value)


def fitted(old: torch.Tensor, label: str, new: Any) -> torch.Tensor:
    """``new`` for the place of ``old``; a plain number fills it.

    Raises:
        ShapeError: it has another shape.
    """
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
        why_not: for each layer the reason, where it has none.
    """

    def __init__(self, root: Envoy, name: str, paths: tuple[str | None, ...], why_not: tuple[str, ...]) -> None:
        super().__init__(name, len(paths))
        self._root = root
        self._paths = paths
        self._why_not = why_not

    def __getitem__(self, layer: int) -> Envoy:
        index = self.position(layer)
        path = self._paths[index]
        if path is None:
            raise MissingPartError(f"{self.name}[{index}]", self._why_not[index])
        return self._root.get(path)

    def __iter__(self) -> Iterator[Envoy]:
        return (self[index] for index in range(len(self)))


class ValueAccess(Layers):
    """``layers_output[i]`` and its kin: a value of shape (batch, position, hidden), read and set.

    Args:
        places: where the value stands in each layer, None where a layer has no such part.
        why_not: for each layer the reason, where it has none.
    """

    def __init__(
        self,
        root: Envoy,
        name: str,
        places: tuple[Place | None, ...],
        why_not: tuple[str, ...],
        shape: StreamShape = StreamShape(),
    ) -> None:
        super().__init__(name, len(places))
        self.shape = shape
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
            raise MissingPartError(f"{self.name}[{index}]", self._why_not[index])
        return place

    def has(self, layer: int) -> bool:
        """Whether the layer has such a part."""
        return self._places[self.position(layer)] is not None

    def get_module(self, layer: int) -> Envoy:
        """The module whose input or output the value is."""
        return self._root.get(self.place(layer).path)

    def _open(self, layer: int) -> Place:
        """The place, which is about to be read or set."""
        return self.place(layer)

    def __getitem__(self, layer: int) -> Any:
        site = user_site()
        return read(self._root, self._open(layer), site=site)

    __call__ = __getitem__

    def as_it_is(self, layer: int) -> Place:
        """The same place, whose value is the model's own tensor, with all its axes and positions as they are."""
        return replace(self.place(layer), shape=StreamShape())

    def __setitem__(self, layer: int, value: Any) -> None:
        write(self._root, self._open(layer), value)


def logits_of(output: Any) -> Any:
    """The logits in what a causal language model gives back, whether a ``ModelOutput`` or a tuple."""
    return output.logits if hasattr(output, "logits") else first_tensor(output)


def with_logits(output: Any, logits: Any) -> Any:
    """What the model gives back, with other logits."""
    if not hasattr(output, "logits"):
        return with_first_tensor(output, logits)
    output.logits = logits
    return output
