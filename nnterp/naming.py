"""From a module to its names: the specification that serves it, its sizes, and the plan made of both.

named = name_modules(model)
named.plan.layers[3].attention        # 'transformer.h.3.attn'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nnterp.architectures import load_specs, spec_from_file
from nnterp.calling import config_of
from nnterp.dimensions import Dimensions, dimensions
from nnterp.inference import infer_spec
from nnterp.rename import RenameConfig, RenamePlan, plan
from nnterp.spec import ArchitectureSpec

__all__ = ["name_modules", "NamedModules", "serving_spec"]


@dataclass(frozen=True)
class NamedModules:
    """What is known of one model."""

    spec: ArchitectureSpec
    sizes: Dimensions
    plan: RenamePlan


def serving_spec(module: torch.nn.Module, spec: str | Path | None = None) -> ArchitectureSpec | None:
    """The specification in the file ``spec``, or else the one that serves the model's type; None where none does."""
    if spec is not None:
        return spec_from_file(spec)
    return load_specs().get(getattr(config_of(module), "model_type", ""))


def name_modules(
    module: torch.nn.Module,
    spec: str | Path | None = None,
    rename_config: RenameConfig | None = None,
    rename: Mapping[str, str | list[str]] | None = None,
) -> NamedModules:
    """Names a model's modules by the user's own specification, by the one that serves the model's type or, where none
    does, by what one forward pass shows of its structure; `rename_config` wins over each of them.

    Raises `UnknownArchitectureError` where the structure cannot be found, and a `RenamingError` where names do not fit.
    """
    config = config_of(module)
    own = serving_spec(module, spec)
    chosen = (infer_spec(module, rename_config) if own is None else own).for_config(config)
    sizes = dimensions(chosen, config, rename_config)
    # Some models use one module in several layers; it has a name in each of them.
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    return NamedModules(chosen, sizes, plan(chosen, names, sizes.num_layers, rename_config, rename))
