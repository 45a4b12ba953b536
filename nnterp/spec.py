"""YAML text -> frozen `ArchitectureSpec`: what a family of models is made of, and what its parts are called.

    spec = parse_spec(Path("architectures/gpt2.yaml").read_text(), "architectures/gpt2.yaml")
    spec.modules.layers                  # 'transformer.h'
    spec.where("modules.layers")         # 'architectures/gpt2.yaml:6'
    spec.for_config(config)              # the same, with what this config changes about the layout

Every key of the format is one field of one of the dataclasses below, with the function that reads it; a new key is a
new field. Nothing here knows torch or transformers. `architectures/README.md` explains the format to writers.
"""
# `key(...)` makes a dataclass field, which ruff cannot know: it takes the call for a shared mutable default.
# ruff: noqa: RUF009

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from nnterp.conditions import Condition, config_value, read_conditions
from nnterp.errors import MissingKeyError, SpecValueError, UnknownKeyError, did_you_mean
from nnterp.frozen import FrozenMapping
from nnterp.spec_reader import (
    Place,
    choice,
    compose,
    key,
    merge,
    read_name,
    read_names,
    read_path,
    read_path_or_null,
    read_paths,
    read_some_names,
    section,
)

__all__ = [
    "ArchitectureSpec",
    "Block",
    "Condition",
    "config_value",
    "DimensionKeys",
    "Layer",
    "Logits",
    "Mlp",
    "Modules",
    "parse_spec",
    "Variant",
]


@dataclasses.dataclass(frozen=True)
class Modules:
    """The parts that a model has once, each with its full path from the causal language model."""

    embed_tokens: str | None = key(read_path_or_null, "the path of the input embedding")
    layers: str = key(read_path, "the path of the list of layers")
    ln_final: str | None = key(read_path_or_null, "the path of the norm after the last layer")
    lm_head: str | None = key(read_path_or_null, "the path of the module that makes logits")


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A layer's MLP: one module, or (`module` is None) a first and a last one with no module around them."""

    module: str | None
    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class _MlpEnds:
    input: str = key(read_path, "the path of the MLP's first module")
    output: str = key(read_path, "the path of the MLP's last module")


def _mlp(place: Place) -> Mlp | None:
    if place.is_null():
        return None
    if isinstance(place.node, yaml.MappingNode):
        ends = section(_MlpEnds)(place)
        return Mlp(module=None, input=ends.input, output=ends.output)
    path = read_path(place)
    return Mlp(module=path, input=path, output=path)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The parts of one layer, with paths relative to it."""

    attention: str | None = key(read_path_or_null, "the path of the attention, relative to the layer")
    mlp: Mlp | None = key(_mlp, "the path of the MLP, relative to the layer, or {input: ..., output: ...}")
    #: Children that see (batch * position, hidden) where the others see (batch, position, hidden).
    flattened: tuple[str, ...] = key(read_paths, "children that see all tokens in one axis", ())


@dataclasses.dataclass(frozen=True)
class Block:
    """How a layer's parts are put together around the residual stream. Paths are relative to the layer."""

    layout: str = key(choice("sequential", "parallel"), "sequential or parallel")
    norm: str = key(choice("pre", "post", "sandwich"), "pre, post or sandwich")
    order: tuple[str, ...] = key(read_paths, "the layer's direct children in the order in which they run")
    #: What is added to the residual stream; None: the output of the attention or the MLP itself.
    attention_contribution: str | None = key(read_path_or_null, "the module whose output is added", None)
    mlp_contribution: str | None = key(read_path_or_null, "the module whose output is added", None)
    #: Norms that the residual stream itself goes through after each addition; where there is one, the plain sum fails.
    attention_sum_norm: str | None = key(
        read_path_or_null, "the norm of the stream after the attention was added", None
    )
    mlp_sum_norm: str | None = key(read_path_or_null, "the norm of the stream after the MLP was added", None)

    @property
    def sum_holds(self) -> bool:
        """Whether layer output == layer input + attention's contribution + MLP's contribution."""
        return self.attention_sum_norm is None and self.mlp_sum_norm is None


