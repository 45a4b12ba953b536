"""Attention without torch's fast kernel, held against the family's own eager weights, its cache, and plain hooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from nnsight_core.errors import OutOfOrderError
from nnterp import StandardizedTransformer
from nnterp.attention import NAMES, ClosedAttentionError, open_place
from nnterp.attention_forms import Form, UnexpectedShapeError, matching
from nnterp.attention_places import Attention
from nnterp.attention_sources import default_attention_prob_source
from nnterp.errors import CannotError
from tests.matrix.models import tiny_model

#: A family of each way to write attention, with the module to which the heads go when they are together again.
PROJECTIONS = {
    "bloom": "dense",  # batch and heads on one axis, ALiBi inside the product
    "xglm": "out_proj",  # the same for all of attention
    "codegen": "out_proj",  # a softmax that is made on the fly
    "gpt_neo": "attention.out_proj",  # inside a child
    "bert": "output.dense",  # the kernel, inside a child
    "gemma2": "o_proj",  # heads repeated, scores capped
    "gpt_oss": "o_proj",  # a sink, and each row's largest subtracted
    "mpt": "out_proj",  # ALiBi
    "gpt_neox_japanese": "dense",
    "openai-gpt": "c_proj",  # no cache
    "falcon": "dense",  # calls the kernel itself
    "llama": "o_proj",
    "deepseek_v3": "o_proj",  # multi-head latent attention
}
#: Those that run the kernel unless they are told otherwise.
EAGER = ("bert", "llama", "deepseek_v3")
#: Sinks take some of the probability.
SINKS = ("gpt_oss",)
LAYER = 1
IDS = torch.randint(5, 320, (2, 8), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


@cache
def _model(model_type: str) -> StandardizedTransformer:
    module = tiny_model(model_type)
    if model_type in EAGER:
        module.set_attn_implementation("eager")
    return StandardizedTransformer(module)


def _read(model: StandardizedTransformer, **options: Any) -> dict[str, torch.Tensor]:
    """All values of a layer and the logits, in one pass."""
    with torch.no_grad(), model.trace(IDS, **options):
        found = {name: getattr(model, name)[LAYER].save() for name in NAMES}
        found["logits"] = model.logits.save()
    return {name: each.value for name, each in found.items()}


def _repeated(value: torch.Tensor, heads: int) -> torch.Tensor:
    return value.repeat_interleave(heads // value.shape[1], 1)


def _cached_values(model: StandardizedTransformer) -> torch.Tensor:
    """(batch, head, position, size), of a call that is shorter than any window."""
    found: torch.Tensor = model._module(input_ids=IDS[:, :3], use_cache=True).past_key_values.layers[LAYER].values
    return found


def _weights(model: StandardizedTransformer, **options: Any) -> torch.Tensor:
    """What the plain model says of its attention, called as a trace calls it."""
    calls: list[dict[str, Any]] = []
    handle = model._module.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    try:
        with torch.no_grad(), model.trace(IDS, **options):
            pass
    finally:
        handle.remove()
    with torch.no_grad():
        found: torch.Tensor = model._module(**calls[0], output_attentions=True).attentions[LAYER]
    return found


# Falcon goes another way when it is asked for weights, and from transformers 5.24 on CodeGen gives none.
@pytest.mark.parametrize("model_type", [name for name in PROJECTIONS if name not in ("falcon", "codegen")])
@pytest.mark.parametrize("mask", [None, MASK])
def test_probabilities_are_the_familys_own_weights(model_type: str, mask: torch.Tensor | None) -> None:
    model = _model(model_type)
    options = {} if mask is None else {"attention_mask": mask}
    seen, expected = _read(model, **options)["attention_probabilities"], _weights(model, **options)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    assert seen.shape == expected.shape == (2, model.num_heads, 8, 8)
    assert torch.equal(seen.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    sums = seen.sum(-1).transpose(1, 2)[real]
    if model_type in SINKS:
        assert (sums < 1).all()
    else:
        assert (sums - 1).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", PROJECTIONS)
def test_heads_are_what_the_projection_takes(model_type: str) -> None:
    model = _model(model_type)
    projection = model.attentions[LAYER]._module.get_submodule(PROJECTIONS[model_type])
    taken: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    try:
        with torch.no_grad():
            logits = model._module(input_ids=IDS).logits
    finally:
        handle.remove()
    seen = _read(model)
    heads, shown = seen["heads_output"], seen["attention_probabilities"]
    assert torch.equal(seen["logits"], logits)
    assert torch.equal(heads.transpose(1, 2).flatten(-2), taken[0])
    by_hand = shown @ _repeated(seen["values"], model.num_heads)
    assert (by_hand - heads).abs().max() < 1e-5
    assert seen["keys"].shape[1] == seen["values"].shape[1] == model.num_kv_heads
    assert (seen["attention_scores"].softmax(-1) / shown - 1)[shown > 1e-3].abs().max() < 1e-4 or model_type in SINKS


@pytest.mark.parametrize("model_type", ["bloom", "xglm", "gpt_neo", "gemma2", "mpt", "llama"])
def test_values_are_those_of_the_cache(model_type: str) -> None:
    model = _model(model_type)
    with torch.no_grad():
        cache = model._module(input_ids=IDS, use_cache=True).past_key_values
    seen = _read(model)
    layer = cache.layers[LAYER]
    # That of a sliding window keeps the last positions only.
    kept = layer.values.shape[-2]
    assert kept > 2
    assert (seen["values"][:, :, -kept:] - layer.values).abs().max() < 1e-5
    assert (seen["keys"][:, :, -kept:] - layer.keys).abs().max() < 1e-5


@pytest.mark.parametrize(
    "model_type", ["bloom", "xglm", "codegen", "gpt_neo", "bert", "gemma2", "mpt", "gpt_oss", "falcon"]
)
def test_probabilities_that_are_set_change_their_head_alone(model_type: str) -> None:
    """Against heads made by hand of the cache's values, put before the projection by a hook."""
    model = _model(model_type)
    plain = _read(model)
    with torch.no_grad(), model.trace(IDS):
        shown = model.attention_probabilities[LAYER]
        shown[:, 1] = 0
        shown[:, 1, :, 0] = 0.5
        heads = model.heads_output[LAYER].save()
        logits = model.logits.save()
    assert torch.equal(
        heads[:, [0, *range(2, model.num_heads)]], plain["heads_output"][:, [0, *range(2, model.num_heads)]]
    )
    with torch.no_grad():
        values = _cached_values(model)
    first = _repeated(values, model.num_heads)[:, 1, 0]
    size = first.shape[-1]

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        changed = args[0].clone()
        changed[..., size : 2 * size] = 0.5 * first[:, None]
        return (changed,)

    projection = model.attentions[LAYER]._module.get_submodule(PROJECTIONS[model_type])
    handle = projection.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            expected = model._module(input_ids=IDS).logits
    finally:
        handle.remove()
    assert (logits - expected).abs().max() < 1e-5
    assert (logits - plain["logits"]).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", ["bloom", "xglm", "codegen", "gemma2", "gpt_oss", "openai-gpt", "deepseek_v3"])
