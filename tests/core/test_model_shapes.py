"""Models of every shape: encoders with decoders, vision, recurrence, fast paths, torch.func, odd outputs."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from nnsight_core import LanguageModel, ModuleNotRunError, NNsight

X = torch.linspace(-1, 1, 6).reshape(2, 3)
IDS = torch.tensor([[5, 6, 7, 8]])
START = torch.tensor([[0, 3]])


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def negated(module: Any, args: Any, output: Any) -> Any:
    return (output[0] * -3, *output[1:]) if isinstance(output, tuple) else output * -3


# Encoders with decoders.


def t5() -> Any:
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        decoder_start_token_id=0,
        eos_token_id=63,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


BOTH = pytest.mark.parametrize(
    "make, encoder, decoder",
    [(t5, "encoder.block", "decoder.block"), (bart, "model.encoder.layers", "model.decoder.layers")],
    ids=["t5", "bart"],
)


@BOTH
@torch.no_grad()
def test_an_encoder_and_a_decoder_in_one_trace(make: Any, encoder: str, decoder: str) -> None:
    module = make()
    for model in (LanguageModel(module), NNsight(module)):
        with model.trace(input_ids=IDS, decoder_input_ids=START):
            first = model.get(encoder)[1].output
            is_tuple = isinstance(first, tuple)
            last = model.get(decoder)[1].output
            shapes = [(each[0] if is_tuple else each).shape for each in (first, last)]
            logits = model.output.logits.save()
        assert shapes == [(1, 4, 16), (1, 2, 16)]
        assert torch.equal(logits.value, module(input_ids=IDS, decoder_input_ids=START).logits)


@BOTH
@torch.no_grad()
def test_an_encoder_and_a_decoder_in_a_generation(make: Any, encoder: str, decoder: str) -> None:
    module = make()
    model = LanguageModel(module)
    options = {"max_new_tokens": 4, "do_sample": False}
    with hooked(module.get_submodule(encoder)[1], negated):
        expected = module.generate(IDS, **options)
    seen: list[Any] = []
    with hooked(module.get_submodule(decoder)[0], lambda *each: seen.append(each[2])):
        plain = module.generate(IDS, **options)
    with model.generate(IDS, **options) as tracer:
        value = model.get(encoder)[1].output
        if isinstance(value, tuple):
            value[0][:] = value[0] * -3
        else:
            value[:] = value * -3
        tokens = tracer.result.save()
    assert torch.equal(tokens.value, expected)
    with model.generate(IDS, **options) as tracer:
        steps = [model.get(decoder)[0].output.save() for _ in tracer.iter[:]]
        tokens = tracer.result.save()
    assert torch.equal(tokens.value, plain)
    assert len(steps) == len(seen)
    for one, other in zip(steps, seen, strict=True):
        pairs = zip(one.value, other, strict=True) if isinstance(other, tuple) else [(one.value, other)]
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(b, torch.Tensor))


# Vision.


@torch.no_grad()
def test_vision_models() -> None:
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    module: Any = ViTForImageClassification(config).eval()
    model, images = NNsight(module), torch.randn(3, 3, 16, 16)
    expected = module(images).logits
    with model.trace(pixel_values=images):
        hidden = model.vit.layernorm.output.save()
        logits = model.output.logits.save()
    assert hidden.shape == (3, 5, 16)
    assert torch.equal(logits.value, expected)
    with model.trace() as tracer:
        with tracer.invoke(images[:1]):
            model.vit.layernorm.output[:, 0] = 0
        with tracer.invoke(images[1:]):
            logits = model.output.logits.save()
    torch.testing.assert_close(logits.value, expected[1:])


@torch.no_grad()
def test_two_towers() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = {**tower, "vocab_size": 64, "eos_token_id": 2}, {**tower, "image_size": 16, "patch_size": 8}
    module: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model = NNsight(module)
    inputs = {"input_ids": torch.tensor([[3, 4, 2], [5, 6, 2]]), "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = module(**inputs)
    with model.trace(**inputs):
        parts = [tower.encoder.layers[1].output.save() for tower in (model.vision_model, model.text_model)]
        by_attribute, by_key = model.output.logits_per_image.save(), model.output["logits_per_text"].save()
        model.output.text_embeds = 0
        changed = model.output.text_embeds.save()
    assert [part.shape for part in parts] == [(2, 5, 16), (2, 3, 16)]
    assert torch.equal(by_attribute.value, expected.logits_per_image)
    assert torch.equal(by_key.value, expected.logits_per_text)
    assert not changed.value.any()


@torch.no_grad()
def test_batch_statistics_are_counted_once() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    module: Any = ResNetForImageClassification(config).train()
    twin, images = copy.deepcopy(module), torch.randn(2, 3, 32, 32)
    expected = twin(images).logits
    model = NNsight(module)
    with model.trace(images):
        assert model.resnet.embedder.output.shape[0] == 2
        logits = model.output.logits.save()
    assert torch.equal(logits.value, expected)
    for one, other in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# torch's own odd ones.


@torch.no_grad()
def test_a_recurrent_layer_gives_nested_tuples() -> None:
    module = nn.Sequential(nn.LSTM(3, 4, num_layers=2, batch_first=True))
    model, x = NNsight(module), torch.randn(2, 5, 3)
    with model.trace(x):
        hidden, (last, cell) = model[0].output
        kept = [each.save() for each in (hidden, last, cell)]
        model[0].output[1][0][:] = 0
        output = model.output.save()
    plain = module(x)
    for one, other in zip(kept, (plain[0], *plain[1]), strict=True):
        assert torch.equal(one.value, other)
    assert not output.value[1][0].any()
    assert torch.equal(output.value[1][1], plain[1][1])


@torch.no_grad()
def test_the_fast_path_of_torchs_encoder_is_not_taken_past_what_is_asked_for() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    model, x = NNsight(encoder), torch.randn(1, 4, 8)
    expected = encoder(x)
    with model.trace(x):
        inside = model.layers[0].linear1.output.save()
        model.layers[1].linear2.output *= 2
        output = model.output.save()
    assert inside.shape == (1, 4, 16)
    assert not torch.allclose(output.value, expected)
    with model.trace(x):
        model.layers[0].output *= 2
        output = model.output.save()
    assert torch.equal(output.value, encoder.layers[1](encoder.layers[0](x) * 2))


@torch.no_grad()
def test_a_module_whose_weights_are_used_without_calling_it_is_said_not_to_run() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 4, 8)
    model = NNsight(attention)
    with pytest.raises(ModuleNotRunError, match=r"out_proj\.output"), model.trace(x, x, x):
        assert model.out_proj.output is not None

    class Direct(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](self[0].forward(x))

    direct = NNsight(Direct(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(ModuleNotRunError, match=r"0\.output"), direct.trace(X):
        assert direct[0].output is not None


class Gives(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: torch.Tensor) -> Any:
        return self.give(x)


Pair = collections.namedtuple("Pair", ["a", "b"])


@torch.no_grad()
def test_named_tuples_lists_strings_and_nothing() -> None:
    model = NNsight(nn.Sequential(Gives(lambda x: Pair(x, x * 2))))
    with model.trace(X):
        model[0].output.b[:] = 1
        model[0].output.a = model[0].output.a + 1
        output = model.output.save()
    assert type(output.value) is Pair
    assert torch.equal(output.a, X + 1) and torch.equal(output.b, torch.ones_like(X))
    model = NNsight(nn.Sequential(Gives(lambda x: [x, [x * 2]])))
    with model.trace(X):
        model[0].output[1][0][:] = 0
        model[0].output.append("more")
        output = model.output.save()
    assert output.value[2] == "more" and not output.value[1][0].any()
    model = NNsight(nn.Sequential(Gives(lambda x: "text")))
    with model.trace(X):
        text = model[0].output.save()
        model[0].output = "other"
        output = model.output.save()
    assert (text.value, output.value) == ("text", "other")
    model = NNsight(nn.Sequential(Gives(lambda x: None), Gives(lambda x: x)))
    with model.trace(X):
        nothing = model[0].output.save()
        model[1].input = X * 2
        output = model.output.save()
    assert nothing.value is None
    assert torch.equal(output.value, X * 2)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["sparse", "compressed", "two tensors", "subclass"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_that_are_not_plain(layout: str) -> None:
    class Own(torch.Tensor):
        pass

    gives: dict[str, Any] = {
        "sparse": lambda x: x.to_sparse(),
        "compressed": lambda x: x.to_sparse_csr(),
        "two tensors": lambda x: TwoTensor(x, x * 3),
        "subclass": lambda x: x.as_subclass(Own),
    }
    model = NNsight(nn.Sequential(Gives(gives[layout]), nn.Identity()))
    expected = gives[layout](X)
    with model.trace(X):
        given = model[0].output.save()
        model[0].output = model[0].output * 2
        output = model.output.save()
    assert type(given.value) is type(output.value) is type(expected)
    if layout == "two tensors":
        assert torch.equal(output.value.a, X * 2) and torch.equal(output.value.b, X * 6)
    else:
        dense = (
            output.value.to_dense()
            if "s" in layout and layout != "subclass"
            else output.value.as_subclass(torch.Tensor)
        )
        assert torch.equal(dense, X * 2)


# Around and inside torch.func.


def test_inside_vmap_and_grad_of_torch_func() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = NNsight(module)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        with model.trace(x):
            model[0].output[..., 0] = 0
            model[0].output = model[0].output * 2
            output = model.output.save()
        return output.value

    def plain(x: torch.Tensor) -> torch.Tensor:
        return module[1](module[0](x) * 2 * torch.tensor([0.0, 1.0, 1.0]))

    torch.testing.assert_close(torch.vmap(doubled)(X), plain(X))
    found = torch.func.grad(lambda x: doubled(x).sum())(X)
    torch.testing.assert_close(found, torch.func.grad(lambda x: plain(x).sum())(X))


def test_a_functional_call_in_the_body() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = NNsight(module)
    with model.trace(X):
        hidden = model[0].output.save()
        other = torch.func.functional_call(module, {"0.weight": torch.zeros(3, 3)}, (X,))
        output = model.output.save()
    assert torch.equal(hidden.value, module[0](X)) and torch.equal(output.value, module(X))
    assert torch.equal(other, module[0].bias.tanh().expand(2, 3))


def test_parametrizations_and_hooks_of_the_users() -> None:
    module = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    model = NNsight(module)
    with model.trace(X):
        weight = model[0].parametrizations.weight.output.save()
        model[0].parametrizations.weight.output *= 0
        output = model[0].output.save()
    assert torch.equal(weight.value, module[0].weight)
    assert torch.equal(output.value, module[0].bias.expand(2, 3))
    before = module[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    after = module[1].register_forward_hook(lambda m, args, out: out * 2)
    with model.trace(X):
        given = model[1].input.clone().save()
        hidden = model[1].output.save()
    before.remove()
    after.remove()
    assert torch.equal(given.value, module[0](X) + 1)
    assert torch.equal(hidden.value, module[1](module[0](X) + 1) * 2)
