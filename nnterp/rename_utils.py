"""Names that scripts import from `nnterp.rename_utils`: the user's own names for parts, and sizes by config key.

RenameConfig(attn_name="mixer", mlp_name=["ffn", "feed_forward"])
get_rename_dict(RenameConfig(attn_name="mixer"))["mixer"]       # 'self_attn'
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

from nnterp.architectures import load_specs
from nnterp.dimensions import USER_KEYS
from nnterp.errors import DimensionError, RenamingError
from nnterp.naming import name_modules
from nnterp.rename import LAYER_NAMES, RenameConfig
from nnterp.rename_plan import as_list
from nnterp.spec import ROLES

__all__ = [
    "AttnProbFunction",
    "expand_path_with_model",
    "get_hidden_size",
    "get_ignores",
    "get_num_attention_heads",
    "get_rename_dict",
    "get_vocab_size",
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
    """Where a script's own attention keeps its probabilities; for `RenameConfig(attn_prob_source=...)`."""

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
