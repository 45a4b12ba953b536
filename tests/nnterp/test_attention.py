"""The values of attention heads, against plain hooks on the unwrapped model and against its cache."""

from __future__ import annotations

from functools import wraps

import pytest
import torch

from nnterp import StandardizedTransformer
from tests.matrix.models import tiny_model

PROMPTS = (["The Eiffel Tower is"], ["The Eiffel Tower is in the city", "The"])


def _projection(model: StandardizedTransformer) -> torch.nn.Module:
    attention = model.attentions[1]._module
    return next(child for name, child in attention.named_modules() if name in ("o_proj", "c_proj"))


def _projected(
    model: StandardizedTransformer, prompts: list[str], head: int | None
) -> tuple[torch.Tensor, torch.Tensor, object]:
    """What comes to the output projection of layer 1, the logits and the cache, with ``head`` doubled."""
    seen = []

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        heads = args[0].detach().clone().unflatten(-1, (model.num_heads, -1))
        if head is not None:
            heads[:, :, head] *= 2
        seen.append(heads.transpose(1, 2))
        return (heads.flatten(-2),)

    with model.trace(prompts):
        ids, mask = model.input_ids, model.attention_mask
    handle = _projection(model).register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(0)
            output = model._module(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    finally:
        handle.remove()
    return seen[0], output.logits, output.past_key_values


@pytest.mark.parametrize("name", ["demo-llama", "demo-gpt2"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_values_of_heads_are_the_models_own(name: str, prompts: list[str]) -> None:
    model = StandardizedTransformer(name)
    with torch.no_grad(), model.trace(prompts):
        queries, keys = model.queries[1].save(), model.keys[1].save()
        values, heads = model.values[1].save(), model.heads_output[1].save()
        mask = model.attention_mask
    expected, _, cache = _projected(model, prompts, None)
    real = mask.bool()
    for ours, cached in ((keys, cache.layers[1].keys), (values, cache.layers[1].values)):
        assert ours.shape == cached.shape
        assert torch.equal(ours.transpose(1, 2)[real], cached.transpose(1, 2)[real])
    difference = (heads - expected).transpose(1, 2)[real].abs().max()
    assert difference < 1e-5
    repeat = model.num_heads // model.num_kv_heads
    scores = queries @ keys.repeat_interleave(repeat, 1).transpose(-1, -2) / queries.shape[-1] ** 0.5
    allowed = real[:, None, None, :] & torch.ones(scores.shape[-2:]).tril().bool()
    by_hand = scores.masked_fill(~allowed, -1e30).softmax(-1) @ values.repeat_interleave(repeat, 1)
    assert (by_hand - heads).transpose(1, 2)[real].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["demo-llama", "demo-gpt2"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_a_head_is_set_and_the_others_stay(name: str, prompts: list[str]) -> None:
    model = StandardizedTransformer(name)
    with torch.no_grad(), model.trace(prompts):
        model.heads_output[1][:, 2] *= 2
        logits, mask = model.logits.save(), model.attention_mask
    _, expected, _ = _projected(model, prompts, 2)
    assert (logits - expected)[mask.bool()].abs().max() < 1e-4
    with torch.no_grad(), model.trace(prompts):
        plain = model.logits.save()
    assert (logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["demo-llama", "demo-gpt2"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_values_that_are_set_change_their_heads_alone(name: str, prompts: list[str]) -> None:
    model = StandardizedTransformer(name)
    with torch.no_grad(), model.trace(prompts):
        before = model.heads_output[1].save()
    with torch.no_grad(), model.trace(prompts):
        values = model.values[1]
        values[:, 0] = 0
        model.values[1] = values
        after = model.heads_output[1].save()
    group = model.num_heads // model.num_kv_heads
    assert not after[:, :group].any()
    assert torch.equal(after[:, group:], before[:, group:])


def test_heads_that_are_alike_are_all_there() -> None:
    """Eight query heads to four of keys, which are all zero: nothing was repeated, and nothing may be folded."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    model = StandardizedTransformer(tiny_model("llama", **sizes))
    for name in ("k_proj", "v_proj"):
        torch.nn.init.zeros_(model.layers[0].self_attn._module.get_submodule(name).weight)
    with torch.no_grad(), model.trace(torch.arange(5, 11)[None]):
        keys = model.keys[0].save()
    with torch.no_grad(), model.trace(torch.arange(5, 11)[None]):
        values = model.values[0].save()
    assert keys.shape == values.shape == (1, 4, 6, 8)


def test_a_forward_that_is_wrapped_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of transformers wrap a forward, say to take an argument by its old name as well."""
    model = StandardizedTransformer("demo-llama")
    attention = type(model.attentions[1]._module)
    plain = attention.forward

    @wraps(plain)
    def forward(*args: object, **kwargs: object) -> object:
        return plain(*args, **kwargs)

    with torch.no_grad(), model.trace("The Eiffel Tower"):
        expected = model.queries[1].save()
    monkeypatch.setattr(attention, "forward", forward)
    with torch.no_grad(), model.trace("The Eiffel Tower"):
        queries = model.queries[1].save()
    assert torch.equal(queries, expected)
