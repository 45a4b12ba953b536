"""Names that scripts import from `nnterp.rename_utils`: the user's own names for parts, and sizes by config key.

RenameConfig(attn_name="mixer", mlp_name=["ffn", "feed_forward"])
get_rename_dict(RenameConfig(attn_name="mixer"))["mixer"]       # 'self_attn'
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from enum import Enum
from typing import Any

import torch

from nnsight_core.sites import user_site
from nnterp.accessors import Place, ValueAccess, read, write
from nnterp.architectures import load_specs
from nnterp.attention_sources import (
    AttentionProbabilitiesAccessor,
    bloom_attention_prob_source,
    default_attention_prob_source,
    gpt2_attention_prob_source,
    gptj_attention_prob_source,
)
from nnterp.dimensions import USER_KEYS
from nnterp.errors import DimensionError, RenamingError, UsageError, ValidationError
from nnterp.naming import name_modules
from nnterp.rename import LAYER_NAMES, RenameConfig
from nnterp.rename_plan import as_list
from nnterp.spec import ROLES

__all__ = [
    "AttentionProbabilitiesAccessor",
    "AttnProbFunction",
    "bloom_attention_prob_source",
    "check_io",
    "check_model_renaming",
    "default_attention_prob_source",
    "default_attn_head_config_keys",
    "default_hidden_size_config_keys",
    "default_vocab_size_config_keys",
    "expand_path_with_model",
    "get_hidden_size",
    "get_ignores",
    "get_num_attention_heads",
    "get_rename_dict",
    "get_vocab_size",
    "gpt2_attention_prob_source",
    "gptj_attention_prob_source",
    "IOType",
    "LayerAccessor",
    "RenameConfig",
    "RenamingError",
    "text_config",
]

#: The arguments of a `RenameConfig` that name modules, and what these are called everywhere.
STANDARD = {
    "attn_name": "self_attn",
    "mlp_name": "mlp",
    "ln_final_name": "ln_final",
    "lm_head_name": "lm_head",
    "model_name": "model",
    "layers_name": "layers",
}


class AttnProbFunction(ABC):
    """Where a script's own attention keeps its probabilities; for `RenameConfig(attn_prob_source=...)`.

    :class:`~nnterp.attention_sources.AttentionProbabilitiesAccessor` reads and sets what it names.
    """

    @abstractmethod
    def get_attention_prob_source(self, attention_module: Any, return_module_source: bool = False) -> Any:
        """The operation of ``attention_module`` that gives the probabilities, or all of its operations."""

    def __call__(self, attention_module: Any, return_module_source: bool = False) -> Any:
        """The same."""
        return self.get_attention_prob_source(attention_module, return_module_source)


def expand_path_with_model(paths: Iterable[str]) -> list[str]:
    """Each path as it is, and below `model`.

    >>> expand_path_with_model(["decoder.layers"])
    ['decoder.layers', 'model.decoder.layers']
    """
    return [path for each in paths for path in (each, f"model.{each}")]


def get_rename_dict(rename_config: RenameConfig | None = None, model: torch.nn.Module | None = None) -> dict[str, str]:
    """What modules are called by models -> what they are called everywhere; the user's names win.

    Without a model these are all the names that the specifications know and that mean one thing only. With one they are
    the names of its modules, fit to be given to ``rename=``.

    >>> get_rename_dict()["transformer.h"]
    'layers'
    """
    known = _known_names() if model is None else _names_of(model, rename_config)
    for field, standard in STANDARD.items():
        for name in as_list(getattr(rename_config, field, None)) if model is None else ():
            known[name] = standard
    return known


def _known_names() -> dict[str, str]:
    meanings: dict[str, set[str]] = {}
    for spec in load_specs().values():
        for role in ROLES:
            for path in getattr(spec.modules, role):
                meanings.setdefault(path, set()).add(role)
        for kind, standard in LAYER_NAMES.items():
            part = getattr(spec.layer, kind)
            for path in part.module if part else ():
                meanings.setdefault(path, set()).add(standard)
    return {
        name: next(iter(standard))
        for name, standard in sorted(meanings.items())
        if len(standard) == 1 and standard != {name}
    }


def _names_of(model: torch.nn.Module, rename_config: RenameConfig | None) -> dict[str, str]:
    made = name_modules(model, None, rename_config).plan
    found = {path: role for role, path in made.modules.items() if path and path != role}
    for layer in made.layers:
        for kind, standard in LAYER_NAMES.items():
            path = getattr(layer, kind)
            name = path[len(layer.path) + 1 :] if path else standard
            if name != standard:
                found[name] = standard
    return found


def text_config(model: Any) -> Any:
    """The config of a model's text part: what it nests under `text_config`, or all of it."""
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def get_num_attention_heads(
    model: Any, raise_error: bool = True, rename_config: RenameConfig | None = None
) -> int | None:
    """How many heads each attention has."""
    return _size("num_heads", model, raise_error, rename_config)


