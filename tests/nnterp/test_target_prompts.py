"""Target prompts: how they are made, and that nothing in them is lost or said twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from nnterp.interventions import (
    TargetPrompt,
    TargetPromptBatch,
    TargetPromptError,
    it_repeat_prompt,
    repeat_prompt,
)
from tests.small_tokenizers import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and refuses %}{{ raise_exception('no system prompts here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def test_repetitions() -> None:
    assert repeat_prompt() == TargetPrompt("king king\n1135 1135\nhello hello\n?", -1)
    assert repeat_prompt(["a", "b"], "->", " | ", "X", 3) == TargetPrompt("a->a | b->b | X", 3)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("instructed", "system", "roles"),
    [
        (True, True, ["system", "user", "assistant", "user"]),
        (True, False, ["user", "assistant", "user"]),
        (False, True, ["system", "user"]),
        (False, False, ["user"]),
    ],
)
def test_conversations(tokenizer: Any, complete: bool, instructed: bool, system: bool, roles: list[str]) -> None:
    target = it_repeat_prompt(
        tokenizer, ["cat"], " = ", complete_prompt=complete, add_user_instr=instructed, use_system_prompt=system
    )
    parts = target.prompt.split("</>\n")
    assert [part[1 : part.index(">")] for part in parts] == [*roles, "assistant"]
    # The answer is left open, and what is asked of the model is said once.
    assert parts[-1] == "<assistant>" + ("cat = cat\n?" if complete else "")
    assert parts[-2].endswith("cat = cat\n?") and target.prompt.count("comes next") == 1
    assert target.index_to_patch == -1


def test_a_text_is_begun_once(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    # A tokenizer that does not add the token itself is left the template's.
    assert it_repeat_prompt(tokenizer).prompt.startswith("<s><system>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = tokenizer(it_repeat_prompt(tokenizer).prompt)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_templates_that_will_not_do(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% set refuses = true %}" + TEMPLATE
    with pytest.raises(TargetPromptError, match=r"no system prompts here\n.*use_system_prompt=False"):
        it_repeat_prompt(tokenizer)
    assert it_repeat_prompt(tokenizer, use_system_prompt=False).prompt.startswith("<user>")
    tokenizer.chat_template = None
    with pytest.raises(TargetPromptError, match=r"no chat template.*repeat_prompt"):
        it_repeat_prompt(tokenizer)


def test_batches() -> None:
    one, two = TargetPrompt("one", -1), TargetPrompt("two", 0)
    batch = TargetPromptBatch.from_target_prompts([one, two])
    assert batch.prompts == ["one", "two"] and torch.equal(batch.index_to_patch, torch.tensor([-1, 0]))
    assert len(batch) == 2 and list(batch) == [one, two] and batch[-1] == two
    for index in ([-1, 0], torch.tensor([-1, 0])):
        assert list(TargetPromptBatch.from_prompts(["one", "two"], index)) == [one, two]
    assert list(TargetPromptBatch.from_prompts(["one", "two"], 0)) == [TargetPrompt("one", 0), two]
    assert list(TargetPromptBatch.from_prompts("one", -1)) == [one]
    assert list(TargetPromptBatch.from_target_prompt(two, 2)) == [two, two]


def test_what_is_meant() -> None:
    one, two = TargetPrompt("one", -1), TargetPrompt("two", 0)
    batch = TargetPromptBatch.from_target_prompts([one, two])
    assert TargetPromptBatch.auto(batch, 5) is batch
    assert list(TargetPromptBatch.auto([one, two], 5)) == [one, two]
    assert list(TargetPromptBatch.auto(two, 3)) == [two] * 3
    assert list(TargetPromptBatch.auto("one", 2)) == [one, one]
    for wrong in (3, ["one"], None):
        with pytest.raises(TargetPromptError, match="A target is a text"):
            TargetPromptBatch.auto(wrong, 1)  # type: ignore[arg-type]
    for index in ([1, 2], [0.5], torch.tensor([True])):
        with pytest.raises(ValueError, match="one whole number for each"):
            TargetPromptBatch.from_prompts(["one"], index)  # type: ignore[arg-type]
