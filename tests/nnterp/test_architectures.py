"""The shipped specifications, held against tiny models with plain PyTorch hooks and nothing else of this project."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nnterp import conditions
from nnterp.architectures import load_specs, spec_files, spec_for, spec_from_file, specs_folder
from nnterp.conditions import config_value
from nnterp.dimensions import dimensions
from nnterp.errors import DuplicateArchitectureError, UnknownArchitectureError
from nnterp.rename import LayerPlan, RenamePlan, plan
from nnterp.spec import ArchitectureSpec, DimensionKeys, Layer, Logits, Modules, Part, Stream, parse_spec
from tests.families import FAMILY_VARIANTS, IDS, tiny_config, tiny_inputs, tiny_model
from tests.matrix.models import MODEL_TYPES
from tests.matrix.table import SIZES

every_variant = pytest.mark.parametrize("row", range(len(FAMILY_VARIANTS)), ids=IDS)


class Run:
    """One forward pass: what each module was given and gave, and the order in which they began."""

    def __init__(self, model: torch.nn.Module, tokens: torch.Tensor) -> None:
        self.order: list[str] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        with self._watching(model), torch.no_grad():
            self.logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits

    @contextmanager
    def _watching(self, model: torch.nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():

            def before(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                self.order.append(name)
                first = args[0] if args else kwargs.get("hidden_states")
                if isinstance(first, torch.Tensor):
                    self.inputs[name] = first.clone()

            def after(_: Any, args: Any, output: Any, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, torch.Tensor):
                    self.outputs[name] = first.clone()

            handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def children_in_order(self, parent: str) -> list[str]:
        return [name.rpartition(".")[2] for name in self.order if name and name.rpartition(".")[0] == parent]


class Case:
    """A tiny model, the spec of its config, the plan made of it, and one pass."""

    def __init__(self, row: int) -> None:
        variant = FAMILY_VARIANTS[row]
        self.model = tiny_model(variant.model_type, **variant.overrides)
        self.config = self.model.config
        self.spec: ArchitectureSpec = spec_for(variant.model_type).for_config(self.config)
        self.modules = dict(self.model.named_modules())
        self.sizes = dimensions(self.spec, self.config)
        self.plan: RenamePlan = plan(self.spec, list(self.modules), self.sizes.num_layers)
        self.tokens = tiny_inputs()
        self.run = Run(self.model, self.tokens)

    def apply(self, path: str | None, values: torch.Tensor) -> torch.Tensor:
        if path is None:
            return values
        with torch.no_grad():
            result: torch.Tensor = self.modules[path](values)
        return result

    def output(self, path: str | None, like: torch.Tensor) -> torch.Tensor:
        assert path is not None
        return self.run.outputs[path].reshape(like.shape)


@lru_cache(maxsize=len(FAMILY_VARIANTS))
def case(row: int) -> Case:
    return Case(row)


def close(seen: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_every_file_is_read() -> None:
    assert {spec.source for spec in load_specs().values()} == {str(path) for path in spec_files()}
    for spec in load_specs().values():
        assert Path(spec.source).stem == spec.family


def test_every_variant_of_every_file_is_shown_by_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        *((row.model_type, row.overrides) for row in FAMILY_VARIANTS),
        *SIZES,
        *((name, {}) for name in MODEL_TYPES),
    ]
    for spec in set(load_specs().values()):
        for variant in spec.variants:
            configs = [tiny_config(name, **overrides) for name, overrides in rows if name in spec.model_types]
            version = next((each.one_of[0] for each in variant.when if each.key == conditions.VERSION), 5)
            monkeypatch.setattr(conditions, "major_version", lambda version=version: version)
            assert any(variant.holds(config) for config in configs), f"no model shows {spec.source}:{variant.line}"
            monkeypatch.setattr(conditions, "major_version", lambda: 5)
            assert not all(variant.holds(config) for config in configs)


@every_variant
def test_paths_exist_and_roles_are_what_transformers_says(row: int) -> None:
    made, model = case(row).plan, case(row).model
    # `plan` has refused every path that is not there.
    assert made.modules["embed_tokens"] is not None and made.modules["lm_head"] is not None
    assert case(row).modules[made.modules["embed_tokens"]] is model.get_input_embeddings()
    assert case(row).modules[made.modules["lm_head"]] is model.get_output_embeddings()
    assert made.modules["model"] == model.base_model_prefix
    assert len(made.layers) == len(list(case(row).modules[str(made.modules["layers"])].children()))


@every_variant
def test_each_layers_output_is_the_next_ones_input(row: int) -> None:
    layers, run = case(row).plan.layers, case(row).run
    for layer, following in itertools.pairwise(layers):
        assert torch.equal(run.outputs[layer.path], run.inputs[following.path])


def recomposed(this: Case, layer: LayerPlan) -> torch.Tensor:
    """The layer's output, put together from its input and its parts in the way that the plan says."""
    value = this.run.inputs[layer.path]
    for part in layer.parts:
        value = this.apply(part.sum_norm, value + this.output(part.contribution, value))
    return value


