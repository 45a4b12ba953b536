"""Queries and keys before their rotation, against plain hooks on the unwrapped model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.attention import ClosedAttentionError
from nnterp.errors import CannotError, MissingPartError, ShapeError
from tests.matrix.models import Case, tiny_model

PROMPTS = ["The Eiffel Tower is in the city", "The"]
IDS = torch.arange(5, 17).reshape(2, 6)


@contextmanager
def _hooked(module: torch.nn.Module, see: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, args, output: see(output))
    try:
        yield
    finally:
        handle.remove()


def _plain(model: StandardizedTransformer, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(0)
    with torch.no_grad():
        output = model._module(input_ids=ids, attention_mask=mask, position_ids=positions)
    logits: torch.Tensor = output.logits
    return logits


@pytest.mark.parametrize(("name", "projection"), [("queries_pre_rope", "q_proj"), ("keys_pre_rope", "k_proj")])
def test_a_padded_batch_has_what_the_projections_give(name: str, projection: str) -> None:
    model = StandardizedTransformer("demo-llama")
    with torch.no_grad(), model.trace(PROMPTS):
        ids, mask = model.input_ids, model.attention_mask
        seen = getattr(model, name)[1].save()
    came: list[torch.Tensor] = []
    with _hooked(model.attentions[1]._module.get_submodule(projection), came.append):
        _plain(model, ids, mask)
    assert torch.equal(seen.transpose(1, 2).flatten(2), came[0])


@pytest.mark.parametrize(("name", "projection"), [("queries_pre_rope", "q_proj"), ("keys_pre_rope", "k_proj")])
def test_what_is_set_is_rotated(name: str, projection: str) -> None:
    model = StandardizedTransformer("demo-llama")
    access = getattr(model, name)
    with torch.no_grad(), model.trace(PROMPTS):
        ids, mask = model.input_ids, model.attention_mask
        access[1][:, 1] *= 2
        logits = model.logits.save()

    def double(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., model.head_dim : 2 * model.head_dim] *= 2
        return output

    with _hooked(model.attentions[1]._module.get_submodule(projection), double):
        expected = _plain(model, ids, mask)
    assert torch.equal(logits[mask.bool()], expected[mask.bool()])
    assert (logits - _plain(model, ids, mask)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_a_norm_of_queries_and_keys_comes_before(model_type: str, dtype: torch.dtype) -> None:
    module = tiny_model(model_type).to(dtype)
    model = StandardizedTransformer(module)
    came: dict[str, torch.Tensor] = {}
    attention = model.attentions[1]._module
    with _hooked(attention.q_norm, lambda each: came.update(q=each)):
        with _hooked(attention.k_norm, lambda each: came.update(k=each)):
            module(IDS)
    with model.trace(IDS):
        queries, keys = model.queries_pre_rope[1].save(), model.keys_pre_rope[1].save()
    for seen, expected in ((queries, came["q"]), (keys, came["k"])):
        assert torch.equal(seen, expected if expected.shape == seen.shape else expected.transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["phi", "gptj"])
def test_a_head_is_whole_where_a_part_of_it_is_rotated(model_type: str) -> None:
    module = tiny_model(model_type)
    model = StandardizedTransformer(module)
    came: list[torch.Tensor] = []
    with _hooked(model.attentions[1]._module.q_proj, came.append):
        module(IDS)
    with model.trace(IDS):
        before = model.queries_pre_rope[1].save()
    assert torch.equal(before.transpose(1, 2).flatten(2), came[0])
    if model_type == "phi":
        with model.trace(IDS):
            after = model.queries[1].save()
        moved = (before - after.value).abs().amax((0, 1, 2)) > 1e-6
        assert moved.any() and not moved.all()


def test_a_generation_caches_what_was_set() -> None:
    model = StandardizedTransformer("demo-llama")
    ids, lengths = model.tokenizer("The Eiffel Tower", return_tensors="pt").input_ids, []
    with model.generate(ids, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            model.keys_pre_rope[1] = model.keys_pre_rope[1].flip(-1)
            lengths.append(model.keys_pre_rope[1].shape[2])
        tokens = model.generator.output.save()

    def flip(output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(-1, (model.num_kv_heads, -1)).flip(-1).flatten(-2)

    with _hooked(model.attentions[1]._module.k_proj, flip):
        truth = model._module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert lengths == [ids.shape[1], 1, 1, 1]
    assert tokens.tolist() == truth.tolist()


def test_each_invoke_has_its_own() -> None:
    model = StandardizedTransformer("demo-llama")
    alone = []
    for head, prompt in enumerate(PROMPTS):
        with torch.no_grad(), model.trace(prompt):
            model.queries_pre_rope[1][:, head] = 0
            alone.append(model.logits[:, -1].save())
    with torch.no_grad(), model.trace() as tracer:
        together = []
        for head, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                model.queries_pre_rope[1][:, head] = 0
                together.append(model.logits[:, -1].save())
    assert tracer.forward_passes == 1
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_tokens_are_counted_from_the_start_of_each_prompt() -> None:
    model = StandardizedTransformer("demo-llama")
    with torch.no_grad(), model.trace(PROMPTS):
        queries, first = model.queries_pre_rope[1].save(), model.queries_pre_rope[1].t[0].save()
        heads = model.heads_contribution[1].save()
        first_heads = model.heads_contribution[1].t[0].save()
        starts = model.attention_mask.value.argmax(-1).tolist()
    assert starts[1] > starts[0] == 0
    for row, start in enumerate(starts):
        assert torch.equal(first[row], queries[row, :, start])
        assert torch.equal(first_heads[row], heads[row, :, start])


def test_gradients_reach_what_comes_before() -> None:
    model = StandardizedTransformer("demo-llama")
    with model.trace(PROMPTS[0]):
        gradient = model.queries_pre_rope[1].grad.save()
        model.logits.square().sum().backward()
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    kept: list[torch.Tensor] = []

    def keep(output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    with _hooked(model.attentions[1]._module.q_proj, keep):
        model._module(ids).logits.square().sum().backward()
    expected = kept[0].grad
    assert expected is not None and expected.any()
    assert (gradient.transpose(1, 2).flatten(2) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_shapes_need_no_numbers() -> None:
    model = StandardizedTransformer("demo-llama")
    with model.scan("The Eiffel Tower"):
        shape = model.keys_pre_rope[0].shape
    assert shape[1:2] + shape[3:] == (model.num_kv_heads, model.head_dim)


def test_layers_that_rotate_nothing_say_so() -> None:
    gpt2 = StandardizedTransformer("demo-gpt2")
    with pytest.raises(MissingPartError, match="does not rotate queries and keys"), gpt2.trace("The"):
        gpt2.queries_pre_rope[0].save()
    # Every fourth layer of Cohere 2, every third of this one, attends without positions.
    cohere = StandardizedTransformer(tiny_model("cohere2"))
    with pytest.raises(MissingPartError, match=r"keys_pre_rope\[2\].*does not rotate"), cohere.trace(IDS):
        cohere.keys_pre_rope[2].save()
    jamba = Case("jamba").model
    with pytest.raises(MissingPartError, match="state-space"), jamba.trace(IDS):
        jamba.queries_pre_rope[0].save()


def test_what_no_tensor_holds_is_refused_with_the_reason() -> None:
    case = Case("deepseek_v3")
    with pytest.raises(CannotError, match="one for all heads"), case.model.trace(case.ids):
        case.model.keys_pre_rope[0].save()
    llama = StandardizedTransformer(tiny_model("llama"))
    with pytest.raises(ShapeError), llama.trace(IDS):
        llama.queries_pre_rope[0] = torch.zeros(2, 6, 64)


def test_a_model_without_weights_says_that_it_needs_them() -> None:
    model = StandardizedTransformer(tiny_model("llama").to("meta"), check_renaming=False)
    with pytest.raises(ClosedAttentionError, match="weights are not loaded"), model.scan(IDS):
        model.queries_pre_rope[0].save()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["gemma3_text", "apertus"])
def test_after_a_norm_inside_the_attention_its_other_values_can_still_be_asked_for(model_type: str) -> None:
    model = StandardizedTransformer(tiny_model(model_type))
    with torch.no_grad(), model.trace(IDS):
        queries, keys = model.queries[1].save(), model.keys[1].save()
        probabilities = model.attention_probabilities[1].save()
    with torch.no_grad(), model.trace(IDS):
        before = model.keys_pre_rope[1].save()
        together = [model.queries[1].save(), model.keys[1].save(), model.attention_probabilities[1].save()]
    for seen, expected in zip(together, (queries, keys, probabilities), strict=True):
        assert torch.equal(seen.value, expected.value)
    # Position 0 is not turned.
    torch.testing.assert_close(before.value[:, :, 0], keys.value[:, :, 0])
