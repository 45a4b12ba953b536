"""Direct logit attribution: what the parts add is the plain model's logit."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import CannotError, MissingPartError, UsageError
from nnterp.interventions import logit_attribution
from tests.families import tiny_model
from tests.matrix.models import MODEL_TYPES
from tests.matrix.models import tiny_model as matrix_model
from tests.nnterp.test_logit_lens import byte_tokenizer

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
    with pytest.raises(UsageError, match="'part' or 'layer'"):
        logit_attribution(model, "a", " Paris", by="token")
    with pytest.raises(UsageError, match="at least one"):
        logit_attribution(model, [], " Paris")
    with pytest.raises(UsageError, match="2 answers for 1 prompts"):
        logit_attribution(model, "a", [" Paris", " Rome"])
