"""Keys and values with a head for each head of queries."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.repeated_heads import SharedHeadsError
from tests.matrix.models import tiny_model

IDS = torch.arange(5, 17).reshape(2, 6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "sizes", "shared"),
    [("llama", {}, 2), ("llama", {"num_key_value_heads": 1}, 4), ("gpt2", {}, 1)],
)
def test_every_head_of_queries_meets_its_own(model_type: str, sizes: dict[str, int], shared: int) -> None:
    model = StandardizedTransformer(tiny_model(model_type, **sizes))
    with model.trace(IDS):
        keys, values = model.keys.repeated[1].save(), model.values.repeated[1].save()
    with model.trace(IDS):
        queries, once = model.queries[1].save(), model.keys[1].save()
        heads = model.heads_output[1].save()
    assert keys.shape == values.shape == queries.shape and once.shape[1] * shared == model.num_heads
    for head in range(model.num_heads):
        assert torch.equal(keys[:, head], once[:, head // shared])
    scores = queries.value @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape[-2:]).tril().bool()
    by_hand = scores.masked_fill(~allowed, -1e30).softmax(-1) @ values
    assert (by_hand - heads).abs().max() < 1e-5


@torch.no_grad()
def test_a_whole_group_is_set_as_its_head_is() -> None:
    model = StandardizedTransformer(tiny_model("llama"))
    with model.trace(IDS):
        model.values[1][:, 1] = 0
        expected = model.logits.save()
    with model.trace(IDS):
        model.values.repeated[1][:, 2:] = 0
        logits = model.logits.save()
    assert torch.equal(logits, expected)


def test_a_head_of_a_group_cannot_be_set_alone() -> None:
    model = StandardizedTransformer(tiny_model("llama"))
    wrong = r"keys\.repeated\[1\] was set to other values for head 3 of queries than for head 2"
    with pytest.raises(SharedHeadsError, match=wrong), model.trace(IDS):
        model.keys.repeated[1][:, 3] = 0
    with pytest.raises(SharedHeadsError), model.trace(IDS):
        model.keys.repeated[1] = torch.randn(2, 4, 6, 16)


def test_shapes_are_known_in_a_scan() -> None:
    model = StandardizedTransformer(tiny_model("llama"))
    with model.scan(IDS):
        assert model.keys.repeated[0].shape == (2, 4, 6, 16)
