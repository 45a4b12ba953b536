"""The logit lens: what would the model say next if it stopped after this layer?

logit_lens(model, ["The Eiffel Tower is in the city of"])    # probabilities, (prompt, layer, vocab)
logit_lens_topk(model, prompts, k=5)                         # only the best, (prompt, layer, k)
lens_tokens(model, "The Eiffel Tower is in the city of")     # the same of one prompt at all positions, with texts

Every layer's output goes through the model's own final norm and unembedding (nostalgebraist, 2020, "interpreting GPT:
the logit lens", https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from nnsight_core.errors import RemoteError
from nnsight_core.input_errors import InputError
from nnterp.errors import PositionError, TopCountError
from nnterp.interventions.batching import as_prompts, in_batches

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["lens_tokens", "LensResult", "logit_lens", "logit_lens_topk", "TopTokens"]

#: How many prompts go through the model at once.
BATCH_SIZE = 32
#: How many logits are held at once, of one layer: 512 MiB in float32. A long prompt is unembedded piece by piece.
LOGITS_AT_ONCE = 2**27

#: What is kept of the logits (prompt, position, vocab) of one layer, each of shape (prompt, position, ...).
Kept = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class LensResult:
    """What the logit lens reads at every layer of one prompt, and at some or all of its positions.

    Args:
        prompt: the prompt as it was given.
        tokens: the text of each token that was looked at, those that the tokenizer adds included.
        positions: where these stand in the prompt, counted from 0.
        ids: their ids, (position).
        layer_names: one name for each layer, the first layer first.
        top_ids: the ids of the most probable next tokens, most probable first, (layer, position, k).
        top_probs: their probabilities, (layer, position, k), float32.
        top_tokens: their texts, by layer, position and rank.

    Bytes that are only part of a character read ``<0xE2>``.
    """

    prompt: str
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    ids: torch.Tensor
    layer_names: tuple[str, ...]
    top_ids: torch.Tensor
    top_probs: torch.Tensor
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]


class TopTokens(NamedTuple):
    """The most probable next tokens, most probable first: their probabilities, float32 on the CPU, and their ids.

    Both are of shape (prompt, layer, k) or (prompt, layer, position, k).
    """

    probs: torch.Tensor
    ids: torch.Tensor


def logit_lens(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    remote: bool = False,
    return_inv_logits: bool = False,
    *,
    all_positions: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The probabilities of the token after each prompt, read from every layer's output.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> probs = logit_lens(model, ["The Eiffel Tower is in the city of", "The capital of Japan is"])
    >>> probs.shape == (2, model.num_layers, model.vocab_size)
    True
    >>> model.token_text(probs[0, -1].argmax())
    ' Paris'

    Many prompts go through the model in batches, with a progress bar on stderr if that takes a while. No gradients are
    kept. :func:`logit_lens_topk` needs far less memory for many prompts, or long ones.

    Args:
        nn_model: the model.
        prompts: one prompt or several.
        remote: not available.
        return_inv_logits: also give the probabilities that the negated logits would have, which show what a layer
            speaks against.
        all_positions: read after every token of the prompts, and not after the last alone.

    Returns:
        probabilities of shape (prompt, layer, vocab), float32 on the CPU, where the last layer is the model's own
        prediction; with ``all_positions`` (prompt, layer, position, vocab). Prompts stand flush right there: ``-1`` is
        the last token of each, and NaN is where a shorter one has no token. With ``return_inv_logits`` a second tensor
        like it.

    Raises:
        RemoteError: ``remote`` is set.
        UsageError: there is no prompt.
        InputError: a prompt has no token, or more than the model has positions.
    """
    if remote:
        raise RemoteError()

    def keep(logits: torch.Tensor) -> Kept:
        kept = (logits.softmax(-1),)
        return (*kept, (-logits).softmax(-1)) if return_inv_logits else kept

    found = _of_prompts(nn_model, prompts, keep, all_positions)
    return (found[0], found[1]) if return_inv_logits else found[0]


def logit_lens_topk(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    k: int = 5,
    *,
    all_positions: bool = False,
) -> TopTokens:
    """The ``k`` most probable tokens after each prompt, read from every layer's output.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> top = logit_lens_topk(model, ["The Eiffel Tower is in the city of", "The capital of Japan is"], k=3)
    >>> top.ids.shape == (2, model.num_layers, 3)
    True
    >>> [model.token_text(token) for token in top.ids[:, -1, 0]]
    [' Paris', ' Tokyo']

    Layers are read one after the other while the model runs, long prompts piece by piece, so that what is held of the
    vocabulary is bounded, however many layers and positions there are.

    Args:
        nn_model: the model.
        prompts: one prompt or several.
        k: how many tokens, from 1 to the size of the vocabulary.
        all_positions: read after every token of the prompts, and not after the last alone.

    Returns:
        probabilities and ids, (prompt, layer, k), or with ``all_positions`` (prompt, layer, position, k). Prompts stand
        flush right there: where a shorter one has no token, the probability is NaN and the id -1.

    Raises:
        TopCountError: ``k`` is out of range.
        UsageError: there is no prompt.
        InputError: a prompt has no token, or more than the model has positions.
    """
    probs, ids = _of_prompts(nn_model, prompts, _top(nn_model, k), all_positions)
    return TopTokens(probs, ids)


