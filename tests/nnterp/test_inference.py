"""With its file taken away, a family is opened by its structure: the same parts, in the same places, the same numbers.

Held for every model type of the matrix. What structure alone does not say as the file does is listed here with its
reason; a type that is recovered and listed, or neither, fails.
"""

from __future__ import annotations

from typing import Any

import pytest

from nnterp import StandardizedTransformer, naming
from nnterp.architectures import load_specs
from nnterp.conditions import config_value
from nnterp.inference import infer_spec
from nnterp.inference.errors import LayersNotFoundError
from nnterp.naming import NamedModules, name_modules
from nnterp.rename import PartPlan
from tests.families import FAMILY_VARIANTS, IDS
from tests.matrix.models import MODEL_TYPES, tiny_model

HELD = "What a layer itself holds is not looked for among the factors of its sum, so that none is found."
#: What inference says otherwise than the file, and why.
DIFFERENT = {
    **dict.fromkeys(("beam", "doge", "zaya"), HELD),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gpt_neox_japanese"), HELD),
    "blt": "Of its three stacks the larger, over patches, is taken for the layers.",
    "cpmant": "The head is given the tokens' positions alone, and no module cuts off those before them.",
    "deepseek_v4": "The config counts heads of keys, and there is one, which is repeated before it is multiplied.",
    "longcat_flash": "Five parts add to the stream: more than are looked for in a sum.",
    "qwen4_exp": "Several streams side by side, mixed by modules that are no norms.",
    "qwen4_exp_text": "Several streams side by side, mixed by modules that are no norms.",
    "xlnet": "The attention adds what no module gives, so that nothing is said of what is added.",
    "xmod": "Language adapters are added after the MLP, so that nothing is said of what is added.",
}
#: What inference does not open.
NOT_FOUND = {
    "reformer": "Layers are reversible, and a layer's input is not the stream that the one before gave.",
    "xlm": "The model has no list of layers: attentions, norms and MLPs are in lists of their own.",
}


def part_differences(kind: str, own: PartPlan | None, wanted: PartPlan | None, compare_sums: bool) -> list[str]:
    if own is None or wanted is None:
        return [] if own is wanted else [f"{kind} is {'missing' if own is None else 'one too many'}"]
    fields = ["module", "input", "output"]
    if compare_sums:
        fields += ["contribution", "norm", "stream", "sum_norm"]
    pairs = [(field, getattr(own, field), getattr(wanted, field)) for field in fields]
    return [f"{kind}.{field} is {one}, not {other}" for field, one, other in pairs if one != other]


def differences(own: NamedModules, wanted: NamedModules, config: Any) -> list[str]:
    """What inference says otherwise than the file, in words."""
    found = []
    for name in ("modules", "embed", "unembed"):
        one, other = getattr(own.plan, name), getattr(wanted.plan, name)
        if one != other:
            found.append(f"{name} is {one}, not {other}")
    # Files list what has a standard name; inference lists whatever it saw written into.
    if not set(wanted.plan.written_over) <= set(own.plan.written_over):
        found.append(f"written_over is {own.plan.written_over}, not {wanted.plan.written_over}")
    for name in ("layout", "stream", "positions_follow"):
        if getattr(own.spec, name) != getattr(wanted.spec, name):
            found.append(f"{name} is {getattr(own.spec, name)}, not {getattr(wanted.spec, name)}")
    if own.sizes != wanted.sizes:
        found.append(f"{own.sizes}, not {wanted.sizes}")
    compare_sums = "contributions" not in wanted.spec.cannot
    for one, other in zip(own.plan.layers, wanted.plan.layers, strict=False):
        kinds = dict.fromkeys(part.kind for part in (*one.parts, *other.parts))
        for kind in kinds:
            found += part_differences(kind, one.part(kind), other.part(kind), compare_sums)
        if len(one.parts) != len(other.parts):
            found.append(f"{len(one.parts)} parts, not {len(other.parts)}")
        if one.router != other.router:
            found.append(f"the router is {one.router}, not {other.router}")
    for name in ("contributions", "project_on_vocab", "chain"):
        if name in own.spec.cannot and name not in wanted.spec.cannot:
            found.append(f"{name} is given up")
    return found + number_differences(own, wanted, config)


def number_differences(own: NamedModules, wanted: NamedModules, config: Any) -> list[str]:
    def value(multiplier: Any) -> float:
        is_held = multiplier is not None and "layer." in multiplier.text
        return 1.0 if multiplier is None or is_held else float(multiplier.value(config))

    def cap(key: str | None) -> float | None:
        if key is None:
            return None
        number = float(key) if key.replace(".", "").isdecimal() else config_value(config, key)
        return None if number is None else float(number)

    pairs = {
        "embedding_multiplier": (own.spec.embedding_multiplier, wanted.spec.embedding_multiplier),
        "logits.multiplier": (own.spec.logits.multiplier, wanted.spec.logits.multiplier),
    }
    for one, other in zip(own.plan.layers, wanted.plan.layers, strict=False):
        for part in other.parts:
            mine = one.part(part.kind)
            if mine is not None and "contributions" not in wanted.spec.cannot:
                pairs[f"{part.kind}.multiplier"] = (mine.multiplier, part.multiplier)
    found = [name for name, (one, other) in pairs.items() if value(one) != pytest.approx(value(other), rel=1e-3)]
    return found + (["softcap"] if cap(own.spec.logits.softcap) != cap(wanted.spec.logits.softcap) else [])


def no_specs() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - set(NOT_FOUND)))
def test_structure_alone_recovers_the_file(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type)
    wanted = name_modules(model)
    monkeypatch.setattr(naming, "load_specs", no_specs)
    own = name_modules(model)
    assert own.spec.source.startswith("<inferred")
    seen = differences(own, wanted, model.config)
    if model_type in DIFFERENT:
        assert seen, f"{model_type} is recovered: take it off the list"
    else:
        assert not seen, "\n".join([*seen, own.spec.text])
    # What was found is held against the model by numbers, as a file is.
    StandardizedTransformer(model)


@pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)
def test_structure_alone_recovers_every_variant(
    model_type: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type, **overrides)
    wanted = name_modules(model)
    monkeypatch.setattr(naming, "load_specs", no_specs)
    assert not differences(name_modules(model), wanted, model.config)


@pytest.mark.parametrize("model_type", sorted(NOT_FOUND))
def test_what_is_not_found_says_what_was_seen(model_type: str) -> None:
    with pytest.raises(LayersNotFoundError, match=r"(?s)layers_name=.*spec='my_model\.yaml'"):
        infer_spec(tiny_model(model_type))


def test_nine_families_of_ten_are_recovered() -> None:
    assert set(DIFFERENT) | set(NOT_FOUND) <= set(MODEL_TYPES)
    assert set(MODEL_TYPES) <= set(load_specs())
    assert len(DIFFERENT) + len(NOT_FOUND) <= len(MODEL_TYPES) / 10