@every_variant
def test_contributions_add_up_as_the_spec_says(row: int) -> None:
    this = case(row)
    for layer in this.plan.layers:
        given, made = this.run.inputs[layer.path], this.run.outputs[layer.path]
        added = [this.output(part.contribution, given) for part in layer.parts]
        assert all(each.abs().max() > 1e-2 for each in added)
        close(recomposed(this, layer), made)
        is_plain = not any(part.sum_norm for part in layer.parts)
        assert torch.allclose(given + sum(added), made, rtol=1e-4, atol=1e-4) == is_plain


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("gemma2-full", (0, "contribution", "self_attn")),
        ("gemma2-full", (1, "contribution", "mlp")),
        ("opt-post-norm", (0, "sum_norm", "final_layer_norm")),
        ("opt-post-norm", (1, "sum_norm", "self_attn_layer_norm")),
        ("opt-full", (1, "contribution", "fc1")),
        ("llama-full", (1, "contribution", "post_attention_layernorm")),
    ],
)
def test_a_wrong_contribution_would_be_seen(variant: str, wrong: tuple[int, str, str]) -> None:
    this = case(IDS.index(variant))
    for layer in this.plan.layers:
        number, name, child = wrong
        changes: dict[str, Any] = {name: f"{layer.path}.{child}"}
        parts = [replace(part, **changes) if part is layer.parts[number] else part for part in layer.parts]
        mistaken = replace(layer, parts=tuple(parts))
        with pytest.raises((AssertionError, RuntimeError)):
            close(recomposed(this, mistaken), this.run.outputs[layer.path])


@every_variant
def test_layout_says_what_the_mlp_reads(row: int) -> None:
    """With the attention's contribution taken away, a parallel MLP gives what it gave, a sequential one not."""
    this = case(row)
    layer = this.plan.layers[0]
    mlp = layer.part("mlp")
    assert layer.attention is not None and mlp is not None

    def nothing(_: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handle = this.modules[layer.attention].register_forward_hook(nothing)
    try:
        without = Run(this.model, this.tokens)
    finally:
        handle.remove()
    same = torch.equal(without.outputs[mlp.output], this.run.outputs[mlp.output])
    assert same == (this.spec.layout == "parallel")


@every_variant
def test_unembed_and_softcap_make_the_logits(row: int) -> None:
    this = case(row)
    values = this.run.outputs[this.plan.layers[-1].path]
    for path in this.plan.unembed:
        values = this.apply(path, values)
    cap = config_value(this.config, str(this.spec.logits.softcap))
    close(values if cap is None else cap * torch.tanh(values / cap), this.run.logits)


@every_variant
def test_embed_makes_vectors_as_wide_as_the_stream(row: int) -> None:
    this = case(row)
    values = this.tokens
    for path in this.plan.embed:
        values = this.apply(path, values)
    assert values.shape == (*this.tokens.shape, this.sizes.hidden_size)
    close(values, this.run.outputs[this.plan.embed[-1]])


@every_variant
def test_dimensions_are_those_of_the_weights(row: int) -> None:
    this = case(row)
    sizes, layer = this.sizes, this.plan.layers[0]
    assert this.run.inputs[layer.path].shape[-1] == sizes.hidden_size
    assert this.run.logits.shape[-1] == sizes.vocab_size
    variant = FAMILY_VARIANTS[row]
    eager = tiny_model(variant.model_type, **variant.overrides, attn_implementation="eager")
    with torch.no_grad():
        result = eager(input_ids=this.tokens, use_cache=True, output_attentions=True)
    cache = getattr(result.past_key_values, "self_attention_cache", result.past_key_values)
    assert cache.layers[0].keys.shape[1::2] == (sizes.num_kv_heads, sizes.head_dim)
    assert len(result.attentions) == sizes.num_layers
    assert result.attentions[0].shape[1] == sizes.num_heads


def test_rows_are_reproducible_and_quick() -> None:
    start = time.perf_counter()
    first, second = tiny_model("opt"), tiny_model("opt")
    first(input_ids=tiny_inputs())
    assert time.perf_counter() - start < 10
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32


def test_unknown_type_says_what_is_served() -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        spec_for("gpt3")
    message = str(caught.value)
    assert "'gpt3'" in message
    assert "Did you mean 'gpt" in message and "'gpt2'" in message
    assert "afmoe" in message and "architectures/README.md" in message and "spec_from_file(" in message
    assert message.count("\n") < 12


def test_a_users_own_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    text = Path(spec_for("apertus").source).read_text(encoding="utf-8")
    own.write_text(text.replace("apertus", "mine"), encoding="utf-8")
    spec = spec_from_file(own)
    assert spec.model_types == ("mine",)
    assert spec.modules == spec_for("apertus").modules
    assert spec.where("modules.layers") == f"{own}:6"
    assert spec_for("mine", tmp_path) == spec


def test_two_files_for_one_type_are_an_error(tmp_path: Path) -> None:
    text = Path(spec_for("gpt2").source).read_text(encoding="utf-8")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DuplicateArchitectureError) as caught:
        load_specs(tmp_path)
    assert "two.yaml:2" in str(caught.value) and "one.yaml:2" in str(caught.value)
    assert "'gpt2' is served twice" in str(caught.value)


def test_files_are_read_once() -> None:
    assert load_specs() is load_specs()
    with pytest.raises(TypeError):
        load_specs()["gpt2"] = spec_for("llama")  # type: ignore[index]


README = (specs_folder() / "README.md").read_text(encoding="utf-8")


def test_the_readmes_example_is_the_real_file() -> None:
    block = README.split("```yaml\n")[1].split("```")[0]
    assert replace(parse_spec(block, "README.md"), notes="") == replace(spec_for("gpt_neox"), notes="")


@pytest.mark.parametrize("kind", [ArchitectureSpec, Modules, Layer, Part, Logits, Stream, DimensionKeys])
def test_the_readme_explains_every_key(kind: Any) -> None:
    table = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    sections = {"modules", "layer", "logits", "stream", "dimensions"}
    for field in fields(kind):
        if "read" in field.metadata and field.name not in sections:
            assert f"{field.name}`" in table, f"architectures/README.md has no row for {field.name}"
