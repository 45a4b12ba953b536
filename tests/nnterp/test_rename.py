"""The plan stage: strings in, strings out. No model, no torch."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pickle
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnterp import rename as rename_module
from nnterp.architectures import spec_for
from nnterp.errors import (
    AliasConflictError,
    AmbiguousNameError,
    ModulePathError,
    RenamingError,
    UnknownNameError,
)
from nnterp.rename import RenameConfig, RenamePlan, plan


def tree(top: list[str], layers: str, children: list[str], count: int) -> list[str]:
    """The paths of a model: those at the top, and each layer with its children; parents are filled in."""
    paths = {"", *top}
    for index in range(count):
        paths |= {f"{layers}.{index}.{child}" for child in children}
    for path in list(paths):
        parts = path.split(".")
        paths |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return sorted(paths)


GPT2 = tree(
    ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"],
    "transformer.h",
    ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"],
    3,
)
LLAMA = tree(
    ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"],
    "model.layers",
    ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.up_proj"],
    12,
)
OPT = tree(
    ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm", "lm_head"],
    "model.decoder.layers",
    ["self_attn.k_proj", "activation_fn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"],
    2,
)
# A model of the user's, laid out like GPT-2 under other names, with the parts of a layer one level further down.
OWN = tree(
    ["net.tokens", "net.norm", "head"],
    "net.blocks",
    ["ln_1", "inner.mixer", "ln_2", "inner.ff"],
    2,
)


def gpt2(**kwargs: Any) -> RenamePlan:
    return plan(spec_for("gpt2"), GPT2, 3, **kwargs)


def failure(kind: type[RenamingError], pieces: list[str], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind) as caught:
        plan(*args, **kwargs)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n  asked for  " in message and message.count("\n") <= 12
    for piece in pieces:
        assert piece in message, message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_gpt2_answers_to_the_standard_names() -> None:
    made = gpt2()
    model_wide = {"embed_tokens": "transformer.wte", "layers": "transformer.h", "ln_final": "transformer.ln_f"}
    assert made.aliases == {
        "": {**model_wide, "model": "transformer"},
        "transformer": model_wide,
        **{f"transformer.h.{i}": {"self_attn": f"transformer.h.{i}.attn"} for i in range(3)},
    }
    assert made.modules == {**model_wide, "lm_head": "lm_head", "model": "transformer"}
    assert made.unembed == ("transformer.ln_f", "lm_head")
    assert made.embed == ("transformer.wte",)
    assert made.shadowed == ()
    assert made.origins["modules.layers"] == spec_for("gpt2").where("modules.layers")


def test_llama_needs_few_aliases() -> None:
    made = plan(spec_for("llama"), LLAMA, 12)
    norm = {"ln_final": "model.norm"}
    assert made.aliases == {
        "": {"embed_tokens": "model.embed_tokens", "layers": "model.layers", **norm},
        "model": norm,
    }


def test_opt_has_no_mlp_module() -> None:
    made = plan(spec_for("opt"), OPT, 2)
    layer = made.layers[1]
    assert layer.path == "model.decoder.layers.1"
    attention, mlp = layer.parts
    assert (layer.mlp, mlp.input, mlp.output) == (None, f"{layer.path}.fc1", f"{layer.path}.fc2")
    assert mlp.contribution == mlp.output
    assert layer.attention == attention.contribution == f"{layer.path}.self_attn"
    assert attention.norm == f"{layer.path}.self_attn_layer_norm" and attention.sum_norm is None
    assert layer.path not in made.aliases
    assert made.resolve("model.layers.1.fc1") == made.resolve("layers.1.fc1") == "model.decoder.layers.1.fc1"


def test_opt_350m() -> None:
    spec = spec_for("opt").for_config({"do_layer_norm_before": False, "word_embed_proj_dim": 3, "hidden_size": 4})
    paths = [path for path in OPT if path != "model.decoder.final_layer_norm"]
    made = plan(spec, [*paths, "model.decoder.project_in", "model.decoder.project_out"], 2)
    assert made.modules["ln_final"] is None
    assert "ln_final" not in made.aliases[""]
    assert made.unembed == ("model.decoder.project_out", "lm_head")
    assert made.embed == ("model.decoder.embed_tokens", "model.decoder.project_in")
    assert made.layers[0].parts[1].sum_norm == "model.decoder.layers.0.final_layer_norm"


def test_a_plan_is_frozen_and_can_be_copied() -> None:
    made = gpt2()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.layers = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        made.aliases[""] = {}  # type: ignore[index]
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.1.attn",
        "layers.1.self_attn",
        "model.layers.1.attn",
        "transformer.layers.1.self_attn",
        ".model.h.1.attn",
    ],
)
def test_every_spelling_is_the_same_module(name: str) -> None:
    assert gpt2().resolve(name) == "transformer.h.1.attn"


def test_names_of() -> None:
    names = gpt2().names_of("model.layers.0")
    assert names[0] == "transformer.h.0"
    assert set(names) == {
        f"{p}.0" for p in ("layers", "transformer.h", "transformer.layers", "model.h", "model.layers")
    }
    assert gpt2().names_of("") == ("",)


def test_names_that_nothing_answers_to() -> None:
    with pytest.raises(UnknownNameError) as caught:
        gpt2().resolve("model.layers.0.self_atn")
    assert "'transformer.h.0' has no 'self_atn'" in str(caught.value)
    assert "model.layers.0.self_attn" in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"'transformer\.h' has no '3'") as caught:
        gpt2().resolve("layers.3")
    assert "layers.0, layers.1, layers.2" in str(caught.value)


def test_a_path_of_the_spec_that_is_not_there() -> None:
    spec = spec_for("gpt2")
    paths = [path.replace("transformer.ln_f", "transformer.ln_final") for path in GPT2]
    pieces = [spec.where("modules.ln_final"), "no module 'transformer.ln_f'", "nearest    transformer.ln_final"]
    failure(ModulePathError, pieces, spec, paths, 3)
    paths = [path.replace("attn", "attention") for path in GPT2]
    failure(ModulePathError, [spec.where("layer.attention"), "'transformer.h.0.attn'"], spec, paths, 3)
    pieces = [spec.where("modules.layers"), "'transformer.h.3' as layer 3 of the 4"]
    failure(ModulePathError, pieces, spec, GPT2, 4)


def test_the_users_names_win() -> None:
    user = RenameConfig(
        attn_name="mixer",
        mlp_name=["feed_forward", "ff"],
        layers_name="blocks",
        lm_head_name="head",
        ln_final_name="norm",
    )
    spec = dataclasses.replace(
        spec_for("gpt2"), modules=dataclasses.replace(spec_for("gpt2").modules, embed_tokens=("net.tokens",))
    )
    made = plan(spec, OWN, 2, user)
    assert made.modules["layers"] == "net.blocks" and made.modules["model"] == "net"
    assert made.layers[1].attention == made.layers[1].parts[0].contribution == "net.blocks.1.inner.mixer"
    assert made.layers[1].mlp == made.layers[1].parts[1].output == "net.blocks.1.inner.ff"
    assert made.resolve("model.layers.1.self_attn") == "net.blocks.1.inner.mixer"
    assert made.unembed == ("net.norm", "head")
    assert made.origins["layer.attention"] == "RenameConfig(attn_name='mixer')"


@pytest.mark.parametrize("name", ["h", "transformer.h", "model.h", "model.transformer.h", ["blocks", "h"], ".h"])
def test_the_ways_to_name_a_module(name: str | list[str]) -> None:
    assert gpt2(user=RenameConfig(layers_name=name)).modules["layers"] == "transformer.h"


def test_a_name_of_the_users_that_is_not_there() -> None:
    spec = spec_for("gpt2")
    for field in ("ln_final_name", "model_name", "attn_name"):
        asked = "ln_ff" if field == "ln_final_name" else "atn"
        user = RenameConfig()
        setattr(user, field, asked)
        failure(ModulePathError, [f"RenameConfig({field}='{asked}')", f"no module '{asked}'"], spec, GPT2, 3, user)
    failure(ModulePathError, ["transformer.ln_f"], spec, GPT2, 3, RenameConfig(ln_final_name="transformer.ln_ff"))


def test_a_name_of_the_users_that_fits_several() -> None:
    user = RenameConfig(attn_name="c_proj")
    pieces = ["RenameConfig(attn_name='c_proj')", "any of 2 modules", "transformer.h.0.attn.c_proj", "mlp.c_proj"]
    failure(AmbiguousNameError, pieces, spec_for("gpt2"), GPT2, 3, user)


def test_layers_may_differ_where_the_user_names_the_parts() -> None:
    paths = [path for path in GPT2 if not path.startswith("transformer.h.1.attn")] + ["transformer.h.1.ssm"]
    made = plan(spec_for("gpt2"), paths, 3, RenameConfig(attn_name=["attention", "attn"]))
    assert [layer.attention is None for layer in made.layers] == [False, True, False]
    assert [part.kind for part in made.layers[1].parts] == ["mlp"]


def test_parts_may_be_ignored() -> None:
    made = gpt2(user=RenameConfig(ignore_attn=True, ignore_mlp=True))
    assert made.layers[0].attention is made.layers[0].mlp is None and made.layers[0].parts == ()
    assert "transformer.h.0" not in made.aliases


def test_a_part_that_the_user_names_hides_another_of_that_name() -> None:
    """The user says outright that `attn` plays the MLP: then `.mlp` is that, and the real `mlp` is listed as hidden."""
    made = gpt2(user=RenameConfig(mlp_name="attn", attn_name="mlp"))
    assert made.layers[0].mlp == "transformer.h.0.attn"
    assert made.aliases["transformer.h.0"]["mlp"] == "transformer.h.0.attn"
    assert "transformer.h.0.mlp" in made.shadowed
    assert made.resolve("layers.0.mlp") == "transformer.h.0.attn"
    # The model's own path means itself, whatever names lead elsewhere.
    assert made.resolve("transformer.h.0.mlp") == "transformer.h.0.mlp"


def test_a_spec_may_not_hide_a_real_child() -> None:
    paths = [*GPT2, *(f"transformer.h.{i}.self_attn" for i in range(3))]
    pieces = [spec_for("gpt2").where("layer.attention"), "'self_attn'", "the model's own transformer.h.0.self_attn"]
    failure(AliasConflictError, pieces, spec_for("gpt2"), paths, 3)


def test_conveniences_never_hide_a_real_child() -> None:
    made = plan(spec_for("gpt2"), [*GPT2, "model", "transformer.layers"], 3)
    assert "model" not in made.aliases[""] and "layers" not in made.aliases["transformer"]
    assert made.resolve("model") == "model"
    assert made.resolve("layers") == "transformer.h"


def test_rename_adds_names() -> None:
    made = gpt2(
        rename={
            "transformer": ["model", "body"],
            "transformer.h": "blocks",
            "attn": "my_attn",
            ".transformer.wpe": ".wpe",
        }
    )
    assert made.aliases[""]["blocks"] == "transformer.h"
    assert made.aliases["transformer.h.2"] == {
        "self_attn": "transformer.h.2.attn",
        "my_attn": "transformer.h.2.attn",
    }
    for name in ("blocks.2.my_attn", "body.layers.2.self_attn", "model.h.2.my_attn"):
        assert made.resolve(name) == "transformer.h.2.attn"
    assert made.resolve("wpe") == "transformer.wpe"


def test_rename_with_a_key_that_fits_nothing() -> None:
    pieces = ["rename={'transfromer': ...}", "no module 'transfromer'", "nearest    transformer"]
    failure(UnknownNameError, pieces, spec_for("gpt2"), GPT2, 3, rename={"transfromer": "model"})
    failure(UnknownNameError, ["transformer.h"], spec_for("gpt2"), GPT2, 3, rename={"transformer.hh": "model"})


@pytest.mark.parametrize(
    ("rename", "piece"),
    [
        ({"ln_1": "mlp"}, "the model's own transformer.h.0.mlp"),
        ({"ln_1": "self_attn"}, "a name of transformer.h.0.attn"),
        ({"transformer.wpe": "layers"}, "a name of transformer.h"),
        ({"ln_1": "a.b"}, "no name that Python takes"),
        ({"ln_1": ""}, "no name that Python takes"),
    ],
)
def test_rename_may_not_take_a_name(rename: dict[str, str | list[str]], piece: str) -> None:
    failure(
        AliasConflictError, [f"rename={{'{next(iter(rename))}': ...}}", piece], spec_for("gpt2"), GPT2, 3, rename=rename
    )


PLANS = {
    "gpt2": lambda: gpt2(rename={"attn": ["my_attn", "a"], "transformer.h": "blocks"}),
    "llama": lambda: plan(spec_for("llama"), LLAMA, 12),
    "opt": lambda: plan(spec_for("opt"), OPT, 2),
    "swapped": lambda: gpt2(user=RenameConfig(mlp_name="attn", attn_name="mlp")),
}


@lru_cache
def drawn(name: str) -> RenamePlan:
    return PLANS[name]()


@given(st.sampled_from(sorted(PLANS)), st.data())
def test_names_and_paths_are_inverse(name: str, data: st.DataObject) -> None:
    made = drawn(name)
    path = data.draw(st.sampled_from(sorted(made.paths)))
    assert made.resolve(path) == path
    names = made.names_of(path)
    assert names[0] == path and len(set(names)) == len(names)
    for spelled in names:
        assert made.resolve(spelled) == path
        assert made.names_of(spelled) == names


@given(st.sampled_from(sorted(PLANS)), st.data())
def test_whatever_resolves_is_a_known_name(name: str, data: st.DataObject) -> None:
    """A walk down any names, real and new, ends at a module that lists the walk among its names."""
    made, walked = drawn(name), ""
    for _ in range(data.draw(st.integers(1, 5))):
        here = made.resolve(walked)
        children = {p.rpartition(".")[2] for p in made.paths if p and p.rpartition(".")[0] == here}
        choices = sorted(children | set(made.aliases.get(here, {})))
        if not choices:
            break
        step = data.draw(st.sampled_from(choices))
        walked = f"{walked}.{step}" if walked else step
    assert walked in made.names_of(walked)


@given(st.permutations(GPT2), st.booleans())
def test_the_order_of_the_paths_does_not_matter(paths: list[str], as_set: bool) -> None:
    assert plan(spec_for("gpt2"), set(paths) if as_set else paths, 3) == gpt2()


def test_reading_and_planning_know_no_torch() -> None:
    here = set(sys.stdlib_module_names) | {"yaml", "nnterp"}
    for name in (
        "spec",
        "spec_reader",
        "conditions",
        "frozen",
        "errors",
        "architectures",
        "rename",
        "rename_plan",
        "dimensions",
    ):
        tree = ast.parse((Path(rename_module.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in imported} <= here
