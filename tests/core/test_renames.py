"""New names for modules: planned as strings, and then as good as the old ones wherever a name is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnsight_core import LanguageModel, NNsight, NNsightError, NoSuchEntryError, NoSuchModuleError, RenameError
from nnsight_core.renames import check_aliases, plan_renames
from nnterp import StandardizedTransformer
from nnterp.errors import RenamingError
from nnterp.rename import plan
from nnterp.spec import ArchitectureSpec
from tests.families import tiny_model

IDS = [5, 6, 7, 8]

PATHS = [
    "",
    "transformer",
    "transformer.h",
    "transformer.h.0",
    "transformer.h.0.attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.0.mlp",
    "transformer.h.0.mlp.c_proj",
    "transformer.h.1",
    "transformer.h.1.attn",
    "transformer.ln_f",
    "lm_head",
]

PLANS: dict[str, tuple[Any, dict[str, dict[str, str]]]] = {
    "a name": ({"transformer": "model"}, {"": {"model": "transformer"}}),
    "a name that occurs often": (
        {"attn": "self_attn"},
        {
            "transformer.h.0": {"self_attn": "transformer.h.0.attn"},
            "transformer.h.1": {"self_attn": "transformer.h.1.attn"},
        },
    ),
    "a path": ({"transformer.h": "layers"}, {"": {"layers": "transformer.h"}}),
    "a path from any module": ({"attn.c_proj": "out"}, {"transformer.h.0": {"out": "transformer.h.0.attn.c_proj"}}),
    "a path from the root": ({".lm_head": "unembed"}, {"": {"unembed": "lm_head"}}),
    "a new name at the root": ({"h": ".layers"}, {"": {"layers": "transformer.h"}}),
    "a new name below another module": ({"lm_head": "transformer.head"}, {"transformer": {"head": "lm_head"}}),
    "several new names": ({"lm_head": ["head", "unembed"]}, {"": {"head": "lm_head", "unembed": "lm_head"}}),
    "an entry of a list": ({"h.0": "first"}, {"transformer": {"first": "transformer.h.0"}}),
    "new names in keys": (
        {"model.blocks": "layers", "h": "blocks", "transformer": "model"},
        {
            "": {"model": "transformer", "layers": "transformer.h"},
            "transformer": {"blocks": "transformer.h"},
        },
    ),
    "a new name below a new name": (
        {"transformer": "model", "lm_head": "model.head"},
        {"": {"model": "transformer"}, "transformer": {"head": "lm_head"}},
    ),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan(name: str) -> None:
    rename, expected = PLANS[name]
    assert plan_renames(rename, PATHS) == expected
    backwards = dict(reversed(rename.items()))
    if name != "a new name below a new name":
        assert plan_renames(backwards, PATHS) == expected


MISTAKES: dict[str, tuple[Any, str]] = {
    "fits nothing": ({"transfromer": "model"}, r"no module 'transfromer'.\nDid you mean 'transformer'"),
    "a path that fits nothing": ({"transformer.hh": "layers"}, r"Did you mean 'transformer.h'"),
    "only at the root": ({".attn": "self_attn"}, r"no module '.attn'.\nDid you mean 'attn'"),
    "the name of another module": ({"lm_head": "transformer"}, r"has a module 'transformer' already"),
    "its own name": ({"lm_head": "lm_head"}, r"'lm_head' is called so anyway"),
    "two modules of one name": ({"lm_head": "x", "transformer": "x"}, r"'x' is a name of 'lm_head' already"),
    "many modules of one name": ({"attn": ".attention"}, r"'transformer.h.1.attn'"),
    "twice the same": ({"lm_head": "x", ".lm_head": "x"}, r"is given to it twice"),
    "twice in a list": ({"lm_head": ["x", "x"]}, r"gives the same name twice"),
    "below nothing": ({"lm_head": "decoder.out"}, r"no module 'decoder' for 'out' to stand below"),
    "taken by an attribute": ({"lm_head": "config"}, r"the model has an attribute 'config' already"),
    "no dict": ("transformer", r"rename: it is a str, not a dict"),
    "pairs": ([("transformer", "model")], r"rename: it is a list, not a dict"),
    "a key that is no string": ({3: "x"}, r"3 is no name of a module"),
    "an empty key": ({"": "x"}, r"'' is no name of a module"),
    "dots in a row": ({"transformer..h": "x"}, r"is no name of a module"),
    "a value that is no name": ({"lm_head": 3}, r"rename\['lm_head'\]: 3 is no name"),
    "an empty list": ({"lm_head": []}, r"\[\] is no name"),
    "an entry that is no name": ({"lm_head": ["x", 3]}, r"3 is no name that Python takes"),
    "a number": ({"lm_head": "0"}, r"'0' is no name that Python takes"),
    "a word of Python's": ({"lm_head": "class"}, r"'class' is no name that Python takes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(name: str) -> None:
    rename, message = MISTAKES[name]
    with pytest.raises(RenameError, match=message):
        plan_renames(rename, PATHS, lambda path, new: (path, new) == ("", "config"))


def test_an_alias_that_leads_nowhere_is_a_mistake() -> None:
    check_aliases({"": {"layers": "transformer.h"}}, PATHS)
    with pytest.raises(RenameError, match=r"Did you mean 'transformer\.h'"):
        check_aliases({"": {"layers": "transformer.hh"}}, PATHS)
    with pytest.raises(RenameError, match="no module 'transformr'"):
        NNsight(tiny_model("gpt2"), aliases={"transformr": {"layers": "transformer.h"}})


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_name_leads_to_the_module_that_it_was_given_to(data: st.DataObject) -> None:
    """Whatever is renamed: a name found on the model is the module's, and each module that a key fits has its name."""

    class Node(torch.nn.Module):
        pass

    names = st.sampled_from("abcd")

    def tree(depth: int) -> torch.nn.Module:
        node = Node()
        for name in data.draw(st.sets(names, max_size=3 if depth else 0)):
            node.add_module(name, tree(depth - 1))
        return node

    root = tree(3)
    modules = dict(root.named_modules())
    ends = {".".join(path.split(".")[-length:]) for path in modules if path for length in (1, 2)}
    assume(ends)
    rename = data.draw(st.dictionaries(st.sampled_from(sorted(ends)), st.sampled_from("uvwxyz"), min_size=1))
    try:
        model = NNsight(root, rename=rename)
    except RenameError as error:
        # Only ever because two modules side by side would have one name.
        assert " is a name of " in str(error)
        return
    for key, new in rename.items():
        fits = [path for path in modules if path == key or path.endswith(f".{key}")]
        assert fits
        for path in fits:
            holder = model.get(path.removesuffix(key).rstrip("."))
            assert getattr(holder, new)._module is modules[path]
            assert getattr(holder, new).path == path
            assert model.get(".".join(part for part in (holder.path, new) if part))._module is modules[path]


