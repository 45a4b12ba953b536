"""Options for loading a model: one that nobody takes is refused before the weights are looked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from nnsight_core.errors import OptionError


def check_loading_options(left: Iterable[str], model: torch.nn.Module, automodel: Any) -> None:
    """Refuse what neither the config has, nor ``from_pretrained``, nor the model's class takes.

    Whatever may be taken by code that cannot be looked through is left to the loading.

    Args:
        left: the names of the options that are no attributes of the config.
        model: the model without weights.
        automodel: the class that is to load it.

    Raises:
        OptionError: for an option that the loading would stumble over.
    """
    kind: Any = type(model)
    loaders = (automodel.from_pretrained, kind.from_pretrained)
    if not all(inspect.unwrap(each).__module__.startswith("transformers.") for each in loaders):
        return
    built = inspect.signature(type(model).__init__).parameters
    if any(each.kind is each.VAR_KEYWORD for each in built.values()):
        return
    taken = {*built} - {"self", "config"}
    for loader in loaders:
        taken |= _named_in(loader)
    for name in left:
        if name not in taken:
            known = [each for each in taken if each.islower() and not each.startswith("_")]
            what = f"neither the loading of {type(model).__name__} nor its config knows such an option."
            raise OptionError(name, what, [*known, *_attributes(model.config)])


def _named_in(loader: Any) -> set[str]:
    """All names in the code of a ``from_pretrained``: it takes its options out of ``kwargs`` by their names."""
    code = inspect.unwrap(getattr(loader, "__func__", loader)).__code__
    names = {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    for constant in code.co_consts:
        entries = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
        names |= {each for each in entries if isinstance(each, str) and each.isidentifier()}
    return names


def _attributes(config: Any) -> list[str]:
    return [*config.to_dict(), *getattr(config, "attribute_map", {})]
