"""Rows inside a module in a generation: in the run of the prompts, in those of the further tokens, and with beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from nnsight_core import LanguageModel, RowsError
from tests.families import tiny_model

STEPS = 4
#: As many prompts as heads, and as many tokens.
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]]
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}

#: The family, the module, and the values inside it: among them some that have the heads, or nothing, before the batch.
PLACES = {
    "llama": (
        "model.layers.1.self_attn",
        ["transpose_0.output", "cat_2.output", "scaled_dot_product_attention_0.output"],
    ),
    "gpt2": ("transformer.h.1.attn", ["split_0.output", "cat_1.output", "scaled_dot_product_attention_0.input"]),
    "bloom": ("transformer.h.1.self_attention", ["baddbmm_0.output", "softmax_0.output", "bmm_0.output"]),
    "mixtral": ("model.layers.1.mlp", ["view_0.output"]),
}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention to what came before, of (..., position, width)."""
    queries, keys = query.shape[-2], key.shape[-2]
    later = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).logical_not()
    weights = (query @ key.transpose(-1, -2)).masked_fill(later, float("-inf"))
    return torch.softmax(weights, dim=-1) @ value


def heads_first(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    """Works on (head, batch, position, width)."""
    per_head = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(per_head, 1) for each in (key, value))
    mixed = attend(*(each.transpose(0, 1) for each in (query, key, value)))
    return mixed.permute(1, 2, 0, 3).contiguous(), None


def heads_folded(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    """Works on (head * batch, position, width), the rows of each head side by side."""
    per_head = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(per_head, 1) for each in (key, value))
    mixed = attend(*(each.transpose(0, 1).flatten(0, 1) for each in (query, key, value)))
    return mixed.view(query.shape[1], len(query), *mixed.shape[1:]).permute(1, 2, 0, 3).contiguous(), None


AttentionInterface.register("heads_first", heads_first)
AttentionInterface.register("heads_folded", heads_folded)


def values(module: Any, path: str, names: list[str], prompt: Any, **options: Any) -> tuple[list[Any], torch.Tensor]:
    """What the prompt alone gives in each step: the values, and the tokens."""
    model = LanguageModel(module)
    with model.generate(prompt, **OPTIONS, **options) as tracer:
        found = read(model, tracer, path, names)
        tokens = model.generator.output.save()
    return found, tokens.value


def read(model: LanguageModel, tracer: Any, path: str, names: list[str]) -> list[Any]:
    found = []
    for _ in tracer.iter[0:STEPS]:
        source = model.get(path).source
        for name in names:
            operation, kind = name.split(".")
            found.append(getattr(source[operation], kind).save())
    return found


def assert_same(one: Any, other: Any) -> None:
    one, other = getattr(one, "value", one), getattr(other, "value", other)
    for mine, theirs in zip(
        *((each,) if isinstance(each, torch.Tensor) else each for each in (one, other)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("ways", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("count", [2, 4])
def test_each_prompt_reads_its_own_rows(family: str, ways: dict[str, Any], count: int) -> None:
    module, (path, names) = tiny_model(family), PLACES[family]
    model = LanguageModel(module)
    with model.generate(**OPTIONS, **ways) as tracer:
        together = []
        for prompt in PROMPTS[:count]:
            with tracer.invoke(prompt):
                together.append((read(model, tracer, path, names), model.generator.output.save()))
    assert tracer.forward_passes == 1
    for prompt, (found, tokens) in zip(PROMPTS, together, strict=False):
        alone, right = values(module, path, names, prompt, **ways)
        assert torch.equal(tokens.value, right)
        for mine, theirs in zip(found, alone, strict=True):
            assert_same(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("ways", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("count", [2, 4])
def test_heads_before_the_batch_are_not_taken_for_it(ways: dict[str, Any], count: int) -> None:
    module = tiny_model("llama", attn_implementation="heads_first")
    assert module.config.num_attention_heads == 4
    model, path = LanguageModel(module), "model.layers.1.self_attn"
    alone = [values(module, path, ["softmax_0.output"], prompt, **ways) for prompt in PROMPTS[:count]]
    with model.generate(**OPTIONS, **ways) as tracer:
        together = []
        for prompt in PROMPTS[:count]:
            with tracer.invoke(prompt):
                together.append(read(model, tracer, path, ["softmax_0.output"]))
    assert tracer.forward_passes == 1
    for found, (right, _) in zip(together, alone, strict=True):
        for mine, theirs in zip(found, right, strict=True):
            assert_same(mine, theirs)


@torch.no_grad()
def test_what_one_prompt_sets_inside_is_its_own() -> None:
    module = tiny_model("llama", attn_implementation="heads_first")
    model, path = LanguageModel(module), "model.layers.1.self_attn"

    def change(tracer: Any) -> Any:
        for step in tracer.iter[0:STEPS]:
            if step != 1:
                model.get(path).source.softmax_0.output = model.get(path).source.softmax_0.output.flip(0) * 0.5
        return model.generator.output.save()

    def plain(prompt: list[int]) -> torch.Tensor:
        with model.generate(prompt, **OPTIONS):
            tokens = model.generator.output.save()
        return tokens.value

    with model.generate(PROMPTS[1], **OPTIONS) as tracer:
        right = change(tracer)
    with model.generate(**OPTIONS) as tracer:
        tokens = []
        for number, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                tokens.append(change(tracer) if number == 1 else model.generator.output.save())
    assert not torch.equal(right.value, plain(PROMPTS[1]))
    assert torch.equal(tokens[1].value, right.value)
    for number in (0, 2, 3):
        assert torch.equal(tokens[number].value, plain(PROMPTS[number]))


@torch.no_grad()
@pytest.mark.parametrize("generates", [True, False])
def test_rows_that_do_not_stand_side_by_side_are_an_error(generates: bool) -> None:
    # There are as many heads as positions, so that the length alone speaks for (batch * position).
    model = LanguageModel(tiny_model("llama", attn_implementation="heads_folded"))
    with pytest.raises(RowsError, match="may or may not"):
        with model.generate(**OPTIONS) if generates else model.trace() as tracer:
            for prompt in PROMPTS[:2]:
                with tracer.invoke(prompt):
                    model.model.layers[1].self_attn.source.softmax_0.output.save()
