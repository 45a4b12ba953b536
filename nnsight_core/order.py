"""The order in which a model runs its modules, found by a dry run: shapes only, nothing computed, nothing changed."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from nnsight_core.hooks import recording, without_hooks

#: Up to this many bytes a model may be copied for a dry run with its real numbers.
_SMALL = 2**30


def observed_order(
    root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[tuple[torch.nn.Module, str]], str]:
    """Which modules of ``root`` are entered and left, in order, when ``root(*args, **kwargs)`` runs.

    Returns the list of (module, "input" or "output"), and a sentence of doubt: empty when the dry run came to its end,
    else what stopped it.
    """
    seen: list[tuple[torch.nn.Module, str]] = []
    try:
        _run_copy(root, args, kwargs, seen, FakeTensorMode(allow_non_fake_inputs=True))
    except Exception as error:  # noqa: BLE001 - a model may raise anything at all, and we are explaining another error
        if sum(each.nbytes for each in (*root.parameters(), *root.buffers())) > _SMALL:
            name = type(error).__name__
            return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {name}.)"
    else:
        return seen, ""
    seen.clear()
    try:
        # A path that depends on the numbers themselves can only be found with them.
        _run_copy(root, args, kwargs, seen, None)
    except Exception as error:  # noqa: BLE001 - likewise
        return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {type(error).__name__}.)"
    return seen, ""


def _run_copy(
    root: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: list[tuple[torch.nn.Module, str]],
    mode: FakeTensorMode | None,
) -> None:
    """Run a copy, which takes the blow: counters, batch statistics, whatever a forward writes down."""
    known: dict[int, Any] = {}
    kept = [value for module in root.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    for each in (*root.parameters(), *root.buffers(), *kept):
        known[id(each)] = mode.from_tensor(each.detach()) if mode else each.detach().clone()
    with without_hooks(root):
        dry = copy.deepcopy(root, known)
    originals = dict(zip(dry.modules(), root.modules(), strict=True))
    args, kwargs = copy.deepcopy((args, kwargs))
    noted: list[tuple[torch.nn.Module, str]] = []
    try:
        with torch.random.fork_rng(devices=[]), recording(dry.modules(), noted), torch.no_grad(), mode or nullcontext():
            if mode:
                args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            dry(*args, **kwargs)
    finally:
        seen += [(originals[module], kind) for module, kind in noted]
