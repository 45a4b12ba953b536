"""The values of heads in several invokes of one generation: each prompt's own, with as many heads as prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from tests.families import tiny_model

STEPS = 3
NAMES = ("queries", "keys", "values", "attention_scores", "attention_probabilities", "heads_output")
#: As many as heads, of as many tokens; the last is padded.
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18]]
LENGTH = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}


FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": {}, "gpt_neox": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> StandardizedTransformer:
    return StandardizedTransformer(tiny_model(request.param, **FAMILIES[request.param]))


def read(model: Any, tracer: Any, change: bool) -> tuple[list[list[Any]], Any]:
    steps = []
    for step in tracer.iter[0:STEPS]:
        steps.append([getattr(model, name)[1].save() for name in NAMES[:4]])
        if change and step == 2:
            model.attention_probabilities[1][:, 1] = model.attention_probabilities[1][:, 1].flip(-1)
        steps[-1].append(model.attention_probabilities[1].save())
        if change and step == 1:
            model.heads_output[1][:, 2] = model.heads_output[1][:, 2] * -30
        steps[-1].append(model.heads_output[1].save())
    return steps, model.generator.output.save()


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_each_prompt_reads_and_sets_the_values_of_its_own_heads(model: StandardizedTransformer, beams: int) -> None:
    options = {**OPTIONS, "num_beams": beams, "num_return_sequences": beams}
    alone = []
    for number, prompt in enumerate(PROMPTS):
        with model.generate(prompt, **options) as tracer:
            alone.append(read(model, tracer, number == 1))
    with model.generate(**options) as tracer:
        together = []
        for number, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                together.append(read(model, tracer, number == 1))
    assert tracer.forward_passes == 1
    for prompt, (steps, tokens), (right_steps, right_tokens) in zip(PROMPTS, together, alone, strict=True):
        assert torch.equal(tokens.value[:, -STEPS:], right_tokens.value[:, -STEPS:])
        for number, (mine, theirs) in enumerate(zip(steps, right_steps, strict=True)):
            for name, one, other in zip(NAMES, mine, theirs, strict=True):
                own = without_padding(name, one.value, LENGTH - len(prompt), number)
                assert own.shape == other.shape
                torch.testing.assert_close(own, other.value, rtol=1e-3, atol=1e-5)


def without_padding(name: str, value: torch.Tensor, padding: int, step: int) -> torch.Tensor:
    """What belongs to the prompt's own tokens, of (batch, head, position, ...) and (batch, head, query, key)."""
    if name in ("attention_scores", "attention_probabilities"):
        value = value[..., padding:]
    is_of_one_token = step and name not in ("keys", "values")
    return value if is_of_one_token else value[:, :, padding:]
