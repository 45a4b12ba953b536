"""What does each attention head look at? Scores of every head on text that repeats itself.

scores = head_scores(model)                       # {"previous": (layer, head), "induction": ..., "duplicate": ...}
find_heads(model, "induction")                    # [Head(layer=3, head=1, score=0.92), ...]

Random tokens are given twice over, so that nothing but the repetition can be looked at. There an induction head looks
at the token after the earlier copy of the current one, a duplicate-token head at the earlier copy itself; a
previous-token head looks one token back everywhere (Elhage et al. 2021, https://transformer-circuits.pub/2021/framework;
Olsson et al. 2022, https://arxiv.org/abs/2209.11895; duplicate tokens: Wang et al. 2022,
https://arxiv.org/abs/2211.00593).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from nnsight_core.prompts import token_rows
from nnterp.choices import KINDS
from nnterp.errors import UsageError, did_you_mean
from nnterp.interventions.batching import progress

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["find_heads", "Head", "head_scores", "KINDS", "looking_scores", "repeated_tokens"]


class Head(NamedTuple):
    """An attention head, counted from 0, and its score, from 0 to 1."""

    layer: int
    head: int
    score: float


def head_scores(
    model: StandardizedTransformer, length: int = 24, sequences: int = 8, seed: int = 0, batch_size: int = 8
) -> dict[str, torch.Tensor]:
    """How much of its attention each head gives to the previous token, and to earlier copies.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> scores = head_scores(model)
    >>> scores["induction"].shape == (model.num_layers, model.num_heads)
    True

    A head that looks at all tokens alike scores about ``0.7 / length`` for induction and for duplicates. No gradients
    are kept.

    Args:
        model: the model.
        length: how many random tokens there are before they are repeated; those of one sequence all differ.
        sequences: over how many such sequences the mean is taken.
        seed: which random tokens.
        batch_size: how many sequences go through the model at once.

    Returns:
        for each of :data:`KINDS` the mean attention probability, (layer, head), from 0 to 1, float32 on the CPU; NaN
        where a layer has no attention, or fewer heads.

    Raises:
        UsageError: ``length`` is below 3, ``sequences`` or ``batch_size`` below 1, or there are too few tokens.
        InputError: the model has too few positions for ``2 * length`` tokens.
        MissingPartError: no layer has attention.
        ClosedAttentionError: the model's attention does not show its probabilities.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: give 1 or more.")
    access = model.attention_probabilities
    layers = [layer for layer in range(model.num_layers) if access.has(layer)]
    # Says why not, if no layer has any.
    access.place(layers[0] if layers else 0)
    ids, start = repeated_tokens(model, length, sequences, seed)
    found: dict[int, list[dict[str, torch.Tensor]]] = {layer: [] for layer in layers}
    for part in progress(ids.split(batch_size), "head scores"):
        with torch.no_grad(), model.trace(part) as tracer:
            for layer in layers:
                found[layer].append(looking_scores(access[layer].value, start))
            tracer.stop()
    most = max(len(batches[0][KINDS[0]][0]) for batches in found.values())
    whole = {kind: torch.full((model.num_layers, most), float("nan")) for kind in KINDS}
    for layer, batches in found.items():
        for kind in KINDS:
            means = torch.cat([each[kind] for each in batches]).mean(0)
            whole[kind][layer, : len(means)] = means
    return whole


def find_heads(
    model: StandardizedTransformer,
    kind: str,
    threshold: float | None = None,
    top_k: int | None = None,
    length: int = 24,
    sequences: int = 8,
    seed: int = 0,
) -> list[Head]:
    """The heads of one kind, the highest score first.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> [head.score >= 0.2 for head in find_heads(model, "previous", threshold=0.2)].count(False)
    0
    >>> len(find_heads(model, "induction", top_k=3))
    3

    Args:
        model: the model.
        kind: one of :data:`KINDS`.
        threshold: the lowest score, from 0 to 1; 0.4 if neither this nor ``top_k`` is given.
        top_k: how many heads at most.
        length: as for :func:`head_scores`.
        sequences: as there.
        seed: as there.

    Raises:
        UsageError: there is no such kind, or ``top_k`` is below 1; and what :func:`head_scores` raises.
    """
    if kind not in KINDS:
        raise UsageError(f"There are no {kind!r} heads. {did_you_mean(kind, KINDS)} Give one of {KINDS}.")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k={top_k}: give 1 or more, or None for all above the threshold.")
    lowest = (0.4 if top_k is None else 0.0) if threshold is None else threshold
    scores = head_scores(model, length, sequences, seed)[kind]
    places = (scores >= lowest).nonzero().tolist()
    found = [Head(layer, head, float(scores[layer, head])) for layer, head in places]
    return sorted(found, key=lambda each: -each.score)[:top_k]


