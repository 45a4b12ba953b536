"""The logit lens: what would the model say next if it stopped after this layer?

logit_lens(model, ["The Eiffel Tower is in the city of"])    # probabilities, (prompt, layer, vocab)
lens_tokens(model, "The Eiffel Tower is in the city of")     # the top tokens at every layer and position

Every layer's output goes through the model's own final norm and unembedding (nostalgebraist, 2020, "interpreting GPT:
the logit lens", https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from nnsight_core.errors import RemoteError
from nnsight_core.input_errors import EmptyPromptError, InputError
from nnterp.errors import TopCountError

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["LensResult", "lens_tokens", "logit_lens"]

#: How many prompts go through the model at once.
BATCH_SIZE = 32


@dataclass(frozen=True, eq=False)
class LensResult:
    """What the logit lens reads at every layer and position of one prompt.

    Args:
        prompt: the prompt as it was given.
        tokens: the text of each of its tokens, those that the tokenizer adds included.
        ids: their ids, (position).
        layer_names: one name for each layer, the first layer first.
        top_ids: the ids of the most probable next tokens, most probable first, (layer, position, k).
        top_probs: their probabilities, (layer, position, k), float32.
        top_tokens: their texts, by layer, position and rank.

    Bytes that are only part of a character read ``<0xE2>``.
    """

    prompt: str
    tokens: tuple[str, ...]
    ids: torch.Tensor
    layer_names: tuple[str, ...]
    top_ids: torch.Tensor
    top_probs: torch.Tensor
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]


def logit_lens(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    remote: bool = False,
    return_inv_logits: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The probabilities of the token after each prompt, read from every layer's output.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> probs = logit_lens(model, ["The Eiffel Tower is in the city of", "The capital of Japan is"])
    >>> probs.shape == (2, model.num_layers, model.vocab_size)
    True
    >>> model.token_text(probs[0, -1].argmax())
    ' Paris'

    Many prompts go through the model in batches, with a progress bar on stderr. No gradients are kept.

    Args:
        nn_model: the model.
        prompts: one prompt or several.
        remote: not available.
        return_inv_logits: also give the probabilities that the negated logits would have, which show what a layer
            speaks against.

    Returns:
        probabilities of shape (prompt, layer, vocab), float32 on the CPU, where the last layer is the model's own
        prediction; with ``return_inv_logits`` a second tensor like it.

    Raises:
        RemoteError: ``remote`` is set.
        InputError: a prompt has no token, or more than the model has positions.
    """
    if remote:
        raise RemoteError()
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise EmptyPromptError(0, 0)
    found: list[torch.Tensor] = []
    inverse: list[torch.Tensor] = []
    for logits in _last_logits(nn_model, given):
        found.append(logits.softmax(-1).cpu())
        if return_inv_logits:
            inverse.append((-logits).softmax(-1).cpu())
    probs = torch.cat(found)
    return (probs, torch.cat(inverse)) if return_inv_logits else probs


def _last_logits(model: StandardizedTransformer, prompts: list[str]) -> Iterator[torch.Tensor]:
    """For each batch of prompts the logits at the last position, (prompt, layer, vocab), float32."""
    starts = range(0, len(prompts), BATCH_SIZE)
    for start in tqdm(starts, desc="logit lens", unit="batch", disable=len(starts) == 1):
        batch = prompts[start : start + BATCH_SIZE]
        try:
            with torch.no_grad(), model.trace(batch) as tracer:
                hidden = [model.layers_output[layer].value[:, -1:] for layer in range(model.num_layers)]
                # What is left of the pass is the unembedding of all positions, of which one is wanted.
                tracer.stop()
                logits = [model.project_on_vocab(each)[:, 0].float() for each in hidden]
        except InputError as error:
            if len(starts) == 1:
                raise
            raise InputError(f"Of the prompts from number {start} on, counting them from there: {error}") from error
        yield torch.stack(logits, dim=1)


def lens_tokens(model: StandardizedTransformer, prompt: str, k: int = 5) -> LensResult:
    """The ``k`` most probable next tokens at every layer and position of one prompt.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> lens = lens_tokens(model, "The Eiffel Tower is in the city of")
    >>> lens.top_probs.shape == (model.num_layers, len(lens.tokens), 5)
    True
    >>> lens.top_tokens[-1][-1][0]      # last layer, last position: the model's own prediction
    ' Paris'

    Layers are read one after the other while the model runs, so that no more than (position, vocab) is held at once.

    Args:
        model: the model.
        prompt: the text.
        k: how many tokens, from 1 to the size of the vocabulary.

    Raises:
        TopCountError: ``k`` is out of range.
        InputError: the prompt has no token, or more than the model has positions.
    """
    if not 1 <= k <= model.vocab_size:
        raise TopCountError(k, model.vocab_size)
    probs, tops = [], []
    with torch.no_grad(), model.trace(prompt) as tracer:
        ids = model.input_ids[0].cpu()
        for layer in range(model.num_layers):
            logits = model.project_on_vocab(model.layers_output[layer].value)[0]
            top = logits.float().softmax(-1).topk(k)
            probs.append(top.values.cpu())
            tops.append(top.indices.cpu())
        tracer.stop()
    top_ids = torch.stack(tops)
    texts = {each: model.token_text(each) for each in {*ids.tolist(), *top_ids.unique().tolist()}}
    return LensResult(
        prompt=prompt,
        tokens=tuple(texts[each] for each in ids.tolist()),
        ids=ids,
        layer_names=tuple(f"layer {layer}" for layer in range(model.num_layers)),
        top_ids=top_ids,
        top_probs=torch.stack(probs),
        top_tokens=tuple(tuple(tuple(texts[each] for each in row) for row in layer) for layer in top_ids.tolist()),
    )