def lens_tokens(
    model: StandardizedTransformer, prompt: str, k: int = 5, positions: Sequence[int] | None = None
) -> LensResult:
    """The ``k`` most probable next tokens at every layer, and at all or some positions, of one prompt.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> lens = lens_tokens(model, "The Eiffel Tower is in the city of")
    >>> lens.top_probs.shape == (model.num_layers, len(lens.tokens), 5)
    True
    >>> lens.top_tokens[-1][-1][0]      # last layer, last position: the model's own prediction
    ' Paris'

    Args:
        model: the model.
        prompt: the text.
        k: how many tokens, from 1 to the size of the vocabulary.
        positions: after which tokens of the prompt, in the order given; all if None. Negative ones count from the end.

    Raises:
        TopCountError: ``k`` is out of range.
        PositionError: the prompt has no such position.
        InputError: the prompt has no token, or more than the model has positions.
    """
    keep = _top(model, k)
    with torch.no_grad(), model.trace(prompt) as tracer:
        whole = model.input_ids.value[0]
        places = _places(positions, len(whole))
        layers = list(_layer_by_layer(model, keep, places))
        tracer.stop()
    top_probs, top_ids = (torch.stack(each)[:, 0] for each in zip(*layers, strict=True))
    ids = whole[list(places)].cpu()
    texts = {each: model.token_text(each) for each in {*ids.tolist(), *top_ids.unique().tolist()}}
    return LensResult(
        prompt=prompt,
        tokens=tuple(texts[each] for each in ids.tolist()),
        positions=places,
        ids=ids,
        layer_names=tuple(f"layer {layer}" for layer in range(model.num_layers)),
        top_ids=top_ids,
        top_probs=top_probs,
        top_tokens=tuple(tuple(tuple(texts[each] for each in row) for row in layer) for layer in top_ids.tolist()),
    )


def _top(model: StandardizedTransformer, k: int) -> Callable[[torch.Tensor], Kept]:
    if not 1 <= k <= model.vocab_size:
        raise TopCountError(k, model.vocab_size)

    def keep(logits: torch.Tensor) -> Kept:
        top = logits.softmax(-1).topk(k)
        return top.values, top.indices

    return keep


def _places(positions: Sequence[int] | None, length: int) -> tuple[int, ...]:
    wanted = range(length) if positions is None else positions
    for position in wanted:
        if not -length <= position < length:
            raise PositionError(f"Position {position} is not there: the prompt has {length} tokens, counted from 0.")
    if not wanted:
        raise PositionError("positions=[] leaves no position to look at.")
    return tuple(position % length for position in wanted)


def _of_prompts(
    model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    keep: Callable[[torch.Tensor], Kept],
    all_positions: bool,
) -> Kept:
    """What is kept, of all prompts: (prompt, layer, ...), or (prompt, layer, position, ...)."""
    found: list[Kept] = []
    parts = in_batches(as_prompts(prompts), BATCH_SIZE, "logit lens")
    for part in parts:
        try:
            found.append(_of_batch(model, part, keep, all_positions))
        except InputError as error:
            if len(parts) == 1:
                raise
            start = len(found) * BATCH_SIZE
            raise InputError(f"Of the prompts from number {start} on, counting them from there: {error}") from error
    return tuple(_flush_right(each) for each in zip(*found, strict=True))


def _of_batch(
    model: StandardizedTransformer,
    prompts: Sequence[str],
    keep: Callable[[torch.Tensor], Kept],
    all_positions: bool,
) -> Kept:
    with torch.no_grad(), model.trace(prompts) as tracer:
        is_token = model.attention_mask.value.bool().cpu()
        places = tuple(range(is_token.shape[1])) if all_positions else (-1,)
        layers = list(_layer_by_layer(model, keep, places))
        tracer.stop()
    found = tuple(torch.stack(each, dim=1) for each in zip(*layers, strict=True))
    if not all_positions:
        return tuple(each[:, :, 0] for each in found)
    for each in found:
        each.movedim(2, 1)[~is_token] = _nothing(each)
    return found


def _layer_by_layer(
    model: StandardizedTransformer, keep: Callable[[torch.Tensor], Kept], places: Sequence[int]
) -> Iterator[Kept]:
    """Inside a trace, what is kept of each layer, on the CPU."""
    for layer in range(model.num_layers):
        hidden = model.layers_output[layer].value
        step = max(1, LOGITS_AT_ONCE // (len(hidden) * model.vocab_size))
        pieces = []
        for start in range(0, len(places), step):
            logits = model.project_on_vocab(hidden[:, list(places[start : start + step])]).float()
            pieces.append(tuple(each.cpu() for each in keep(logits)))
        yield tuple(torch.cat(each, dim=1) for each in zip(*pieces, strict=True))


def _flush_right(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Batches one after the other; where they have positions, and differ in them, the shorter ones are filled up."""
    if batches[0].ndim < 4 or len({each.shape[2] for each in batches}) == 1:
        return torch.cat(list(batches))
    longest = max(batches, key=lambda each: each.shape[2])
    whole = longest.new_full((sum(map(len, batches)), *longest.shape[1:]), _nothing(longest))
    start = 0
    for each in batches:
        whole[start : start + len(each), :, whole.shape[2] - each.shape[2] :] = each
        start += len(each)
    return whole


def _nothing(like: torch.Tensor) -> float:
    return float("nan") if like.is_floating_point() else -1