def looking_scores(probabilities: torch.Tensor, start: int = 0) -> dict[str, torch.Tensor]:
    """How much attention goes where each kind of head would look, in text that is given twice over.

    >>> looks = torch.zeros(1, 1, 6, 6)
    >>> looks[0, 0, range(1, 6), range(5)] = 1          # every token looks one back
    >>> {kind: float(score) for kind, score in looking_scores(looks).items()}
    {'previous': 1.0, 'induction': 0.0, 'duplicate': 0.0}

    Args:
        probabilities: (sequence, head, query, key).
        start: at which position the first copy starts; the second one ends where the sequences do.

    Returns:
        for each of :data:`KINDS` the mean over the queries, (sequence, head), float32 on the CPU. Previous: over all
        tokens of both copies but the first. Induction and duplicate: over the second copy.
    """
    end = probabilities.shape[-1]
    length = (end - start) // 2
    both, second = torch.arange(start + 1, end), torch.arange(start + length, end)
    looks = {"previous": (both, 1), "induction": (second, length - 1), "duplicate": (second, length)}
    return {
        kind: probabilities[:, :, queries, queries - back].float().mean(-1).cpu()
        for kind, (queries, back) in looks.items()
    }


def repeated_tokens(
    model: StandardizedTransformer, length: int, sequences: int, seed: int = 0
) -> tuple[torch.Tensor, int]:
    """Random ordinary tokens, each sequence twice over, after what the tokenizer puts before every text.

    Args:
        model: the model; without a tokenizer every id counts as ordinary.
        length: how many tokens a copy has; they all differ.
        sequences: how many sequences.
        seed: which tokens.

    Returns:
        the ids, (sequence, position), and the position at which the first copy starts.

    Raises:
        UsageError: there are not that many tokens to draw, or none are to be drawn.
    """
    ordinary = torch.tensor(_ordinary(model))
    # Of two tokens the one after the earlier copy is the previous one.
    if length < 3 or sequences < 1 or len(ordinary) < length:
        raise UsageError(
            f"{sequences} sequences of {length} different tokens cannot be drawn from {len(ordinary)}: "
            f"give at least one sequence, and a length from 3 to {len(ordinary)}."
        )
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack(
        [ordinary[torch.randperm(len(ordinary), generator=generator)[:length]] for _ in range(sequences)]
    )
    before = torch.tensor(_prefix(model), dtype=once.dtype).expand(sequences, -1)
    return torch.cat([before, once, once], 1), before.shape[1]


def _ordinary(model: StandardizedTransformer) -> Sequence[int]:
    """The ids of tokens that stand for text: none that is special or was added, nor a row that pads the embedding."""
    if model.tokenizer is None:
        return range(model.vocab_size)
    known = {*model.tokenizer.get_vocab().values()} - {*model.tokenizer.all_special_ids}
    known -= {*getattr(model.tokenizer, "added_tokens_decoder", ())}
    return sorted(each for each in known if each < model.vocab_size)


def _prefix(model: StandardizedTransformer) -> list[int]:
    """What the tokenizer puts before every text, such as a token for the beginning. Idle heads rest on it."""
    if model.tokenizer is None:
        return []
    (whole,), (plain,) = (token_rows(model.tokenizer, "a", each) for each in ({}, {"add_special_tokens": False}))
    starts = range(len(whole) - len(plain) + 1)
    start = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return [each for each in whole[:start] if each is not None]
