"""Direct logit attribution: what the parts add is the plain model's logit."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import CannotError, MissingPartError, UsageError
from nnterp.interventions import logit_attribution
from nnterp.interventions.logit_attribution import WAYS
from tests.families import tiny_model
from tests.matrix.models import MODEL_TYPES
from tests.matrix.models import tiny_model as matrix_model
from tests.small_tokenizers import byte_tokenizer

PROMPTS = ["some text", "short", "and one more text"]
#: Sequential, parallel, sandwich norms, biases, multipliers, no attention in some layers, capped logits.
FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "opt", "granite", "falcon_h1", "jamba", "cohere", "phi")


def plain_logits(model: StandardizedTransformer, prompt: str) -> torch.Tensor:
    """What the unembedding gives at the last position of a prompt that runs alone, (vocab)."""
    kept = []
    plain = model._module
    handle = plain.get_output_embeddings().register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        plain(model.tokenizer(prompt, return_tensors="pt").input_ids)
    handle.remove()
    return kept[0][0, -1]


@pytest.mark.parametrize("by", ["part", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_sum_to_the_logit(family: str, by: str) -> None:
    model = StandardizedTransformer(tiny_model(family), tokenizer=byte_tokenizer())
    found = logit_attribution(model, PROMPTS, [7, 8, 9], by=by, batch_size=2)
    assert found.scores.shape == (len(found.names), 3)
    multiplier = model._spec.logits.multiplier
    factor = multiplier.value(model.config) if multiplier else 1
    for column, (prompt, token) in enumerate(zip(PROMPTS, (7, 8, 9), strict=True)):
        assert float(found.logits[column] - factor * plain_logits(model, prompt)[token]) == pytest.approx(0, abs=1e-4)


#: The stream is multiplied by vectors, weighted by depth, shifted, or multiplied after the last part.
SCALED = ("doge", "beam", "zaya", "gemma4_text", "gpt_neox_japanese")


@pytest.mark.parametrize("family", [name for name in SCALED if name in MODEL_TYPES])
def test_parts_of_a_stream_that_is_itself_scaled_sum_to_the_logit(family: str) -> None:
    model = StandardizedTransformer(matrix_model(family), tokenizer=byte_tokenizer())
    found = logit_attribution(model, PROMPTS[0], 7)
    assert float(found.logits[0] - plain_logits(model, PROMPTS[0])[7]) == pytest.approx(0, abs=1e-4)
    assert ("bias before mlp 0" in found.names) == (family == "zaya")
    by_head = logit_attribution(model, PROMPTS[0], 7, by="head")
    for layer, rows in by_head.units.items():
        heads = by_head.scores[rows.start : rows.stop + 1].sum()
        assert float(heads - found.scores[found.names.index(f"attention {layer}"), 0]) == pytest.approx(0, abs=1e-5)
    assert float(found.scores.abs().max()) > 1e-3 and not found.scores.requires_grad


@torch.no_grad()
def test_one_part_adds_what_is_lost_without_it_under_the_same_norm() -> None:
    model = StandardizedTransformer("demo-llama")
    prompt, answer, other = "The Eiffel Tower is in the city of", " Paris", " Rome"
    found = logit_attribution(model, prompt, answer, against=other)
    ids = [model.tokenizer.encode(each)[0] for each in (answer, other)]
    plain, kept = model._module, {}
    layer = plain.model.layers[-1].mlp
    handles = [
        layer.register_forward_hook(lambda _, __, output: kept.update(mlp=output[0, -1])),
        plain.model.norm.register_forward_hook(lambda _, args, output: kept.update(into=args[0][0, -1])),
    ]
    with torch.no_grad():
        logits = plain(model.tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
    for handle in handles:
        handle.remove()
    scale = (kept["into"].square().mean() + plain.model.norm.variance_epsilon).sqrt()
    direction = (plain.lm_head.weight[ids[0]] - plain.lm_head.weight[ids[1]]) * plain.model.norm.weight
    expected = float(kept["mlp"] @ direction / scale)
    assert float(found.scores[found.names.index(f"mlp {model.num_layers - 1}"), 0]) == pytest.approx(expected, abs=1e-4)
    assert float(found.logits[0]) == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), abs=1e-4)


@torch.no_grad()
def paris_against_rome(
    model: StandardizedTransformer, prompt: str, matrices: list[torch.nn.Module]
) -> tuple[list[torch.Tensor], torch.Tensor, float]:
    """By hooks on the plain model: what each matrix takes, the direction to the logits, and their difference."""
    plain, taken, ids = model._module, [], [model.tokenizer.encode(city)[0] for city in (" Paris", " Rome")]
    norm = plain.transformer.ln_f if hasattr(plain, "transformer") else plain.model.norm
    handles = [
        each.register_forward_pre_hook(lambda _, given: taken.append(given[0][0, -1])) for each in [*matrices, norm]
    ]
    logits = plain(model.tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
    for handle in handles:
        handle.remove()
    *inside, end = taken
    direction = (plain.lm_head.weight[ids[0]] - plain.lm_head.weight[ids[1]]) * norm.weight
    if isinstance(norm, torch.nn.LayerNorm):
        direction = (direction - direction.mean()) / (end.var(unbiased=False) + norm.eps).sqrt()
    else:
        direction = direction / (end.square().mean() + norm.variance_epsilon).sqrt()
    return inside, direction, float(logits[ids[0]] - logits[ids[1]])


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_a_neuron_adds_its_activation_times_its_row(name: str, request: pytest.FixtureRequest) -> None:
    model: StandardizedTransformer = request.getfixturevalue(name)
    prompts = ["The Eiffel Tower is in the city of", "Paris and"]
    found = logit_attribution(model, prompts, " Paris", against=" Rome", by="neuron")
    mlps = [layer.mlp._module for layer in model.layers]
    rows = [each.c_proj.weight if name == "demo_gpt2" else each.down_proj.weight.T for each in mlps]
    matrices = [each.c_proj if name == "demo_gpt2" else each.down_proj for each in mlps]
    by_layer = found.by_layer()
    assert by_layer.shape == (model.num_layers, rows[0].shape[0], 2) and not by_layer.isnan().any()
    for column, prompt in enumerate(prompts):
        inside, direction, difference = paris_against_rome(model, prompt, matrices)
        for layer, neurons in enumerate(inside):
            assert torch.allclose(by_layer[layer, :, column], neurons * (rows[layer] @ direction), atol=1e-5)
        assert float(found.logits[column]) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_a_head_adds_what_its_columns_of_the_projection_make_of_it(name: str, request: pytest.FixtureRequest) -> None:
    model: StandardizedTransformer = request.getfixturevalue(name)
    prompt = "The Eiffel Tower is in the city of"
    found = logit_attribution(model, prompt, " Paris", against=" Rome", by="head")
    attentions = [layer.self_attn._module for layer in model.layers]
    matrices = [each.c_proj if name == "demo_gpt2" else each.o_proj for each in attentions]
    inside, direction, difference = paris_against_rome(model, prompt, matrices)
    by_layer = found.by_layer()
    assert by_layer.shape == (model.num_layers, model.num_heads, 1)
    for layer, matrix in enumerate(matrices):
        columns = (matrix.weight.T if name == "demo_gpt2" else matrix.weight).unflatten(1, (model.num_heads, -1))
        expected = torch.einsum("ohd,hd,o->h", columns, inside[layer].unflatten(0, (model.num_heads, -1)), direction)
        assert torch.allclose(by_layer[layer, :, 0], expected, atol=1e-5)
    assert found.names[1:3] == ("attention 0 head 0", "attention 0 head 1") and "attention 0 bias" in found.names
    assert float(found.logits[0]) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "opt", "granite", "falcon_h1", "minicpm3", "codegen"])
@pytest.mark.parametrize("by", ["head", "neuron"])
def test_heads_or_neurons_and_biases_sum_to_the_logit(by: str, family: str) -> None:
    """One matrix or several, norms and multipliers after it, and a part that is no module of its own."""
    model = StandardizedTransformer(tiny_model(family), tokenizer=byte_tokenizer())
    found, part = logit_attribution(model, PROMPTS, [7, 8, 9], by=by, batch_size=2), WAYS[by]
    whole = logit_attribution(model, PROMPTS, [7, 8, 9])
    for layer in range(model.num_layers):
        rows = found.units[layer]
        assert found.names[rows.start] == f"{part} {layer} {by} 0" and found.names[rows.stop] == f"{part} {layer} bias"
        total = found.scores[rows.start : rows.stop + 1].sum(0)
        assert torch.allclose(total, whole.scores[whole.names.index(f"{part} {layer}")], atol=1e-5)
    for column, (prompt, token) in enumerate(zip(PROMPTS, (7, 8, 9), strict=True)):
        with torch.no_grad():
            ids = model.tokenizer(prompt, return_tensors="pt").input_ids
            logits = model._module(input_ids=ids).logits[0, -1]
        if family != "gemma2":  # its logits are capped
            assert float(found.logits[column] - logits[token]) == pytest.approx(0, abs=1e-4)


def test_experts_have_no_neurons_of_their_own() -> None:
    mixtral = StandardizedTransformer(tiny_model("mixtral"), tokenizer=byte_tokenizer())
    with pytest.raises(CannotError, match="in layer 0 the MLP is made of experts"):
        logit_attribution(mixtral, "some text", 7, by="neuron")
    mamba = StandardizedTransformer(tiny_model("mamba"), tokenizer=byte_tokenizer())
    with pytest.raises(MissingPartError, match="mlps_output"):
        logit_attribution(mamba, "some text", 7, by="neuron")
    with pytest.raises(MissingPartError, match="attentions_output"):
        logit_attribution(mamba, "some text", 7, by="head")


def test_contributions_are_what_the_layer_adds() -> None:
    """In Gemma 2 what a part gives goes through a norm first; in Granite it is multiplied."""
    for family in ("gemma2", "granite", "gpt2"):
        model = StandardizedTransformer(tiny_model(family), tokenizer=byte_tokenizer())
        with torch.no_grad(), model.trace("some text"):
            before = model.layers_input[1].clone().save()
            attention = model.attentions_contribution[1].clone().save()
            mlp = model.mlps_contribution[1].clone().save()
            after = model.layers_output[1].save()
        assert torch.allclose(before + attention + mlp, after.value, atol=1e-5)
        with torch.no_grad(), model.trace("some text"):
            model.mlps_contribution[1] = 0
            half = model.layers_output[1].save()
        assert torch.allclose(half.value, before + attention, atol=1e-5)


def test_what_is_no_sum_says_so() -> None:
    bert = StandardizedTransformer(tiny_model("bert", is_decoder=True), tokenizer=byte_tokenizer())
    with pytest.raises(CannotError):
        logit_attribution(bert, "some text", 7)
    streams = StandardizedTransformer(tiny_model("hy_v4"), tokenizer=byte_tokenizer())
    with pytest.raises(CannotError, match="residual stream is of shape"):
        logit_attribution(streams, "some text", 7, by="layer")
    mamba = StandardizedTransformer(tiny_model("mamba"), tokenizer=byte_tokenizer())
    with pytest.raises(MissingPartError, match="attentions_contribution"), mamba.trace("some text"):
        mamba.attentions_contribution[0]


def test_mistakes_are_named() -> None:
    model = StandardizedTransformer("demo-gpt2")
    with pytest.raises(UsageError, match="not by head or neuron"):
        logit_attribution(model, "a", " Paris", by="layer").by_layer()
    with pytest.raises(UsageError, match="one of 'part', 'layer', 'head', 'neuron'"):
        logit_attribution(model, "a", " Paris", by="token")
    with pytest.raises(UsageError, match="at least one"):
        logit_attribution(model, [], " Paris")
    with pytest.raises(UsageError, match="2 answers for 1 prompts"):
        logit_attribution(model, "a", [" Paris", " Rome"])
