"""What was found about a model as the YAML text of a specification, to be read like any other and kept by the user."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from nnterp.inference.layers import LayersDescription, PartDescription

__all__ = ["Findings", "write_yaml"]

HEADER = """\
# Inferred from the model's structure, by one forward pass: see "Models that no file serves" in architectures/README.md.
# Check it (nnterp check MODEL --spec FILE), say what only a reader can know in `notes`, and keep it.
"""
#: Parts of whose absence a specification gives the reason.
NULLABLE = ("attention", "mlp")
#: What these parts are called in every layer.
STANDARD = {"attention": "self_attn", "mlp": "mlp"}
#: What YAML takes for something else than a text.
WORDS = ("null", "true", "false", "yes", "no", "on", "off")
#: How wide a part may be in one line.
WIDTH = 108


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything that a specification says, as it was found."""

    model_type: str
    modules: Mapping[str, str | None]
    layers: LayersDescription
    embed: tuple[str, ...] = ()
    unembed: tuple[str, ...] = ()
    #: Products of config keys and numbers, by the key of the specification: `embedding_multiplier`, `logits.softcap`.
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: For each kind of part its multipliers, by their keys.
    multipliers: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    stream: Mapping[str, tuple[str, ...] | str] = dataclasses.field(default_factory=dict)
    dimensions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    written_over: tuple[str, ...] = ()
    positions_follow: str | None = None
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cannot: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_yaml(found: Findings) -> str:
    """The specification as text; what has the usual value is left out."""
    blocks = [
        HEADER + f"family: {_name(found.model_type)}\nmodel_types: [{_text(found.model_type)}]",
        _mapping("modules", {role: _text(path) for role, path in found.modules.items()}),
        _mapping("layer", _layer(found)),
    ]
    if found.layers.layout != "sequential":
        blocks.append(f"layout: {found.layers.layout}")
    if found.embed not in ((), ("embed_tokens",)):
        blocks.append(f"embed: {_list(found.embed)}")
    if found.unembed not in ((), ("ln_final", "lm_head")):
        blocks.append(f"unembed: {_list(found.unembed)}")
    if "embedding_multiplier" in found.numbers:
        blocks.append(f"embedding_multiplier: {_text(found.numbers['embedding_multiplier'])}")
    logits = {key: f"logits.{key}" for key in ("multiplier", "softcap")}
    written = {key: _text(found.numbers[name]) for key, name in logits.items() if name in found.numbers}
    blocks.append(_mapping("logits", written))
    stream = {key: each if isinstance(each, str) else _list(each) for key, each in found.stream.items()}
    blocks.append(_mapping("stream", stream))
    if found.positions_follow:
        blocks.append(f"positions_follow: {_text(found.positions_follow)}")
    if found.written_over:
        blocks.append(f"written_over: {_list(found.written_over)}")
    blocks.append(_mapping("dimensions", {key: _text(value) for key, value in found.dimensions.items()}))
    blocks.append(_mapping("absent", {key: _quoted(reason) for key, reason in found.absent.items()}))
    blocks.append(_mapping("cannot", {key: _quoted(reason) for key, reason in found.cannot.items()}))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _layer(found: Findings) -> dict[str, str]:
    parts = found.layers.parts
    order = ["attention", *(kind for kind in parts if kind not in (*NULLABLE, "also_added")), "mlp"]
    written = {kind: _part(parts.get(kind), found.multipliers.get(kind), kind) for kind in order}
    if "also_added" in parts:
        written["also_added"] = (
            f"\n    - {_part(parts['also_added'], found.multipliers.get('also_added'))}".replace("- \n    ", "- ")
            .replace("\n    ", "\n      ")
            .replace("\n      -", "\n    -")
        )
    if found.layers.router:
        written["router"] = _choice(found.layers.router)
    return written


def _part(part: PartDescription | None, multipliers: Mapping[str, str] | None, kind: str = "") -> str:
    if part is None:
        return "null"
    standard = STANDARD.get(kind, "")
    if any(path.startswith(f"{standard}.") for path in part.module) and standard:
        # What has the standard name must play the part: it stands around the module that does the work.
        first, last = part.input or part.module, part.output or part.module
        part = dataclasses.replace(part, module=(standard,), input=first, output=last)
    entries = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, tuple) and value:
            entries[field.name] = _choice(value)
    entries |= {name: _text(product) for name, product in (multipliers or {}).items()}
    if list(entries) == ["module"]:
        return entries["module"]
    flow = "{" + ", ".join(f"{key}: {value}" for key, value in entries.items()) + "}"
    return flow if len(flow) <= WIDTH else "".join(f"\n    {key}: {value}" for key, value in entries.items())


def _mapping(name: str, entries: Mapping[str, str]) -> str:
    if not entries:
        return ""
    return "\n".join([f"{name}:", *(f"  {key}: {value}".replace(": \n", ":\n") for key, value in entries.items())])


def _choice(paths: tuple[str, ...]) -> str:
    return _text(paths[0]) if len(paths) == 1 else _list(paths)


def _list(names: Iterable[str]) -> str:
    return f"[{', '.join(_text(name) for name in names)}]"


def _text(value: str | None) -> str:
    """A name as YAML has it: quoted where it could be taken for something else."""
    if value is None:
        return "null"
    # A number stays one; a path such as `0` or `1.0` may not become one.
    plain = re.fullmatch(r"[A-Za-z_][\w./ ()*-]*|\d+(\.\d+)?(e[+-]\d+)?( [*/] [\w.()]+)*", value)
    return (
        value if plain and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off") else _quoted(value)
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _name(model_type: str) -> str:
    return _text(model_type)
