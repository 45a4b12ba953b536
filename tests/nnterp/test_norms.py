"""Frozen norms: whole decompositions make logits, and what does not fit says so."""

from __future__ import annotations

import pytest
import torch

from nnsight_core.errors import OutOfOrderError
from nnterp import StandardizedTransformer
from nnterp.errors import CannotError, MissingPartError, ShapeError, StackShapeError
from nnterp.norms import frozen, probes
from tests.families import tiny_inputs, tiny_model
from tests.matrix import hooks
from tests.matrix.models import MODEL_TYPES, Case
from tests.matrix.models import tiny_model as matrix_model

PROMPT = "The Eiffel Tower is in the city of"


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
@torch.no_grad()
def test_every_part_of_the_stream_adds_up_to_the_logits(name: str) -> None:
    model = StandardizedTransformer(name)
    with model.trace(PROMPT):
        parts = [model.layers_input[0].clone()]
        for layer in range(model.num_layers):
            parts += [model.attentions_output[layer].clone(), model.mlps_output[layer].clone()]
        stack = model.apply_ln_to_stack(torch.stack(parts)).save()
        norm = model.frozen_ln_final().save()
        scale = model.ln_final_scale.save()
        logits = model.logits.save()
    assert torch.equal(scale, norm.scale) and stack.shape[0] == 1 + 2 * model.num_layers
    tokens = torch.arange(model.vocab_size)
    made = (stack.sum(0) + norm.bias) @ model.unembedding_directions(tokens).T
    assert float((made - logits).abs().max()) < 1e-4 * float(logits.abs().max())


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.LayerNorm(7),
        torch.nn.LayerNorm(8, elementwise_affine=False),
        torch.nn.RMSNorm(5, eps=1e-3),
        torch.nn.RMSNorm(6, elementwise_affine=False, eps=1e-6),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_norm_is_known_by_what_it_gives(norm: torch.nn.Module, dtype: torch.dtype) -> None:
    norm = norm.to(dtype)
    width = norm.normalized_shape[0]
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(width, generator=torch.Generator().manual_seed(0)))
    stream = torch.randn(2, 3, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    stream[1, 2] = 0
    held = frozen(stream, norm(stream), norm(probes(stream)))
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    assert held.centers == isinstance(norm, torch.nn.LayerNorm)
    if norm.weight is not None:
        assert torch.allclose(held.weight, norm.weight.to(held.weight.dtype), **close)
    if getattr(norm, "bias", None) is not None:
        assert torch.allclose(held.bias, norm.bias.to(held.bias.dtype), **close)
    centred = stream.double() - (stream.double().mean(-1, keepdim=True) if held.centers else 0)
    expected = (centred.square().mean(-1, keepdim=True) + (norm.eps or 0)).sqrt()
    assert torch.allclose(held.scale[:1].double(), expected[:1], **close)
    assert bool(held.scale.isfinite().all())


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(CannotError, match="other numbers than in the pass"):
        stream = torch.randn(1, 2, 4)
        frozen(stream, stream.tanh(), probes(stream).tanh())


@torch.no_grad()
def test_a_scale_is_set_for_one_prompt_alone() -> None:
    model, ids = StandardizedTransformer(tiny_model("gpt2")), tiny_inputs()
    with model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            model.mlps_norm_scale[1] *= 3
            first = model.logits.save()
        with tracer.invoke(ids[1:]):
            scale = model.mlps_norm_scale[1].save()
            second = model.logits.save()
    with model.trace(ids[1:]):
        alone = model.mlps_norm_scale[1].save()
        plain = model.logits.save()
    with model.trace(ids[:1]):
        model.mlps_norm_scale[1] = model.mlps_norm_scale[1] * 3
        changed = model.logits.save()
    assert torch.allclose(scale, alone, atol=1e-6) and torch.allclose(second, plain, atol=1e-5)
    assert torch.allclose(first, changed, atol=1e-5)


@torch.no_grad()
def test_a_scan_has_the_shapes() -> None:
    model, ids = StandardizedTransformer(tiny_model("llama")), tiny_inputs()
    with model.scan(ids):
        scale = model.ln_final_scale.save()
        stack = model.apply_ln_to_stack(torch.zeros(4, *ids.shape, model.hidden_size)).save()
    assert scale.shape == (*ids.shape, 1) and stack.shape == (4, *ids.shape, model.hidden_size)


@torch.no_grad()
def test_every_step_of_a_generation_has_its_own_scale() -> None:
    model = StandardizedTransformer("demo-llama")
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        scales = [model.ln_final_scale.save() for _ in tracer.iter[:]]
    assert [each.shape[1] for each in scales[1:]] == [1, 1] and scales[0].shape[1] > 1


def test_what_does_not_fit_says_so() -> None:
    model, ids = StandardizedTransformer(tiny_model("llama")), tiny_inputs()
    with pytest.raises(StackShapeError, match="all prompts and positions"), model.trace(ids):
        model.apply_ln_to_stack(torch.zeros(3, model.hidden_size))
    with pytest.raises(ShapeError, match=r"mlps_norm_scale\[0\]"), model.trace(ids):
        model.mlps_norm_scale[0] = torch.ones(2)
    with pytest.raises(OutOfOrderError), model.trace(ids):
        model.logits.save()
        model.ln_final_scale.save()
    bert = StandardizedTransformer(tiny_model("opt", do_layer_norm_before=False))
    with pytest.raises(MissingPartError, match="ln_final_scale"), bert.trace(ids):
        bert.ln_final_scale.save()
    with pytest.raises(MissingPartError, match="reads the stream through a norm"), bert.trace(ids):
        bert.mixers_norm_scale[0].save()


#: For each family the norm before the mixer of layer 1, written down from its source; None where there is none.
FIRST_NORMS = {
    "llama": "model.layers.1.input_layernorm",
    "gpt2": "transformer.h.1.ln_1",
    "gpt_neox": "gpt_neox.layers.1.input_layernorm",
    "gemma2": "model.layers.1.input_layernorm",
    "falcon_h1": "model.layers.1.input_layernorm",
    "jamba": "model.layers.1.input_layernorm",
    "rwkv": "rwkv.blocks.1.ln1",
    "nemotron_h": "model.layers.1.norm",
    "xlnet": None,
    "bert": None,
    "bart": None,
    "olmo2": None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in FIRST_NORMS if name in MODEL_TYPES])