def get_hidden_size(model: Any, raise_error: bool = True, rename_config: RenameConfig | None = None) -> int | None:
    """How wide the residual stream is."""
    return _size("hidden_size", model, raise_error, rename_config)


def get_vocab_size(model: Any, raise_error: bool = True, rename_config: RenameConfig | None = None) -> int | None:
    """How many tokens the model knows."""
    return _size("vocab_size", model, raise_error, rename_config)


def _size(dimension: str, model: Any, raise_error: bool, rename_config: RenameConfig | None) -> int | None:
    said = getattr(rename_config, USER_KEYS[dimension], None)
    if isinstance(said, int):
        return said
    module = getattr(model, "_module", model)
    try:
        found: int = getattr(name_modules(module, None, rename_config).sizes, dimension)
    except DimensionError:
        if raise_error:
            raise
        return None
    return found


def get_ignores(model: Any, rename_config: RenameConfig | None = None) -> list[str]:
    """The parts that a model's layers lack: some of "attention" and "mlp"."""
    made = name_modules(getattr(model, "_module", model), None, rename_config).plan
    return [kind for kind in LAYER_NAMES if not any(layer.part(kind) for layer in made.layers)]


def default_attn_head_config_keys() -> list[str]:
    """The config keys under which the specifications look for the number of heads, the most usual first."""
    return _config_keys("num_heads")


def default_hidden_size_config_keys() -> list[str]:
    """The config keys under which the specifications look for the width of the stream, the most usual first.

    >>> default_hidden_size_config_keys()[0]
    'hidden_size'
    """
    return _config_keys("hidden_size")


def default_vocab_size_config_keys() -> list[str]:
    """The config keys under which the specifications look for the number of tokens, the most usual first."""
    return _config_keys("vocab_size")


def _config_keys(dimension: str) -> list[str]:
    keys = (key for spec in load_specs().values() for key in getattr(spec.dimensions, dimension))
    return [key for key, _ in Counter(key for key in keys if not key.isdecimal()).most_common()]


class IOType(Enum):
    """Which side of a module is meant."""

    INPUT = "input"
    OUTPUT = "output"


