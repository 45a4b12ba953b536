"""Path patching against plain hooks in three runs for each path, and against sums written out by hand."""

from __future__ import annotations

import pytest
import torch

from nnterp.errors import LayerIndexError, UsageError
from nnterp.interventions import activation_patching, path_patching
from tests.matrix import hooks
from tests.matrix.models import Case
from tests.nnterp import patching_oracle as oracle
from tests.nnterp.test_activation_patching import entropy, pair

RECEIVERS = [("mixers_input", 2), ("mlps_input", 1)]


def parts(case: Case, kinds: tuple[str, ...]) -> list[hooks.Place]:
    places = [oracle.place(case, kind, layer) for kind in kinds for layer in range(case.num_layers)]
    return list(dict.fromkeys(at for at in places if at is not None))


def by_hand(
    case: Case, ids: tuple[torch.Tensor, torch.Tensor], sender: hooks.Place, position: int, held: list[hooks.Place]
) -> torch.Tensor:
    """The metric with the paths from one sender to the receivers patched: three runs, one hook for each part."""
    clean, corrupted = ids
    source = oracle.read(case, clean, sender)
    changes = {at: oracle.put(oracle.read(case, corrupted, at)) for at in held}
    mixed = oracle.read(case, corrupted, sender)
    mixed[:, position] = source[:, position]
    changes[sender] = oracle.put(mixed)
    ends = [oracle.place(case, kind, layer) for kind, layer in RECEIVERS]
    taken = {at: oracle.put(oracle.read(case, corrupted, at, changes)) for at in ends}
    return entropy(oracle.run(case, corrupted, taken))


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "jamba"])
def test_paths_are_as_three_runs_with_hooks_give_them(family: str, freeze_mlps: bool) -> None:
    case = Case(family)
    ids = pair(2, 4)
    senders = ("attentions_output", "mlps_output")
    found = path_patching(case.model, *ids, entropy, senders, RECEIVERS, freeze_mlps=freeze_mlps, batch_size=6)
    with torch.no_grad():
        for kind in senders:
            still = ("mixers_output", "mlps_output") if freeze_mlps or kind == "mlps_output" else ("mixers_output",)
            for layer in range(case.num_layers):
                sender = oracle.place(case, kind, layer)
                if sender is None:
                    assert found.values[kind][:, layer].isnan().all()
                    continue
                for position in range(4):
                    expected = by_hand(case, ids, sender, position, parts(case, still))
                    assert torch.allclose(found.values[kind][:, layer, position], expected, atol=1e-5)


def test_the_direct_path_to_the_logits_is_a_sum_in_the_residual_stream() -> None:
    """The last layer's output changes by what the sender's output changes by, and by nothing else."""
    case = Case("gpt2")
    clean, corrupted = pair(2, 5)
    found = path_patching(case.model, clean, corrupted, entropy)
    with torch.no_grad():
        last = oracle.read(case, corrupted, ("transformer.h.2", "output"))
        for kind, name in (("attentions_output", "attn"), ("mlps_output", "mlp")):
            for layer in range(3):
                at = (f"transformer.h.{layer}.{name}", "output")
                change = oracle.read(case, clean, at) - oracle.read(case, corrupted, at)
                for position in range(5):
                    stream = last.clone()
                    stream[:, position] += change[:, position]
                    logits = case.module.lm_head(case.module.transformer.ln_f(stream))
                    assert torch.allclose(found.values[kind][:, layer, position], entropy(logits), atol=1e-5)


def test_the_paths_to_the_last_part_are_all_of_a_patch() -> None:
    """Nothing comes after the last MLP, so patching it and patching its path to the logits are one."""
    case = Case("llama")
    ids = pair(2, 5)
    paths = path_patching(case.model, *ids, entropy, "mlps_output", layers=[-1])
    patches = activation_patching(case.model, *ids, entropy, "mlps_output", layers=[-1])
    assert torch.allclose(paths.values["mlps_output"], patches.values["mlps_output"], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "multiplier"),
    [("falcon_h1", "attention_out_multiplier"), ("granitemoeshared", "residual_multiplier"), ("mamba", None)],
)
def test_every_part_is_held_still_whatever_a_layer_is_made_of(family: str, multiplier: str | None) -> None:
    """With everything held, the stream before the last layer changes by what the first layer's mixer changes by."""
    case = Case(family)
    clean, corrupted = pair(1, 5)
    last = case.num_layers - 1
    result = path_patching(
        case.model, clean, corrupted, entropy, "mixers_output", [("layers_input", last)], [0], each_position=False
    )
    with torch.no_grad():
        at = oracle.place(case, "layers_input", last)
        stream = oracle.read(case, corrupted, at)
        mixer = oracle.place(case, "mixers_output", 0)
        change = oracle.read(case, clean, mixer) - oracle.read(case, corrupted, mixer)
        factor = getattr(case.module.config, multiplier) if multiplier else 1
        expected = entropy(oracle.run(case, corrupted, {at: oracle.put(stream + factor * change)}))
    assert torch.allclose(result["mixers_output"], expected, atol=1e-5)


def test_what_cannot_be_says_so() -> None:
    case = Case("gpt2")
    ids = pair(1, 5)

    def patched(**options: object) -> None:
        path_patching(case.model, *ids, entropy, **options)

    with pytest.raises(UsageError, match="what adds to the residual stream is one of attentions_output"):
        patched(senders="layers_output")
    with pytest.raises(UsageError, match="not 'mlps_input'"):
        patched(receivers=["mlps_input"])
    with pytest.raises(UsageError, match="does not end at 'mlps_output'"):
        patched(receivers=[("mlps_output", 1)])
    with pytest.raises(UsageError, match="names a head, but mlps_input is of all heads"):
        patched(receivers=[("mlps_input", 1, 0)])
    with pytest.raises(UsageError, match="leaves nowhere for a path to end"):
        patched(receivers=[])
    with pytest.raises(LayerIndexError):
        patched(receivers=[("mlps_input", 3)])
