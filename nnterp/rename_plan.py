"""What goes into renaming and what comes out of it: `RenameConfig`, the user's word, and `RenamePlan`, the result.

made.resolve("model.layers.3.self_attn")     # 'transformer.h.3.attn'
made.names_of("transformer.h.3")             # ('transformer.h.3', 'layers.3', 'model.h.3', ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from nnterp.errors import UnknownNameError, nearest
from nnterp.kept_path import KeptPath
from nnterp.multipliers import LayerTensor, Multiplier

__all__ = ["as_list", "join", "LayerPlan", "PartPlan", "RenameConfig", "RenamePlan"]


def join(parent: str, name: str) -> str:
    """The path of what is called `name` below `parent`; the root's path is empty."""
    return f"{parent}.{name}" if parent else name


def as_list(names: str | list[str] | None) -> list[str]:
    """None, one or several names as a list."""
    return [names] if isinstance(names, str) else list(names or ())


@dataclasses.dataclass
class RenameConfig:
    """What the user's model calls its parts; wins over the specification.

        RenameConfig(layers_name="blocks", attn_name="mixer", attn_head_config_key="n_heads")

    A name is the last component of a module's path ("blocks") or a dotted path ("decoder.blocks"), with or without a
    leading "model."; the names of layer parts are looked for inside each layer. In a list of names the first that the
    model has wins. The `..._config_key`s are keys of the config, or the number itself. `ignore_attn` and `ignore_mlp`
    say that the model has no such part. `attn_prob_source` says what makes the probabilities in an attention module
    (an `AttnProbFunction`); without it they are found.
    """

    attn_name: str | list[str] | None = None
    mlp_name: str | list[str] | None = None
    ln_final_name: str | list[str] | None = None
    lm_head_name: str | list[str] | None = None
    model_name: str | list[str] | None = None
    layers_name: str | list[str] | None = None
    attn_prob_source: Any = None
    ignore_mlp: bool | None = None
    ignore_attn: bool | None = None
    attn_head_config_key: str | list[str] | int | None = None
    hidden_size_config_key: str | list[str] | int | None = None
    vocab_size_config_key: str | list[str] | int | None = None


@dataclasses.dataclass(frozen=True)
class PartPlan:
    """Full paths of one part of one layer."""

    #: "attention", "state_space", ..., "mlp" or "also_added".
    kind: str
    #: None where the part is no module of its own.
    module: str | None
    input: str
    output: str
    #: The module whose output is added to the residual stream.
    contribution: str
    #: The norm through which the part reads the stream.
    norm: str | None = None
    #: What makes the output of what the heads give; None where no one module does.
    projection: str | None = None
    #: What the stream itself goes through, before the part and after the addition.
    stream: str | None = None
    sum_norm: str | None = None
    #: What the contribution, and the stream that it is added to, are multiplied by.
    multiplier: Multiplier | None = None
    stream_multiplier: Multiplier | None = None
    #: What is added to both before that.
    bias: LayerTensor | None = None
    stream_bias: LayerTensor | None = None
    #: Where the state after the last position is kept; empty where there is none.
    state: tuple[KeptPath, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer and its parts: what mixes positions first, then the MLP, then what else is added."""

    #: The layer's own path; where the model keeps no list of layers, that of the layer's first module.
    path: str
    #: The modules that take what the layer takes, and give what it gives.
    input: str
    output: str
    parts: tuple[PartPlan, ...]
    router: str | None = None
    #: The module of all experts, and that which gives the router's logits, if it is one of its own.
    experts: str | None = None
    router_logits: str | None = None
    #: What the stream is multiplied by after the last part.
    multiplier: Multiplier | None = None
    #: Whether all parts of the specification are among `parts`: the user may have said to leave some out.
    is_whole: bool = True

    def part(self, kind: str) -> PartPlan | None:
        """The part of a kind, None where the layer has none."""
        return next((part for part in self.parts if part.kind == kind), None)

    @property
    def mixer(self) -> PartPlan | None:
        """What moves things between positions; in a layer that has nothing but an MLP, that."""
        return self.parts[0] if self.parts else None

    @property
    def attention(self) -> str | None:
        """The attention's path."""
        part = self.part("attention")
        return part.module if part else None

    @property
    def mlp(self) -> str | None:
        """The MLP's path; None also where the MLP is no module of its own."""
        part = self.part("mlp")
        return part.module if part else None


@dataclasses.dataclass(frozen=True)
class RenamePlan:
    """Which module plays which part of a model, and by which names it can be asked for. Made by `plan`."""

    #: For each parent path ('' is the root) the extra names of what is below it, with full paths.
    aliases: Mapping[str, Mapping[str, str]]
    #: The roles of the specification, and 'model', the base model.
    modules: Mapping[str, str | None]
    layers: tuple[LayerPlan, ...]
    #: Full paths of the modules that turn tokens into vectors, and the last layer's output into logits.
    embed: tuple[str, ...]
    unembed: tuple[str, ...]
    #: Who said so: 'modules.layers' -> 'architectures/gpt2.yaml:6' or "RenameConfig(layers_name='h')".
    origins: Mapping[str, str]
    #: Real children that an alias of the user's hides from attribute access, by full path.
    shadowed: tuple[str, ...]
    paths: frozenset[str] = dataclasses.field(repr=False)
    #: Modules into whose output the model writes after they have given it.
    written_over: tuple[str, ...] = ()

    def resolve(self, name: str) -> str:
        """The model's own path for any of a module's names.

            made.resolve("layers.0") == made.resolve("model.layers.0") == "transformer.h.0"

        A path of the model's own always means itself. Raises `UnknownNameError`, with the nearest names, where no
        module answers to the name.
        """
        name = name.removeprefix(".")
        if name in self.paths or not name:
            return name
        path, parts = "", name.split(".")
        for index, part in enumerate(parts):
            below = self.aliases.get(path, {}).get(part, join(path, part))
            if below not in self.paths:
                raise self._unknown(name, path, parts[:index], part)
            path = below
        return path

    def names_of(self, path: str) -> tuple[str, ...]:
        """Every name that `resolve` takes for a module; its own path comes first, then the shorter before the longer.

        made.names_of("transformer.h.0")   # ('transformer.h.0', 'layers.0', 'model.h.0', 'model.layers.0', ...)
        """
        path = self.resolve(path)
        others = sorted({*self._spellings(path)} - {path}, key=lambda name: (len(name), name))
        return (path, *others)

    def _spellings(self, path: str) -> Iterator[str]:
        if not path:
            yield ""
            return
        parent, _, child = path.rpartition(".")
        if child not in self.aliases.get(parent, {}):
            yield from (join(name, child) for name in self._spellings(parent))
        for holder, names in self.aliases.items():
            for alias, target in names.items():
                # A real path means itself, so an alias that hides a real child is a name only beneath other aliases.
                if target == path:
                    yield from (
                        spelled
                        for name in self._spellings(holder)
                        if (spelled := join(name, alias)) not in self.paths or spelled == path
                    )

    def _unknown(self, name: str, path: str, known: list[str], part: str) -> UnknownNameError:
        children = {p[len(path) + 1 if path else 0 :] for p in self.paths if p and p.rpartition(".")[0] == path}
        children |= set(self.aliases.get(path, {}))
        near = nearest(part, children) or tuple(sorted(children, key=lambda child: (len(child), child)))
        return UnknownNameError(
            name,
            f"no module answers to '{name}': '{path or 'the root'}' has no '{part}'.",
            [".".join([*known, child]) for child in near],
            f"'{path or 'the root'}' has {len(children)} names directly below it.",
        )
