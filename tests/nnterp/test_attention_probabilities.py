"""Scores and probabilities of attention, against the model's own eager weights and a kernel that is patched by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional

from nnsight_core import OutOfOrderError, SourceError
from nnsight_core import operations as core_operations
from nnsight_core.kernels import run_open
from nnterp import StandardizedTransformer
from nnterp.errors import ShapeError

LAYER = 1
ONE, PADDED = ["The Eiffel Tower is"], ["The Eiffel Tower is in the city", "The", "John and Mary went"]


@pytest.fixture(scope="module", params=["demo-llama", "demo-gpt2"])
def model(request: pytest.FixtureRequest) -> StandardizedTransformer:
    return StandardizedTransformer(request.param, enable_attention_probs=True)


@pytest.fixture(scope="module")
def llama() -> StandardizedTransformer:
    return StandardizedTransformer("demo-llama")


@contextmanager
def eager(model: StandardizedTransformer) -> Iterator[torch.nn.Module]:
    """The unwrapped model with its attention written out, for as long as it lasts."""
    before = model._module.config._attn_implementation
    model._module.set_attn_implementation("eager")
    try:
        yield model._module
    finally:
        model._module.set_attn_implementation(before)


def inputs(model: StandardizedTransformer, prompts: list[str]) -> dict[str, Any]:
    """What the model is called with for these prompts."""
    batch = model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(0)}


def patched_logits(
    model: StandardizedTransformer,
    prompts: list[str],
    change: Callable[[torch.Tensor], torch.Tensor] = lambda each: each,
    bias: Callable[[torch.Tensor], torch.Tensor] = lambda each: each,
) -> torch.Tensor:
    """The unwrapped model's logits with a kernel written out here, which changes what is in one layer."""
    calls = 0

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        nonlocal calls
        repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2)
        scores = scores * (how["scale"] or query.shape[-1] ** -0.5)
        allowed = how["attn_mask"]
        if allowed is None:
            allowed = torch.ones(scores.shape[-2:]).tril().bool() if how["is_causal"] else torch.ones(()).bool()
        scores = scores.masked_fill(~allowed, -torch.inf)
        calls += 1
        weights = (bias(scores) if calls == LAYER + 1 else scores).softmax(-1).nan_to_num(0)
        return (change(weights) if calls == LAYER + 1 else weights) @ value.repeat_interleave(repeat, 1)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", attend)
        logits: torch.Tensor = model._module(**inputs(model, prompts)).logits
    assert calls == model.num_layers
    return logits


