"""Attribution patching against autograd by hand on the plain model, and against the patches that it estimates."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import UsageError
from nnterp.interventions import activation_patching, attribution_patching, logit_difference
from nnterp.interventions.sites import STREAMS
from tests.matrix.models import Case
from tests.nnterp import patching_oracle as oracle
from tests.nnterp.test_activation_patching import CLEAN, CORRUPTED, entropy, pair


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "jamba", "cohere", "falcon"])
def test_estimates_are_the_gradients_that_autograd_gives(family: str, steps: int | None) -> None:
    case = Case(family)
    clean, corrupted = pair(2, 5)
    result = attribution_patching(case.model, clean, corrupted, entropy, sites=STREAMS, steps=steps)
    embed = case.module.get_input_embeddings()
    with torch.no_grad():
        ends = embed(clean), embed(corrupted)
        before = entropy(oracle.run(case, corrupted, {}))
    starts = [None] if steps is None else [ends[1] + (k + 0.5) / steps * (ends[0] - ends[1]) for k in range(steps)]
    for kind in STREAMS:
        for layer in range(case.num_layers):
            at = oracle.place(case, kind, layer)
            if at is None:
                assert result.values[kind][:, layer].isnan().all()
                continue
            with torch.no_grad():
                change = oracle.read(case, clean, at) - oracle.read(case, corrupted, at)
            mean = sum(oracle.gradient(case, corrupted, at, entropy, start) for start in starts) / len(starts)
            expected = before[:, None] + (change * mean).sum(-1)
            assert torch.allclose(result.values[kind][:, layer], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_integrated_gradients_add_up_to_the_whole_change(family: str) -> None:
    """Completeness: along the way of the embeddings, the positions make up the metric's change."""
    case = Case(family)
    clean, corrupted = pair(2, 6)
    result = attribution_patching(case.model, clean, corrupted, entropy, "layers_input", [0], steps=64)
    found = (result.values["layers_input"][:, 0] - result.before[:, None]).sum(-1)
    assert torch.allclose(found, result.clean - result.before, atol=2e-3)


def test_a_small_change_is_estimated_as_patching_measures_it() -> None:
    """To first order the two agree, so the error falls with the square of the change."""
    case = Case("llama")
    ids, _ = pair(1, 5)
    embed = case.module.get_input_embeddings().weight
    with torch.no_grad():
        embed[7] = embed[6] + 1e-2 * embed[8]
    clean, corrupted = ids.clone(), ids.clone()
    clean[:, 2], corrupted[:, 2] = 7, 6
    wanted = {"sites": ["layers_output", "mlps_output"]}
    exact = activation_patching(case.model, clean, corrupted, double, **wanted)
    estimate = attribution_patching(case.model, clean, corrupted, double, **wanted)
    for kind in wanted["sites"]:
        assert exact.effect(kind).abs().max() > 1e-4
        assert torch.allclose(exact.effect(kind), estimate.effect(kind), atol=2e-5)


def double(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 11] - logits[:, -1, 12]


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_it_names_the_sites_that_patching_names(name: str, request: pytest.FixtureRequest) -> None:
    model: StandardizedTransformer = request.getfixturevalue(name)
    metric = logit_difference(model, " Mary", " John")
    exact = activation_patching(model, CLEAN, CORRUPTED, metric)
    estimate = attribution_patching(model, CLEAN, CORRUPTED, metric, steps=16)
    for kind in exact.values:
        pairs = torch.stack([exact.effect(kind).flatten(), estimate.effect(kind).flatten()])
        assert torch.corrcoef(pairs)[0, 1] > 0.85
        assert exact.effect(kind).argmax() == estimate.effect(kind).argmax() or kind == "layers_output"


def test_the_gradients_of_the_parameters_stay_as_they_are(demo_gpt2: StandardizedTransformer) -> None:
    metric = logit_difference(demo_gpt2, " Mary", " John")
    with torch.no_grad():
        found = attribution_patching(demo_gpt2, CLEAN, CORRUPTED, metric, "mlps_output", layers=[1, 2], steps=2)
    assert not found["mlps_output"].requires_grad
    assert all(parameter.grad is None for parameter in demo_gpt2._module.parameters())


def test_frozen_parameters_are_no_hindrance() -> None:
    case = Case("llama")
    clean, corrupted = pair(1, 5)
    usual = attribution_patching(case.model, clean, corrupted, entropy)
    case.module.requires_grad_(False)
    frozen = attribution_patching(case.model, clean, corrupted, entropy)
    for kind in usual.values:
        assert torch.equal(usual[kind], frozen[kind])


def test_positions_and_layers_of_choice() -> None:
    case = Case("gpt2")
    clean, corrupted = pair(1, 6)
    whole = attribution_patching(case.model, clean, corrupted, entropy, "layers_output")
    part = attribution_patching(
        case.model, clean, corrupted, entropy, "layers_output", [2, 1], [-1, 3], each_position=False
    )
    expected = whole.effect("layers_output")[1:, [3, 5]].sum(-1)
    assert part.axes["layers_output"] == ("layer",)
    assert torch.allclose(part.effect("layers_output"), expected, atol=1e-6)


def test_what_has_no_gradient_says_so(demo_gpt2: StandardizedTransformer) -> None:
    with pytest.raises(UsageError, match="has no gradient"):
        attribution_patching(demo_gpt2, CLEAN, CORRUPTED, lambda logits: logits[:, -1].argmax(-1).float())
    with pytest.raises(UsageError, match="steps=0"):
        attribution_patching(demo_gpt2, CLEAN, CORRUPTED, entropy, steps=0)