def test_what_is_set_counts_and_nothing_else_changes(model_type: str) -> None:
    model = _model(model_type)
    plain = _read(model)
    kept = model.num_heads // model.num_kv_heads
    with torch.no_grad(), model.trace(IDS):
        model.queries[LAYER][:, :kept] = 0
        scores = model.attention_scores[LAYER].save()
    assert torch.equal(scores[:, kept:], plain["attention_scores"][:, kept:])
    assert not torch.equal(scores[:, :kept], plain["attention_scores"][:, :kept])
    with torch.no_grad(), model.trace(IDS):
        model.attention_scores[LAYER][:, 0] = 0
        shown = model.attention_probabilities[LAYER].save()
    assert torch.equal(shown[:, 1:], plain["attention_probabilities"][:, 1:])
    assert (shown[:, 0] - shown[:, 0, :, :1]).abs().max() < 1e-6
    with torch.no_grad(), model.trace(IDS):
        model.keys[LAYER].save()
        model.values[LAYER][:, 0] *= 2
        heads = model.heads_output[LAYER].save()
    assert torch.equal(heads[:, kept:], plain["heads_output"][:, kept:])
    assert (heads[:, :kept] - 2 * plain["heads_output"][:, :kept]).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["xglm", "llama"])
def test_values_count_also_where_nothing_is_asked_for_afterwards(model_type: str) -> None:
    model = _model(model_type)
    with torch.no_grad(), model.trace(IDS) as tracer:
        model.values[LAYER][:] = 0
        result = tracer.result.save()
    last: list[torch.Tensor] = []
    handle = model._module.register_forward_hook(lambda _, args, output: last.append(output.logits))
    try:
        with torch.no_grad(), model.trace(IDS):
            model.values[LAYER][:] = 0
    finally:
        handle.remove()
    assert torch.equal(last[0], result.logits)
    assert not torch.equal(last[0], _read(model)["logits"])


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "gpt_oss", "llama"])
def test_a_new_token_sees_what_it_sees_without_a_cache(model_type: str) -> None:
    model = _model(model_type)
    kept = []
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), model.generate(IDS[:1], **options) as tracer:
        for _ in tracer.iter[:]:
            kept.append([model.values[LAYER].save(), model.attention_probabilities[LAYER].save()])
        ids = model.generator.output.save()
    with torch.no_grad(), model.trace(ids[:, :-1]):
        values, shown = model.values[LAYER].save(), model.attention_probabilities[LAYER].save()
    assert [each[1].shape[2] for each in kept] == [8, 1, 1]
    # A sliding window shows a new token the last positions only.
    seen = kept[2][0].shape[2]
    assert (kept[2][1][:, :, 0] - shown[:, :, -1, -seen:]).abs().max() < 1e-5
    assert (kept[2][0] - values[:, :, -seen:]).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["bloom", "xglm", "gpt_oss", "llama"])
