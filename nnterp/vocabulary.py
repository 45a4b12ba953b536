"""From the residual stream to tokens: the model's own way from the last layer's output to its logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.arguments import apply
from nnterp.calling import config_of
from nnterp.errors import TopCountError, UsageError
from nnterp.prefix_space import without_space
from nnterp.token_text import token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nnterp.accessors import ValueAccess
    from nnterp.rename_plan import RenamePlan
    from nnterp.spec import ArchitectureSpec


class Vocabulary:
    """The vocabulary tools of a :class:`~nnterp.StandardizedTransformer`."""

    _plan: RenamePlan
    _spec: ArchitectureSpec
    layers_output: ValueAccess
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int

    def project_on_vocab(self, hidden_state: Any) -> Any:
        """The logits that a hidden state would give if it were the last layer's output.

        Applies the final norm, the unembedding and whatever the family does to the logits after that (soft-capping).
        On the last layer's output it gives the model's own logits. Works on plain tensors and inside a trace. This is
        the logit lens (nostalgebraist, 2020, "interpreting GPT: the logit lens").

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     logits = model.project_on_vocab(model.layers_output[2]).save()
        >>> logits.shape[-1] == model.vocab_size
        True

        Args:
            hidden_state: of shape (..., hidden).

        Returns:
            logits of shape (..., vocab).

        Raises:
            CannotError: the family's logits are made of more than the last layer's output.
        """
        self._spec.refuse("project_on_vocab", "project_on_vocab(...)")
        hidden_state = self.layers_output.shape.joined(hidden_state)
        for path in self._plan.unembed:
            module = self.get(path)  # type: ignore[attr-defined]
            hidden_state = module(apply(_in_type_of, hidden_state, getattr(module._module, "weight", None)))
        return apply(self._finished, hidden_state)

    def _finished(self, logits: torch.Tensor) -> Any:
        return self._spec.logits.applied(logits, config_of(self._module))  # type: ignore[attr-defined]

    @property
    def add_prefix_false_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, but without the space that some put before every text.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> model.add_prefix_false_tokenizer("Paris") == model.add_prefix_false_tokenizer(" Paris")
        False

        Raises:
            UsageError: there is no tokenizer, or it cannot be kept from adding the space.
        """
        if self.tokenizer is None:
            raise UsageError("This model was opened without a tokenizer: give tokenizer=... with it.")
        made = self.__dict__.get("_without_space")
        if made is None or made[0] is not self.tokenizer:
            made = self.__dict__["_without_space"] = (self.tokenizer, without_space(self.tokenizer))
        found: PreTrainedTokenizerBase = made[1]
        return found

    def probs_to_dict(self, tokens: torch.Tensor, probs: torch.Tensor) -> dict[str, float]:
        """Token texts and their probabilities, in the given order.

        Args:
            tokens: ids, of shape (k).
            probs: their probabilities, of shape (k).
        """
        found: dict[str, float] = {}
        for token, prob in zip(tokens.tolist(), probs.tolist(), strict=True):
            text = self.token_text(token)
            # Tokens that are only part of a character read alike; their numbers tell them apart.
            found[text if text not in found else f"{text}#{token}"] = prob
        return found

    def token_text(self, token: int) -> str:
        """How a token reads, its space included; bytes that are only part of a character read ``<0xE2>``."""
        return token_text(self.tokenizer, int(token))

    def get_topk_closest_tokens(self, hidden_state: Any, k: int = 5) -> Any:
        """The ``k`` most probable tokens that a hidden state gives through the unembedding.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     hidden = model.layers_output[-1][:, -1].save()
        >>> list(model.get_topk_closest_tokens(hidden[0], k=1))
        [' Paris']

        Args:
            hidden_state: of shape (hidden), or with more axes before it.
            k: how many, from 1 to the size of the vocabulary.

        Returns:
            a dict from token text to probability (0 to 1), most probable first; for (batch, hidden) a list of them, and
            so on for each further axis.

        Raises:
            TopCountError: ``k`` is out of range.
        """
        if not 1 <= k <= self.vocab_size:
            raise TopCountError(k, self.vocab_size)
        plain = hidden_state.value if hasattr(hidden_state, "save") else hidden_state
        with torch.no_grad():
            top = self.project_on_vocab(plain).softmax(-1).topk(k)
        return self._named(top.indices, top.values)

    def _named(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        if tokens.ndim == 1:
            return self.probs_to_dict(tokens, probs)
        rows: Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(tokens, probs, strict=True)
        return [self._named(token_row, prob_row) for token_row, prob_row in rows]


def _in_type_of(hidden_state: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Some models keep the stream in single precision, and round it only for the map to the vocabulary."""
    is_map = weight is not None and weight.ndim == 2 and weight.is_floating_point()
    return hidden_state.to(weight.dtype) if is_map and weight is not None else hidden_state