def plain_logits(model: StandardizedTransformer, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad(), model.trace(prompts):
        logits = model.logits.save()
    return logits.value


@pytest.mark.parametrize("prompts", [ONE, PADDED])
def test_probabilities_are_the_eager_weights(model: StandardizedTransformer, prompts: list[str]) -> None:
    with torch.no_grad(), model.trace(prompts):
        queries, keys, values = model.queries[LAYER], model.keys[LAYER], model.values[LAYER]
        scores = model.attention_scores[LAYER].save()
        found = model.attention_probabilities[LAYER].save()
        heads = model.heads_output[LAYER].save()
        repeat = model.num_heads // model.num_kv_heads
        by_hand = (queries @ keys.repeat_interleave(repeat, 1).mT / model.head_dim**0.5).save()
        weighted = (found @ values.repeat_interleave(repeat, 1)).save()
        logits = model.logits.save()
    given = inputs(model, prompts)
    real = given["attention_mask"].bool()
    length = real.shape[1]
    allowed = (real[:, None, None, :] & torch.ones(length, length).tril().bool()).expand_as(found)
    with eager(model) as module, torch.no_grad():
        expected = module(**given, output_attentions=True).attentions[LAYER]
    sees = allowed.any(-1)
    assert found.shape == scores.shape == (len(prompts), model.num_heads, length, length)
    assert (found - expected)[sees].abs().max() < 1e-6
    assert not found[~allowed].any()
    assert torch.equal(scores == -torch.inf, ~allowed)
    assert (scores - by_hand)[allowed].abs().max() < 1e-4
    assert torch.allclose(found.sum(-1), sees.float())
    assert (weighted - heads).abs().max() < 1e-5
    assert torch.equal(logits, plain_logits(model, prompts))


def test_reading_leaves_the_numbers_also_where_gradients_are_wanted(model: StandardizedTransformer) -> None:
    with model.trace(PADDED):
        plain = model.logits.save()
    with model.trace(PADDED):
        for layer in range(model.num_layers):
            _ = model.attention_scores[layer], model.attention_probabilities[layer]
        logits = model.logits.save()
    assert plain.requires_grad
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("prompts", [ONE, PADDED])
def test_a_probability_that_is_set_counts(model: StandardizedTransformer, prompts: list[str]) -> None:
    def change(weights: torch.Tensor) -> torch.Tensor:
        weights = weights.clone()
        weights[:, 2, -1, -1] = 0.75
        return weights

    with torch.no_grad(), model.trace(prompts):
        before = model.heads_output[LAYER].save()
    with torch.no_grad(), model.trace(prompts):
        model.attention_probabilities[LAYER][:, 2, -1, -1] = 0.75
        after = model.heads_output[LAYER].save()
        logits = model.logits.save()
    assert (logits - patched_logits(model, prompts, change)).abs().max() < 1e-4
    assert (logits - plain_logits(model, prompts)).abs().max() > 1e-3
    same = torch.ones(before.shape[:3], dtype=torch.bool)
    same[:, 2, -1] = False
    assert torch.equal(after[same], before[same])
    assert not torch.equal(after[~same], before[~same])


@pytest.mark.parametrize("prompts", [ONE, PADDED])
def test_scores_that_are_set_count(model: StandardizedTransformer, prompts: list[str]) -> None:
    def bias(scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[0, 1, 2:] *= 0.5
        return scores

    with torch.no_grad(), model.trace(prompts):
        scores = model.attention_scores[LAYER]
        scores[0, 1, 2:] *= 0.5
        model.attention_scores[LAYER] = scores
        found = model.attention_probabilities[LAYER].save()
        logits = model.logits.save()
    assert torch.allclose(found[:, :, -1], scores_softmax(model, prompts, bias)[:, :, -1], atol=1e-6)
    assert (logits - patched_logits(model, prompts, bias=bias)).abs().max() < 1e-4
    if len(prompts) > 1:
        assert torch.equal(logits[1:], plain_logits(model, prompts)[1:])


def scores_softmax(
    model: StandardizedTransformer, prompts: list[str], bias: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    with torch.no_grad(), model.trace(prompts):
        scores = model.attention_scores[LAYER].save()
    return bias(scores.value).softmax(-1)


def test_a_whole_layer_is_set(model: StandardizedTransformer) -> None:
    def uniform(weights: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(weights) / weights.shape[-1]

    with torch.no_grad(), model.trace(ONE):
        model.attention_probabilities[LAYER] = uniform(model.attention_probabilities[LAYER])
        logits = model.logits.save()
    assert (logits - patched_logits(model, ONE, uniform)).abs().max() < 1e-4
    with torch.no_grad(), model.trace(ONE):
        model.attention_probabilities[LAYER] = 0
        heads = model.heads_output[LAYER].save()
    assert not heads.any()
    with pytest.raises(ShapeError, match=r"attention_probabilities\[1\]"), model.trace(ONE):
        model.attention_probabilities[LAYER] = torch.ones(3, 3)


@pytest.mark.parametrize("prompts", [ONE, PADDED])
def test_gradients_are_those_of_the_eager_model(model: StandardizedTransformer, prompts: list[str]) -> None:
    given = inputs(model, prompts)
    real = given["attention_mask"].bool()
    with eager(model) as module:
        output = module(**given, output_attentions=True)
        weights = output.attentions[LAYER]
        weights.retain_grad()
        output.logits[:, -1].logsumexp(-1).sum().backward()
        expected = weights.grad
        module.zero_grad()
    with model.trace(prompts):
        gradient = model.attention_probabilities[LAYER].grad.save()
        model.logits[:, -1].logsumexp(-1).sum().backward()
    reaches = real[:, None, :, None] & real[:, None, None, :] & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    reaches = reaches.expand_as(expected)
    scale = expected[reaches].abs().max()
    assert scale > 1e-3
    assert (gradient - expected)[reaches].abs().max() < 1e-4 * scale
    assert gradient.isfinite().all()


def test_gradients_of_weights_stay(model: StandardizedTransformer) -> None:
    module = model._module
    found = []
    for opened in (False, True):
        module.zero_grad()
        with model.trace(PADDED):
            if opened:
                _ = model.attention_probabilities[LAYER]
            model.logits[:, -1].logsumexp(-1).sum().backward()
        found.append({name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None})
    module.zero_grad()
    for name, gradient in found[0].items():
        assert gradient.isfinite().all()
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * (1e-3 + gradient.abs().max()), name


@pytest.mark.parametrize("prompts", [ONE, PADDED])
def test_each_new_token_has_its_row(model: StandardizedTransformer, prompts: list[str]) -> None:
    rows, heads, asks = [], [], []
    with torch.no_grad(), model.generate(prompts, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            asks.append(model.queries[LAYER].shape)
            rows.append(model.attention_probabilities[LAYER].save())
            heads.append(model.heads_output[LAYER].save())
        tokens = model.generator.output.save()
    given = inputs(model, prompts)
    del given["position_ids"]
    with eager(model) as module, torch.no_grad():
        out = module.generate(
            **given, max_new_tokens=4, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    assert torch.equal(tokens, out.sequences)
    length = given["input_ids"].shape[1]
    for step, (row, each) in enumerate(zip(rows, heads, strict=True)):
        size = length if step == 0 else 1
        assert row.shape == (len(prompts), model.num_heads, size, length + step)
        assert each.shape == asks[step] == (len(prompts), model.num_heads, size, model.head_dim)
        assert (row - out.attentions[step][LAYER])[:, :, -1].abs().max() < 1e-5


def test_what_is_set_in_a_generation_stays_in_its_step(llama: StandardizedTransformer) -> None:
    """Query heads that share keys are packed then: each has to be changed as itself."""
    before, after, values = [], [], []
    for collected, is_set in ((before, False), (after, True)):
        with torch.no_grad(), llama.generate(PADDED, max_new_tokens=2, do_sample=False) as tracer:
            for step in tracer.iter[:]:
                kept = llama.values[LAYER].save()
                if is_set and step == 1:
                    llama.attention_probabilities[LAYER][1, 3] = 1 / 16
                collected.append(llama.heads_output[LAYER].save())
                values.append(kept)
    assert torch.equal(before[0], after[0])
    same = torch.ones(before[1].shape[:3], dtype=torch.bool)
    same[1, 3] = False
    assert torch.equal(before[1][same], after[1][same])
    group = llama.num_heads // llama.num_kv_heads
    assert torch.allclose(after[1][1, 3, 0], values[-1][1, 3 // group].sum(0) / 16, atol=1e-5)


def test_inputs_of_one_pass_have_their_own(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(PADDED):
        whole = model.attention_probabilities[LAYER].save()
        plain = model.logits.save()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(PADDED[:1]):
            one = model.attention_probabilities[LAYER].save()
            first = model.logits.save()
        with tracer.invoke(PADDED[1:]):
            two = model.attention_probabilities[LAYER].save()
            model.attention_probabilities[LAYER][:, 0, -1] = 0
            second = model.logits.save()
    assert torch.equal(one, whole[:1])
    assert torch.equal(two, whole[1:])
    assert torch.equal(first, plain[:1])
    assert (second - plain[1:]).abs().amax((1, 2)).min() > 1e-4


def test_edits_scans_and_sessions(model: StandardizedTransformer) -> None:
    with torch.no_grad(), model.trace(ONE):
        model.attention_probabilities[LAYER][:, 1] *= 0.5
        expected = model.logits.save()
    with model.edit() as edited:
        edited.attention_probabilities[LAYER][:, 1] *= 0.5
    assert torch.equal(plain_logits(edited, ONE), expected)
    with model.scan(ONE):
        shape = tuple(model.attention_probabilities[LAYER].shape)
    with torch.no_grad(), model.session():
        with model.trace(ONE):
            kept = model.attention_probabilities[LAYER].save()
        with model.trace(ONE):
            model.attention_probabilities[LAYER] = kept * 0.5
            halved = model.attention_probabilities[LAYER].save()
            heads = model.heads_output[LAYER].save()
    assert shape == tuple(kept.shape)
    assert torch.equal(halved, kept * 0.5)
    with torch.no_grad(), model.trace(ONE):
        whole = model.heads_output[LAYER].save()
    assert torch.allclose(whole * 0.5, heads, atol=1e-6)


def test_other_layers_and_other_passes_keep_their_kernel(
    model: StandardizedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counted(*args: Any) -> Any:
        opened.append(args)
        return run_open(*args)

    monkeypatch.setattr(core_operations, "run_open", counted)
    with torch.no_grad(), model.trace(ONE):
        _ = model.queries[0]
        _ = model.attention_probabilities[LAYER]
        _ = model.heads_output[2]
    assert len(opened) == 1
    plain_logits(model, ONE)
    assert len(opened) == 1


def test_order(model: StandardizedTransformer) -> None:
    with pytest.raises(OutOfOrderError, match=r"attention_scores\[1\] was asked for after"), model.trace(ONE):
        _ = model.attention_probabilities[1]
        _ = model.attention_scores[1]
    with pytest.raises(OutOfOrderError, match=r"attention_probabilities\[0\] was asked for after"), model.trace(ONE):
        _ = model.attention_probabilities[1]
        _ = model.attention_probabilities[0]


def test_half_precision_has_probabilities_in_full(llama: StandardizedTransformer) -> None:
    model = StandardizedTransformer("demo-llama", dtype=torch.bfloat16)
    plain = plain_logits(model, PADDED)
    with torch.no_grad(), model.trace(PADDED):
        found = model.attention_probabilities[LAYER].save()
        logits = model.logits.save()
    with torch.no_grad(), model.trace(PADDED):
        model.attention_probabilities[LAYER][:, 0, -1] = 0
        heads = model.heads_output[LAYER].save()
    assert torch.equal(logits, plain)
    assert found.dtype == torch.float32
    assert (found[:, :, -1].sum(-1) - 1).abs().max() < 1e-6
    assert heads.dtype == torch.bfloat16
    assert not heads[:, 0, -1].any()


def test_training_with_dropout_says_so() -> None:
    model = StandardizedTransformer("demo-gpt2", attn_pdrop=0.1)
    model._module.train()
    with pytest.raises(SourceError, match=r"attention_probabilities\[1\]: the kernel drops out"), model.trace(ONE):
        _ = model.attention_probabilities[1]


def test_it_is_known_whether_they_are_there(model: StandardizedTransformer) -> None:
    assert model.attn_probs_available


def test_what_was_opened_is_shown_with_its_line(
    model: StandardizedTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    model.attention_probabilities.print_source(LAYER)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("attention_probabilities[1]: probabilities of scaled_dot_product_attention_0 in ")
    file, _, rest = shown[1].strip().partition("   ")
    path, _, line = file.rpartition(":")
    assert rest == "attn_output = torch.nn.functional.scaled_dot_product_attention("
    with open(path, encoding="utf-8") as source:
        assert source.readlines()[int(line) - 1].strip() == rest
    model.attention_scores.print_source(LAYER)
    assert capsys.readouterr().out.startswith("attention_scores[1]: scores of scaled")