# What a renamed model is like.


@pytest.fixture(scope="module")
def module() -> Any:
    return tiny_model("gpt2")


RENAME: dict[str, str | list[str]] = {
    "transformer": "model",
    "transformer.h": ["layers", "blocks"],
    "attn": "self_attn",
    "lm_head": "model.head",
}


@pytest.fixture(scope="module")
def model(module: Any) -> LanguageModel:
    return LanguageModel(module, rename=RENAME)


def test_old_and_new_names_are_one_module(module: Any, model: LanguageModel) -> None:
    attention = module.transformer.h[1].attn
    for envoy in (
        model.transformer.h[1].attn,
        model.model.h[1].self_attn,
        model.layers[1].self_attn,
        model.blocks[-2].attn,
        model.get("layers.1.self_attn"),
        model.get("model.h.1.attn"),
        model["transformer.h.1.self_attn"],
    ):
        assert envoy._module is attention
        assert envoy.path == "transformer.h.1.attn"
    assert model.model.head._module is module.lm_head
    assert {"model", "layers", "blocks", "transformer", "lm_head", "trace"} <= set(dir(model))
    assert "self_attn" in dir(model.layers[0])
    assert set(vars(module)["_modules"]) == {"transformer", "lm_head"}


def test_values_are_read_and_set_by_new_names(module: Any, model: LanguageModel) -> None:
    with LanguageModel(module).trace(IDS) as tracer:
        tracer.transformer.h[0].attn.output[0][:] = 0
        expected = tracer.output.logits.save()
    with model.trace(IDS) as tracer:
        tracer.layers[0].self_attn.output[0][:] = 0
        cache = tracer.cache(modules=["layers.1", model.blocks[2], "model.head"])
        logits = model.output.logits.save()
    assert torch.equal(logits, expected)
    assert cache.keys() == ["transformer.h.1", "transformer.h.2", "lm_head"]
    entry = cache["transformer.h.1"]
    for name in ("layers.1", "blocks.1", "model.h.1", "transformer.h.1", "model.transformer.h.1"):
        assert cache[name] is entry and name in cache
    assert torch.equal(cache.layers[1].output, entry.output)
    assert torch.equal(cache.model.h[1].output, entry.output)
    with pytest.raises(NoSuchModuleError, match="layers"):
        assert cache["layer.1"]