@torch.no_grad()
def test_layers_norm_input_is_what_a_hook_on_the_norm_sees(model_type: str) -> None:
    case, path = Case(model_type), FIRST_NORMS[model_type]
    values = case.model.layers_norm_input
    if path is None:
        with pytest.raises(MissingPartError, match=r"layers_norm_input\[1\]"), case.model.trace(case.ids):
            values[1].save()
        return
    truth = hooks.read(case.module, [(path, "input")], case.ids)[path, "input"]
    with case.model.trace(case.ids):
        seen = values[1].save()
    assert torch.equal(seen, truth)
    expected = hooks.changed_logits(case.module, (path, "input"), lambda each: each * 1.5 - 0.25, case.ids)
    with case.model.trace(case.ids):
        values[1] = values[1] * 1.5 - 0.25
        logits = case.model.logits.save()
    assert torch.equal(logits, expected) and not torch.equal(expected, case.logits)


@torch.no_grad()
def test_a_norm_after_the_addition_has_a_scale_and_no_other() -> None:
    model, ids = StandardizedTransformer(matrix_model("bert")), torch.arange(5, 27).reshape(2, 11)
    norm = model._module.bert.encoder.layer[1].attention.output.LayerNorm
    with model.trace(ids):
        added = model.layers_input[1] + model.attentions_contribution[1]
        scale = model.attentions_sum_norm_scale[1].save()
        expected = (added.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt().save()
    assert torch.allclose(scale, expected, rtol=1e-4)
    llama = StandardizedTransformer("demo-llama")
    with pytest.raises(MissingPartError, match="goes through no norm once"), llama.trace(PROMPT):
        llama.mlps_sum_norm_scale[0].save()
