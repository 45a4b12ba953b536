"""Tokenizers that put a space before every text, so that `"word"` reads like `" word"`, and the same without it."""

from __future__ import annotations

import copy
import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from nnterp.errors import UsageError
from nnterp.token_text import token_text


def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text of one letter is read as if a space stood before it."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not ids:
        return False
    # A tokenizer without a decoder shows its marks for a space as they are.
    return token_text(tokenizer, ids[0])[:1].isspace() or str(tokenizer.convert_ids_to_tokens(ids[0]))[:1] in "▁Ġ"


def without_space(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer if it adds no space, else a copy that does not.

    Loading it with ``add_prefix_space=False`` is no way to this: many tokenizers take the option and go on as before.

    Raises:
        UsageError: the tokenizer cannot be kept from it.
    """
    if not adds_space(tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        made: Any = copy.deepcopy(tokenizer)
        made._tokenizer = Tokenizer.from_str(json.dumps(_without(json.loads(backend.to_str()))))
        if not adds_space(made):
            kept: PreTrainedTokenizerBase = made
            return kept
    raise UsageError(
        f"{type(tokenizer).__name__} puts a space before every text and cannot be kept from it. "
        "nnterp.prompt_utils.get_first_tokens tells words with and without a space apart all the same."
    )


def _without(part: Any) -> Any:
    """The description of a tokenizer without what adds the space; its decoder stays, for it takes off what is there."""
    if isinstance(part, list):
        return [_without(each) for each in part if not (isinstance(each, dict) and _is_prepend(each))]
    if not isinstance(part, dict):
        return part
    found = {key: value if key == "decoder" else _without(value) for key, value in part.items()}
    found = {key: None if key == "normalizer" and _is_prepend(value) else value for key, value in found.items()}
    if found.get("type") == "Metaspace":
        found["prepend_scheme"] = "never"
    if found.get("type") == "ByteLevel":
        found["add_prefix_space"] = False
    return found


def _is_prepend(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
