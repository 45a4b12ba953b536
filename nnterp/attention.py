"""Inside attention: what its heads ask, offer and give, by layer, read and set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_core.envoy import Envoy
from nnsight_core.sites import user_site
from nnterp.accessors import Place, ValueAccess, read, write
from nnterp.attention_kernel import kernel_places
from nnterp.attention_places import Attention, AttentionPlaces
from nnterp.errors import UsageError

if TYPE_CHECKING:
    from nnterp.rename_plan import RenamePlan

#: The accessors, and which of the places of a layer's attention each reads and sets.
NAMES = {"queries": "queries", "keys": "keys", "values": "values", "heads_output": "heads_output"}

#: Who knows where the values stand in which attention; the first that knows a place of a value is believed.
_FINDERS: tuple[Callable[[Attention], AttentionPlaces], ...] = (kernel_places,)


class ClosedAttentionError(UsageError):
    """The values of a layer's heads, where its attention cannot be opened."""

    def __init__(self, asked: str, why: str) -> None:
        super().__init__(
            f"{asked} was asked for, but {why}\n"
            "Where the family has it, load the model with attn_implementation='sdpa'; the module's .source shows all "
            "that it computes."
        )


class HeadAccess(ValueAccess):
    """``queries[i]``, ``keys[i]``, ``values[i]``, ``heads_output[i]``: (batch, head, position, head_dim), read and set.

    They are the arguments and the result of the layer's attention kernel: queries and keys after rotation where the
    family rotates, keys and values of all positions in the cache, with a head for each of ``num_kv_heads``, and the
    output of each head before the output projection (and before a gate, where the family has one after the kernel).
    Setting keys or values changes this layer's attention in this pass; it does not change what the cache holds.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower"):
    ...     keys = model.keys[1].save()
    ...     model.heads_output[1][:, 2] = 0     # without head 2 of layer 1
    ...     logits = model.logits.save()
    >>> keys.shape[1] == model.num_kv_heads
    True

    Raises:
        ClosedAttentionError: the layer does not run scaled dot-product attention through transformers.
        ShapeError: what is set has another shape.
    """

    def __init__(
        self, root: Envoy, name: str, modules: tuple[str | None, ...], why_not: tuple[str, ...], groups: int
    ) -> None:
        places = tuple(None if path is None else Place(path, "call", name) for path in modules)
        super().__init__(root, name, places, why_not)
        self._groups = groups

    def place(self, layer: int) -> Place:
        """Where layer ``layer``'s value stands.

        Raises:
            LayerIndexError: the model has no such layer.
            MissingPartError: the layer has no attention.
            ClosedAttentionError: its attention cannot be opened.
        """
        path, label = super().place(layer).path, f"{self.name}[{self.position(layer)}]"
        attention = Attention(self._root.get(path), path, self._groups)
        reasons = []
        for find in _FINDERS:
            found: Place | str = getattr(find(attention), NAMES[self.name])
            if isinstance(found, Place):
                return replace(found, label=label)
            reasons.append(found)
        raise ClosedAttentionError(label, reasons[-1])

    def _open(self, layer: int) -> Place:
        place = self.place(layer)
        if place.kind.startswith("source."):
            # Operations are counted from the start of a call: the module has to know before it runs.
            _ = self._root.get(place.path).source
        return place

    def __getitem__(self, layer: int) -> Any:
        site = user_site()
        return read(self._root, self._open(layer), site=site)

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        write(self._root, self._open(layer), value)


class Heads:
    """The heads of a :class:`~nnterp.StandardizedTransformer`: all read and set, in the order in which they are made.

    See :class:`HeadAccess`.
    """

    queries: HeadAccess
    keys: HeadAccess
    values: HeadAccess
    heads_output: HeadAccess
    attentions_output: ValueAccess
    num_heads: int
    num_kv_heads: int
    _plan: RenamePlan

    def _add_heads(self, root: Envoy) -> None:
        parts = tuple(each.part("attention") for each in self._plan.layers)
        modules = tuple(part.module if part else None for part in parts)
        groups = max(1, self.num_heads // (self.num_kv_heads or self.num_heads or 1)) if self.num_heads else 1
        for name in NAMES:
            setattr(self, name, HeadAccess(root, name, modules, self.attentions_output._why_not, groups))
