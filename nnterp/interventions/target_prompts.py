r"""Prompts that a hidden state is put into, and where: the targets of patchscopes.

TargetPrompt("cat cat\n1135 1135\nhello hello\n?", -1)      # the hidden state takes the place of its last token's
repeat_prompt()                                             # such a prompt, which makes the model say what it was given

Prompts that have the model repeat a word are from Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for
Inspecting Hidden Representations of Language Models" (https://arxiv.org/abs/2401.06102).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from nnterp.errors import UsageError

__all__ = ["it_repeat_prompt", "repeat_prompt", "TargetPrompt", "TargetPromptBatch", "TargetPromptError"]

#: The words that are repeated where none are given: those of the paper.
WORDS = ("king", "1135", "hello")

_TASK = "You are given a text that breaks off. Say the word that comes next in it, and nothing else."
_SYSTEM = "You are a helpful assistant."


class TargetPromptError(UsageError, ValueError):
    """What is put, and the prompts that it is put into, do not fit each other."""


@dataclass
class TargetPrompt:
    """A prompt, and at which of its tokens a hidden state is put.

    Args:
        prompt: the text.
        index_to_patch: the token, by the prompt's own tokens, whatever the padding; those that the tokenizer adds at
            the start count. Negative ones count from the end.
    """

    prompt: str
    index_to_patch: int


def repeat_prompt(
    words: Sequence[str] | None = None,
    rel: str = " ",
    sep: str = "\n",
    placeholder: str = "?",
    index_to_patch: int = -1,
) -> TargetPrompt:
    """A prompt that repeats words: with a hidden state in the placeholder's stead, the model says what it stands for.

    >>> repeat_prompt(["cat", "dog"], rel=" -> ")
    TargetPrompt(prompt='cat -> cat\\ndog -> dog\\n?', index_to_patch=-1)

    It is the prompt for next-token prediction of Ghandeharioun et al. 2024.

    Args:
        words: the words; king, 1135 and hello if None.
        rel: what stands between a word and its repetition.
        sep: what stands between one pair and the next.
        placeholder: the last word, which is not repeated.
        index_to_patch: the token that is patched, the last one by default.
    """
    pairs = [f"{word}{rel}{word}" for word in (WORDS if words is None else words)]
    return TargetPrompt(sep.join([*pairs, placeholder]), index_to_patch)


def it_repeat_prompt(
    tokenizer: Any,
    words: Sequence[str] | None = None,
    rel: str = " ",
    sep: str = "\n",
    placeholder: str = "?",
    complete_prompt: bool = True,
    add_user_instr: bool = True,
    use_system_prompt: bool = True,
) -> TargetPrompt:
    """:func:`repeat_prompt` as a conversation, for models that were tuned to follow instructions.

    >>> from nnterp import StandardizedTransformer
    >>> tokenizer = StandardizedTransformer("demo-gpt2").tokenizer
    >>> tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\\n{% endfor %}"
    >>> target = it_repeat_prompt(tokenizer, ["cat"], add_user_instr=False, use_system_prompt=False)
    >>> target.prompt.endswith("<assistant>cat cat\\n?")
    True

    Args:
        tokenizer: the model's tokenizer, whose chat template is used.
        words: the words, and so on as in :func:`repeat_prompt`.
        rel: likewise.
        sep: likewise.
        placeholder: likewise.
        complete_prompt: let the assistant's answer begin with the repetitions, so that the placeholder comes last; if
            not, the prompt ends where the answer is to begin, and the last token is one of the template.
        add_user_instr: have the user explain the task in a turn of its own, which the assistant agrees to. If not, the
            system prompt explains it, or, without one, the user's only turn.
        use_system_prompt: begin with a system prompt; some templates have none.

    Returns:
        the conversation as text, patched at its last token. Where the template writes the token that begins a text and
        the tokenizer adds one as well, it stands there once.

    Raises:
        TargetPromptError: the tokenizer has no chat template, or its template takes no such conversation.
    """
    text = repeat_prompt(words, rel, sep, placeholder).prompt
    turns = _conversation(text, add_user_instr, use_system_prompt)
    if complete_prompt:
        turns.append({"role": "assistant", "content": text})
    if getattr(tokenizer, "chat_template", None) is None:
        raise TargetPromptError(
            "This tokenizer has no chat template, so its model takes plain text: give repeat_prompt(...) instead."
        )
    try:
        prompt = tokenizer.apply_chat_template(
            turns, tokenize=False, continue_final_message=complete_prompt, add_generation_prompt=not complete_prompt
        )
    except TemplateError as error:
        raise TargetPromptError(
            f"The tokenizer's chat template does not take this conversation: {error}\n"
            "Templates without a system prompt need use_system_prompt=False."
        ) from error
    return TargetPrompt(_begun_once(tokenizer, prompt), -1)


def _conversation(text: str, add_user_instr: bool, use_system_prompt: bool) -> list[dict[str, str]]:
    """The turns before the assistant's answer."""
    if add_user_instr:
        start = [{"role": "system", "content": _SYSTEM}] if use_system_prompt else []
        asked = [{"role": "user", "content": _TASK}, {"role": "assistant", "content": "I will."}]
        return [*start, *asked, {"role": "user", "content": text}]
    if use_system_prompt:
        return [{"role": "system", "content": _TASK}, {"role": "user", "content": text}]
    return [{"role": "user", "content": f"{_TASK}\n\n{text}"}]


