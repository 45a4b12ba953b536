"""A routing is read as the model itself reports it, and forced as patched functions force it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from nnterp import StandardizedTransformer, conditions
from nnterp.errors import CannotError, MissingPartError, RoutingError, ShapeError
from nnterp.experts import routing_of
from tests.families import tiny_inputs, tiny_model
from tests.matrix.models import tiny_model as matrix_model


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "minimax"])
@torch.no_grad()
def test_logits_are_those_that_the_model_reports(model_type: str) -> None:
    module, ids = matrix_model(model_type), torch.arange(5, 27).reshape(2, 11)
    model = StandardizedTransformer(module)
    reported = module(input_ids=ids, output_router_logits=True).router_logits
    routed = [each for each in range(model.num_layers) if model.router_logits.has(each)]
    with model.trace(ids):
        seen = [model.router_logits[layer].save() for layer in routed]
    assert len(reported) == len(seen) > 1
    for one, other in zip(seen, reported, strict=True):
        assert torch.equal(one.reshape(other.shape), other)


@torch.no_grad()
def test_a_forced_routing_is_that_of_a_patched_choice() -> None:
    module, ids = matrix_model("mixtral"), torch.arange(5, 27).reshape(2, 11)
    model = StandardizedTransformer(module)
    wanted = torch.tensor([3, 1]).expand(22, 2)
    plain = torch.topk
    calls = []

    def topk(values: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append(values)
        return (values.gather(-1, wanted), wanted) if len(calls) == 2 else plain(values, *args, **kwargs)

    with mock.patch("torch.topk", topk):
        expected = module(input_ids=ids).logits
    assert len(calls) == model.num_layers
    with model.trace(ids):
        probabilities = model.router_logits[1].float().softmax(-1)
        chosen = probabilities[..., [3, 1]]
        model.expert_indices[1] = wanted.reshape(2, 11, 2)
        model.expert_weights[1] = chosen / chosen.sum(-1, keepdim=True)
        logits = model.logits.save()
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, module(input_ids=ids).logits, atol=1e-3)


@torch.no_grad()
def test_one_of_two_prompts_is_routed_otherwise() -> None:
    model, ids = StandardizedTransformer(matrix_model("mixtral")), torch.arange(5, 27).reshape(2, 11)
    with model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            model.router_logits[1] = model.router_logits[1].flip(-1)
            first = model.logits.save()
        with tracer.invoke(ids[1:]):
            second = model.logits.save()
    assert tracer.forward_passes == 1
    with model.trace(ids[:1]):
        model.router_logits[1] = model.router_logits[1].flip(-1)
        alone = model.logits.save()
    plain = model.trace(ids, trace=False).logits
    assert torch.allclose(first, alone, atol=1e-5) and torch.allclose(second, plain[1:], atol=1e-5)
    assert not torch.allclose(first, plain[:1], atol=1e-3)


@torch.no_grad()
def test_every_step_of_a_generation_routes() -> None:
    model, ids = StandardizedTransformer(matrix_model("mixtral")), torch.arange(5, 16).reshape(1, 11)
    with model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0) as tracer:
        seen = [model.expert_indices[2].save() for _ in tracer.iter[:]]
    assert [tuple(each.shape) for each in seen] == [(1, 11, 2), (1, 1, 2), (1, 1, 2)]


def test_what_is_not_there_says_so() -> None:
    dense, ids = StandardizedTransformer(tiny_model("llama")), tiny_inputs()
    with pytest.raises(MissingPartError, match="names no router"), dense.trace(ids):
        dense.router_logits[0].save()
    some = StandardizedTransformer(matrix_model("deepseek_v3"))
    with pytest.raises(MissingPartError, match=r"expert_indices\[0\].*\n?.*it has no router"), some.trace(ids):
        some.expert_indices[0].save()
    scout = StandardizedTransformer(matrix_model("llama4_text"))
    with pytest.raises(CannotError, match="What goes into each expert is multiplied"), scout.trace(ids):
        scout.expert_weights[0].save()
    with pytest.raises(ShapeError, match=r"expert_indices\[1\]"), some.trace(ids):
        some.expert_indices[1] = torch.zeros(1, 2)
    with pytest.raises(RoutingError, match="whole numbers"):
        routing_of(((torch.zeros(2, 3),), {}))


def test_what_the_older_transformers_keeps_shut_is_said_by_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    module = matrix_model("mixtral")
    monkeypatch.setattr(conditions, "major_version", lambda: 4)
    model = StandardizedTransformer(module)
    with pytest.raises(MissingPartError, match=r"expert_indices\[1\].*Transformers 4 calls experts one by one"):
        with model.trace(torch.arange(5, 27).reshape(2, 11)):
            model.expert_indices[1].save()
    monkeypatch.undo()
    assert StandardizedTransformer(module).expert_indices.has(1)
