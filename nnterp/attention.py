"""Inside attention: what its heads ask, offer and give, by layer, read and set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.operations import operation_of
from nnterp.accessors import Place, ValueAccess
from nnterp.attention_kernel import kernel_places
from nnterp.attention_operations import operation_places
from nnterp.attention_places import Attention, AttentionPlaces
from nnterp.errors import CannotError, UsageError
from nnterp.operation_access import OperationAccess, running
from nnterp.repeated_heads import RepeatedHeads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_core.source import Operation
    from nnterp.rename_plan import RenamePlan
    from nnterp.spec import ArchitectureSpec

#: The accessors, and which of the places of a layer's attention each reads and sets.
NAMES = {
    "queries": "queries",
    "keys": "keys",
    "values": "values",
    "attention_scores": "scores",
    "attention_probabilities": "probabilities",
    "heads_output": "heads_output",
}

#: Who knows where the values stand in which attention; the first that knows a place of a value is believed.
_FINDERS: tuple[Callable[[Attention], AttentionPlaces], ...] = (kernel_places, operation_places)


class ClosedAttentionError(UsageError):
    """The values of a layer's heads, where its attention cannot be opened."""

    def __init__(self, asked: str, why: str) -> None:
        super().__init__(
            f"{asked} was asked for, but {why}\n"
            "The module's .source shows all that it computes; its operations can be read and set there by their names."
        )


def open_place(attention: Attention, name: str, label: str) -> tuple[Place, AttentionPlaces]:
    """Where one of the values of `AttentionPlaces` stands in an attention module, and where all stand that are told of
    with it; ``label`` is what users call it.

    Raises:
        ClosedAttentionError: nobody knows.
    """
    reasons = []
    for find in _FINDERS:
        places = find(attention)
        found: Place | str = getattr(places, name)
        if isinstance(found, Place):
            return replace(found, label=label, positions=2), places
        reasons.append(found)
        if places.counted:
            # Who knows where some of the values stand knows why another stands nowhere.
            break
    raise ClosedAttentionError(label, reasons[-1])


class HeadAccess(OperationAccess):
    """``queries[i]``, ``keys[i]``, ``values[i]``, ``heads_output[i]``: (batch, head, position, head_dim), read and set.

    They are the arguments and the result of the layer's attention kernel, or of the products of matrices that stand in
    its place: queries and keys after rotation where the family rotates, keys and values of all positions in the cache
    and of those that the model itself puts before the tokens, with a head for each of ``num_kv_heads``, and the output
    of each head before the output projection (and before a gate, where the family has one after that).
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
        ClosedAttentionError: the layer's attention cannot be opened.
        ShapeError: what is set has another shape.
    """

    def __init__(
        self,
        root: Envoy,
        name: str,
        modules: tuple[str | None, ...],
        why_not: tuple[str, ...],
        counts: tuple[int, int],
        spec: ArchitectureSpec,
    ) -> None:
        super().__init__(root, name, modules, why_not, spec)
        self._counts = counts

    def _found(self, path: str, label: str) -> tuple[Place, Iterable[str]]:
        place, places = open_place(Attention(self._root.get(path), path, *self._counts), NAMES[self.name], label)
        return place, places.counted

    def is_open(self, layer: int) -> bool:
        """Whether the layer has attention that can be opened as the model runs now."""
        if not self.has(layer):
            return False
        try:
            self.place(layer)
        except (CannotError, ClosedAttentionError):
            return False
        return True

    @property
    def repeated(self) -> RepeatedHeads:
        """The same with a head for each head of queries; see :class:`~nnterp.repeated_heads.RepeatedHeads`."""
        return RepeatedHeads(self._root, self.name, self._open, len(self), self._counts[1])


class AttentionAccess(HeadAccess):
    """``attention_scores[i]``, ``attention_probabilities[i]``: (batch, head, query, key), read and set.

    Scores are what the softmax takes: scaled, masked and capped as the family does it. Probabilities are what the
    values are multiplied by; for each query they add up to 1. What a query may not see scores minus infinity and has
    the probability 0; so has everything, for a query that may see nothing at all, as those of padding may.

    A fast kernel shows neither. Where one is asked for, both are computed beside the kernel, for that layer and pass
    alone; the model goes on with the kernel's own numbers, except for the queries whose probabilities were changed. In
    models of half precision they are float32, as in the kernel.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower"):
    ...     model.attention_scores[1][:, 2, :, 0] = -float("inf")      # head 2 of layer 1 does not see the first token
    ...     probabilities = model.attention_probabilities[1].save()
    ...     logits = model.logits.save()
    >>> probabilities[0, 2, 1].tolist()
    [0.0, 1.0, 0.0]

    Raises:
        ClosedAttentionError: the layer's attention cannot be opened.
        SourceError: the kernel drops out probabilities at random, as in training.
        ShapeError: what is set has another shape.
    """

    def source_of(self, layer: int) -> str:
        """Which operation of which module the value is taken from, and the file and line that call it.

        >>> from nnterp import StandardizedTransformer
        >>> print(StandardizedTransformer("demo-llama").attention_probabilities.source_of(1))  # doctest: +ELLIPSIS
        attention_probabilities[1]: probabilities of scaled_dot_product_attention_0 in model.layers.1.self_attn
          .../sdpa_attention.py:...   attn_output = torch.nn.functional.scaled_dot_product_attention(

        Raises:
            MissingPartError: the layer has no attention.
            ClosedAttentionError: its attention cannot be opened.
        """
        place = self.place(layer)
        name, value = operation_of(place.kind), place.kind.rpartition(".")[2]
        operation = self._root.get(place.path).source[name]
        return told(place.label, value, operation, place.path)

    def print_source(self, layer: int = 0, allow_dispatch: bool = True) -> None:
        """Write to the terminal what :meth:`source_of` says.

        Args:
            layer: which layer.
            allow_dispatch: accepted for scripts that set it; no weights are needed.
        """
        sys.stdout.write(f"{self.source_of(layer)}\n")


def told(label: str, value: str, operation: Operation, path: str) -> str:
    """From which operation of the module at ``path`` a value is taken, and the file and line that call it."""
    where = f"{operation.file}:{operation.line}   {operation.text}".rstrip()
    return f"{label}: {value} of {operation.name} in {path}\n  {where}"


class Heads:
    """The heads of a :class:`~nnterp.StandardizedTransformer`: all read and set, in the order in which they are made.

    See :class:`HeadAccess` and :class:`AttentionAccess`.
    """

    queries: HeadAccess
    keys: HeadAccess
    values: HeadAccess
    attention_scores: AttentionAccess
    attention_probabilities: AttentionAccess
    heads_output: HeadAccess
    attentions_output: ValueAccess
    num_heads: int
    num_kv_heads: int
    _plan: RenamePlan
    _spec: ArchitectureSpec
    _module: torch.nn.Module

    def _add_heads(self, root: Envoy) -> None:
        parts = tuple(each.part("attention") for each in self._plan.layers)
        modules = tuple(running(self._module, part) if part else None for part in parts)
        groups = max(1, self.num_heads // (self.num_kv_heads or self.num_heads or 1)) if self.num_heads else 1
        counts = groups, self.num_heads or 0
        for name in NAMES:
            kind = AttentionAccess if name.startswith("attention_") else HeadAccess
            setattr(self, name, kind(root, name, modules, self.attentions_output._why_not, counts, self._spec))

    @property
    def attn_probs_available(self) -> bool:
        """Whether ``attention_probabilities`` can be read of some layer of this model as it runs now."""
        access = self.attention_probabilities
        return any(access.is_open(layer) for layer in range(len(access)))
