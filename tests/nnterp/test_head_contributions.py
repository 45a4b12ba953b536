"""What each head adds, against plain hooks on the output projection of the unwrapped model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from nnterp import StandardizedTransformer
from nnterp.architectures import specs_folder
from nnterp.errors import CannotError, MissingPartError, ShapeError
from nnterp.head_contributions import ClosedProjectionError, contributions_of
from tests.matrix.models import Case, tiny_model

PROMPTS = ["The Eiffel Tower is in the city", "The"]
IDS = torch.arange(5, 17).reshape(2, 6)


def _projection(model: StandardizedTransformer, layer: int) -> torch.nn.Module:
    attention = model.attentions[layer]._module
    found: torch.nn.Module = attention.get_submodule("o_proj" if hasattr(attention, "o_proj") else "c_proj")
    return found


def _weight(projection: torch.nn.Module) -> torch.Tensor:
    weight = projection.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach() if isinstance(projection, torch.nn.Linear) else weight.detach().T


@pytest.mark.parametrize("name", ["demo-llama", "demo-gpt2"])
def test_a_padded_batch_gives_what_hooks_give(name: str) -> None:
    model = StandardizedTransformer(name)
    came: list[torch.Tensor] = []
    with torch.no_grad(), model.trace(PROMPTS):
        ids, mask = model.input_ids, model.attention_mask
        seen = model.heads_contribution[1].save()
    projection = _projection(model, 1)
    handle = projection.register_forward_pre_hook(lambda _, args: came.append(args[0].detach()))
    with torch.no_grad():
        model._module(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0))
    handle.remove()
    shares, columns = came[0].chunk(model.num_heads, -1), _weight(projection).chunk(model.num_heads, 1)
    real = mask.bool()
    for head, (share, column) in enumerate(zip(shares, columns, strict=True)):
        assert (seen[:, head] - linear(share, column))[real].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["demo-llama", "demo-gpt2"])
def test_a_head_that_is_set_to_zero_is_a_head_whose_output_is_zero(name: str) -> None:
    model = StandardizedTransformer(name)
    with torch.no_grad(), model.trace(PROMPTS):
        model.heads_output[1][:, 2] = 0
        expected = model.logits.save()
    with torch.no_grad(), model.trace(PROMPTS):
        model.heads_contribution[1][:, 2] = 0
        logits, mask = model.logits.save(), model.attention_mask
    assert (logits - expected)[mask.bool()].abs().max() < 1e-4


def test_every_step_of_a_generation_has_its_own() -> None:
    model = StandardizedTransformer("demo-llama")
    prompt, lengths = "The Eiffel Tower", []
    with model.generate(prompt, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            model.heads_contribution[1][:, 0] = 0
            lengths.append(model.heads_contribution[1].shape[2])
        tokens = model.generator.output.save()

    projection, width = _projection(model, 1), model.head_dim

    def ablate(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (given,) = args
        given = given.clone()
        given[..., :width] = 0
        return (given,)

    handle = projection.register_forward_pre_hook(ablate)
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    truth = model._module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    handle.remove()
    assert lengths == [ids.shape[1], 1, 1]
    assert tokens.tolist() == truth.tolist()


def test_each_invoke_ablates_its_own_head() -> None:
    model = StandardizedTransformer("demo-gpt2")
    alone = []
    for head, prompt in enumerate(PROMPTS):
        with torch.no_grad(), model.trace(prompt):
            model.heads_contribution[2][:, head] = 0
            alone.append(model.logits[:, -1].save())
    with torch.no_grad(), model.trace() as tracer:
        together = []
        for head, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                model.heads_contribution[2][:, head] = 0
                together.append(model.logits[:, -1].save())
    assert tracer.forward_passes == 1
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_gradients_of_all_heads_are_that_of_their_sum() -> None:
    model = StandardizedTransformer("demo-llama")
    model._module.requires_grad_(False)
    embeddings = model._module.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    with model.trace(PROMPTS[0]):
        heads = model.heads_contribution[1].grad.save()
        attention = model.attentions_output[1].grad.save()
        model.logits.square().sum().backward()
    with_heads = embeddings.weight.grad
    embeddings.weight.grad = None
    with model.trace(PROMPTS[0]):
        model.logits.square().sum().backward()
    assert torch.equal(heads, attention[:, None].expand_as(heads)) and attention.any()
    assert torch.allclose(with_heads, embeddings.weight.grad, rtol=1e-4, atol=1e-4 * float(with_heads.abs().max()))


@torch.no_grad()
def test_a_gate_is_part_of_what_a_head_adds() -> None:
    """Qwen3-Next multiplies what each head gives by a gate before the output projection."""
    model = StandardizedTransformer(tiny_model("qwen3_next"))
    layer = next(each for each in range(model.num_layers) if model.heads_contribution.has(each))
    attention = model.attentions[layer]._module
    with model.trace(IDS):
        hidden = model.attentions_input[layer].save()
        heads, added = model.heads_output[layer].save(), model.heads_contribution[layer].save()
    both = attention.q_proj(hidden.value).unflatten(-1, (model.num_heads, 2 * model.head_dim))
    gate = both[..., model.head_dim :].transpose(1, 2).sigmoid()
    columns = attention.o_proj.weight.unflatten(-1, (model.num_heads, -1)).transpose(0, 1)
    expected = (heads * gate) @ columns.transpose(1, 2)
    assert (added - expected).abs().max() < 1e-5
    assert (added - heads.value @ columns.transpose(1, 2)).abs().max() > 1e-3


@torch.no_grad()
def test_a_norm_after_the_attention_is_not() -> None:
    """Gemma 2 norms what the attention gives before it is added to the stream."""
    model = StandardizedTransformer(tiny_model("gemma2"))
    with model.trace(IDS):
        heads = model.heads_contribution[1].save()
        output = model.attentions_output[1].save()
        added = model.attentions_contribution[1].save()
    assert torch.allclose(heads.sum(1), output.value, atol=1e-5)
    assert torch.allclose(model.layers[1]._module.post_attention_layernorm(heads.sum(1)), added.value, atol=1e-4)


class LowRank(torch.nn.Module):
    """A linear map with an adapter beside it, as LoRA puts one."""

    def __init__(self, base: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = torch.nn.Linear(size, 3, bias=False), torch.nn.Linear(3, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x) + self.up(self.down(x))
        return result


class Squared(LowRank):
    """No linear map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square()


