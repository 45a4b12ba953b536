"""YAML text -> frozen `ArchitectureSpec`: what a family of models is made of, and what its parts are called.

    spec = parse_spec(Path("architectures/gpt2.yaml").read_text(), "architectures/gpt2.yaml")
    spec.modules.layers                  # ('transformer.h',)
    spec.where("modules.layers")         # 'architectures/gpt2.yaml:6'
    spec.for_config(config)              # the same, with what this config changes about the layout

Every key of the format is one field of one of the dataclasses below, with the function that reads it; a new key is a
new field. Nothing here knows torch or transformers. `architectures/README.md` explains the format to writers.
"""
# `key(...)` makes a dataclass field, which ruff cannot know: it takes the call for a shared mutable default.
# ruff: noqa: RUF009

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from nnterp.conditions import Condition, config_value, read_conditions
from nnterp.errors import CannotError, MissingKeyError, SpecValueError, UnknownKeyError, did_you_mean, nearest
from nnterp.frozen import FrozenMapping
from nnterp.multipliers import Multiplier, number, read_multiplier
from nnterp.spec_layer import Layer, Part
from nnterp.spec_reader import (
    Place,
    choice,
    compose,
    key,
    merge,
    read_keys,
    read_name,
    read_path_or_null,
    read_paths,
    read_some_names,
    section,
)

__all__ = [
    "ArchitectureSpec",
    "Condition",
    "config_value",
    "DimensionKeys",
    "Layer",
    "Logits",
    "Modules",
    "parse_spec",
    "Part",
    "Stream",
    "Variant",
]


USUAL_AXES = ("batch", "position", "hidden")
KEY = "a config key, a list of them, or the number itself"


def _axes(place: Place) -> tuple[str, ...]:
    axes = tuple(read_name(item) for item in place.items("a list of axes"))
    names = sorted(name for axis in axes for name in axis.replace("positions", "position").split("*"))
    if names not in (sorted(USUAL_AXES), sorted([*USUAL_AXES, "stream"])):
        raise place.error(
            f"`{place.path}` does not name the axes of a residual stream.",
            found=", ".join(axes),
            expected="batch, position and hidden in any order, with or without stream",
            mend="Write the axes in the order in which the model's tensors have them; two in one are 'stream*hidden'.",
        )
    return axes


def _keys(name: str) -> tuple[str, ...]:
    return (name, f"text_config.{name}")


@dataclasses.dataclass(frozen=True)
class Modules:
    """The parts that a model has once, each with its full path from the causal language model.

    Of several paths the first that a model has is meant; none: the family has no such part.
    """

    embed_tokens: tuple[str, ...] = key(read_path_or_null, "the path of the input embedding")
    layers: tuple[str, ...] = key(read_path_or_null, "the path of the list of layers")
    ln_final: tuple[str, ...] = key(read_path_or_null, "the path of the norm after the last layer")
    lm_head: tuple[str, ...] = key(read_path_or_null, "the path of the module that makes logits")


@dataclasses.dataclass(frozen=True)
class Logits:
    """What happens to the numbers after the last module of `unembed`."""

    multiplier: Multiplier | None = key(read_multiplier, "a product of config keys and numbers", None)
    #: The config key of the cap in logits = cap * tanh(x / cap); a null in the config means no cap.
    softcap: str | None = key(lambda place: str(place.scalar()), "a config key or a number", None)

    def applied(self, logits: Any, config: Mapping[str, Any] | Any) -> Any:
        """The model's logits, of what its last module gave."""
        if self.multiplier is not None:
            logits = logits * self.multiplier.value(config)
        cap = None if self.softcap is None else number(self.softcap, config)
        return logits if cap is None else cap * (logits / cap).tanh()