@dataclasses.dataclass(frozen=True)
class Logits:
    """What happens to the numbers after the last module of `unembed`."""

    #: The config key of the cap in logits = cap * tanh(x / cap); a null in the config means no cap.
    softcap: str | None = key(read_name, "a config key", None)


@dataclasses.dataclass(frozen=True)
class DimensionKeys:
    """For each dimension the config keys that may hold it; the first that is there and not null wins."""

    num_layers: tuple[str, ...] = key(read_names, "a config key, or a list of them")
    num_heads: tuple[str, ...] = key(read_names, "a config key, or a list of them")
    hidden_size: tuple[str, ...] = key(read_names, "a config key, or a list of them")
    vocab_size: tuple[str, ...] = key(read_names, "a config key, or a list of them")
    #: None of them set: as many as num_heads.
    num_kv_heads: tuple[str, ...] = key(read_names, "a config key, or a list of them", ())
    #: None of them set: hidden_size // num_heads.
    head_dim: tuple[str, ...] = key(read_names, "a config key, or a list of them", ())


@dataclasses.dataclass(frozen=True)
class Variant:
    """A layout that some configs of the family have: all of `when` must hold."""

    when: tuple[Condition, ...]
    line: int

    def holds(self, config: Mapping[str, Any] | Any) -> bool:
        """Whether this config has this layout."""
        return all(condition.holds(config) for condition in self.when)


def _variants(place: Place) -> tuple[Variant, ...]:
    allowed = ["when", *VARYING]
    variants = []
    for item in place.items("a list of variants"):
        entries = item.entries()
        for name, entry in entries.items():
            if name not in allowed:
                raise UnknownKeyError(item.source, entry.line, item.named, name, allowed)
        if "when" not in entries:
            meaning = "the config keys and values that make the variant apply"
            raise MissingKeyError(item.source, item.line, item.named, "when", [*entries], meaning)
        variants.append(Variant(read_conditions(entries["when"]), item.line))
    return tuple(variants)


def _absent(place: Place) -> Mapping[str, str]:
    parts = [field.name for kind in (Modules, Layer) for field in dataclasses.fields(kind) if field.name in PARTS]
    reasons: dict[str, str] = {}
    for name, entry in place.entries().items():
        if name not in parts:
            raise UnknownKeyError(place.source, entry.line, place.named, name, parts)
        if not entry.is_null():
            reasons[name] = read_name(entry)
    return FrozenMapping(reasons)


def _note(place: Place) -> str:
    return place.text("text").strip()


