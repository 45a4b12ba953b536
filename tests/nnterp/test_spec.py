"""The parse stage: YAML text in, a frozen spec or an error that says file, line, what is so and what to do out."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnterp.conditions import config_value
from nnterp.errors import (
    CannotError,
    DuplicateKeyError,
    MissingKeyError,
    SpecError,
    SpecSyntaxError,
    SpecValueError,
    UnknownKeyError,
)
from nnterp.spec import ArchitectureSpec, Part, parse_spec

TOY = """\
family: toy
model_types: [toy, toy2]
modules:
  embed_tokens: net.embed
  layers: net.blocks
  ln_final: net.norm
  lm_head: head
layer:
  attention: attn
  mlp: {module: mlp, norm: ln_2, contribution: drop}
layout: sequential
logits:
  softcap: cap
embed: [embed_tokens]
unembed: [ln_final, lm_head]
dimensions:
  num_layers: [depth, num_layers]
  num_heads: heads
  hidden_size: text_config.width
  vocab_size: vocab
variants:
  - when: {parallel: true}
    layout: parallel
  - when: {final_norm: false, kind: [a, b]}
    modules: {ln_final: null}
    absent: {ln_final: No such norm.}
  - when: {narrow: {differs_from: width}}
    unembed: [ln_final, net.up, lm_head]
