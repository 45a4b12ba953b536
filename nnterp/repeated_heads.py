"""Keys and values with a head for each head of queries, where several of these share one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.sites import user_site
from nnterp.accessors import Layers, Place, read, write
from nnterp.errors import UsageError

__all__ = ["RepeatedHeads", "SharedHeadsError"]


class SharedHeadsError(UsageError, ValueError):
    """Heads that share their keys or values were set to different ones."""

    def __init__(self, label: str, groups: int, apart: list[int]) -> None:
        one, other = apart
        super().__init__(
            f"{label} was set to other values for head {one} of queries than for head {other}, and the model has one "
            f"for both: each is shared by {groups} heads.\n"
            f"Set all heads of a group alike, or set {label.replace('.repeated', '')}, which has the heads that there "
            "are. What one head alone sees is attention_scores, attention_probabilities and heads_output."
        )


class RepeatedHeads(Layers):
    """``keys.repeated[i]``, ``values.repeated[i]``: (batch, head, position, head_dim), with ``num_heads`` heads.

    Head ``h`` of queries meets head ``h`` of these; in grouped and multi-query attention (Ainslie et al. 2023, "GQA")
    several are equal. They can be set where what is set is the same for all heads that share one.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower"):
    ...     queries, keys = model.queries[1].save(), model.keys.repeated[1].save()
    >>> model.num_kv_heads, keys.shape[1] == queries.shape[1] == model.num_heads
    (2, True)

    Raises:
        SharedHeadsError: heads that share keys or values were set to different ones.
    """

    def __init__(self, root: Envoy, name: str, place: Callable[[int], Place], count: int, heads: int) -> None:
        super().__init__(f"{name}.repeated", count)
        self._root = root
        self._place = place
        self._heads = heads

    def place(self, layer: int) -> Place:
        """Where layer ``layer``'s value stands; raises what the accessor itself raises."""
        place, label = self._place(layer), f"{self.name}[{self.position(layer)}]"

        def get(value: Any) -> torch.Tensor:
            return self._repeated(place.get(value))

        def put(value: Any, new: torch.Tensor) -> Any:
            groups = max(1, self._heads // place.get(value).shape[1])
            once = new[:, ::groups]
            again = once.repeat_interleave(groups, 1)
            # In a scan there are no numbers that could be compared.
            if type(new).__name__ != "FakeTensor" and not torch.equal(again, new):
                other = int((again != new).flatten(2).any(-1).any(0).nonzero()[0])
                raise SharedHeadsError(label, groups, [other, other // groups * groups])
            return place.put(value, once)

        return replace(place, label=label, get=get, put=put)

    def _repeated(self, tensor: torch.Tensor) -> torch.Tensor:
        groups = self._heads // max(1, tensor.shape[1])
        return tensor if groups < 2 else tensor.repeat_interleave(groups, 1)

    def __getitem__(self, layer: int) -> Any:
        site = user_site()
        return read(self._root, self.place(layer), site=site)

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        write(self._root, self.place(layer), value)