def test_an_error_names_new_names_too(model: LanguageModel) -> None:
    with pytest.raises(NoSuchModuleError, match="Did you mean 'layers'"):
        model.layer  # noqa: B018 - the access is what fails
    with pytest.raises(NoSuchEntryError, match=r"transformer.h \(ModuleList\) has 3 modules, \[0\] to \[2\]; \[7\]"):
        model.layers[7]


def test_printing_shows_both_names() -> None:
    net = torch.nn.Sequential(*[torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}) for _ in range(2)])
    net.add_module("tail", torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.ReLU(), torch.nn.ReLU(), torch.nn.GELU()]))
    assert str(NNsight(net)) == str(net)
    shown = str(NNsight(net, rename={"tail.1": "tail.middle", "0.a": ".first", ".1": ["one", "second"]}))
    assert shown == (
        "Sequential(\n"
        "  (0): ModuleDict(\n"
        "    (a): Linear(in_features=2, out_features=2, bias=True)\n"
        "  )\n"
        "  (1 -> one, second): ModuleDict(\n"
        "    (a): Linear(in_features=2, out_features=2, bias=True)\n"
        "  )\n"
        "  (tail): ModuleList(\n"
        "    (0): ReLU()\n"
        "    (1 -> middle): ReLU()\n"
        "    (2): ReLU()\n"
        "    (3): GELU(approximate='none')\n"
        "  )\n"
        "  (0.a -> first)\n"
        ")"
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_without_the_new_names_the_text_is_torchs(name: str) -> None:
    module = tiny_model(name)
    (layers,) = [path for path, each in module.named_modules() if path.endswith((".h", ".layers"))]
    shown = str(NNsight(module, rename={f".{layers}": "blocks"}))
    assert shown == f"{str(module)[:-2]}\n  ({layers} -> blocks)\n)"


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"lm_head": "config"}, "the model has an attribute 'config' already"),
        ({"attn": "output"}, "transformer.h.0 has an attribute 'output' already"),
        ({"lm_head": "generate"}, "the model has an attribute 'generate' already"),
        ({"lm_head": "tokenizer"}, "the model has an attribute 'tokenizer' already"),
        ({"transfromer": "model"}, "Did you mean 'transformer'"),
    ],
)
def test_a_name_that_would_never_be_reached_is_refused(module: Any, rename: dict[str, str], message: str) -> None:
    with pytest.raises(RenameError, match=message):
        LanguageModel(module, rename=rename)


