"""Prompts of any kind -> one batch of token ids, padded on the left."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from nnsight_core.errors import OptionError
from nnsight_core.input_errors import EmptyPromptError, InputError

#: Without the tokenizer's mask nobody could tell its padding from tokens.
_MASK = {"return_attention_mask": True}


def is_text(given: Any) -> bool:
    """Whether a prompt, or one of several, is text."""
    if isinstance(given, (list, tuple)):
        return any(is_text(each) for each in given)
    return isinstance(given, str)


def tokenizer_options(tokenizer: Any) -> set[str]:
    """What a tokenizer can be told about reading a text."""
    names = set() if tokenizer is None else {*inspect.signature(tokenizer.__call__).parameters}
    return names - {"text", "text_pair", "text_target", "text_pair_target", "tokenizer_kwargs", "kwargs"}


def _left_padded(row: list[int], mask: list[int]) -> list[int | None]:
    tokens = [token for token, is_token in zip(row, mask, strict=True) if is_token]
    return [*[None] * (len(row) - len(tokens)), *tokens]


def token_rows(tokenizer: Any, given: Any, options: dict[str, Any]) -> list[list[int | None]]:
    """Every prompt as a list of token ids, with None for padding."""
    if isinstance(given, str):
        return _tokenised(tokenizer, [given], options)
    if isinstance(given, torch.Tensor):
        rows: list[list[int | None]] = given.tolist() if given.ndim == 2 else [given.tolist()]
        return rows
    if not isinstance(given, Sequence):
        raise InputError(
            f"A prompt is text, token ids or a dict of tensors, not a {type(given).__name__}: {given!r:.80}"
        )
    if not given:
        raise EmptyPromptError(0, 0)
    if all(isinstance(each, str) for each in given):
        return _tokenised(tokenizer, list(given), options)
    if all(isinstance(each, int) for each in given):
        return [list(given)]
    return [row for each in given for row in (token_rows(tokenizer, each, options) if len(each) else [[]])]


def _tokenised(tokenizer: Any, texts: list[str], options: dict[str, Any]) -> list[list[int | None]]:
    if tokenizer is None:
        raise InputError(
            "This model was wrapped without a tokenizer, so it cannot read text.\n"
            "Give it one, LanguageModel(model, tokenizer=...), or give token ids instead of text."
        )
    for name in options:
        if name not in tokenizer_options(tokenizer) and not hasattr(tokenizer, name):
            what = f"{type(tokenizer).__name__} has no such option."
            raise OptionError(f"invoker_args[{name!r}]", what, tokenizer_options(tokenizer))
    # The batch is made here, of tensors and with a mask, whatever the tokenizer would make.
    asked = {name: value for name, value in options.items() if name not in ("return_tensors", *_MASK)}
    encoded: Any = tokenizer(texts, **asked, **_MASK)
    rows: list[list[int]] = encoded["input_ids"]
    masks = encoded.get("attention_mask") or [[1] * len(row) for row in rows]
    return [_left_padded(row, mask) for row, mask in zip(rows, masks, strict=True)]


def padded(rows: list[list[int | None]], filler: int) -> dict[str, torch.Tensor]:
    """The prompts as one batch, padded on the left with ``filler``: ids and mask, each (batch, position).

    Raises:
        EmptyPromptError: a prompt has no token.
    """
    for index, row in enumerate(rows):
        if all(each is None for each in row):
            raise EmptyPromptError(index, len(rows))
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        tokens = [each for each in row if each is not None]
        ids[index, longest - len(tokens) :] = torch.tensor(tokens)
        mask[index, longest - len(tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
