"""A module that runs several times in one pass: every call is read and set by its number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel

from nnsight_core import CallsNotCountedError, LanguageModel, ModuleNotRunError, NNsight, OutOfOrderError
from tests.families import tiny_model

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(4):
            x = torch.tanh(self.layer(x))
        return self.head(x)


@pytest.fixture
def net() -> Loop:
    return Loop()


@pytest.fixture
def model(net: Loop) -> NNsight:
    return NNsight(net)


def hidden_by_hand(net: Loop, x: torch.Tensor, changes: dict[int, float] | None = None) -> list[torch.Tensor]:
    x, found = net.first(x), []
    for number in range(4):
        found.append(net.layer(x) * (changes or {}).get(number, 1.0))
        x = torch.tanh(found[-1])
    return [*found, net.head(x)]


def test_every_call_in_order(net: Loop, model: NNsight) -> None:
    with model.trace(X):
        calls = model.layer.calls
        first = model.first.output.save()
        found = [calls[number].output.save() for number in range(4)]
        last = model.head.output.save()
    assert torch.equal(first.value, net.first(X))
    for one, other in zip([*found, last], hidden_by_hand(net, X), strict=True):
        assert torch.equal(one.value, other)


def test_without_a_number_it_is_the_next_call_that_comes(net: Loop, model: NNsight) -> None:
    with model.trace(X):
        first = model.layer.output.save()
        same = model.layer.output.save()
    expected = hidden_by_hand(net, X)
    assert torch.equal(first.value, expected[0]) and torch.equal(same.value, expected[0])


def test_a_call_in_the_middle_is_set_its_input_read_and_another_skipped(net: Loop, model: NNsight) -> None:
    with model.trace(X):
        third = model.layer.calls[2]
        given = third.input.clone().save()
        third.output *= -2
        output = model.output.save()
    expected = hidden_by_hand(net, X)
    assert torch.equal(given.value, expected[1].tanh())
    assert torch.equal(output.value, hidden_by_hand(net, X, {2: -2.0})[4])
    with model.trace(X):
        model.layer.calls[1].skip(X)
        model.layer.calls[2].input = model.layer.calls[2].input * 3
        after = model.layer.calls[2].output.save()
    assert torch.equal(after.value, net.layer(X.tanh() * 3))


def test_in_invokes(net: Loop, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X):
            emb = model.first.output.save()
            found = [model.layer.calls[number].output.save() for number in (0, 2, 3)]
        with tracer.invoke(X * 2):
            model.layer.calls[1].output *= 0.5
            output = model.output.save()
    assert tracer.forward_passes == 1
    expected = hidden_by_hand(net, X)
    torch.testing.assert_close(emb.value, net.first(X))
    for one, number in zip(found, (0, 2, 3), strict=True):
        torch.testing.assert_close(one.value, expected[number])
    torch.testing.assert_close(output.value, hidden_by_hand(net, X * 2, {1: 0.5})[4])


def test_a_look_in_an_invoke_goes_on_with_the_same_count(net: Loop, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X):
            second = model.layer.calls[1].output.save()
            assert second.shape == X.shape
            fourth = model.layer.calls[3].output.save()
    expected = hidden_by_hand(net, X)
    assert torch.equal(second.value, expected[1]) and torch.equal(fourth.value, expected[3])


def test_mistakes(model: NNsight) -> None:
    with pytest.raises(ModuleNotRunError, match=r"layer\.calls\[4\]\.output(.|\n)*called 4 times"), model.trace(X):
        assert model.layer.calls[4].output is not None
    with pytest.raises(OutOfOrderError, match=r"layer\.calls\[1\]\.output"), model.trace(X):
        assert model.layer.calls[2].output is not None
        assert model.layer.calls[1].output is not None
    with pytest.raises(CallsNotCountedError, match=r"calls = model\.layer\.calls"), model.trace(X):
        assert model.first.output is not None
        assert model.layer.calls[0].output is not None
    with pytest.raises(ValueError, match="counted from 0"), model.trace(X):
        assert model.layer.calls[-1]
    with pytest.raises(TypeError, match="by number"), model.trace(X):
        assert list(model.layer.calls)
    with pytest.raises(AttributeError, match=r"\.input, \.inputs"), model.trace(X):
        model.layer.calls[0].outptu = 0


@torch.no_grad()
def test_albert_shares_one_layer() -> None:
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    module: Any = AlbertModel(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = module(ids, output_hidden_states=True).hidden_states
    model = NNsight(module)
    with model.trace(ids):
        layer = model.encoder.albert_layer_groups[0].albert_layers[0]
        calls, inside = layer.calls, layer.ffn.calls
        found = []
        for number in range(3):
            assert inside[number].output.shape[-1] == 32
            found.append(calls[number].output.save())
        pooled = model.pooler.output.save()
    for one, other in zip(found, expected[1:], strict=True):
        assert torch.equal(one.value, other)
    assert pooled.shape == (1, 16)


@torch.no_grad()
def test_in_a_generation_calls_are_counted_in_each_step() -> None:
    module = tiny_model("gpt2")
    module.transformer.h[2] = module.transformer.h[1]
    model = LanguageModel(module)
    seen: list[torch.Tensor] = []
    handle = module.transformer.h[1].register_forward_hook(lambda *each: seen.append(each[2]))
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    module.generate(torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 2), **options)
    handle.remove()
    with model.generate([3, 4], **options) as tracer:
        calls = model.transformer.h[1].calls
        found = [calls[number].output.save() for _ in tracer.iter[:] for number in range(2)]
    assert len(found) == len(seen) == 6
    for one, other in zip(found, seen, strict=True):
        assert torch.equal(one.value, other)


def test_an_edit_asks_for_calls_by_number(net: Loop, model: NNsight) -> None:
    with model.edit() as edited:
        edited.layer.calls[2].output = edited.layer.calls[2].output * 3.0
    for _ in range(2):
        with edited.trace(X):
            out = edited.output.save()
        torch.testing.assert_close(out.value, hidden_by_hand(net, X, {2: 3.0})[-1])


def test_what_a_body_runs_itself_has_no_number(net: Loop, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.layer(model.layer.calls[0].output, hook=True)
            one = model.layer.calls[2].output.save()
        with tracer.invoke(-X):
            other = model.layer.calls[2].output.save()
    torch.testing.assert_close(one.value, hidden_by_hand(net, X)[2])
    torch.testing.assert_close(other.value, hidden_by_hand(net, -X)[2])
