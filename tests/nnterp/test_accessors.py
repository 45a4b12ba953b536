"""Every accessor reads what a hand-placed hook reads, and writes what a hand-placed hook writes, on every family.

The paths below are written by hand from transformers' own code, apart from the specifications.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError, MissingPartError, ShapeError
from nnterp.rename import RenameConfig
from tests.families import FAMILY_VARIANTS, IDS, tiny_inputs, tiny_model

ROWS = pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)

# layers, attention, first and last module of the MLP, embedding
PATHS = {
    "gpt2": ("transformer.h", "attn", "mlp", "mlp", "transformer.wte"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", "mlp", "gpt_neox.embed_in"),
    "opt": ("model.decoder.layers", "self_attn", "fc1", "fc2", "model.decoder.embed_tokens"),
}
LLAMA_LIKE = ("model.layers", "self_attn", "mlp", "mlp", "model.embed_tokens")


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def with_first(value: Any, tensor: torch.Tensor) -> Any:
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def hooked(module: Any, path: str, kind: str, change: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> Any:
    """The logits when ``change`` is applied by a plain hook, and what the hook saw."""
    seen: list[torch.Tensor] = []
    batch = ids.shape[0]

    def both(tensor: torch.Tensor) -> torch.Tensor:
        shaped = tensor.reshape(batch, -1, tensor.shape[-1])
        seen.append(shaped.clone())
        return change(shaped).reshape(tensor.shape)

    def before(m: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (both(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": both(kwargs["hidden_states"])}

    def after(m: Any, args: Any, output: Any) -> Any:
        return with_first(output, both(first(output)))

    target = module.get_submodule(path)
    if kind == "input":
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(after)
    try:
        logits = module(input_ids=ids).logits
    finally:
        handle.remove()
    return logits, seen[0]


def places(model_type: str, layer: int) -> list[tuple[str, str, str]]:
    layers, attention, mlp_first, mlp_last, _ = PATHS.get(model_type, LLAMA_LIKE)
    at = f"{layers}.{layer}"
    return [
        ("layers_input", at, "input"),
        ("attentions_input", f"{at}.{attention}", "input"),
        ("attentions_output", f"{at}.{attention}", "output"),
        ("mlps_input", f"{at}.{mlp_first}", "input"),
        ("mlps_output", f"{at}.{mlp_last}", "output"),
        ("layers_output", at, "output"),
    ]


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def doubled_last(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[:, -1] *= 2
    return tensor


@ROWS
@torch.no_grad()
def test_each_accessor_reads_what_a_hook_reads(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids = tiny_inputs()
    for layer in range(model.num_layers):
        with model.trace(ids):
            read = [getattr(model, name)[layer].clone().save() for name, _, _ in places(model_type, layer)]
            logits = model.logits.save()
        for value, (name, path, kind) in zip(read, places(model_type, layer), strict=True):
            expected_logits, expected = hooked(module, path, kind, unchanged, ids)
            assert torch.equal(value, expected), name
            assert torch.equal(logits, expected_logits)


@ROWS
@torch.no_grad()
def test_each_accessor_writes_what_a_hook_writes(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids = tiny_inputs()
    plain = module(input_ids=ids).logits
    layer = model.num_layers // 2
    for name, path, kind in places(model_type, layer):
        expected, _ = hooked(module, path, kind, doubled_last, ids)
        assert not torch.equal(expected, plain), f"{name}: the hook's own change does nothing"
        with model.trace(ids):
            getattr(model, name)[layer] = doubled_last(getattr(model, name)[layer].value)
            whole = model.logits.save()
        with model.trace(ids):
            getattr(model, name)[layer][:, -1] *= 2
            in_place = model.logits.save()
        assert torch.equal(whole, expected), name
        assert torch.equal(in_place, expected), name
    assert torch.equal(module(input_ids=ids).logits, plain)


@ROWS
@torch.no_grad()
def test_writing_back_what_was_read_changes_nothing(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids = tiny_inputs()
    with model.trace(ids):
        model.token_embeddings = model.token_embeddings
        for layer in range(model.num_layers):
            for name, _, _ in places(model_type, layer):
                accessor = getattr(model, name)
                accessor[layer] = accessor[layer]
        model.logits = model.logits
        logits = model.logits.save()
    assert torch.equal(logits, module(input_ids=ids).logits)


@ROWS
@torch.no_grad()
def test_embeddings_and_logits_are_read_and_set(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids = tiny_inputs()
    path = model._plan.embed[-1] if "word_embed_proj_dim" in overrides else PATHS.get(model_type, LLAMA_LIKE)[4]
    expected, embedded = hooked(module, path, "output", doubled_last, ids)
    with model.trace(ids):
        read = model.token_embeddings.clone().save()
        model.token_embeddings[:, -1] *= 2
        logits = model.logits.save()
        model.logits = 0
        zero = model.output.logits.save()
    assert torch.equal(read, embedded)
    assert torch.equal(logits, expected)
    assert zero.abs().sum() == 0
    with model.trace(ids):
        probabilities = model.next_token_probs.save()
    torch.testing.assert_close(probabilities.value, module(input_ids=ids).logits[:, -1].softmax(-1))


@ROWS
@torch.no_grad()
def test_a_padded_prompt_gives_what_it_gives_alone(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    long, short = tiny_inputs(1, 11)[0].tolist(), tiny_inputs(1, 4)[0].tolist()
    with model.trace([long, short]):
        hidden = model.layers_output[-1].save()
        logits = model.logits.save()
    for row, ids in enumerate((long, short)):
        alone = module(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits[row, -len(ids) :], alone, atol=2e-5, rtol=1e-4)
    assert hidden.shape == (2, 11, model.hidden_size)


@ROWS
@torch.no_grad()
def test_the_unembedding_of_the_last_layer_is_the_logits(model_type: str, overrides: dict[str, Any]) -> None:
    model = StandardizedTransformer(tiny_model(model_type, **overrides))
    with model.trace(tiny_inputs()):
        inside = model.project_on_vocab(model.layers_output[-1]).save()
        hidden = model.layers_output[-1].save()
        logits = model.logits.save()
    assert torch.equal(inside, logits)
    assert torch.equal(model.project_on_vocab(hidden), logits.value)


@ROWS
def test_gradients_flow_through_what_was_read(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids = tiny_inputs()
    with model.trace(ids):
        hidden = model.layers_output[0].save()
        loss = model.logits.square().sum().save()
    (ours,) = torch.autograd.grad(loss.value, hidden.value)
    kept: list[torch.Tensor] = []
    layer = module.get_submodule(model._plan.layers[0].path)
    handle = layer.register_forward_hook(lambda m, args, output: kept.append(first(output)))
    expected_loss = module(input_ids=ids).logits.square().sum()
    handle.remove()
    (expected,) = torch.autograd.grad(expected_loss, kept[0])
    assert torch.equal(ours, expected)


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer(tiny_model("llama"))


def test_a_layer_that_is_not_there_is_named_with_the_range(model: StandardizedTransformer) -> None:
    with model.trace([3, 4, 5]):
        with pytest.raises(LayerIndexError, match=r"layers_output\[3\] was asked for, but the model has 3 layers"):
            model.layers_output[3]
        with pytest.raises(LayerIndexError, match=r"Give 0 to 2, or -1 to -3"):
            model.mlps[-4]
        with pytest.raises(TypeError, match="number of a layer"):
            model.layers_output["1"]


def test_negative_indices_count_from_the_last_layer(model: StandardizedTransformer) -> None:
    with model.trace([3, 4, 5]):
        first_layer = model.layers_output[-3].save()
    with model.trace([3, 4, 5]):
        same = model.layers_output[0].save()
    assert torch.equal(first_layer, same)
    assert model.attentions[-1]._module is model.layers[2].self_attn._module


def test_a_value_of_another_shape_is_refused_before_it_reaches_the_model(model: StandardizedTransformer) -> None:
    with model.trace([3, 4, 5]):
        with pytest.raises(ShapeError, match=r"layers_output\[0\] was set to a value of shape \(64,\)"):
            model.layers_output[0] = torch.zeros(64)
        with pytest.raises(ShapeError, match="a str"):
            model.layers_output[0] = "zero"
        after = model.logits.save()
    assert torch.equal(after, model.trace([3, 4, 5], trace=False).logits)


def test_a_value_of_another_dtype_becomes_the_models_own(model: StandardizedTransformer) -> None:
    with model.trace([3, 4, 5]):
        model.layers_output[0] = torch.zeros(1, 3, 64, dtype=torch.float64)
        assert model.layers_output[0].dtype == torch.float32


def test_a_part_that_a_layer_has_not_says_so_by_name() -> None:
    model = StandardizedTransformer(tiny_model("llama"), rename_config=RenameConfig(ignore_mlp=True))
    with model.trace([3, 4, 5]), pytest.raises(MissingPartError, match=r"mlps_output\[1\] was asked for"):
        model.mlps_output[1]


def test_steps_and_modules_are_reached_under_standard_and_own_names() -> None:
    module = tiny_model("gpt2")
    model = StandardizedTransformer(module)
    for envoy in (model.layers[1], model.model.layers[1], model.transformer.h[1], model.get("layers.1")):
        assert envoy._module is module.transformer.h[1]
    assert model.layers[1].self_attn._module is module.transformer.h[1].attn
    assert model.embed_tokens._module is module.transformer.wte
    assert model.ln_final._module is module.transformer.ln_f
    assert model.lm_head._module is module.lm_head
    assert [each._module for each in model.mlps] == [block.mlp for block in module.transformer.h]