def test_a_name_that_the_standardised_layer_has_for_something_else_is_refused(module: Any) -> None:
    for name in ("logits", "num_layers", "layers_output", "skip_layer", "trace"):
        with pytest.raises(
            RenameError, match=f"the new name '{name}' of 'lm_head': the model has an attribute '{name}'"
        ):
            StandardizedTransformer(module, rename={"lm_head": name})


def test_a_module_at_two_places_has_the_names_of_both() -> None:
    shared = torch.nn.Linear(2, 2)
    net = torch.nn.ModuleDict({"a": torch.nn.Sequential(shared), "b": torch.nn.Sequential(shared)})
    model = NNsight(net, rename={"0": "only"})
    assert model.a.only._module is shared and model.b.only._module is shared


def test_the_standardised_layer_plans_the_same_names(gpt2_spec: ArchitectureSpec, module: Any) -> None:
    """Both packages take `rename=`; a name means the same in both."""
    paths = [name for name, _ in module.named_modules()]
    standard = plan(gpt2_spec, paths, 3).aliases
    for rename in (
        {"transformer.h": "blocks"},
        {"h": "blocks"},
        {"attn": ["attention", "mixer"]},
        {"attn.c_proj": "out"},
        {".lm_head": "unembed"},
        {"h": ".blocks"},
    ):
        made = plan(gpt2_spec, paths, 3, rename=rename).aliases
        new = {
            holder: {name: target for name, target in names.items() if name not in standard.get(holder, {})}
            for holder, names in made.items()
        }
        assert {holder: names for holder, names in new.items() if names} == plan_renames(rename, paths)
    with pytest.raises(RenamingError):
        plan(gpt2_spec, paths, 3, rename={"transfromer": "x"})


@pytest.fixture
def gpt2_spec(module: Any) -> ArchitectureSpec:
    from nnterp.architectures import spec_for

    return spec_for("gpt2").for_config(module.config)


# Going through the tree.


def test_modules_are_envoys_under_torchs_names(module: Any, model: LanguageModel) -> None:
    expected = list(module.named_modules())
    found = model.named_modules()
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(envoy._module is each for (_, envoy), (_, each) in zip(found, expected, strict=True))
    assert all(model.get(name)._module is envoy._module for name, envoy in found)
    assert [each.path for each in model.modules()] == [name for name, _ in expected]
    below = model.transformer.h[1].named_modules()
    assert [name for name, _ in below] == [name for name, _ in module.transformer.h[1].named_modules()]
    assert below[1][1].path == "transformer.h.1.ln_1"
    assert [name for name, _ in model.named_children()] == [name for name, _ in module.named_children()]
    assert [each._module for each in model.transformer.children()] == list(module.transformer.children())


def test_some_of_the_modules(module: Any, model: LanguageModel) -> None:
    wanted = model.named_modules(include_fn=lambda each: each.path.endswith("mlp"))
    assert [name for name, _ in wanted] == [f"transformer.h.{index}.mlp" for index in range(3)]
    with model.trace(IDS):
        sizes = [each.output.norm().item() for each in model.modules(lambda each: each.path.endswith("mlp"))]
    assert len(sizes) == 3 and all(sizes)


def test_a_module_at_two_places_comes_once() -> None:
    shared = torch.nn.Linear(2, 2)
    net = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    assert [name for name, _ in NNsight(net).named_modules()] == [name for name, _ in net.named_modules()]
    assert [name for name, _ in NNsight(net).named_children()] == ["0", "1", "2"]


def test_a_new_name_that_hides_a_module_does_not_lead_the_walk_astray(module: Any) -> None:
    model = NNsight(module, aliases={"transformer": {"wte": "transformer.wpe"}})
    assert dict(model.named_modules())["transformer.wte"]._module is module.transformer.wte


def test_every_mistake_of_names_is_one_of_the_packages_own() -> None:
    assert issubclass(RenameError, NNsightError) and issubclass(RenameError, ValueError)