@dataclasses.dataclass(frozen=True)
class Stream:
    """The axes of what layers and their parts take and give, where they are not batch, position, hidden.

    `positions` are not those of the tokens: there are more of them. `stream*hidden` are two axes in one.
    """

    layers: tuple[str, ...] = key(_axes, "the axes of a layer's input and output", USUAL_AXES)
    parts: tuple[str, ...] = key(_axes, "the axes of what a layer's parts take and give", USUAL_AXES)
    embeddings: tuple[str, ...] = key(_axes, "the axes of the token embeddings", USUAL_AXES)
    #: How many positions the model itself puts before those of the tokens.
    prefix: Multiplier | None = key(read_multiplier, "a config key or a number", None)


@dataclasses.dataclass(frozen=True)
class DimensionKeys:
    """For each dimension the config keys that may hold it; the first that is there and not null wins."""

    num_layers: tuple[str, ...] = key(read_keys, KEY, _keys("num_hidden_layers"))
    #: Needed where there is attention.
    num_heads: tuple[str, ...] = key(read_keys, KEY, _keys("num_attention_heads"))
    hidden_size: tuple[str, ...] = key(read_keys, KEY, _keys("hidden_size"))
    vocab_size: tuple[str, ...] = key(read_keys, KEY, _keys("vocab_size"))
    #: None of them set: as many as num_heads.
    num_kv_heads: tuple[str, ...] = key(read_keys, KEY, _keys("num_key_value_heads"))
    #: None of them set: hidden_size // num_heads.
    head_dim: tuple[str, ...] = key(read_keys, KEY, _keys("head_dim"))


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


