"""Tokens of one's own prompt in values with an axis of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from tests.matrix.models import tiny_model

PROMPTS = ["The Eiffel Tower is in the city", "John and"]
TOKENS = [0, -1, slice(0, 2), [1, 0]]


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer("demo-llama")


@pytest.mark.parametrize("token", TOKENS, ids=str)
@pytest.mark.parametrize("name", ["queries", "heads_output", "attention_probabilities"])
def test_tokens_are_counted_along_positions_and_not_heads(
    model: StandardizedTransformer, name: str, token: Any
) -> None:
    with torch.no_grad(), model.trace(PROMPTS):
        value = getattr(model, name)[1]
        whole, part = value.save(), value.t[token].save()
        mask = model.attention_mask
    for row in range(len(PROMPTS)):
        assert torch.equal(part[row], whole[row][:, mask[row].bool()][:, token])


@pytest.mark.parametrize("token", TOKENS, ids=str)
def test_tokens_are_set_along_positions(model: StandardizedTransformer, token: Any) -> None:
    with torch.no_grad(), model.trace(PROMPTS):
        plain = model.heads_output[1].save()
        mask = model.attention_mask
    with torch.no_grad(), model.trace(PROMPTS):
        heads = model.heads_output[1]
        heads.t[token] = 7.0
        changed = heads.save()
    for row in range(len(PROMPTS)):
        expected = plain[row].clone()
        own = expected[:, mask[row].bool()]
        own[:, token] = 7.0
        expected[:, mask[row].bool()] = own
        assert torch.equal(changed[row], expected)


def test_tokens_of_values_to_come(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                last = model.heads_output[1].t[-1]
                if prompt == PROMPTS[0]:
                    first = last.save()
    with torch.no_grad(), model.trace(PROMPTS[0]):
        alone = model.heads_output[1][:, :, -1].save()
    torch.testing.assert_close(torch.as_tensor(first), torch.as_tensor(alone), atol=1e-5, rtol=1e-4)


def test_one_prompt_without_padding(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(PROMPTS[0]):
        value = model.attention_probabilities[1]
        whole, part = value.save(), value.t[0].save()
    assert torch.equal(part, whole[:, :, 0])


def test_what_was_computed_from_heads_says_that_it_cannot_tell(model: StandardizedTransformer) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="which axis"), model.trace(PROMPTS[0]):
        _ = (model.queries[1] * 2).t[0]


def test_streams_stand_behind_positions() -> None:
    """As many streams as tokens, so that the lengths tell nothing."""
    model = StandardizedTransformer(tiny_model("deepseek_v4"))
    streams = model.config.hc_mult
    with torch.no_grad(), model.trace(torch.arange(5, 5 + streams)[None]):
        value = model.layers_output[1]
        whole, part = value.save(), value.t[1].save()
    assert whole.shape[1] == whole.shape[2] == streams
    assert torch.equal(part, whole[:, 1])