def _begun_once(tokenizer: Any, prompt: str) -> str:
    begin = tokenizer.bos_token
    if begin and prompt.startswith(begin) and tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        return prompt.removeprefix(begin)
    return prompt


@dataclass
class TargetPromptBatch:
    """Several target prompts, each patched at a token of its own.

    >>> batch = TargetPromptBatch.from_prompts(["one two", "three"], [-1, 0])
    >>> len(batch), batch[1]
    (2, TargetPrompt(prompt='three', index_to_patch=0))

    Args:
        prompts: the texts.
        index_to_patch: which token of each, (prompt).

    Raises:
        TargetPromptError: there are not as many indices as prompts, or they are no whole numbers.
    """

    prompts: list[str]
    index_to_patch: torch.Tensor

    def __post_init__(self) -> None:
        index = self.index_to_patch
        if index.shape != (len(self.prompts),) or index.is_floating_point() or index.dtype == torch.bool:
            raise TargetPromptError(
                f"index_to_patch is {index.dtype} of shape {tuple(index.shape)}, and there are {len(self.prompts)} "
                "prompts: give one whole number for each of them."
            )

    @classmethod
    def from_target_prompts(cls, prompts_: Sequence[TargetPrompt]) -> TargetPromptBatch:
        """The batch of these prompts, in their order."""
        return cls([each.prompt for each in prompts_], torch.tensor([int(each.index_to_patch) for each in prompts_]))

    @classmethod
    def from_target_prompt(cls, prompt: TargetPrompt, batch_size: int) -> TargetPromptBatch:
        """The same prompt ``batch_size`` times."""
        return cls.from_target_prompts([prompt] * batch_size)

    @classmethod
    def from_prompts(
        cls, prompts: str | Sequence[str], index_to_patch: int | Sequence[int] | torch.Tensor
    ) -> TargetPromptBatch:
        """The batch of these texts.

        Args:
            prompts: one text or several.
            index_to_patch: the token of each, or one number for all of them.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        index = torch.as_tensor(index_to_patch)
        return cls(texts, index.expand(len(texts)) if index.ndim == 0 else index)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, idx: int) -> TargetPrompt:
        return TargetPrompt(self.prompts[idx], int(self.index_to_patch[idx]))

    def __iter__(self) -> Iterator[TargetPrompt]:
        return (self[index] for index in range(len(self)))

    @staticmethod
    def auto(
        target_prompt: str | TargetPrompt | Sequence[TargetPrompt] | TargetPromptBatch, batch_size: int
    ) -> TargetPromptBatch:
        """The batch that is meant: one prompt stands for ``batch_size`` of them, several are taken as they are.

        Args:
            target_prompt: a target, several, or a text, which is patched at its last token.
            batch_size: how many there are to be of a single one.

        Raises:
            TargetPromptError: it is none of these.
        """
        if isinstance(target_prompt, TargetPromptBatch):
            return target_prompt
        if isinstance(target_prompt, str):
            target_prompt = TargetPrompt(target_prompt, -1)
        if isinstance(target_prompt, TargetPrompt):
            return TargetPromptBatch.from_target_prompt(target_prompt, batch_size)
        if isinstance(target_prompt, (list, tuple)) and all(isinstance(each, TargetPrompt) for each in target_prompt):
            return TargetPromptBatch.from_target_prompts(target_prompt)
        raise TargetPromptError(
            f"A target is a text, a TargetPrompt, a list of them or a TargetPromptBatch, not {target_prompt!r:.80}."
        )
