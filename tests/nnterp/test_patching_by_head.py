"""Patching, estimates of it, paths and ablation by head, against one change in one pass of the plain model each."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import CannotError, MissingPartError, UsageError
from nnterp.interventions import ablation, activation_patching, attribution_patching, logit_difference, path_patching
from nnterp.interventions.sites import HEADS
from tests.matrix.models import Case
from tests.nnterp import patching_oracle as oracle
from tests.nnterp.test_activation_patching import CLEAN, CORRUPTED, entropy, pair

#: Heads that share keys, none that do, parallel parts, few layers with attention, a gate after the heads, a query of
#: another size than the value.
FAMILIES = ("llama", "gpt2", "gpt_neox", "jamba", "qwen3_next", "deepseek_v3")

case = lru_cache(Case)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_what_one_change_in_a_pass_of_its_own_gives(family: str) -> None:
    this, (clean, corrupted) = case(family), pair(2, 5)
    together = activation_patching(this.model, clean, corrupted, entropy, HEADS, batch_size=7)
    single = activation_patching(
        this.model, clean, corrupted, entropy, HEADS, positions=[-1, 1], each_position=True, batch_size=64
    )
    seen = 0
    with torch.no_grad():
        for kind in HEADS:
            assert together.axes[kind] == ("layer", "head") and single.axes[kind] == ("layer", "head", "position")
            count = this.model.num_kv_heads if kind in ("keys", "values") else this.model.num_heads
            assert together.values[kind].shape == (2, this.num_layers, count)
            for layer in range(this.num_layers):
                at = oracle.place(this, kind, layer)
                if at is None:
                    assert together.values[kind][:, layer].isnan().all() and single.values[kind][:, layer].isnan().all()
                    continue
                source = oracle.read(this, clean, at)
                assert source.shape[:3] == (2, count, 5)
                for head in range(count):
                    seen += 1
                    expected = entropy(oracle.run(this, corrupted, {at: oracle.put_head(source, head)}))
                    assert torch.allclose(together.values[kind][:, layer, head], expected, atol=1e-5)
                    for column, position in enumerate((1, 4)):
                        expected = entropy(oracle.run(this, corrupted, {at: oracle.put_head(source, head, position)}))
                        assert torch.allclose(single.values[kind][:, layer, head, column], expected, atol=1e-5)
    assert seen >= 8


@pytest.mark.parametrize(
    ("family", "projection"),
    [("bloom", "self_attention.dense"), ("gptj", "attn.out_proj"), ("falcon", "self_attention.dense")],
)
def test_heads_of_attention_that_a_family_writes_out_itself(family: str, projection: str) -> None:
    """By the columns of the output projection, which takes all heads side by side; patched and estimated."""
    this, (clean, corrupted) = case(family), pair(2, 5)
    heads = this.model.num_heads
    found = activation_patching(this.model, clean, corrupted, entropy, "heads_output", each_position=True)
    estimated = attribution_patching(this.model, clean, corrupted, entropy, "heads_output", each_position=True)
    with torch.no_grad():
        before = entropy(oracle.run(this, corrupted, {}))
    for layer in range(this.num_layers):
        at = f"{this.facts['layers']}.{layer}.{projection}", "input"
        with torch.no_grad():
            source, usual = (oracle.read(this, ids, at).unflatten(-1, (heads, -1)) for ids in (clean, corrupted))
        slope = oracle.gradient(this, corrupted, at, entropy).unflatten(-1, (heads, -1))
        expected = before[:, None, None] + ((source - usual) * slope).sum(-1)
        assert torch.allclose(estimated.values["heads_output"][:, layer], expected.transpose(1, 2), atol=1e-5)
        for head in range(heads):
            for position in range(5):
                mixed = usual.clone()
                mixed[:, position, head] = source[:, position, head]
                with torch.no_grad():
                    expected = entropy(oracle.run(this, corrupted, {at: oracle.put(mixed.flatten(-2))}))
                assert torch.allclose(found.values["heads_output"][:, layer, head, position], expected, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_the_gradients_that_autograd_gives(family: str, steps: int | None) -> None:
    this, (clean, corrupted) = case(family), pair(2, 5)
    found = attribution_patching(this.model, clean, corrupted, entropy, HEADS, steps=steps)
    embed = this.module.get_input_embeddings()
    with torch.no_grad():
        ends = embed(clean), embed(corrupted)
        before = entropy(oracle.run(this, corrupted, {}))
    starts = [None] if steps is None else [ends[1] + (k + 0.5) / steps * (ends[0] - ends[1]) for k in range(steps)]
    for kind in HEADS:
        for layer in range(this.num_layers):
            at = oracle.place(this, kind, layer)
            if at is None:
                assert found.values[kind][:, layer].isnan().all()
                continue
            with torch.no_grad():
                change = oracle.read(this, clean, at) - oracle.read(this, corrupted, at)
            mean = sum(oracle.gradient(this, corrupted, at, entropy, start) for start in starts) / len(starts)
            expected = before[:, None] + (change * mean).sum((2, 3))
            assert torch.allclose(found.values[kind][:, layer], expected, atol=1e-5)


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("family", ["llama", "jamba", "afmoe"])
def test_paths_are_as_three_runs_with_changes_give_them(family: str, freeze_mlps: bool) -> None:
    # In the last of the families a gate comes after the heads, which what is sent goes through to later layers.
    this, (clean, corrupted) = case(family), pair(2, 4)
    layers = [layer for layer in range(this.num_layers) if oracle.place(this, "heads_output", layer)]
    receivers = [("queries", layers[-1], 1), ("keys", layers[-1], -1), ("values", layers[-1]), ("mlps_input", 1)]
    found = path_patching(
        this.model, clean, corrupted, entropy, "heads_output", receivers, freeze_mlps=freeze_mlps, batch_size=6
    )
    assert found.axes["heads_output"] == ("layer", "head")
    still = ("mixers_output", "mlps_output") if freeze_mlps else ("mixers_output",)
    with torch.no_grad():
        for layer in layers:
            sender, own = (oracle.place(this, kind, layer) for kind in ("heads_output", "mixers_output"))
            places = {oracle.place(this, kind, each) for kind in still for each in range(this.num_layers)} - {own, None}
            held = {at: oracle.put(oracle.read(this, corrupted, at)) for at in places}
            source = oracle.read(this, clean, sender)
            for head in range(this.model.num_heads):
                changes = {**held, sender: oracle.put_head(source, head)}
                taken = {}
                for kind, where, *heads in receivers:
                    at = oracle.place(this, kind, where)
                    value = oracle.read(this, corrupted, at, changes)
                    taken[at] = oracle.put_head(value, heads[0] if heads else slice(None))
                    if kind == "mlps_input":
                        taken[at] = oracle.put(value)
                expected = entropy(oracle.run(this, corrupted, taken))
                assert torch.allclose(found.values["heads_output"][:, layer, head], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "jamba"])
def test_ablated_heads_are_as_with_a_change(family: str, method: str) -> None:
    this, (ids, _) = case(family), pair(2, 5)
    others = torch.randint(5, 320, (3, 5), generator=torch.Generator().manual_seed(2))
    found = ablation(this.model, ids, entropy, HEADS, method, None if method == "zero" else others, seed=3)
    drawn = torch.randint(3, (2,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for kind in HEADS:
            for layer in range(this.num_layers):
                at = oracle.place(this, kind, layer)
                if at is None:
                    continue
                seen = oracle.read(this, others, at)
                value = {
                    "zero": torch.zeros_like(seen[:2]),
                    "mean": seen.mean((0, 2), keepdim=True).expand(2, -1, 5, -1),
                    "resample": seen[drawn],
                }[method]
                for head in range(seen.shape[1]):
                    expected = entropy(oracle.run(this, ids, {at: oracle.put_head(value, head)}))
                    assert torch.allclose(found.values[kind][:, layer, head], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["demo_gpt2", "demo_llama"])
def test_the_heads_of_the_indirect_object_circuit_are_those_of_an_exhaustive_sweep(
    name: str, request: pytest.FixtureRequest
) -> None:
    """With hooks on the output projection, which takes all heads side by side, and nothing else."""
    model: StandardizedTransformer = request.getfixturevalue(name)
    found = activation_patching(model, CLEAN, CORRUPTED, logit_difference(model, " Mary", " John"), "heads_output")
    plain, ids = model._module, [model.tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPTED)]
    layers = plain.transformer.h if name == "demo_gpt2" else plain.model.layers
    mary, john = (model.tokenizer.encode(each)[0] for each in (" Mary", " John"))
    swept, size = torch.empty(model.num_layers, model.num_heads), model.head_dim
    with torch.no_grad():
        for row, layer in enumerate(layers):
            projection = layer.attn.c_proj if name == "demo_gpt2" else layer.self_attn.o_proj
            kept: list[torch.Tensor] = []
            handle = projection.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0].clone()))
            plain(ids[0])
            handle.remove()
            for head in range(model.num_heads):

                def put(_: object, given: tuple[torch.Tensor], head=head, kept=kept) -> tuple[torch.Tensor]:
                    new = given[0].clone()
                    new[..., head * size : (head + 1) * size] = kept[0][..., head * size : (head + 1) * size]
                    return (new,)

                handle = projection.register_forward_pre_hook(put)
                logits = plain(ids[1]).logits[0, -1]
                handle.remove()
                swept[row, head] = logits[mary] - logits[john]
    assert torch.allclose(found["heads_output"], swept, atol=1e-4)
    # Heads of late layers write the name where it is needed, and what each recovers comes from its values.
    recovered = found.recovered("heads_output")
    last = activation_patching(
        model, CLEAN, CORRUPTED, logit_difference(model, " Mary", " John"), "heads_output", positions=[-1]
    ).recovered("heads_output")
    assert recovered[3:].sum() > 0.5 and torch.allclose(last[-1], recovered[-1], atol=1e-5)


def test_what_cannot_be_says_so() -> None:
    llama, ids = case("llama"), pair(1, 5)
    with pytest.raises(UsageError, match=r"queries\[1\] has 4 heads"):
        path_patching(llama.model, *ids, entropy, "heads_output", [("queries", 1, 4)])
    with pytest.raises(UsageError, match="what adds to the residual stream is one of"):
        path_patching(llama.model, *ids, entropy, "queries")
    with pytest.raises(MissingPartError, match="heads_output"):
        activation_patching(Case("falcon_mamba").model, *ids, entropy, "heads_output")
    with pytest.raises(CannotError, match="runs twice"):
        activation_patching(Case("diffllama").model, *ids, entropy, "heads_output")
