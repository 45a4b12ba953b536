"""States are those of recurrences worked out here step by step; what is set is what the next step goes on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import conv1d, normalize, pad, sigmoid, silu, softplus

from nnsight_core import OutOfOrderError
from nnterp import StandardizedTransformer
from nnterp.errors import MissingPartError, ShapeError, SpecValueError
from nnterp.kept_path import KeptPath
from nnterp.mixer_states import NoStateError
from nnterp.spec import parse_spec
from tests.matrix.models import MODEL_TYPES, tiny_model

IDS = torch.arange(5, 27).reshape(2, 11)


def _causal(mixed: torch.Tensor, conv: Any) -> torch.Tensor:
    """A short convolution over (batch, position, channel), each position with those before it."""
    width = conv.weight.shape[-1]
    padded = pad(mixed.transpose(1, 2), (width - 1, 0))
    return conv1d(padded, conv.weight, conv.bias, groups=mixed.shape[-1]).transpose(1, 2)


def _mamba(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    inner, _ = mixer.in_proj(hidden).chunk(2, -1)
    inner = silu(_causal(inner, mixer.conv1d))
    rank, size = mixer.dt_proj.in_features, config.state_size
    step, enters, _ = mixer.x_proj(inner).split([rank, size, size], -1)
    step = softplus(mixer.dt_proj(step))
    state = torch.zeros(*hidden.shape[::2][:1], inner.shape[-1], size)
    for now in range(hidden.shape[1]):
        decay = torch.exp(-mixer.A_log.exp() * step[:, now, :, None])
        state = decay * state + (step[:, now] * inner[:, now])[..., None] * enters[:, now, None, :]
    return state


def _mamba2(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    heads, width, size, groups = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, mixer.n_groups
    _, mixed, step = mixer.in_proj(hidden).split([heads * width, mixer.conv_dim, heads], -1)
    mixed = silu(_causal(mixed, mixer.conv1d))
    inner, enters, _ = mixed.split([heads * width, groups * size, groups * size], -1)
    inner = inner.unflatten(-1, (heads, width))
    enters = enters.unflatten(-1, (groups, size)).repeat_interleave(heads // groups, 2)
    step = softplus(step + mixer.dt_bias)
    state = torch.zeros(len(hidden), heads, width, size)
    for now in range(hidden.shape[1]):
        decay = torch.exp(-mixer.A_log.exp() * step[:, now])[..., None, None]
        state = decay * state + (step[:, now, :, None] * inner[:, now])[..., None] * enters[:, now, :, None, :]
    return state


def _delta_rule(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Yang et al. 2024, "Gated Delta Networks": what the state says of a key is replaced, in part, by the value."""
    mixed = silu(_causal(mixer.in_proj_qkv(hidden), mixer.conv1d))
    _, keys, values = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
    keys = normalize(keys.unflatten(-1, (-1, mixer.head_k_dim)), dim=-1, eps=1e-6)
    values = values.unflatten(-1, (-1, mixer.head_v_dim))
    keys = keys.repeat_interleave(values.shape[2] // keys.shape[2], 2)
    strength = sigmoid(mixer.in_proj_b(hidden))
    decay = torch.exp(-mixer.A_log.exp() * softplus(mixer.in_proj_a(hidden) + mixer.dt_bias))
    state = torch.zeros(len(hidden), values.shape[2], keys.shape[-1], values.shape[-1])
    for now in range(hidden.shape[1]):
        state = state * decay[:, now, :, None, None]
        said = torch.einsum("bhkv,bhk->bhv", state, keys[:, now])
        change = strength[:, now, :, None] * (values[:, now] - said)
        state = state + torch.einsum("bhk,bhv->bhkv", keys[:, now], change)
    return state


def _lightning(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Each head forgets at a rate of its own."""
    _, keys, values = silu(mixer.qkv_proj(hidden)).unflatten(-1, (mixer.num_attention_heads, -1)).chunk(3, -1)
    state = torch.zeros(len(hidden), keys.shape[2], keys.shape[3], values.shape[3])
    for now in range(hidden.shape[1]):
        state = torch.exp(-mixer.slope_rate) * state + torch.einsum("bhk,bhv->bhkv", keys[:, now], values[:, now])
    return state


def _short_convolution(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    gate, _, inner = mixer.in_proj(hidden).chunk(3, -1)
    return (gate * inner).transpose(1, 2)[..., -config.conv_L_cache :]


def _rwkv(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """What the stabilised numerator and denominator stand for: sums that decay from step to step."""
    before = pad(hidden, (0, 0, 1, -1))
    keys = mixer.key(hidden * mixer.time_mix_key + before * (1 - mixer.time_mix_key)).exp()
    values = mixer.value(hidden * mixer.time_mix_value + before * (1 - mixer.time_mix_value))
    above, below, decay = torch.zeros_like(keys[:, 0]), torch.zeros_like(keys[:, 0]), torch.exp(-mixer.time_decay.exp())
    for now in range(hidden.shape[1]):
        above, below = decay * above + keys[:, now] * values[:, now], decay * below + keys[:, now]
    return torch.stack([above, below])


def _mlstm(mixer: Any, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Beck et al. 2024, "xLSTM": exponential gates, so that the memory is a sum of outer products."""
    cap, heads = config.gate_soft_cap, config.num_heads
    keys, values = (each(hidden).unflatten(-1, (heads, -1)) for each in (mixer.k, mixer.v))
    enters = torch.exp(cap * torch.tanh(mixer.igate_preact(hidden) / cap))
    stays = sigmoid(cap * torch.tanh(mixer.fgate_preact(hidden) / cap))
    state = torch.zeros(len(hidden), heads, keys.shape[-1], values.shape[-1])
    for now in range(hidden.shape[1]):
        outer = torch.einsum("bhk,bhv->bhkv", keys[:, now], values[:, now])
        state = stays[:, now, :, None, None] * state + enters[:, now, :, None, None] * outer
    return state


def _plain(state: Any) -> torch.Tensor:
    return state


def _unstabilised(state: Any) -> torch.Tensor:
    above, below, exponent = state
    return torch.stack([above, below]) * exponent.exp()


def _memory(state: Any) -> torch.Tensor:
    memory, _, exponent = state
    return memory * exponent.exp()[..., None]


RECURRENCES: dict[str, tuple[Callable[[Any, torch.Tensor, Any], torch.Tensor], Callable[[Any], torch.Tensor]]] = {
    "mamba": (_mamba, _plain),
    "mamba2": (_mamba2, _plain),
    "bamba": (_mamba2, _plain),
    "qwen3_5": (_delta_rule, _plain),
    "minimax": (_lightning, _plain),
    "lfm2": (_short_convolution, _plain),
    "rwkv": (_rwkv, _unstabilised),
    "xlstm": (_mlstm, _memory),
}


@pytest.mark.parametrize("model_type", [name for name in RECURRENCES if name in MODEL_TYPES])
@torch.no_grad()
def test_a_state_is_that_of_the_recurrence_step_by_step(model_type: str) -> None:
    by_hand, meant = RECURRENCES[model_type]
    module = tiny_model(model_type)
    model = StandardizedTransformer(module)
    layers = [layer for layer in range(model.num_layers) if model.mixers_state.has(layer)]
    seen = {}
    # In one step of a generation, as some models keep no state where no token is to follow.
    with model.generate(IDS, max_new_tokens=1, pad_token_id=0):
        for layer in layers:
            seen[layer] = model.mixers_input[layer].save(), model.mixers_state[layer].save()
    for layer, (hidden, state) in seen.items():
        mixer = model.mixers[layer]._module
        expected = by_hand(mixer, hidden.value, module.config)
        assert torch.allclose(meant(state.value), expected, rtol=1e-4, atol=1e-6 + 1e-5 * float(expected.abs().max()))
        assert expected.abs().max() > 1e-6


@pytest.fixture(scope="module")
def mamba() -> StandardizedTransformer:
    return StandardizedTransformer(tiny_model("mamba"))


@torch.no_grad()
def test_a_state_is_there_when_the_output_is_in_either_order(mamba: StandardizedTransformer) -> None:
    with mamba.trace(IDS):
        first = mamba.mixers_state[0].save()
        mamba.mixers_output[0].save()
        mamba.mixers_output[1].save()
        second = mamba.mixers_state[1].save()
        again = mamba.mixers_state(1).save()
    output = mamba._module(IDS)
    cache = next(output[name] for name in ("cache", "cache_params") if name in output)
    assert torch.equal(first, (cache.layers[0].recurrent_states if hasattr(cache, "layers") else cache.ssm_states)[0])
    assert torch.equal(second, again) and not torch.equal(first, second)
    with pytest.raises(OutOfOrderError, match=r"mixers_state\[1\]"), mamba.trace(IDS):
        mamba.mixers_output[2].save()
        mamba.mixers_state[1].save()


@torch.no_grad()
def test_parts_are_written_through_and_rows_of_others_stay(mamba: StandardizedTransformer) -> None:
    with mamba.generate(IDS, max_new_tokens=1, pad_token_id=0):
        plain = mamba.mixers_state[1].save()
    kept = []
    with mamba.generate(IDS, max_new_tokens=2, min_new_tokens=2, pad_token_id=0) as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                state = mamba.mixers_state[1]
                state[0, 3] = 7.0
                mamba.mixers_state[1] *= 2
            kept.append(mamba.mixers_state[1].save())
    expected = plain.clone()
    expected[0, 3] = 7.0
    assert torch.equal(kept[0], 2 * expected) and torch.equal(kept[0][1], 2 * plain[1])
    with pytest.raises(ShapeError, match=r"mixers_state\[0\]"), mamba.trace(IDS):
        mamba.mixers_state[0] = torch.zeros(3)


@torch.no_grad()
def test_an_edit_sets_the_state_after_each_step(mamba: StandardizedTransformer) -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
    live, edited = [], []
    with mamba.generate(IDS, **options) as tracer:
        for _ in tracer.iter[:]:
            mamba.mixers_state[1] = 0.5 * mamba.mixers_state[1]
            live.append(mamba.logits[:, -1].save())
    with mamba.edit() as halved:
        mamba.mixers_state[1] = 0.5 * mamba.mixers_state[1]
    with halved.generate(IDS, **options) as tracer:
        for _ in tracer.iter[:]:
            edited.append(halved.logits[:, -1].save())
    assert all(torch.equal(one, other) for one, other in zip(live, edited, strict=True))
    with mamba.generate(IDS, **options) as tracer:
        plain = [mamba.logits[:, -1].save() for _ in tracer.iter[:]]
    assert torch.equal(plain[0], live[0]) and not torch.equal(plain[1], live[1])


def test_gradients_go_through_a_state(mamba: StandardizedTransformer) -> None:
    mixer = mamba._module.backbone.layers[1].mixer
    with mamba.trace(IDS):
        hidden = mamba.mixers_input[1]
        given = hidden.save()
        gradient = hidden.grad.save()
        mamba.mixers_state[1].square().sum().backward()
    leaf = given.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(_mamba(mixer, leaf, mamba.config).square().sum(), leaf)
    mamba._module.zero_grad(set_to_none=True)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 0


def test_a_scan_knows_the_shape(mamba: StandardizedTransformer) -> None:
    with mamba.scan(IDS):
        shape = mamba.mixers_state[1].shape
    assert tuple(shape) == (2, 96, 8)


def test_no_state_is_an_error_that_says_what_to_do(mamba: StandardizedTransformer) -> None:
    with (
        pytest.raises(NoStateError, match=r"(?s)mamba.yaml:\d+ says.*use_cache=True"),
        mamba.trace(IDS, use_cache=False),
    ):
        mamba.mixers_state[0].save()
    llama = StandardizedTransformer("demo-llama")
    with pytest.raises(MissingPartError, match=r"mixers_state\[2\].*llama.yaml names none"), llama.trace("Hello"):
        llama.mixers_state[2].save()
    jamba = StandardizedTransformer(tiny_model("jamba"))
    assert [jamba.mixers_state.has(layer) for layer in range(3)] == [True, False, True]
    with pytest.raises(MissingPartError, match=r"mixers_state\[1\].*keys and values"), jamba.trace(IDS):
        jamba.mixers_state[1].save()


@pytest.mark.parametrize("wrong", ["cache_params.states", "cache", "output..1", "module.a b"])
def test_a_path_that_leads_nowhere_is_told_by_its_line(wrong: str) -> None:
    text = (
        "family: mine\nmodel_types: [mine]\n"
        "modules: {embed_tokens: e, layers: l, ln_final: n, lm_head: h}\n"
        f"layer:\n  attention: null\n  mlp: null\n  recurrent: {{module: m, state: '{wrong}'}}\n"
        "absent: {attention: It has none., mlp: It has none.}\n"
    )
    with pytest.raises(SpecValueError, match=r"mine.yaml:7: `layer.recurrent.state` is no path to a state"):
        parse_spec(text, "mine.yaml")


def test_a_path_gets_what_it_puts() -> None:
    path = KeptPath("output", ("1", "kept", ":", "*"))
    start = ("hidden", [0, 1]), {"kept": torch.zeros(2, 3)}
    changed = path.put(start, 2, torch.tensor([4.0, 5.0]))
    assert path.get(changed, 2).tolist() == [4, 5] and path.get(changed, 1).tolist() == [0, 0]
    assert path.text == "output.1.kept.:.*" and changed[0] is start[0]
    assert path.get(("hidden",), 2) is None and path.get(("hidden", {}), 2) is None
