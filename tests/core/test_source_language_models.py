"""Inside the attention of language models: probabilities are the model's own weights, and can be set."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nnsight_core import LanguageModel, NoSuchOperationError, OutOfOrderError
from tests.families import MODEL_TYPES, tiny_inputs, tiny_model

IDS = tiny_inputs()
SMALL: dict[str, Any] = {"hidden_size": 64, "vocab_size": 320, "num_attention_heads": 4, "num_hidden_layers": 3}
MORE: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "vocab_size": 320, "n_head": 4, "n_layer": 3},
    "falcon": SMALL,
    "mixtral": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
}
ATTENTION = {
    "gpt2": "transformer.h.1.attn",
    "llama": "model.layers.1.self_attn",
    "gpt_neox": "gpt_neox.layers.1.attention",
    "opt": "model.decoder.layers.1.self_attn",
    "gemma2": "model.layers.1.self_attn",
    "bloom": "transformer.h.1.self_attention",
    "falcon": "transformer.h.1.self_attention",
    "mixtral": "model.layers.1.self_attn",
}
#: These call their attention by a name that can be exchanged.
EXCHANGEABLE = ("gpt2", "llama", "gpt_neox", "opt", "mixtral")


@cache
def module(family: str, implementation: str = "eager") -> PreTrainedModel:
    if family in MODEL_TYPES:
        model = tiny_model(family)
        model.set_attn_implementation(implementation)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **MORE[family])
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return made.eval()


def attention(model: LanguageModel) -> Any:
    return model.get(ATTENTION[model.config.model_type])


class Patched:
    """A function of torch's, with what its call number `at` on four axes, (batch, head, ...), gives changed."""

    def __init__(self, name: str, at: int, change: Any) -> None:
        self.name, self.left, self.change = name, at, change
        self.own = getattr(functional, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = self.own(*args, **kwargs)
        if value.ndim != 4:
            return value
        self.left -= 1
        return self.change(value.clone()) if self.left == -1 else value

    def logits(self, model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
        with mock.patch.object(functional, self.name, self):
            logits: torch.Tensor = model(ids).logits
        assert self.left < 0
        return logits


def without_first(value: torch.Tensor) -> torch.Tensor:
    value[..., 0] = 0
    return value


@torch.no_grad()
@pytest.mark.parametrize("family", ATTENTION)
def test_probabilities_are_the_models_own_and_can_be_set(family: str) -> None:
    plain = module(family)
    model = LanguageModel(plain)
    weights = plain(IDS, output_attentions=True).attentions[1]
    assert (weights.sum(-1) - 1).abs().max() < 1e-5
    with model.trace(IDS):
        scores = attention(model).source.softmax_0.input.clone().save()
        probabilities = attention(model).source.softmax_0.output.save()
        logits = model.output.logits.save()
    assert torch.equal(probabilities, weights)
    torch.testing.assert_close(scores.softmax(-1), weights)
    assert torch.equal(logits, plain(IDS).logits)
    with model.trace(IDS):
        attention(model).source.softmax_0.output[:, :, :, 0] = 0
        changed = model.output.logits.save()
    assert torch.equal(changed, Patched("softmax", 1, without_first).logits(plain))
    assert not torch.allclose(changed, logits, atol=1e-5)
    assert torch.equal(logits, plain(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", EXCHANGEABLE)
def test_the_fused_attention_is_one_operation(family: str) -> None:
    plain = module(family, "sdpa")
    model = LanguageModel(plain)
    with model.trace(IDS):
        (query, key, *_), _ = attention(model).source.scaled_dot_product_attention_0.input
        query, key = query.save(), key.save()
        attention(model).source.scaled_dot_product_attention_0.output[:, :, :, 0] = 0
        changed = model.output.logits.save()
    assert query.shape == (2, 4, 11, 16)
    assert key.shape[2:] == (11, 16)
    assert torch.equal(changed, Patched("scaled_dot_product_attention", 1, without_first).logits(plain))
    with model.trace(IDS):
        with pytest.raises(NoSuchOperationError, match="scaled_dot_product_attention_0"):
            attention(model).source.softmax_0.output  # noqa: B018


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "falcon", "mixtral"])
def test_every_operation_of_every_module_is_there_and_reading_it_changes_nothing(family: str) -> None:
    plain = module(family)
    model = LanguageModel(plain)
    logits = plain(IDS).logits
    layer = ATTENTION[family].rpartition(".")[0]
    with model.trace(IDS) as tracer:
        ran = tracer.cache()
    count = 0
    for path in ran:
        if "." in path.removeprefix(layer) and not path.startswith(layer):
            continue
        envoy = model.get(path)
        with model.trace(IDS):
            for operation in envoy.source:
                assert operation.input is not None
                assert operation.output is not None
                count += 1
            found = model.output.logits.save()
        assert torch.equal(found, logits), path
    assert count > 50


@torch.no_grad()
def test_the_list_is_there_outside_a_trace_too() -> None:
    model = LanguageModel(module("gpt2"))
    outside = model.transformer.h[0].attn.source
    with model.trace(IDS):
        inside = str(model.transformer.h[0].attn.source)
    assert str(outside) == inside
    softmax = outside.softmax_0
    assert softmax.text == "attn_weights = nn.functional.softmax(attn_weights, dim=-1)"
    assert softmax.file.endswith("modeling_gpt2.py")
    assert f"modeling_gpt2.py:{softmax.line}" in inside
    with pytest.raises(NoSuchOperationError, match="Did you mean 'softmax_0'"):
        outside.softmax_7  # noqa: B018


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_invokes_of_different_lengths(family: str) -> None:
    plain = module(family)
    model = LanguageModel(plain)
    short, long = IDS[:1, :6], IDS[1:]
    with model.trace() as tracer:
        with tracer.invoke(short):
            mine = attention(model).source.softmax_0.output.save()
            attention(model).source.softmax_0.output[..., -1, :] = 0
        with tracer.invoke(long):
            other = attention(model).source.softmax_0.output.save()
            logits = model.output.logits.save()
    assert tracer.forward_passes == 1
    alone = plain(short, output_attentions=True).attentions[1]
    torch.testing.assert_close(mine[..., 5:, 5:], alone)
    together = plain(long, output_attentions=True)
    torch.testing.assert_close(other.value, together.attentions[1])
    torch.testing.assert_close(logits.value, together.logits)


@torch.no_grad()
def test_where_heads_are_folded_into_the_batch_rows_are_found() -> None:
    model = LanguageModel(module("bloom"))
    with model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            mine = attention(model).source.baddbmm_0.output.save()
            attention(model).source.bmm_0.output = 0
        with tracer.invoke(IDS[1:]):
            other = attention(model).source.baddbmm_0.output.save()
            logits = model.output.logits.save()
    for ids, found in ((IDS[:1], mine), (IDS[1:], other)):
        with model.trace(ids):
            alone = attention(model).source.baddbmm_0.output.save()
            plain = model.output.logits.save()
        torch.testing.assert_close(found.value, alone.value)
    torch.testing.assert_close(logits.value, plain.value)


@torch.no_grad()
def test_where_positions_are_folded_into_the_batch_rows_are_kept_apart() -> None:
    plain = module("mixtral")
    model = LanguageModel(plain)
    with model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            router = model.model.layers[1].mlp.gate.source.linear_0
            mine = router.output.save()
            router.output = 0
        with tracer.invoke(IDS[1:]):
            logits = model.output.logits.save()
    assert mine.shape == (11, 4)
    assert torch.equal(logits, plain(IDS).logits[1:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_step_of_a_generation(family: str) -> None:
    plain = module(family)
    model = LanguageModel(plain)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = plain.generate(IDS, output_attentions=True, return_dict_in_generate=True, **options)
    steps = []
    with model.generate(IDS, **options) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                assert attention(model).input is not None
            steps.append(attention(model).source.softmax_0.output.save())
        tokens = model.generator.output.save()
    assert torch.equal(tokens, wanted.sequences)
    for found, each in zip(steps, wanted.attentions, strict=True):
        assert torch.equal(found, each[1])
    with model.generate(IDS, **options) as tracer:
        with tracer.iter[1]:
            attention(model).source.softmax_0.output = 0
        changed = model.generator.output.save()
    assert torch.equal(changed[:, :12], wanted.sequences[:, :12])


@torch.no_grad()
def test_half_way_through_the_attention() -> None:
    plain = module("llama")
    model = LanguageModel(plain)
    with model.trace(IDS):
        assert attention(model).q_proj.output is not None
        probabilities = attention(model).source.softmax_0.output.save()
        attention(model).source.softmax_0.output[:, :, :, 0] = 0
        assert attention(model).o_proj.input is not None
        logits = model.output.logits.save()
    assert torch.equal(probabilities, plain(IDS, output_attentions=True).attentions[1])
    assert torch.equal(logits, Patched("softmax", 1, without_first).logits(plain))
    with pytest.raises(OutOfOrderError, match=r"Write model\.layers\.1\.self_attn\.source before"):
        with model.generate(IDS, max_new_tokens=2, pad_token_id=0):
            assert attention(model).q_proj.output is not None
            attention(model).source.softmax_0.output.save()
    with model.generate(IDS, max_new_tokens=2, pad_token_id=0) as tracer:
        for _ in tracer.iter[:]:
            source = attention(model).source
            assert attention(model).q_proj.output is not None
            assert source.softmax_0.output is not None


def test_a_gradient_of_the_probabilities() -> None:
    plain = module("gpt2")
    model = LanguageModel(plain)
    weights = plain(IDS, output_attentions=True)
    weights.attentions[1].retain_grad()
    weights.logits[:, -1].sum().backward()
    with model.trace(IDS):
        probabilities = attention(model).source.softmax_0.output
        gradient = probabilities.grad.save()
        model.output.logits[:, -1].sum().backward()
    torch.testing.assert_close(gradient.value, weights.attentions[1].grad)
    plain.zero_grad()