class LayerAccessor:
    """One module of each layer, or what it takes or gives, by the layer's index.

        downs = LayerAccessor(model, "mlp.down_proj", IOType.INPUT)
        with model.trace("The Eiffel Tower"):
            downs[3] *= 0                                # read and set, tensor or tuple

    Where the value has a standard name (`layers_output`, `mlps_input`, ...) it is the same value, of shape
    (batch, position, hidden); elsewhere it is the first tensor that the module takes or gives, with its own axes.

    Args:
        model: a `StandardizedTransformer`.
        attr_name: the module's name in its layer, standard or the model's own; None: the layer itself.
        io_type: the module's input or output; None: the module.
    """

    def __init__(self, model: Any, attr_name: str | None, io_type: IOType | None) -> None:
        self.model = model
        self.attr_name = attr_name
        self.io_type = io_type
        self._is_tuple: bool | None = None

    def get_module(self, layer: int) -> Any:
        """The module in one layer. Raises `UnknownNameError` where the layer has none of that name."""
        return self.model.get(self._path(layer))

    def __getitem__(self, layer: int) -> Any:
        """The value in one layer, in a trace; without an `io_type` the module."""
        return (
            self.get_module(layer) if self.io_type is None else read(self.model, self._place(layer), site=user_site())
        )

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        """Puts another tensor in the value's place. Raises `TypeError` without an `io_type`: a module is not set."""
        if self.io_type is None:
            raise TypeError("Without an io_type this gives modules, which are not set: say IOType.INPUT or OUTPUT.")
        write(self.model, self._place(layer), value)

    @property
    def returns_tuple(self) -> bool | None:
        """Whether the module hands on a tuple; None as long as nothing was read. Reading and setting do not need it."""
        return self._is_tuple

    def _path(self, layer: int) -> str:
        path: str = self.model._plan.layers[self.model.layers_output.position(layer)].path
        found: str = self.model._plan.resolve(f"{path}.{self.attr_name}" if self.attr_name else path)
        return found

    def _place(self, layer: int) -> Place:
        assert self.io_type is not None
        path, kind = self._path(layer), self.io_type.value
        place = Place(path, kind, f"{self.attr_name or 'layers'}_{kind}[{layer}]")
        for name in ("layers", "attentions", "mixers", "mlps"):
            access: ValueAccess = getattr(self.model, f"{name}_{kind}")
            if access.has(layer) and access.place(layer).path == path:
                place = access.place(layer)
        if self.io_type is IOType.INPUT:
            return place
        return replace(place, get=self._noting(place.get))

    def _noting(self, get: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(value: Any) -> Any:
            self._is_tuple = isinstance(value, tuple)
            return get(value)

        return noted


def check_io(std_model: Any, model_name: str, ignores: Collection[str] = ()) -> None:
    """Checks that layers, attentions and MLPs take and give what they should, in one small pass.

    Args:
        std_model: a `StandardizedTransformer`.
        model_name: what errors call the model.
        ignores: parts that are not looked at: "attention", "mlp".

    Raises:
        ValidationError: a value has another shape than its name promises.
    """
    wanted = {"token_embeddings", "layers", "logits", *(kind for kinds in IO_KINDS.values() for kind in kinds)}
    _check(std_model, model_name, lambda kind: kind in wanted - _ignored(ignores))


def check_model_renaming(
    std_model: Any,
    model_name: str,
    ignores: Collection[str],
    allow_dispatch: bool,
    allow_multimodal: bool = False,
) -> None:
    """Checks by numbers, in one small pass, all that the names of a model promise: :func:`check_io`, that each layer's
    output is the next one's input, that the contributions add up, and that the unembedding gives the logits.

    `StandardizedTransformer` does so when it opens a model, unless ``check_renaming=False``.

    Args:
        std_model: a `StandardizedTransformer`.
        model_name: what errors call the model.
        ignores: parts that are not looked at: "attention", "mlp".
        allow_dispatch: load the weights for it, if they are not there yet; without them nothing is checked.
        allow_multimodal: accepted for scripts that set it; nothing has to be allowed.

    Raises:
        ValidationError: a promise is not kept.
    """
    if not std_model.dispatched:
        if not allow_dispatch:
            return
        std_model.dispatch()
    _check(std_model, model_name, lambda kind: kind not in _ignored(ignores))


def _ignored(parts: Collection[str]) -> set[str]:
    for part in parts:
        if part not in IO_KINDS:
            raise UsageError(f"ignores={list(parts)}: there is no part {part!r}, but {[*IO_KINDS]}.")
    return {kind for part in parts for kind in IO_KINDS[part]}


def _check(std_model: Any, model_name: str, is_wanted: Callable[[str], bool]) -> None:
    for row in std_model._promised():
        wrong = row.disagreement() if is_wanted(row.kind) else None
        if wrong is not None:
            raise ValidationError(row.origin, row.promise, wrong, model_name)


#: Which values belong to a part that may be ignored.
IO_KINDS = {"attention": ("attentions", "mixers"), "mlp": ("mlps",)}