@dataclasses.dataclass(frozen=True)
class ArchitectureSpec:
    """What one family of models is made of. Made by `parse_spec`; immutable.

    A family's layout may depend on the config; `for_config` gives the spec of one model.
    """

    family: str = key(read_name, "the family's name")
    model_types: tuple[str, ...] = key(read_some_names, "the `model_type`s of the configs that the file serves")
    modules: Modules = key(section(Modules), "the parts that a model has once")
    layer: Layer = key(section(Layer), "the parts of one layer")
    block: Block = key(section(Block), "how a layer's parts are put together")
    unembed: tuple[str, ...] = key(read_paths, "the modules that make logits of the last layer's output, in turn")
    dimensions: DimensionKeys = key(section(DimensionKeys), "the config keys of the dimensions")
    embed: tuple[str, ...] = key(read_paths, "the modules that make vectors of the tokens, in turn", ("embed_tokens",))
    logits: Logits = key(section(Logits), "what happens after the last module of `unembed`", Logits())
    variants: tuple[Variant, ...] = key(_variants, "layouts that depend on the config", ())
    absent: Mapping[str, str] = key(_absent, "what the family has not, and why", FrozenMapping())
    notes: str = key(_note, "what a reader should know", "")

    source: str = dataclasses.field(default="", compare=False)
    #: Every value's line, by its path in the YAML, such as 'modules.layers' or 'block.order.2'.
    lines: Mapping[str, int] = dataclasses.field(default=FrozenMapping(), compare=False, repr=False)
    text: str = dataclasses.field(default="", compare=False, repr=False)

    def line_of(self, path: str) -> int:
        """The line on which a value stands; for a default, the line of what encloses it.

        spec.line_of("modules.ln_final")        # 7
        """
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path, 1)

    def where(self, path: str) -> str:
        """File and line of a value, as an editor opens it: 'architectures/gpt2.yaml:7'."""
        return f"{self.source}:{self.line_of(path)}"

    def for_config(self, config: Mapping[str, Any] | Any) -> ArchitectureSpec:
        """The spec of one model: every variant that holds for this config, laid over the base in file order.

            spec.for_config({"use_parallel_residual": False}).block.layout        # 'sequential'

        Lines then are those of the variants' values. The result has no variants left. Raises a `SpecError` where
        variants that hold at once contradict each other.
        """
        if not self.variants:
            return self
        base, overlays = _split(compose(self.text, self.source), self.source)
        for variant, overlay in zip(self.variants, overlays, strict=True):
            if variant.holds(config):
                base = merge(base, overlay)
        return _build(base, self.source, "")

    @property
    def attention_contribution(self) -> str | None:
        """The module, relative to the layer, whose output is what attention adds to the residual stream."""
        return self.block.attention_contribution or self.layer.attention

    @property
    def mlp_contribution(self) -> str | None:
        """The module, relative to the layer, whose output is what the MLP adds to the residual stream."""
        return self.block.mlp_contribution or (self.layer.mlp.output if self.layer.mlp else None)


ROLES = tuple(field.name for field in dataclasses.fields(Modules))
#: Parts that a family may lack, if it says why.
PARTS = (*(role for role in ROLES if role != "layers"), "attention", "mlp")
VARYING = ("modules", "layer", "block", "embed", "unembed", "logits", "dimensions", "absent")


def parse_spec(text: str, source: str) -> ArchitectureSpec:
    """Reads one family's YAML; `source` is the file's name, for messages.

        spec = parse_spec(text, "architectures/gpt2.yaml")

    Raises a `SpecError` that names file and line: an unknown, double or missing key, a value of the wrong kind, an
    empty path, a role that does not exist, parts that contradict each other. Each variant is checked as well.
    """
    node = compose(text, source)
    spec = _build(node, source, text)
    base, overlays = _split(node, source)
    for overlay in overlays:
        _build(merge(base, overlay), source, "")
    return spec


def _split(node: yaml.Node, source: str) -> tuple[yaml.Node, list[yaml.Node]]:
    """A file without its variants, and what each of its variants lays over it."""
    root = Place(source, "", 1, node)
    variants = root.entries().get("variants")
    overlays: list[yaml.Node] = [item.without("when") for item in variants.items("")] if variants else []
    return root.without("variants"), overlays


def _build(node: yaml.Node, source: str, text: str) -> ArchitectureSpec:
    root = Place(source, "", 1, node)
    spec = section(ArchitectureSpec)(root)
    spec = dataclasses.replace(spec, source=source, lines=FrozenMapping(dict(root.lines())), text=text)
    for check in (_check_absent, _check_chains, _check_norms, _check_order):
        check(spec)
    return spec


