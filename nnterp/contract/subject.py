"""The model that questions are put to, with the plain answers that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.copies import hooked
from nnterp.accessors import Place, ValueAccess, logits_of
from nnterp.calling import some_tokens
from nnterp.contract.oracle import Spot, Visiting, changed_run, plain_run, visiting
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["Broken", "CannotTell", "Subject"]

BATCH, POSITIONS = 2, 7
#: How far two ways to the same logits may differ, relative to their size: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
ACCESSES = (
    *("layers_input", "layers_output", "attentions_input", "attentions_output"),
    *("mixers_input", "mixers_output", "mlps_input", "mlps_output"),
)


class Broken(Exception):
    """A promise does not hold; the message says what was seen."""


class CannotTell(Exception):
    """A promise makes no sense for this model; the message says why."""


@dataclass
class Subject:
    """One model, ready to be asked.

    Args:
        model: the model behind the interface.
        module: the same model without it.
        oracle: hooks that share nothing with the interface.
        layers: which layers are asked; all if None.
    """

    model: StandardizedTransformer
    module: torch.nn.Module
    oracle: Visiting = visiting
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # Hooks of others, of a library that moves weights about say, are none of ours.
        self.hooked_before = frozenset(hooked(self.module))
        self.ids = some_tokens(self.module, BATCH, POSITIONS)
        # Some models give other last digits each time, and can be asked for no more than that.
        self._is_exact = torch.equal(logits_of(self.run()), logits_of(self.run()))
        self.chosen = self.layers if self.layers is not None else tuple(range(self.model.num_layers))

    def run(self) -> Any:
        """What the plain model gives for the two prompts."""
        return self.model.trace(self.ids, trace=False)

    def places(self, promise: str = "") -> dict[str, Place]:
        """Every value that the interface has a name for, by that name, in an order in which they can be read."""
        found: dict[str, Place] = {}
        if self.model._plan.embed and promise in ("", "token_embeddings"):
            found["token_embeddings"] = self.model._embeddings_place()
        for index in self.chosen:
            for name in ACCESSES:
                access: ValueAccess = getattr(self.model, name)
                if promise in ("", name.partition("_")[0]) and access.has(index):
                    found[f"{name}[{index}]"] = access.place(index)
        if promise in ("", "logits"):
            found["logits"] = self.model._logits_place
        return found

    def seen(self, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
        """What hooks see at each place, in the axes of the interface."""
        kept, _ = plain_run(self.module, {_spot(place) for place in places.values()}, self.run, self.oracle)
        missing = [name for name, place in places.items() if _spot(place) not in kept]
        if missing:
            raise Broken(f"{missing[0]}: its module, {places[missing[0]].path}, does not run.")
        return {name: self._as_given(place, kept[_spot(place)]) for name, place in places.items()}

    def _as_given(self, place: Place, value: Any) -> torch.Tensor:
        tensor: torch.Tensor = place.shape.view(place.get(value))
        return tensor.reshape(BATCH, -1, tensor.shape[-1]) if tensor.ndim == 2 else tensor

    def logits_with(
        self, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], places: Mapping[str, Place]
    ) -> torch.Tensor:
        """The plain model's logits when hooks make these changes."""
        functions = {_spot(places[name]): self._changer(places[name], change) for name, change in changes.items()}
        output: torch.Tensor = logits_of(changed_run(self.module, functions, self.run, self.oracle))
        return output

    def _changer(self, place: Place, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
        def changed(value: Any) -> Any:
            old = place.get(value)
            part = place.shape.view(old)
            return place.put(value, place.shape.put(old, change(part.clone())).reshape(old.shape))

        return changed

    def same(self, seen: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether two readings of one number are equal, bit for bit where the model itself is reproducible."""
        return torch.equal(seen, expected) if self._is_exact else self.close(seen, expected)

    def close(self, seen: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether two ways to one number agree up to rounding."""
        if seen.shape != expected.shape:
            return False
        coarsest = max(TOLERANCE.get(each.dtype, 1e-1) for each in (seen, expected))
        allowed = coarsest * (1e-6 + float(expected.double().abs().max()))
        apart = (seen.double() - expected.double()).abs()
        return bool((torch.nan_to_num(apart) <= allowed).all()) and bool((apart.isnan() == expected.isnan()).all())


def _spot(place: Place) -> Spot:
    return place.path, place.kind


def difference(seen: torch.Tensor, expected: torch.Tensor) -> str:
    """How two tensors differ, in words."""
    if seen.shape != expected.shape:
        return f"the shape is {tuple(seen.shape)} where hooks see {tuple(expected.shape)}"
    return f"the numbers differ by up to {float((seen.double() - expected.double()).abs().max()):.3g}"
