"""What each head looks at in a prompt: its attention probabilities, with the tokens they are between.

found = attention_patterns(model, "The Eiffel Tower is in the city of", layers=[2])
found.probabilities[2]        # (head, query, key); each query's add up to 1
found.most(2, head=1)         # for each token the one that it looks at most, and how much
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nnterp.errors import PositionError
from nnterp.interventions.sites import chosen_layers, prompt_ids, token_texts

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["attention_patterns", "AttentionPatterns"]


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """The attention of some layers on one prompt.

    Args:
        tokens: the text of each token.
        probabilities: by layer, (head, query, key), float32 on the CPU, from 0 to 1.
    """

    tokens: tuple[str, ...]
    probabilities: Mapping[int, torch.Tensor]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(self.probabilities)

    def most(self, layer: int, head: int) -> list[tuple[int, float]]:
        """For each query the key that it looks at most, and with what probability.

        Raises:
            PositionError: the layer is not among these, or has no such head.
        """
        heads = self.probabilities.get(layer)
        if heads is None:
            raise PositionError(f"Layer {layer} is not among these patterns; they are of layers {self.layers}.")
        if not 0 <= head < len(heads):
            raise PositionError(f"Layer {layer} has {len(heads)} heads, counted from 0, and none is {head}.")
        values, keys = heads[head].max(-1)
        return list(zip(keys.tolist(), values.tolist(), strict=True))


def attention_patterns(
    model: StandardizedTransformer, prompt: str | Sequence[int] | torch.Tensor, layers: Sequence[int] | None = None
) -> AttentionPatterns:
    """The attention probabilities of every head on a prompt.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> found = attention_patterns(model, "The Eiffel Tower is in the city of", layers=[-1])
    >>> found.layers, found.probabilities[5].shape
    ((5,), torch.Size([4, 8, 8]))

    Args:
        model: the model.
        prompt: one text, or its token ids.
        layers: the layers; all that have attention if None. Negative ones count from the last.

    Raises:
        LayerIndexError: the model has no such layer.
        MissingPartError: a layer that was asked for, or every layer, has no attention.
        ClosedAttentionError: the model's attention does not show its probabilities.
        InputError: the prompt has no token, or more than the model has positions.
    """
    access = model.attention_probabilities
    wanted = chosen_layers(model, layers)
    if layers is None:
        wanted = tuple(layer for layer in wanted if access.has(layer)) or wanted
    for layer in wanted:
        # Says why not, before the model runs.
        access.place(layer)
    ids = prompt_ids(model, prompt if isinstance(prompt, (str, torch.Tensor)) else torch.tensor([*prompt]))[:1]
    with torch.no_grad(), model.trace(ids) as tracer:
        found = {layer: access[layer].value[0].float().cpu() for layer in wanted}
        tracer.stop()
    return AttentionPatterns(token_texts(model, ids), found)
