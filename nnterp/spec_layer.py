"""What a specification says of one layer: its parts, and how each takes from and adds to the residual stream."""
# `key(...)` makes a dataclass field, which ruff cannot know: it takes the call for a shared mutable default.
# ruff: noqa: RUF009

from __future__ import annotations

import dataclasses

import yaml

from nnterp.errors import MissingKeyError
from nnterp.kept_path import KeptPath, read_kept_paths
from nnterp.multipliers import LayerTensor, Multiplier, read_layer_tensor, read_multiplier
from nnterp.spec_reader import Place, key, read_name, read_path_choice, read_path_or_null, section

__all__ = ["KINDS", "Layer", "Part", "PROJECTIONS"]


#: What the map that makes an attention's output of its heads is mostly called.
PROJECTIONS = ("o_proj", "out_proj", "output.dense", "dense", "c_proj", "attention.out_proj", "Wo", "out_lin")

PRODUCT = "a product of config keys, numbers and what the layer holds"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a layer. Paths are relative to the layer; of several the first that a layer has is meant.

    A part need not be a module: `module` is empty where a first and a last module have none around them.
    """

    module: tuple[str, ...] = key(read_path_choice, "the part's path", ())
    input: tuple[str, ...] = key(read_path_choice, "the module whose input the part takes; without it, the part", ())
    output: tuple[str, ...] = key(read_path_choice, "the module whose output the part gives; without it, the part", ())
    #: The part reads the stream through this norm.
    norm: tuple[str, ...] = key(read_path_or_null, "the norm through which the part reads the stream", ())
    #: What is added to the residual stream; empty: the output.
    contribution: tuple[str, ...] = key(read_path_or_null, "the module whose output is added to the stream", ())
    #: The residual stream itself goes through this norm after the addition.
    sum_norm: tuple[str, ...] = key(read_path_or_null, "the norm of the stream after the addition", ())
    #: The residual stream itself goes through this module before the part.
    stream: tuple[str, ...] = key(read_path_or_null, "the module that the stream itself goes through before", ())
    #: What the contribution, and the stream that it is added to, are multiplied by outside of any module.
    multiplier: Multiplier | None = key(read_multiplier, PRODUCT, None)
    stream_multiplier: Multiplier | None = key(read_multiplier, PRODUCT, None)
    #: What is added to both before that.
    bias: LayerTensor | None = key(read_layer_tensor, "a tensor that the layer holds", None)
    stream_bias: LayerTensor | None = key(read_layer_tensor, "a tensor that the layer holds", None)
    #: Below the part's module: what makes its output of what its heads give. None: what has one of the usual names.
    projection: tuple[str, ...] | None = key(read_path_or_null, "what makes the output of the heads", None)
    #: Where parts of several kinds have one path, what lies below it in this kind.
    has: tuple[str, ...] = key(read_path_choice, "what the module holds where it is of this kind", ())
    #: Several where a state is several tensors.
    state: tuple[KeptPath, ...] = key(read_kept_paths, "where its state after the last position is kept", ())


def _part(place: Place) -> Part | None:
    if place.is_null():
        return None
    if not isinstance(place.node, yaml.MappingNode):
        return Part(module=read_path_choice(place))
    part = section(Part)(place)
    if not part.module:
        for name in ("input", "output"):
            if not getattr(part, name):
                meaning = f"the path of its {'first' if name == 'input' else 'last'} module, as there is no `module`"
                raise MissingKeyError(place.source, place.line, place.named, name, [*place.entries()], meaning)
    return part


@dataclasses.dataclass(frozen=True)
class Layer:
    """The parts of one layer: those that move things between positions, by kind, and the MLP."""

    attention: Part | None = key(_part, "the attention, relative to the layer")
    mlp: Part | None = key(_part, "the MLP, relative to the layer")
    linear_attention: Part | None = key(_part, "the linear attention", None)
    state_space: Part | None = key(_part, "the state-space mixer", None)
    recurrent: Part | None = key(_part, "the recurrent mixer", None)
    convolution: Part | None = key(_part, "the convolution", None)
    #: More that is added to the stream: a second MLP beside the experts, what is made of the layer's own embeddings.
    also_added: tuple[Part, ...] = key(lambda place: _parts(place), "what else is added to the stream", ())
    #: What the stream is multiplied by after the last part.
    multiplier: Multiplier | None = key(read_multiplier, PRODUCT, None)
    #: Where a model keeps no list of layers: the first and the last module of one.
    input: tuple[str, ...] = key(read_path_choice, "the path of a layer's first module", ())
    output: tuple[str, ...] = key(read_path_choice, "the path of a layer's last module", ())
    router: tuple[str, ...] = key(read_path_or_null, "the module that chooses experts", ())
    #: Beside the router, if nothing else is said.
    experts: tuple[str, ...] = key(read_path_choice, "the module of all experts", ())
    #: Empty: the first linear map that the router itself calls.
    router_logits: tuple[str, ...] = key(read_path_choice, "the module that gives the router's logits", ())
    #: Operations of the router; empty: the experts are called with both.
    expert_indices: str = key(read_name, "the router's operation that gives the experts of each token", "")
    expert_weights: str = key(read_name, "the router's operation that gives the weights of experts", "")

    def mixers(self) -> dict[str, Part]:
        """The parts that move things between positions, by kind."""
        return {kind: part for kind in KINDS if (part := getattr(self, kind)) is not None}


def _parts(place: Place) -> tuple[Part, ...]:
    parts = tuple(_part(item) for item in place.items("a list of parts"))
    return tuple(part for part in parts if part is not None)


#: What a layer may use to move things between positions, and what each is called in a sentence.
KINDS = {
    "attention": "attention",
    "linear_attention": "linear attention",
    "state_space": "a state-space mixer",
    "recurrent": "a recurrent mixer",
    "convolution": "a convolution",
}
