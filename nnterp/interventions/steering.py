"""Steering vectors: a direction for each layer, found from contrasting prompts, and added or taken out.

vector = SteeringVector.train(model, positive=["I love it"], negative=["I hate it"])
with model.trace("The film was"):
    vector.apply(model, factor=2, layers=[3])       # or vector.ablate(model)
    logits = model.logits.save()
vector.save("praise.safetensors")

The difference of means is from Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition"
(https://arxiv.org/abs/2312.06681); the principal component of paired differences from Zou et al. 2023, "Representation
Engineering" (https://arxiv.org/abs/2310.01405).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nnterp.choices import METHODS
from nnterp.errors import SteeringVectorError, UsageError
from nnterp.files import why_not_writable
from nnterp.interventions.batching import as_prompts, progress
from nnterp.nnsight_utils import collect_token_activations_batched

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["check_vector_file", "METHODS", "SteeringVector"]

#: Marks a file of ours, and which of the file's entries say what.
_FORMAT = "nnterp steering vector 1"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the residual stream after each of some layers.

    Args:
        directions: one direction for each layer, (layer, hidden), float32 on the CPU.
        layers: the layers, ascending, counted from 0.
        method: how it was found: ``"mean"`` or ``"principal"``, or a word of your own.
    """

    directions: torch.Tensor
    layers: tuple[int, ...]
    method: str = "mean"

    def __post_init__(self) -> None:
        if self.directions.ndim != 2 or len(self.directions) != len(self.layers):
            raise UsageError(
                f"The directions are of shape {tuple(self.directions.shape)}, and there are {len(self.layers)} layers: "
                f"give a tensor of shape ({len(self.layers)}, hidden)."
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"The layers of a steering vector are given once each, in order, not {self.layers}.")

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The direction of one layer, (hidden)."""
        if layer not in self.layers:
            raise UsageError(f"This steering vector has no direction for layer {layer}; it has {list(self.layers)}.")
        return self.directions[self.layers.index(layer)]

    @classmethod
    def train(
        cls,
        model: StandardizedTransformer,
        positive: Sequence[str],
        negative: Sequence[str],
        layers: Sequence[int] | None = None,
        method: str = "mean",
        token: int = -1,
        batch_size: int = 32,
    ) -> SteeringVector:
        """Find the direction that leads from the negative to the positive prompts.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> japan, france = ["The capital of Japan is"], ["The capital of France is"]
        >>> vector = SteeringVector.train(model, japan, france, layers=[2, 3])
        >>> vector.directions.shape == (2, model.hidden_size)
        True

        Args:
            model: the model.
            positive: prompts with what is wanted.
            negative: prompts without it. ``"principal"`` takes the two lists as pairs, of the same length.
            layers: after which layers; all if None. Negative ones count from the last.
            method: ``"mean"``: the difference between the means of the activations. ``"principal"``: the first
                principal component (not centred) of the differences within pairs, as long as the mean difference along
                it and with its sign.
            token: which token of each prompt is read, by its own tokens, whatever the padding.
            batch_size: how many prompts go through the model at once.

        Raises:
            UsageError: a list of prompts is empty, pairs are wanted and the lists differ in length, or the method is
                unknown.
            LayerIndexError: the model has no such layer.
        """
        if method not in METHODS:
            raise UsageError(f"There is no method {method!r} of finding a steering vector: give one of {METHODS}.")
        lists = {"positive": as_prompts(positive, "positive"), "negative": as_prompts(negative, "negative")}
        ours, others = map(len, lists.values())
        if method == "principal" and ours != others:
            raise UsageError(
                f"There are {ours} positive and {others} negative prompts, and the method 'principal' takes them as "
                "pairs: give as many of the one as of the other, or method='mean'."
            )
        wanted = range(model.num_layers) if layers is None else layers
        chosen = tuple(sorted({model.layers_output.position(layer) for layer in wanted}))
        if not chosen:
            raise UsageError("layers=[] leaves no layer to find a direction for.")
        found = {
            name: collect_token_activations_batched(
                model, prompts, batch_size, chosen, idx=token, tqdm=partial(progress, title=f"{name} prompts")
            ).float()
            for name, prompts in lists.items()
        }
        directions = found["positive"].mean(1) - found["negative"].mean(1)
        if method == "principal":
            directions = _principal(found["positive"] - found["negative"], directions)
        return cls(directions, chosen, method)

    def apply(
        self,
        model: StandardizedTransformer,
        factor: float = 1,
        layers: Sequence[int] | int | None = None,
        positions: Any = None,
        token_positions: Any = None,
        batch_index: Any = None,
    ) -> None:
        """Inside a trace, add ``factor`` times each layer's direction to that layer's output.

        In a generation it holds for the step in which it stands: ``for step in tracer.iter[:]: vector.apply(model)``
        steers every step.

        Args:
            model: the model that is traced.
            factor: how much of it; negative steers the other way.
            layers: some of the vector's layers; all of them if None.
            positions: which positions, as for :meth:`StandardizedTransformer.steer`.
            token_positions: which tokens of each prompt, as there.
            batch_index: which prompts, as there.

        Raises:
            SteeringVectorError: the vector is of a model of another width.
            UsageError: the vector has no direction for a layer.
        """
        for layer in self._chosen(layers):
            model.steer(layer, self[layer], factor, positions, token_positions, batch_index)

    def ablate(
        self,
        model: StandardizedTransformer,
        layers: Sequence[int] | int | None = None,
        positions: Any = None,
        token_positions: Any = None,
        batch_index: Any = None,
    ) -> None:
        """Inside a trace, take each layer's direction out of that layer's output; arguments as for :meth:`apply`."""
        for layer in self._chosen(layers):
            model.ablate_direction(layer, self[layer], positions, token_positions, batch_index)

    def project(
        self, model: StandardizedTransformer, prompts: Sequence[str], token: int = -1, batch_size: int = 32
    ) -> torch.Tensor:
        """How far the prompts' activations lie along the directions: (prompt, layer), in units of the residual stream.

        Args:
            model: the model.
            prompts: the texts.
            token: which token of each prompt is read, by its own tokens.
            batch_size: how many prompts go through the model at once.

        Raises:
            SteeringVectorError: the vector is of a model of another width.
            UsageError: there is no prompt.
        """
        given = as_prompts(prompts)
        hidden = collect_token_activations_batched(
            model, given, batch_size, self.layers, idx=token, tqdm=partial(progress, title="projection")
        ).float()
        if hidden.shape[-1] != self.directions.shape[-1]:
            raise SteeringVectorError(self.directions[0], (hidden.shape[-1],))
        return torch.einsum("lph,lh->pl", hidden, self.unit().directions)

    def unit(self) -> SteeringVector:
        """The same directions, each of length 1; a direction of length 0 stays so."""
        return replace(self, directions=torch.nn.functional.normalize(self.directions, dim=-1))

    def save(self, path: str | Path) -> None:
        """Write the vector to a safetensors file.

        Raises:
            UsageError: the file cannot be written.
        """
        check_vector_file(path)
        about = {"format": _FORMAT, "layers": ",".join(map(str, self.layers)), "method": self.method}
        save_file({"directions": self.directions.contiguous()}, str(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a vector that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            UsageError: the file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file '{path}' to load a steering vector from.")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise UsageError(f"'{path}' is a safetensors file, but no steering vector that save() wrote.")
                layers = tuple(int(layer) for layer in about["layers"].split(","))
                return cls(file.get_tensor("directions"), layers, about["method"])
        except SafetensorError as error:
            raise UsageError(f"'{path}' is no safetensors file, as save() writes one: {error}") from error

    def _chosen(self, layers: Sequence[int] | int | None) -> Sequence[int]:
        if layers is None:
            return self.layers
        # In forward order, whatever the order given: a layer that has run cannot be steered any more.
        return sorted({layers} if isinstance(layers, int) else set(layers))


def check_vector_file(path: str | Path) -> None:
    """Say before the work, and not after it, that a steering vector could not be written there.

    Raises:
        UsageError: there is no such folder, or one may not write there.
    """
    reason = why_not_writable(Path(path))
    if reason is not None:
        raise UsageError(f"The steering vector cannot be written to '{path}': {reason}. Give another file.")


def _principal(differences: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """For each layer the direction along which the pairs differ most, (layer, hidden), from (layer, pair, hidden)."""
    main: torch.Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[:, 0]
    return main * (main * means).sum(-1, keepdim=True)