def _check_absent(spec: ArchitectureSpec) -> None:
    """A part is there or not there for a reason; never both, never neither."""
    paths = {f"modules.{role}": getattr(spec.modules, role) for role in ROLES}
    paths |= {"layer.attention": spec.layer.attention, "layer.mlp": spec.layer.mlp}
    for path, value in paths.items():
        part = path.rpartition(".")[2]
        if value is None and part not in spec.absent:
            raise MissingKeyError(
                spec.source,
                spec.line_of(path),
                "`absent`",
                part,
                [*spec.absent],
                f"why `{path}` is null, in one sentence",
            )
        if value is not None and part in spec.absent:
            raise SpecValueError(
                spec.source,
                spec.line_of(f"absent.{part}"),
                f"`absent.{part}` gives a reason for a part that is there.",
                found=f"`{path}` on line {spec.line_of(path)}",
                expected=f"`{path}: null`, or no reason",
                mend=f"Take '{part}' out of `absent`, or write null for `{path}`.",
            )


def _check_chains(spec: ArchitectureSpec) -> None:
    """The steps of `embed` and `unembed` are roles or full paths."""
    for name in ("embed", "unembed"):
        chain: tuple[str, ...] = getattr(spec, name)
        if not chain:
            raise SpecValueError(
                spec.source,
                spec.line_of(name),
                f"`{name}` is empty.",
                found="[]",
                expected="at least one role or full path",
                mend="Leave the key out to have the default." if name == "embed" else "Write [ln_final, lm_head].",
            )
        for index, step in enumerate(chain):
            if "." not in step and step not in ROLES:
                raise SpecValueError(
                    spec.source,
                    spec.line_of(f"{name}.{index}"),
                    f"`{name}` has the role '{step}', which does not exist.",
                    found=step,
                    expected=f"a role ({', '.join(ROLES)}) or a full path such as 'model.norm'",
                    mend=did_you_mean(step, ROLES) or "Name it under `modules` if it is one of the roles.",
                )


def _check_norms(spec: ArchitectureSpec) -> None:
    """`norm: post` is for those layers whose stream itself goes through norms, and says which."""
    has_post = spec.block.norm == "post"
    for part in ("attention", "mlp"):
        path = f"block.{part}_sum_norm"
        given = getattr(spec.block, f"{part}_sum_norm") is not None
        if given == (has_post and getattr(spec.layer, part) is not None):
            continue
        fact = f"`block.norm` is {spec.block.norm}, and `{path}` is {'given' if given else 'not'}."
        raise SpecValueError(
            spec.source,
            spec.line_of(path if given else "block.norm"),
            fact,
            found=f"norm: {spec.block.norm} on line {spec.line_of('block.norm')}",
            expected="norm: post together with attention_sum_norm and mlp_sum_norm, or none of them",
            mend="A norm of the stream after an addition is a `..._sum_norm`; a norm of what is added, before it is "
            "added, is a `..._contribution` (norm: sandwich).",
        )


def _check_order(spec: ArchitectureSpec) -> None:
    """What a spec says about a layer's children agrees with the order in which it says they run."""
    mlp = spec.layer.mlp
    named = {
        "layer.attention": spec.layer.attention,
        "layer.mlp.input": mlp.input if mlp else None,
        "layer.mlp.output": mlp.output if mlp else None,
        **{f"layer.flattened.{i}": path for i, path in enumerate(spec.layer.flattened)},
        **{f"block.{f.name}": getattr(spec.block, f.name) for f in dataclasses.fields(Block) if f.default is None},
    }
    for path, value in named.items():
        child = value.partition(".")[0] if value else None
        if child is not None and child not in spec.block.order:
            raise SpecValueError(
                spec.source,
                spec.line_of(path),
                f"`{path}` is in '{child}', which `block.order` does not have.",
                found=f"{value}; the order on line {spec.line_of('block.order')} is {', '.join(spec.block.order)}",
                expected="a child of the layer that runs",
                mend=did_you_mean(child, spec.block.order) or f"Put '{child}' into `block.order` where it runs.",
            )
    for index, child in enumerate(spec.block.order):
        if "." in child:
            raise SpecValueError(
                spec.source,
                spec.line_of(f"block.order.{index}"),
                f"`block.order` has '{child}', which is no direct child of the layer.",
                found=child,
                expected="direct children only",
                mend=f"Write '{child.partition('.')[0]}'.",
            )
