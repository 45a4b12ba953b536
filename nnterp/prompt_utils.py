"""Prompts with words to watch for: how probable is it that the model goes on with one of them?

prompt = Prompt.from_strings("The capital of France is", {"right": "Paris", "wrong": ["London", "Rome"]}, model)
run_prompts(model, [prompt])["right"]                          # (prompt, layer), one layer: the model's own prediction
run_prompts(model, [prompt], get_probs_func=logit_lens)        # every layer's, from nnterp.interventions

A word is told by its first token, as it reads after a space and right after other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm as progress_bar
from transformers import PreTrainedTokenizerBase

from nnsight_core import LanguageModel
from nnsight_core.errors import RemoteError
from nnterp.errors import LayerIndexError, UsageError, did_you_mean
from nnterp.nnsight_utils import compute_next_token_probs
from nnterp.prefix_space import adds_space
from nnterp.standardized_transformer import StandardizedTransformer
from nnterp.token_text import token_text

__all__ = [
    "get_first_tokens",
    "next_token_probs_unsqueeze",
    "Prompt",
    "run_prompts",
    "TargetError",
    "TokenizationError",
]

#: From a model and prompts to probabilities, (prompt, layer, vocab).
GetProbs = Callable[..., torch.Tensor]

#: A character that no word begins with and that no tokenizer joins to the letter after it.
CONTEXT = "🍐"


class TokenizationError(UsageError, ValueError):
    """A word has no first token of its own, so its probability cannot be read from one."""

    def __init__(self, word: str, fact: str) -> None:
        super().__init__(
            f"{word!r} cannot be told by its first token: {fact}\n"
            "Choose another word, or give token ids: Prompt(text, target_tokens={'target': [id, ...]})."
        )


class TargetError(UsageError, ValueError):
    """Targets whose probability cannot be had: without a token, unknown, or not the same for all prompts."""


def get_first_tokens(
    words: str | list[str],
    llm_or_tokenizer: LanguageModel | PreTrainedTokenizerBase,
    use_hacky_implementation: bool = False,
) -> list[int]:
    """The ids of the tokens that a text may go on with if a word follows: of ``"word"`` and of ``" word"``, each once.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> [model.token_text(each) for each in get_first_tokens(["Paris", "London"], model)]
    ['Paris', ' Paris', 'L', ' London']

    A word that begins with a space stands as it is. Where `` word`` begins with a token that is nothing but a space,
    that token is left out, for every word may follow it. Some tokenizers put a space before every text, which makes
    ``"word"`` and ``" word"`` alike; there the word is read after another character.

    A long or rare word is told by its first piece alone, which other words may share: look at what was found before a
    long run, and at :meth:`Prompt.has_no_collisions`.

    Args:
        words: one word or several.
        llm_or_tokenizer: a model with its tokenizer, or a tokenizer.
        use_hacky_implementation: read every word after another character, also where the tokenizer adds no space.

    Raises:
        TokenizationError: a word has no token, or its first one is the unknown token or part of what stood before it.
    """
    tokenizer = _tokenizer(llm_or_tokenizer)
    is_within = use_hacky_implementation or adds_space(tokenizer)
    found: list[int] = []
    for word in [words] if isinstance(words, str) else words:
        forms = [word] if word[:1].isspace() else [word, f" {word}"]
        firsts = [_first(tokenizer, form, is_within) for form in forms]
        own = [first for first in firsts if token_text(tokenizer, first).strip() or not word.strip()]
        if not own:
            raise TokenizationError(word, "it begins with a token that is nothing but a space.")
        found += own
    return list(dict.fromkeys(found))


def _tokenizer(given: LanguageModel | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = given.tokenizer if isinstance(given, LanguageModel) else given
    if tokenizer is None:
        raise UsageError("This model was opened without a tokenizer, so it has no words: give tokenizer=... with it.")
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _first(tokenizer: PreTrainedTokenizerBase, text: str, is_within: bool) -> int:
    before = _ids(tokenizer, CONTEXT) if is_within else []
    ids = _ids(tokenizer, CONTEXT + text if is_within else text)
    if ids[: len(before)] != before:
        raise TokenizationError(text, "this tokenizer joins it to the character before it.")
    if len(ids) == len(before):
        raise TokenizationError(text, "this tokenizer makes no token of it.")
    first = ids[len(before)]
    if first == tokenizer.unk_token_id:
        raise TokenizationError(text, f"this tokenizer does not know it and reads {tokenizer.unk_token!r}.")
    return first


@dataclass
class Prompt:
    """A prompt and named sets of tokens whose probability after it is wanted.

    Args:
        prompt: the text.
        target_tokens: the ids that count for each target; an id that is given twice counts once.
        target_strings: the words that they stand for, where they were made from words.
    """

    prompt: str
    target_tokens: dict[str, list[int]]
    target_strings: dict[str, str | list[str]] | None = None

    @classmethod
    def from_strings(
        cls,
        prompt: str,
        target_strings: dict[str, str | list[str]] | list[str] | str,
        tokenizer: LanguageModel | PreTrainedTokenizerBase,
    ) -> Prompt:
        """A prompt whose targets are words, by :func:`get_first_tokens`.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> prompt = Prompt.from_strings("The Eiffel Tower is in the city of", ["Paris"], model)
        >>> [model.token_text(each) for each in prompt.target_tokens["target"]]
        ['Paris', ' Paris']

        Args:
            prompt: the text.
            target_strings: a word or several for each target; without names they are one target, ``"target"``.
            tokenizer: a tokenizer, or a model with its tokenizer.

        Raises:
            TokenizationError: a word has no first token of its own.
            TargetError: a target has no word.
        """
        named = target_strings if isinstance(target_strings, dict) else {"target": target_strings}
        for name, words in named.items():
            if not words:
                raise TargetError(f"The target {name!r} has no word, and so no probability: give one, or leave it out.")
        return cls(prompt, {name: get_first_tokens(words, tokenizer) for name, words in named.items()}, named)

    def has_no_collisions(self, ignore_targets: str | list[str] | None = None) -> bool:
        """Whether no token belongs to two targets; one that does counts for both.

        >>> Prompt("It is", {"cat": [5, 6], "catfish": [5]}).has_no_collisions()
        False

        Args:
            ignore_targets: targets that are not looked at.

        Raises:
            TargetError: there is no target of such a name.
        """
        ignored = [ignore_targets] if isinstance(ignore_targets, str) else list(ignore_targets or ())
        for name in ignored:
            if name not in self.target_tokens:
                near = did_you_mean(name, self.target_tokens)
                raise TargetError(f"This prompt has no target {name!r}, but {[*self.target_tokens]}. {near}".rstrip())
        tokens = [each for name, ids in self.target_tokens.items() if name not in ignored for each in set(ids)]
        return len(tokens) == len(set(tokens))

    def get_target_probs(self, probs: Any, layer: int | None = None) -> dict[str, torch.Tensor]:
        """The probability of each target, the sum over its tokens, 0 to 1: (prompt, layer), on the CPU.

        Args:
            probs: probabilities of the next token, (prompt, layer, vocab).
            layer: one layer only, which gives (prompt).

        Raises:
            UsageError: ``probs`` has other axes.
            TargetError: a target has no token, or one that is beyond the vocabulary.
            LayerIndexError: there is no such layer.
        """
        _check_axes(probs, None)
        found = {name: _mass(probs, name, ids) for name, ids in self.target_tokens.items()}
        if layer is None:
            return found
        count = probs.shape[1]
        if not -count <= layer < count:
            raise LayerIndexError("probs", layer, count)
        return {name: mass[:, layer] for name, mass in found.items()}

    @torch.no_grad()
    def run(self, nn_model: StandardizedTransformer, get_probs: GetProbs) -> dict[str, torch.Tensor]:
        """The probability of each target after this prompt: (1, layer).

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> prompt = Prompt.from_strings("The Eiffel Tower is in the city of", "Paris", model)
        >>> bool(prompt.run(model, next_token_probs_unsqueeze)["target"][0, 0] > 0.9)
        True

        Args:
            nn_model: the model.
            get_probs: from a model and a prompt to probabilities (prompt, layer, vocab):
                :func:`next_token_probs_unsqueeze`, :func:`~nnterp.interventions.logit_lens`, or one's own.
        """
        return self.get_target_probs(get_probs(nn_model, self.prompt))


def _check_axes(probs: Any, prompts: int | None) -> None:
    shape = getattr(probs, "shape", None)
    if shape is None or len(shape) != 3 or prompts not in (None, shape[0]):
        got = f"a {type(probs).__name__}" if shape is None else f"of shape {tuple(shape)}"
        wanted = "(prompt, layer, vocab)" if prompts is None else f"(prompt, layer, vocab), with {prompts} prompts"
        raise UsageError(
            f"The probabilities are {got}, and should be {wanted}. Where there is one layer: probs.unsqueeze(1)."
        )


def _mass(probs: torch.Tensor, name: str, tokens: Sequence[int]) -> torch.Tensor:
    """What the tokens have together, from (prompt, layer, vocab) to (prompt, layer)."""
    ids = torch.tensor(list(dict.fromkeys(tokens)), dtype=torch.long, device=probs.device)
    if len(ids) == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < probs.shape[-1]:
        raise TargetError(
            f"The target {name!r} is of the tokens {list(tokens)}: "
            f"give ids from 0 to {probs.shape[-1] - 1}, at least one."
        )
    picked = probs[..., ids]
    # Half precision would lose small probabilities beside large ones.
    return (picked.float() if picked.dtype in (torch.float16, torch.bfloat16) else picked).sum(-1).cpu()


def next_token_probs_unsqueeze(
    nn_model: StandardizedTransformer, prompt: str | list[str], remote: bool = False, **_kwargs: Any
) -> torch.Tensor:
    """The model's own prediction, with an axis for a layer as lenses have it: (prompt, 1, vocab).

    Further arguments are taken and not used, so that it can be called like functions that have some.
    """
    return compute_next_token_probs(nn_model, prompt, remote=remote).unsqueeze(1)


@torch.no_grad()
def run_prompts(
    nn_model: StandardizedTransformer,
    prompts: list[Prompt],
    batch_size: int = 32,
    get_probs_func: GetProbs | None = None,
    func_kwargs: dict[str, Any] | None = None,
    remote: bool = False,
    tqdm: Callable[..., Iterable[int]] | None = progress_bar,
) -> dict[str, torch.Tensor]:
    """The probability of each target after each prompt: for every target's name (prompt, layer), on the CPU.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_lens
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> cities = {"The Eiffel Tower is in the city of": "Paris", "The capital of Japan is": "Tokyo"}
    >>> prompts = [Prompt.from_strings(text, {"right": city}, model) for text, city in cities.items()]
    >>> found = run_prompts(model, prompts, get_probs_func=logit_lens, tqdm=None)
    >>> found["right"].shape == (2, model.num_layers)
    True

    Args:
        nn_model: the model.
        prompts: prompts with targets of the same names.
        batch_size: how many prompts go through the model at once.
        get_probs_func: from a model, a list of texts and ``remote`` to probabilities (prompt, layer, vocab), such as
            :func:`~nnterp.interventions.logit_lens`; the model's own prediction as a single layer if None.
        func_kwargs: further arguments for it.
        remote: not available.
        tqdm: puts a progress bar around the batches; None for none.

    Raises:
        TargetError: the targets differ between prompts, or one of them has no token.
        UsageError: the batch size is below 1, or the probabilities have other axes.
        RemoteError: ``remote`` is set.
    """
    if remote:
        raise RemoteError()
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: give 1 or more.")
    names = list(prompts[0].target_tokens) if prompts else []
    for number, prompt in enumerate(prompts):
        if set(prompt.target_tokens) != set(names):
            raise TargetError(
                f"Prompt 0 has the targets {names}, but prompt {number} has {list(prompt.target_tokens)}: "
                "give all of them the same."
            )
    get_probs = get_probs_func or next_token_probs_unsqueeze
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    starts = range(0, len(prompts), batch_size)
    for start in starts if tqdm is None else tqdm(starts, desc="Running prompts"):
        batch = prompts[start : start + batch_size]
        texts = [prompt.prompt for prompt in batch]
        probs = get_probs(nn_model, texts, remote=remote, **(func_kwargs or {}))
        _check_axes(probs, len(batch))
        for prompt, row in zip(batch, probs.split(1), strict=True):
            for name, mass in prompt.get_target_probs(row).items():
                found[name].append(mass)
    return {name: torch.cat(rows) for name, rows in found.items()}