def test_each_of_two_inputs_has_its_own(model_type: str) -> None:
    model = _model(model_type)
    plain = _read(model)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            first = model.attention_probabilities[LAYER].save()
            kept = model.logits.save()
        with tracer.invoke(IDS[1:]):
            values = model.values[LAYER]
            values[:, 0] = 0
            shown = model.attention_probabilities[LAYER]
            second = shown.clone().save()
            shown[:, 1] = 0
            heads = model.heads_output[LAYER].save()
    assert tracer.forward_passes == 1
    assert torch.equal(first, plain["attention_probabilities"][:1])
    assert torch.equal(second, plain["attention_probabilities"][1:])
    assert torch.equal(kept, plain["logits"][:1])
    assert not heads[:, :2].any() and heads[:, -1].any()


@pytest.mark.parametrize("model_type", ["bloom", "xglm", "gemma2"])
def test_gradients_reach_what_is_inside(model_type: str) -> None:
    """The gradient of values against a difference of two runs."""
    model = _model(model_type)
    direction = torch.randn(_read(model)["values"].shape, generator=torch.Generator().manual_seed(0))
    with model.trace(IDS):
        values = model.values[LAYER]
        values.requires_grad_()
        loss = model.logits.log_softmax(-1)[..., 7].sum()
        with loss.backward():
            gradient = values.grad.save()
    losses = []
    for step in (1e-2, -1e-2):
        with torch.no_grad(), model.trace(IDS):
            model.values[LAYER] = model.values[LAYER] + step * direction
            losses.append(model.logits.log_softmax(-1)[..., 7].sum().save())
    measured = (losses[0] - losses[1]) / 2e-2
    assert (gradient * direction).sum() == pytest.approx(float(measured), rel=2e-2)


def test_a_way_that_is_taken_in_another_pass_is_no_silent_one() -> None:
    """Falcon goes another way where it is to give its weights: nothing is taken for what it is not."""
    model = _model("falcon")
    with pytest.raises(Exception, match="scaled_dot_product_attention"), torch.no_grad():
        with model.trace(IDS, output_attentions=True):
            model.queries[LAYER].save()


@pytest.mark.parametrize(
    ("model_type", "said", "why"),
    [
        ("prophetnet", "attends twice", "2 softmaxes"),
        ("reformer", "by hashes", "no softmax"),
        ("diffllama", "runs twice in one call", "several times"),
    ],
)
def test_attention_that_stays_closed_says_why(model_type: str, said: str, why: str) -> None:
    model = _model(model_type)
    with pytest.raises(CannotError, match=said), model.trace(IDS):
        model.attention_probabilities[LAYER].save()
    assert not model.attn_probs_available
    # The specification says what is seen in the attention itself.
    with pytest.raises(ClosedAttentionError, match=why):
        default_attention_prob_source(model.attentions[LAYER])


def test_a_name_that_depends_on_the_call_is_no_place() -> None:
    """XLNet has one product more where there is a mask, and so another name for that of probabilities and values."""
    model = _model("xlnet")
    assert model.attention_probabilities.is_open(LAYER) and model.values.is_open(LAYER)
    with pytest.raises(CannotError, match="has two names"), model.trace(IDS):
        model.heads_output[LAYER].save()
    attention = Attention(model.attentions[LAYER], "", 1, 0)
    with pytest.raises(ClosedAttentionError, match="depends on"):
        open_place(attention, "heads_output", "heads_output")
    with torch.no_grad(), model.trace(IDS):
        shown = model.attention_probabilities[LAYER].save()
    assert (shown - _weights(model)).abs().max() < 1e-6


def test_order_holds_among_them() -> None:
    model = _model("bloom")
    with pytest.raises(OutOfOrderError), torch.no_grad(), model.trace(IDS):
        model.attention_probabilities[LAYER].save()
        model.values[LAYER].save()


def test_forms_give_back_what_they_take() -> None:
    usual = torch.rand(2, 3, 5, 7)
    for tensor in (usual, usual.permute(2, 0, 3, 1), usual.flatten(0, 1), usual.transpose(0, 1).flatten(0, 1)):
        wide = torch.cat([tensor, torch.rand(*tensor.shape[:-1], 1)], -1) if tensor.shape[-1] == 7 else tensor
        form = matching(wide, usual)
        assert form is not None
        assert torch.equal(form.view(wide), usual)
        new = torch.rand_like(usual)
        assert torch.equal(form.view(form.put(wide, new)), new)
        assert torch.equal(form.put(wide, usual), wide)
    with pytest.raises(UnexpectedShapeError, match="6 \\* batch"):
        Form((0, 1, 2, 3), 0, 6).view(torch.zeros(4, 5, 7))
