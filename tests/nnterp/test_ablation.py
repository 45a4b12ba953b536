"""Ablation against one plain hook for each site."""

from __future__ import annotations

import pytest
import torch

from nnterp.errors import PromptPairError, UsageError
from nnterp.interventions import ablation
from tests.matrix.models import Case
from tests.nnterp import patching_oracle as oracle
from tests.nnterp.test_activation_patching import entropy, pair

KINDS = ("attentions_output", "mlps_output", "layers_output")


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "jamba"])
def test_ablated_layers_are_as_with_a_hook(family: str, method: str) -> None:
    case = Case(family)
    ids, _ = pair(2, 5)
    others = torch.randint(5, 320, (4, 5))
    reference = None if method == "zero" else others
    result = ablation(case.model, ids, entropy, KINDS, method, reference, seed=3)
    drawn = torch.randint(4, (2,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for kind in KINDS:
            for layer in range(case.num_layers):
                at = oracle.place(case, kind, layer)
                if at is None:
                    assert result.values[kind][:, layer].isnan().all()
                    continue
                seen = oracle.read(case, others, at)
                value = {
                    "zero": torch.zeros(2, 5, seen.shape[-1]),
                    "mean": seen.mean((0, 1)).expand(2, 5, -1),
                    "resample": seen[drawn],
                }[method]
                expected = entropy(oracle.run(case, ids, {at: oracle.put(value)}))
                assert torch.allclose(result.values[kind][:, layer], expected, atol=1e-5)


def test_the_mean_counts_every_token_once_whatever_the_lengths() -> None:
    case = Case("llama")
    ids, _ = pair(1, 6)
    reference = [[5, 6, 7], [8], [9, 10, 11, 12]]
    result = ablation(case.model, ids, entropy, "mlps_output", "mean", reference, [1], [2], each_position=True)
    assert result.axes["mlps_output"] == ("layer", "position") and result["mlps_output"].shape == (1, 1)
    at = oracle.place(case, "mlps_output", 1)
    with torch.no_grad():
        tokens = torch.cat([oracle.read(case, torch.tensor([row]), at)[0] for row in reference])
        value = tokens.mean(0).expand(1, 6, -1)
        expected = entropy(oracle.run(case, ids, {at: oracle.put(value, 2)}))
    assert torch.allclose(result["mlps_output"][0], expected, atol=1e-5)


def test_the_mean_shows_how_far_it_is(bars: list[tuple[str, str, int]]) -> None:
    case = Case("llama")
    ablation(case.model, pair(1, 6)[0], entropy, "mlps_output", "mean", [[5, 6, 7], [8], [9, 10]], [1])
    assert bars == [("mean of mlps_output", "prompt", 3), ("mlps_output", "batch", 0)]


def test_what_cannot_be_says_so() -> None:
    case = Case("gpt2")
    ids, others = pair(1, 6)
    with pytest.raises(UsageError, match=r"no ablation 'men'\. Did you mean 'mean'"):
        ablation(case.model, ids, entropy, method="men")
    with pytest.raises(UsageError, match="'mean' needs reference prompts"):
        ablation(case.model, ids, entropy, method="mean")
    with pytest.raises(UsageError, match="'zero' has no use for reference"):
        ablation(case.model, ids, entropy, reference=others)
    with pytest.raises(PromptPairError, match="have 6 tokens, those that stand in for them 4"):
        ablation(case.model, ids, entropy, method="resample", reference=others[:, :4])