@torch.no_grad()
def test_an_adapter_is_part_of_the_projection() -> None:
    module = tiny_model("phi")
    module.model.layers[1].self_attn.dense = LowRank(module.model.layers[1].self_attn.dense, 64)
    model = StandardizedTransformer(module)
    with model.trace(IDS):
        heads = model.heads_contribution[1].save()
        output = model.attentions_output[1].save()
    dense = module.model.layers[1].self_attn.dense
    assert torch.allclose(heads.sum(1) + dense.base_layer.bias, output.value, atol=1e-5)
    whole = dense.base_layer.weight + dense.up.weight @ dense.down.weight
    came: list[torch.Tensor] = []
    handle = dense.register_forward_pre_hook(lambda _, args: came.append(args[0]))
    module(IDS)
    handle.remove()
    assert torch.allclose(heads[:, 2], linear(came[0][..., 32:48], whole[:, 32:48]), atol=1e-5)


def test_half_precision_adds_up_to_its_own_rounding() -> None:
    model = StandardizedTransformer(tiny_model("llama").bfloat16())
    with torch.no_grad(), model.trace(IDS):
        heads = model.heads_contribution[1].save()
        output = model.attentions_output[1].save()
    assert heads.dtype is torch.bfloat16
    assert (heads.sum(1) - output).abs().max() < 0.02 * output.abs().max()


@torch.no_grad()
def test_a_projection_that_is_not_linear_says_so() -> None:
    module = tiny_model("llama")
    module.model.layers[1].self_attn.o_proj = Squared(module.model.layers[1].self_attn.o_proj, 64)
    model = StandardizedTransformer(module)
    with pytest.raises(ClosedProjectionError, match="Squared is no linear map"), model.trace(IDS):
        model.heads_contribution[1].save()
    with model.trace(IDS):
        assert model.heads_contribution[0].shape == (2, 4, 6, 64)


def test_heads_that_do_not_divide_what_comes_are_no_heads() -> None:
    given = torch.ones(1, 2, 6)
    with pytest.raises(ValueError, match="4 heads do not divide the 6 entries"):
        contributions_of(torch.nn.Linear(6, 3), given, given, 4)


@torch.no_grad()
def test_a_module_that_only_has_the_name_is_not_believed() -> None:
    module = tiny_model("llama")
    attention = module.model.layers[1].self_attn
    plain = attention.forward

    def twice(*args: object, **kwargs: object) -> object:
        output, *rest = plain(*args, **kwargs)
        return (output * 2, *rest)

    attention.forward = twice
    model = StandardizedTransformer(module)
    with pytest.raises(ClosedProjectionError, match=r"o_proj does not give what the attention gives: the numbers"):
        with model.trace(IDS):
            model.heads_contribution[1].save()


@torch.no_grad()
def test_a_specification_may_name_the_projection_or_say_that_there_is_none(tmp_path: Path) -> None:
    text = (specs_folder() / "llama.yaml").read_text(encoding="utf-8")
    line = "attention: {module: self_attn, norm: input_layernorm}"
    assert text.count(line) == 1
    path = tmp_path / "llama.yaml"
    path.write_text(text.replace(line, f"{line[:-1]}, projection: null}}"), encoding="utf-8")
    model = StandardizedTransformer(tiny_model("llama"), spec=path)
    with pytest.raises(ClosedProjectionError, match="no module of the attention is known"), model.trace(IDS):
        model.heads_contribution[1].save()


@pytest.mark.parametrize("model_type", ["jetmoe", "xlnet", "diffllama"])
def test_families_whose_heads_cannot_be_told_apart_say_why(model_type: str) -> None:
    case = Case(model_type)
    with pytest.raises(CannotError) as refused, case.model.trace(case.ids):
        case.model.heads_contribution[0].save()
    assert case.spec.cannot["heads_contribution"] in str(refused.value)


def test_a_layer_without_attention_and_a_wrong_shape_say_so() -> None:
    model = Case("jamba").model
    without = next(layer for layer in range(model.num_layers) if not model.heads_contribution.has(layer))
    with pytest.raises(MissingPartError), model.trace(IDS):
        model.heads_contribution[without].save()
    llama = StandardizedTransformer(tiny_model("llama"))
    with pytest.raises(ShapeError, match=r"\(2, 6, 64\)"), llama.trace(IDS):
        llama.heads_contribution[0] = torch.zeros(2, 6, 64)