notes: A toy.
"""


def changed(*replacements: tuple[str, str]) -> str:
    """The toy file with pieces of text replaced; each must be there exactly once, or the test would test nothing."""
    text = TOY
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def failure(kind: type[SpecError], text: str, line: int, *pieces: str) -> SpecError:
    """Parses, expects this error on this line with these pieces in its message, and holds the message to its form."""
    with pytest.raises(kind) as caught:
        parse_spec(text, "toy.yaml")
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(f"toy.yaml:{line}: "), message
    assert caught.value.line == line and caught.value.source == "toy.yaml"
    assert "\n  found      " in message and "\n  expected   " in message
    assert message.count("\n") <= 12
    for piece in pieces:
        assert piece in message, message
    return caught.value


def test_a_whole_file() -> None:
    spec = parse_spec(TOY, "toy.yaml")
    assert spec.family == "toy"
    assert spec.model_types == ("toy", "toy2")
    assert spec.modules.layers == ("net.blocks",)
    assert spec.layer.mlp == Part(module=("mlp",), norm=("ln_2",), contribution=("drop",))
    assert spec.layer.mixers() == {"attention": Part(module=("attn",))}
    assert spec.layout == "sequential"
    assert spec.unembed == ("ln_final", "lm_head")
    assert spec.embed == ("embed_tokens",)
    assert spec.logits.softcap == "cap" and spec.logits.multiplier is None
    assert spec.dimensions.num_layers == ("depth", "num_layers")
    assert spec.dimensions.num_kv_heads == ("num_key_value_heads", "text_config.num_key_value_heads")
    assert spec.notes == "A toy."


def test_a_spec_is_frozen_hashable_and_can_be_copied() -> None:
    spec = parse_spec(TOY, "toy.yaml")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.family = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.absent["mlp"] = "none"  # type: ignore[index]
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(copy.deepcopy(spec)) == hash(spec)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("family", 1),
        ("model_types.1", 2),
        ("modules", 3),
        ("modules.ln_final", 6),
        ("layout", 11),
        ("layer.mlp.norm", 10),
        ("dimensions.num_heads", 18),
        # Defaults have no line of their own: what encloses them has.
        ("layer.mlp.sum_norm", 10),
        ("logits.multiplier", 12),
        ("variants.1.when", 24),
    ],
)
def test_lines(path: str, line: int) -> None:
    spec = parse_spec(TOY, "toy.yaml")
    assert spec.line_of(path) == line
    assert spec.where(path) == f"toy.yaml:{line}"


MLP = "  mlp: {module: mlp, norm: ln_2, contribution: drop}"


def test_a_part_without_a_module() -> None:
    spec = parse_spec(changed((MLP, "  mlp: {input: fc1, output: fc2}")), "toy.yaml")
    assert spec.layer.mlp == Part(input=("fc1",), output=("fc2",))
    failure(MissingKeyError, changed((MLP, "  mlp: {input: fc1}")), 10, "`layer.mlp` lacks the key 'output'")


def test_of_several_paths_the_first_that_is_there_is_meant() -> None:
    spec = parse_spec(changed((MLP, "  mlp: [moe, mlp]"), ("net.blocks", "[net.blocks, h]")), "toy.yaml")
    assert spec.layer.mlp == Part(module=("moe", "mlp"))
    assert spec.modules.layers == ("net.blocks", "h")
    failure(SpecValueError, changed((MLP, "  mlp: []")), 10, "`layer.mlp` is empty")


def test_layers_of_several_kinds() -> None:
    more = f"{MLP}\n  state_space: {{module: attn, has: [conv, scan]}}\n  convolution: conv\n  also_added: [extra]"
    spec = parse_spec(changed((MLP, more)), "toy.yaml")
    assert list(spec.layer.mixers()) == ["attention", "state_space", "convolution"]
    assert spec.layer.mixers()["state_space"].has == ("conv", "scan")
    assert spec.layer.also_added == (Part(module=("extra",)),)


def test_a_model_without_a_list_of_layers() -> None:
    text = changed(("net.blocks", "null"), ("attention: attn", "attention: net.attn.*\n  input: net.attn.*"))
    text += "absent: {layers: There are lists of parts.}\n"
    failure(MissingKeyError, text, 8, "`layer` lacks the key 'output'")
    text = text.replace("  input:", "  output: net.norm.*\n  input:")
    spec = parse_spec(text, "toy.yaml")
    assert (spec.layer.input, spec.layer.output) == (("net.attn.*",), ("net.norm.*",))
    failure(SpecValueError, changed((MLP, f"{MLP}\n  input: attn")), 11, "for models that keep no list of layers")


@pytest.mark.parametrize(
    ("text", "value"),
    [("scale", 3.0), ("1 / scale", 1 / 3), ("2 * scale / sqrt(layers)", 3.0), ("0.5", 0.5), ("no_such_key", 1.0)],
)
def test_multipliers(text: str, value: float) -> None:
    spec = parse_spec(changed(("  softcap: cap", f"  multiplier: {text}")), "toy.yaml")
    assert spec.logits.multiplier is not None
    assert spec.logits.multiplier.value({"scale": 3, "layers": 4}) == pytest.approx(value)
    assert spec.logits.applied(torch.ones(2), {"scale": 3, "layers": 4}).tolist() == pytest.approx([value] * 2)


def test_what_is_no_product() -> None:
    failure(
        SpecValueError, changed(("  softcap: cap", "  multiplier: a + b")), 13, "is no product", "joined by * and /"
    )


def test_a_softcap_may_be_a_key_a_number_or_unset() -> None:
    logits = torch.tensor([0.0, 100.0])
    assert parse_spec(TOY, "toy.yaml").logits.applied(logits, {"cap": 2.0}).tolist() == pytest.approx([0, 2])
    assert parse_spec(TOY, "toy.yaml").logits.applied(logits, {"cap": None}).tolist() == [0, 100]
    assert parse_spec(changed(("cap: cap", "cap: 5")), "toy.yaml").logits.applied(logits, {})[1] == pytest.approx(5)


def test_the_axes_of_the_stream() -> None:
    spec = parse_spec(TOY + "stream: {layers: [batch, position, stream*hidden]}\n", "toy.yaml")
    assert spec.stream.layers == ("batch", "position", "stream*hidden")
    assert spec.stream.parts == ("batch", "position", "hidden")
    failure(SpecValueError, TOY + "stream: {layers: [batch, hidden]}\n", 30, "does not name the axes")


def test_what_cannot_hold_has_a_reason() -> None:
    spec = parse_spec(TOY + "cannot: {steer: Nothing to steer.}\n", "toy.yaml")
    spec.refuse("skip", "skip_layer(3)")
    with pytest.raises(CannotError, match=r"steer\(\.\.\.\) cannot be had of this model: Nothing to steer"):
        spec.refuse("steer", "steer(...)")
    failure(UnknownKeyError, TOY + "cannot: {stear: Why.}\n", 30, "Did you mean 'steer'?")


def test_no_variant_holds() -> None:
    spec = parse_spec(TOY, "toy.yaml")
    plain = spec.for_config({"parallel": False})
    assert plain == dataclasses.replace(spec, variants=())
    assert plain.for_config({"parallel": True}) is plain


def test_a_variant_replaces_values_and_reports_its_own_lines() -> None:
    spec = parse_spec(TOY, "toy.yaml").for_config({"parallel": True})
    assert spec.layout == "parallel"
    assert spec.layer.mlp is not None and spec.layer.mlp.norm == ("ln_2",)
    assert spec.line_of("layout") == 23
    assert spec.line_of("layer.mlp.norm") == 10


def test_all_variants_that_hold_are_applied() -> None:
    spec = parse_spec(TOY, "toy.yaml")
    config = {"parallel": True, "final_norm": False, "kind": "b", "narrow": 4, "width": 8}
    both = spec.for_config(config)
    assert both.layout == "parallel"
    assert both.modules.ln_final == ()
    assert both.absent == {"ln_final": "No such norm."}
    assert both.unembed == ("ln_final", "net.up", "lm_head")
    assert both.line_of("modules.ln_final") == 25
    assert both.line_of("unembed") == 28
    assert spec.modules.ln_final == ("net.norm",)


@pytest.mark.parametrize(
    ("config", "holds"),
    [
        ({"final_norm": False, "kind": "a"}, True),
        ({"final_norm": False, "kind": "c"}, False),
        ({"final_norm": False}, False),
        ({"final_norm": 0, "kind": "a"}, False),
        ({"kind": "a"}, False),
    ],
)
def test_all_conditions_of_a_variant_must_hold(config: dict[str, Any], holds: bool) -> None:
    assert parse_spec(TOY, "toy.yaml").variants[1].holds(config) == holds


@pytest.mark.parametrize(
    ("config", "holds"),
    [({"narrow": 4, "width": 8}, True), ({"narrow": 8, "width": 8}, False), ({"narrow": None, "width": 8}, False)],
)
def test_two_values_of_a_config_may_differ(config: dict[str, Any], holds: bool) -> None:
    assert parse_spec(TOY, "toy.yaml").variants[2].holds(config) == holds


def test_a_config_may_be_an_object() -> None:
    class Config:
        parallel = True

    assert parse_spec(TOY, "toy.yaml").for_config(Config()).layout == "parallel"
    assert config_value(Config(), "no.such.key") is None


def test_unknown_key() -> None:
    text = changed(("layer:\n", "layers:\n"))
    failure(UnknownKeyError, text, 8, "the file has no key 'layers'", "Did you mean 'layer'?")
    text = changed(("  attention: attn", "  atention: attn"))
    failure(UnknownKeyError, text, 9, "`layer` has no key 'atention'", "Did you mean 'attention' or", "mlp")


def test_unknown_key_in_a_variant() -> None:
    text = changed(("    layout: parallel", "    layuot: parallel"))
    failure(UnknownKeyError, text, 23, "`variants.0` has no key 'layuot'", "Did you mean 'layout'?")
    text = changed(("    layout: parallel", "    layer: {mpl: a}"))
    failure(UnknownKeyError, text, 23, "`layer` has no key 'mpl'", "Did you mean 'mlp'?")


def test_a_variant_may_not_change_what_it_is_a_variant_of() -> None:
    text = changed(("    layout: parallel", "    model_types: [other]"))
    failure(UnknownKeyError, text, 23, "has no key 'model_types'")


def test_missing_key() -> None:
    text = changed(("  layers: net.blocks\n", ""))
    failure(MissingKeyError, text, 3, "`modules` lacks the key 'layers'", "embed_tokens", "Add 'layers'")
    text = changed(("family: toy\n", ""))
    failure(MissingKeyError, text, 1, "the file lacks the key 'family'")
    text = changed(("  - when: {parallel: true}\n    layout", "  - layout"))
    failure(MissingKeyError, text, 22, "`variants.0` lacks the key 'when'")


def test_null_without_a_reason() -> None:
    text = changed(("  ln_final: net.norm", "  ln_final: null"))
    failure(MissingKeyError, text, 6, "`absent` lacks the key 'ln_final'", "why `modules.ln_final` is null")


def test_a_reason_without_a_missing_part() -> None:
    text = TOY + "absent: {ln_final: There is none.}\n"
    failure(SpecValueError, text, 30, "part that is there", "`modules.ln_final` on line 6")
    # Some layers may lack what others have.
    parse_spec(TOY + "absent: {mlp: Only every second layer has one.}\n", "toy.yaml")
    failure(UnknownKeyError, TOY + "absent: {ln_finale: Why not.}\n", 30, "Did you mean 'ln_final'?")


@pytest.mark.parametrize("path", ["''", "net..blocks", ".net", "net.", "' net'"])
def test_empty_path(path: str) -> None:
    text = changed(("  layers: net.blocks", f"  layers: {path}"))
    failure(SpecValueError, text, 5, "`modules.layers` is no module path", "names joined by single dots")


@pytest.mark.parametrize(
    ("old", "new", "line", "piece"),
    [
        ("  layers: net.blocks", "  layers: {a: b}", 5, "a mapping"),
        ("  layers: net.blocks", "  layers: 3", 5, "the number '3'"),
        ("  attention: attn", "  attention: true", 9, "the truth value 'true'"),
        ("model_types: [toy, toy2]", "model_types: toy", 2, "the text 'toy'"),
        ("model_types: [toy, toy2]", "model_types: []", 2, "at least one name"),
        ("embed: [embed_tokens]", "embed: embed_tokens", 14, "a list of module paths"),
        ("unembed: [ln_final, lm_head]", "unembed: {a: b}", 15, "a mapping"),
        ("unembed: [ln_final, lm_head]", "unembed: []", 15, "`unembed` is empty"),
        ("  - when: {parallel: true}", "  - when: {}", 22, "at least one config key"),
        ("  - when: {parallel: true}", "  - when: {parallel: [[1]]}", 22, "a single value"),
        ("  num_heads: heads", "  num_heads: ''", 18, "is empty"),
    ],
)
def test_wrong_kind_of_value(old: str, new: str, line: int, piece: str) -> None:
    failure(SpecValueError, changed((old, new)), line, piece)


def test_a_word_that_is_no_choice() -> None:
    text = changed(("layout: sequential", "layout: sequentail"))
    failure(SpecValueError, text, 11, "sequential or parallel", "Did you mean 'sequential'?")


def test_duplicate_keys() -> None:
    text = changed(("  lm_head: head\n", "  lm_head: head\n  layers: other\n"))
    failure(DuplicateKeyError, text, 8, "`modules` gives the key 'layers' twice", "line 5", "line 8")


def test_unknown_role_in_unembed() -> None:
    text = changed(("unembed: [ln_final, lm_head]", "unembed: [ln_finale, lm_head]"))
    failure(
        SpecValueError, text, 15, "the role 'ln_finale'", "embed_tokens, layers, ln_final, lm_head", "mean 'ln_final'"
    )


@pytest.mark.parametrize(
    ("text", "line", "piece"),
    [
        ("", 1, "an empty file"),
        ("- a\n", 1, "a list"),
        ("family: [toy\nmodel_types: x\n", 2, "not YAML"),
        ("family: toy\n[a]: b\n", 2, "a key is no name"),
    ],
)
def test_no_specification_at_all(text: str, line: int, piece: str) -> None:
    failure(SpecSyntaxError, text, line, piece)


def test_errors_can_be_pickled() -> None:
    error = failure(UnknownKeyError, changed(("layer:\n", "layers:\n")), 8)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UnknownKeyError and str(again) == str(error) and again.line == 8


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,7}x", fullmatch=True)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(".".join)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    children = draw(st.lists(NAMES, min_size=4, max_size=8, unique=True))
    return {
        "family": draw(NAMES),
        "model_types": draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)),
        "modules": {role: draw(PATHS) for role in ("embed_tokens", "layers", "ln_final", "lm_head")},
        "layer": {
            "attention": {"module": children[0], "norm": children[2]},
            "mlp": {"module": children[1], "norm": children[3], "contribution": draw(PATHS)},
        },
        "layout": draw(st.sampled_from(["sequential", "parallel"])),
        "unembed": ["ln_final", f"{draw(NAMES)}.{draw(NAMES)}", "lm_head"],
        "dimensions": {
            name: draw(st.lists(NAMES, min_size=1, max_size=2))
            for name in ("num_layers", "num_heads", "hidden_size", "vocab_size")
        },
    }


def plain(spec: ArchitectureSpec) -> dict[str, Any]:
    """A spec as the document that it was made of."""
    return {
        "family": spec.family,
        "model_types": list(spec.model_types),
        "modules": {role: path for role, (path,) in dataclasses.asdict(spec.modules).items()},
        "layer": {kind: _part(getattr(spec.layer, kind)) for kind in ("attention", "mlp")},
        "layout": spec.layout,
        "unembed": list(spec.unembed),
        "dimensions": {
            name: list(getattr(spec.dimensions, name))
            for name in ("num_layers", "num_heads", "hidden_size", "vocab_size")
        },
    }


def _part(part: Part) -> dict[str, str]:
    return {name: paths[0] for name, paths in dataclasses.asdict(part).items() if paths}


#: How long an example takes says how busy the machine is, and nothing of what is tested.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(documents(), st.booleans())
def test_what_is_written_is_what_is_read(document: dict[str, Any], flow: bool) -> None:
    text = yaml.safe_dump(document, default_flow_style=flow, sort_keys=False)
    assert plain(parse_spec(text, "drawn.yaml")) == document


@unhurried
@given(documents())
def test_every_value_stands_on_the_line_that_is_reported(document: dict[str, Any]) -> None:
    text = yaml.safe_dump(document, default_flow_style=False, sort_keys=False)
    spec, rows = parse_spec(text, "drawn.yaml"), text.splitlines()
    for role, path in document["modules"].items():
        assert rows[spec.line_of(f"modules.{role}") - 1].strip() == f"{role}: {path}"
    for kind, part in document["layer"].items():
        for name, path in part.items():
            assert rows[spec.line_of(f"layer.{kind}.{name}") - 1].strip() == f"{name}: {path}"


@unhurried
@given(documents(), st.data())
def test_a_misspelt_key_is_named_with_its_line(document: dict[str, Any], data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(["modules", "layer", "dimensions"]))
    key = data.draw(st.sampled_from(sorted(document[section])))
    lines = yaml.safe_dump(document, sort_keys=False).splitlines()
    start = lines.index(f"{section}:")
    line = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {key}:"))
    lines[line] = lines[line].replace(f"  {key}:", f"  {key}zz:")
    with pytest.raises(UnknownKeyError) as caught:
        parse_spec("\n".join(lines), "drawn.yaml")
    assert caught.value.line == line + 1
    assert f"Did you mean '{key}'" in str(caught.value)
