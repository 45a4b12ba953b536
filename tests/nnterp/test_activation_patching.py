"""Activation patching against one plain hook and one pass for each site, and the indirect-object circuit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_core.input_errors import EmptyPromptError
from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError, MissingPartError, PositionError, PromptPairError, UsageError
from nnterp.interventions import (
    activation_patching,
    attribution_patching,
    gradient_x_input,
    integrated_gradients,
    logit_difference,
    path_patching,
)
from nnterp.interventions.sites import STREAMS
from tests.matrix.models import Case, tiny_model
from tests.nnterp import patching_oracle as oracle

CLEAN = "John and Mary went to the store. John handed the milk to"
CORRUPTED = "John and Mary went to the store. Mary handed the milk to"


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """A metric that looks at all of the prediction."""
    last = logits[:, -1].log_softmax(-1)
    return -(last.exp() * last).sum(-1)


def pair(prompts: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    clean = torch.randint(5, 320, (prompts, positions), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 1:-2] = torch.randint(5, 320, (prompts, positions - 3), generator=generator)
    return clean, corrupted


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "jamba", "mixtral"])
def test_every_site_is_what_one_hook_in_a_pass_of_its_own_gives(family: str) -> None:
    case = Case(family)
    clean, corrupted = pair(2, 5)
    result = activation_patching(case.model, clean, corrupted, entropy, sites=STREAMS, batch_size=7)
    with torch.no_grad():
        assert torch.allclose(result.clean, entropy(oracle.run(case, clean, {})), atol=1e-5)
        assert torch.allclose(result.corrupted, entropy(oracle.run(case, corrupted, {})), atol=1e-5)
        for kind in STREAMS:
            assert result.axes[kind] == ("layer", "position")
            assert result.values[kind].shape == (2, case.num_layers, 5)
            for layer in range(case.num_layers):
                at = oracle.place(case, kind, layer)
                if at is None:
                    assert result.values[kind][:, layer].isnan().all()
                    continue
                source = oracle.read(case, clean, at).view(2, 5, -1)
                for position in range(5):
                    expected = entropy(oracle.run(case, corrupted, {at: oracle.put(source, position)}))
                    assert torch.allclose(result.values[kind][:, layer, position], expected, atol=1e-5)


def test_positions_together_and_a_part_of_the_layers() -> None:
    case = Case("llama")
    clean, corrupted = pair(1, 6)
    result = activation_patching(
        case.model, clean[0], corrupted[0], entropy, "mlps_output", [-1, 0], [-2, 1], each_position=False
    )
    assert result.layers == (0, case.num_layers - 1) and result.positions == (1, 4)
    assert result.axes["mlps_output"] == ("layer",)
    with torch.no_grad():
        for row, layer in enumerate(result.layers):
            at = oracle.place(case, "mlps_output", layer)
            source = oracle.read(case, clean, at)
            expected = entropy(oracle.run(case, corrupted, {at: oracle.put(source, [1, 4])}))
            assert torch.allclose(result["mlps_output"][row], expected[0], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_the_size_of_a_batch_changes_no_number(demo_llama: StandardizedTransformer, batch_size: int) -> None:
    metric = logit_difference(demo_llama, " Mary", " John")
    found = activation_patching(demo_llama, CLEAN, CORRUPTED, metric, "attentions_output", batch_size=batch_size)
    usual = activation_patching(demo_llama, CLEAN, CORRUPTED, metric, "attentions_output")
    assert torch.allclose(found["attentions_output"], usual["attentions_output"], atol=1e-4)


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_the_indirect_object_circuit_is_where_an_exhaustive_sweep_finds_it(
    name: str, request: pytest.FixtureRequest
) -> None:
    model: StandardizedTransformer = request.getfixturevalue(name)
    metric = logit_difference(model, " Mary", " John")
    result = activation_patching(model, CLEAN, CORRUPTED, metric)
    ids = [model.tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPTED)]
    plain = model._module
    layers = plain.transformer.h if name == "demo_gpt2" else plain.model.layers
    mary, john = model.tokenizer.encode(" Mary")[0], model.tokenizer.encode(" John")[0]
    with torch.no_grad():
        states = plain(ids[0], output_hidden_states=True).hidden_states
        sweep = torch.empty(len(layers), ids[0].shape[1])
        for layer, module in enumerate(layers[:-1]):
            for position in range(ids[0].shape[1]):
                handle = module.register_forward_hook(_patch(states[layer + 1], position))
                logits = plain(ids[1]).logits[0, -1]
                handle.remove()
                sweep[layer, position] = logits[mary] - logits[john]
    assert torch.allclose(result["layers_output"][:-1], sweep[:-1], atol=1e-4)
    # What the circuit is known for: the second name carries it at first, the last position at the end, nothing else.
    recovered = result.recovered("layers_output")
    subject = result.tokens.index(" Mary", 3)
    assert recovered[0, subject] > 0.9 and recovered[-1, -1] > 0.99
    assert recovered[:, :subject].abs().max() < 0.01
    # One by one, the positions of a layer make up what was lost, roughly; and a middle layer may share it out.
    assert (recovered.sum(1) > 0.8).all()
    assert result.recovered("attentions_output")[3:, -1].sum() > 0.5


def _patch(source: torch.Tensor, position: int) -> Any:
    def hook(_: object, __: object, output: object) -> object:
        value = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        value[:, position] = source[:, position]
        return value if isinstance(output, torch.Tensor) else (value, *output[1:])

    return hook


def test_gradients_are_not_kept_and_the_model_stays_as_it_was(demo_gpt2: StandardizedTransformer) -> None:
    result = activation_patching(demo_gpt2, CLEAN, CORRUPTED, entropy, "layers_input", layers=[0, 1])
    assert not result["layers_input"].requires_grad
    assert all(parameter.grad is None for parameter in demo_gpt2._module.parameters())


def test_what_cannot_be_is_an_error_that_says_why(demo_gpt2: StandardizedTransformer) -> None:
    def patched(clean=CLEAN, corrupted=CORRUPTED, metric=entropy, **options):
        return activation_patching(demo_gpt2, clean, corrupted, metric, **options)

    with pytest.raises(PromptPairError, match="The clean prompt has 13 tokens, the corrupted one 12") as caught:
        patched(corrupted="John and Mary went to the store. handed the milk to")
    assert "' handed'" in str(caught.value)
    with pytest.raises(PromptPairError, match="There are 2 clean and 1 corrupted"):
        patched(clean=[CLEAN, CLEAN])
    with pytest.raises(PromptPairError, match=r"The prompts have \[13, 1\] tokens"):
        patched(clean=[CLEAN, "John"])
    with pytest.raises(EmptyPromptError):
        patched(clean="", corrupted="")
    with pytest.raises(UsageError, match=r"There are no sites 'layer_output'\. Did you mean 'layers_output'"):
        patched(sites="layer_output")
    with pytest.raises(UsageError, match="at least one kind of sites, and each once"):
        patched(sites=["layers_output", "layers_output"])
    with pytest.raises(LayerIndexError):
        patched(layers=[6])
    with pytest.raises(PositionError, match="Position 13 is not there: the prompts have 13 tokens"):
        patched(positions=[13])
    with pytest.raises(UsageError, match="batch_size=0"):
        patched(batch_size=0)
    with pytest.raises(UsageError, match=r"(?s)tensor of shape \(1, 1634\) .*one number for each prompt"):
        patched(metric=lambda logits: logits[:, -1])
    with pytest.raises(UsageError, match="nothing was lost"):
        patched(corrupted=CLEAN, layers=[0]).recovered("layers_output")
    with pytest.raises(UsageError, match="has no sites 'mlps_input'; it has layers_output"):
        patched(layers=[0], sites="layers_output")["mlps_input"]


def test_a_model_without_such_a_part_says_so() -> None:
    case = Case("mamba")
    clean, corrupted = pair(1, 5)
    with pytest.raises(MissingPartError, match="attentions_output"):
        activation_patching(case.model, clean, corrupted, entropy, "attentions_output")
    found = activation_patching(case.model, clean, corrupted, entropy, "mixers_output")
    assert not found["mixers_output"].isnan().any()


@pytest.mark.parametrize("method", [activation_patching, attribution_patching, path_patching])
def test_a_model_whose_passes_differ_is_refused(method: Any) -> None:
    noisy = StandardizedTransformer(tiny_model("gpt2", resid_pdrop=0.3))
    # The attention's own dropout is no module, but an argument of a function.
    inside = StandardizedTransformer(tiny_model("llama", attention_dropout=0.3))
    still = StandardizedTransformer(tiny_model("llama"))
    ids = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 9, 5, 6]])
    for model in (noisy, inside, still):
        model._module.train()
    for model in (noisy, inside):
        with pytest.raises(UsageError, match=r"training mode.*model\.eval\(\) first"):
            method(model, *ids, lambda logits: logits[:, -1, 7], "attentions_output")
        assert model._module.training
        model.eval()
        assert not model._module.training
    for model in (noisy, inside, still):
        result = method(model, *ids, lambda logits: logits[:, -1, 7], "attentions_output")
        assert result["attentions_output"].isfinite().all()


@pytest.mark.parametrize("method", [activation_patching, attribution_patching, path_patching])
def test_one_layer_and_one_position_need_no_list(demo_gpt2: StandardizedTransformer, method: Any) -> None:
    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 7]

    ids = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 9, 5, 6]])
    one = method(demo_gpt2, *ids, metric, "mlps_output", layers=-2, positions=1)
    several = method(demo_gpt2, *ids, metric, "mlps_output", layers=[-2], positions=[1])
    assert torch.equal(one["mlps_output"], several["mlps_output"]) and one["mlps_output"].shape == (1, 1)
    assert (one.layers, one.positions) == ((demo_gpt2.num_layers - 2,), (1,))


def test_a_metric_that_leaves_torch_is_called_by_its_type(demo_gpt2: StandardizedTransformer) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    with pytest.raises(UsageError, match="The metric gave a ndarray for logits"):
        activation_patching(demo_gpt2, ids, ids, lambda logits: logits[:, -1, 7].numpy())


def test_no_gradients_inside_inference_mode(demo_gpt2: StandardizedTransformer) -> None:
    ids = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 9, 5, 6]])
    calls = (
        lambda: attribution_patching(demo_gpt2, *ids, lambda logits: logits[:, -1, 7]),
        lambda: gradient_x_input(demo_gpt2, "Paris is"),
        lambda: integrated_gradients(demo_gpt2, "Paris is"),
    )
    for call in calls:
        with torch.inference_mode(), pytest.raises(UsageError, match=r"inside torch\.inference_mode"):
            call()