def _reasons(names: Callable[[], Sequence[str]]) -> Callable[[Place], Mapping[str, str]]:
    """A reader for a mapping from some of ``names`` to a sentence each."""

    def read(place: Place) -> Mapping[str, str]:
        reasons: dict[str, str] = {}
        for name, entry in place.entries().items():
            if name not in names():
                raise UnknownKeyError(place.source, entry.line, place.named, name, names())
            if not entry.is_null():
                reasons[name] = read_name(entry)
        return FrozenMapping(reasons)

    return read


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
    layout: str = key(choice("sequential", "parallel"), "sequential or parallel", "sequential")
    unembed: tuple[str, ...] = key(read_paths, "the modules that make logits", ("ln_final", "lm_head"))
    dimensions: DimensionKeys = key(section(DimensionKeys), "the config keys of the dimensions", DimensionKeys())
    embed: tuple[str, ...] = key(read_paths, "the modules that make vectors of the tokens, in turn", ("embed_tokens",))
    logits: Logits = key(section(Logits), "what happens after the last module of `unembed`", Logits())
    #: What the model multiplies its embeddings by before the first layer, outside of any module.
    embedding_multiplier: Multiplier | None = key(read_multiplier, "a product of config keys and numbers", None)
    stream: Stream = key(section(Stream), "the axes of the residual stream", Stream())
    #: Modules, from the model or from a layer, into whose output the model writes after they have given it.
    written_over: tuple[str, ...] = key(read_paths, "modules into whose output the model writes later", ())
    #: A config key: positions are numbered from the number after its value.
    positions_follow: str | None = key(read_name, "a config key", None)
    variants: tuple[Variant, ...] = key(_variants, "layouts that depend on the config", ())
    absent: Mapping[str, str] = key(_reasons(lambda: PARTS), "what the family has not, and why", FrozenMapping())
    cannot: Mapping[str, str] = key(_reasons(lambda: PROMISES), "what cannot hold, and why", FrozenMapping())
    notes: str = key(_note, "what a reader should know", "")

    source: str = dataclasses.field(default="", compare=False)
    #: Every value's line, by its path in the YAML, such as 'modules.layers' or 'layer.mlp.norm'.
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

    def refuse(self, promise: str, asked: str) -> None:
        """Raises `CannotError`, which says why, where a promise cannot hold for this family."""
        if promise in self.cannot:
            raise CannotError(asked, self.cannot[promise], self.where(f"cannot.{promise}"))

    def for_config(self, config: Mapping[str, Any] | Any) -> ArchitectureSpec:
        """The spec of one model: every variant that holds for this config, laid over the base in file order.

            spec.for_config({"use_parallel_residual": False}).layout        # 'sequential'

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


ROLES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Modules))
#: Parts that a family, or some of its layers, may lack, if the file says why.
PARTS: tuple[str, ...] = (*ROLES, "attention", "mlp", "router")
VARYING: tuple[str, ...] = (
    *("modules", "layer", "layout", "embed", "unembed", "embedding_multiplier", "logits", "stream", "dimensions"),
    *("written_over", "positions_follow"),
    *("absent", "cannot"),
)
#: What is promised of every family, by the names that `cannot` uses.
PROMISES: tuple[str, ...] = (
    *("layers", "attentions", "mlps", "mixers", "token_embeddings", "logits"),
    *("chain", "contributions", "project_on_vocab", "final_norm", "norm_scales", "unembedding_directions"),
    "mixers_state",
    *("queries", "keys", "values", "attention_scores", "attention_probabilities", "heads_output"),
    *("heads_contribution", "queries_pre_rope", "keys_pre_rope"),
    *("router_logits", "expert_indices", "expert_weights", "experts_output"),
    *("steer", "skip", "generate", "cache", "gradients", "padding", "invokes"),
)


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
    for check in (_check_absent, _check_layers, _check_chains):
        check(spec)
    return spec


def _check_absent(spec: ArchitectureSpec) -> None:
    """A part is there or not there for a reason; never both, never neither."""
    paths: dict[str, Any] = {f"modules.{role}": getattr(spec.modules, role) for role in ROLES}
    paths |= {"layer.attention": spec.layer.attention, "layer.mlp": spec.layer.mlp}
    for path, value in paths.items():
        part = path.rpartition(".")[2]
        if not value and part not in spec.absent:
            raise MissingKeyError(
                spec.source,
                spec.line_of(path),
                "`absent`",
                part,
                [*spec.absent],
                f"why `{path}` is null, in one sentence",
            )
        # Some layers may lack what others have.
        if value and part in spec.absent and path.startswith("modules."):
            raise SpecValueError(
                spec.source,
                spec.line_of(f"absent.{part}"),
                f"`absent.{part}` gives a reason for a part that is there.",
                found=f"`{path}` on line {spec.line_of(path)}",
                expected=f"`{path}: null`, or no reason",
                mend=f"Take '{part}' out of `absent`, or write null for `{path}`.",
            )


def _check_layers(spec: ArchitectureSpec) -> None:
    """Without a list of layers, `layer.input` and `layer.output` say where one begins and ends; with one, it does."""
    for name in ("input", "output"):
        if not spec.modules.layers and not getattr(spec.layer, name):
            meaning = f"the path of a layer's {'first' if name == 'input' else 'last'} module, with * for its index"
            raise MissingKeyError(spec.source, spec.line_of("layer"), "`layer`", name, ["attention", "mlp"], meaning)
        if spec.modules.layers and getattr(spec.layer, name):
            raise SpecValueError(
                spec.source,
                spec.line_of(f"layer.{name}"),
                f"`layer.{name}` is for models that keep no list of layers.",
                found=f"`modules.layers` on line {spec.line_of('modules.layers')}",
                expected="one of the two",
                mend="A layer of a list takes and gives what its module does.",
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
            # A module at the root has no dot in its path either; a name like a role's is a slip.
            if "." not in step and step not in ROLES and nearest(step, ROLES):
                raise SpecValueError(
                    spec.source,
                    spec.line_of(f"{name}.{index}"),
                    f"`{name}` has the role '{step}', which does not exist.",
                    found=step,
                    expected=f"a role ({', '.join(ROLES)}) or a full path such as 'model.norm'",
                    mend=did_you_mean(step, ROLES) or "Name it under `modules` if it is one of the roles.",
                )
