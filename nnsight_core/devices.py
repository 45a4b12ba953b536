"""On which devices a model's weights lie, and on which they come to lie when they are needed.

Libraries that split a model over devices, or keep its weights in memory or on disk until they are needed, leave a hook
on each module concerned: ``module._hf_hook``, which knows the device to run on. Until then such weights are on meta.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch


def _hooks_of(module: torch.nn.Module) -> Iterator[Any]:
    waiting = [vars(module).get("_hf_hook")]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            yield hook
            # Several hooks of one module are in a sequence, which is a hook itself.
            waiting += getattr(hook, "hooks", ())


def _own_home(module: torch.nn.Module) -> torch.device | None:
    for hook in _hooks_of(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def homes(root: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.device | None]]:
    """Every module below ``root``, itself included, with the device that it is made to run on; None where it is not."""
    return _homes(root, None, set())


def _homes(
    module: torch.nn.Module, outer: torch.device | None, seen: set[torch.nn.Module]
) -> Iterator[tuple[torch.nn.Module, torch.device | None]]:
    if module in seen:
        return
    seen.add(module)
    home = _own_home(module) or outer
    yield module, home
    for child in module.children():
        yield from _homes(child, home, seen)


def input_device(root: torch.nn.Module, otherwise: torch.device | None = None) -> torch.device:
    """Where the inputs of the model ``root`` belong: where its input embedding, or else its first weight, is used.

    Args:
        otherwise: for weights that are nowhere, as those of a model that is not loaded.
    """
    embedding = _embedding_of(root)
    first: list[torch.nn.Module] = [] if embedding is None else [embedding]
    known = dict(homes(root))
    for module in (*first, *known):
        home = known.get(module)
        for tensor in module.parameters(recurse=False):
            if home is not None or not tensor.is_meta:
                return home or tensor.device
    return otherwise or torch.device("cpu")


def _embedding_of(root: torch.nn.Module) -> torch.nn.Module | None:
    find = getattr(root, "get_input_embeddings", None)
    try:
        found = find() if find is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, torch.nn.Module) else None


def has_numbers(root: torch.nn.Module) -> bool:
    """Whether the weights of ``root`` are there, or will be when they are needed."""
    return all(
        home is not None or not any(tensor.is_meta for tensor in module.parameters(recurse=False))
        for module, home in homes(root)
    )


def resident_hooks(root: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each hook that fetches weights, and one like it that takes them to be there."""
    for module in root.modules():
        for hook in _hooks_of(module):
            if hasattr(hook, "weights_map"):
                resident = copy.copy(hook)
                resident.offload, resident.weights_map, resident.tied_params_map = False, None, None
                yield hook, resident
