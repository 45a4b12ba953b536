"""The order in which a model runs its modules, found by a dry run: shapes only, nothing computed, nothing changed."""

from __future__ import annotations

from typing import Any

import torch

from nnsight_core.hooks import recording
from nnsight_core.shapes import ShapesOnly
from nnsight_core.twin import Twin

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
        _run_twin(root, args, kwargs, seen, ShapesOnly.here())
    except Exception as error:  # noqa: BLE001 - a model may raise anything at all, and we are explaining another error
        tensors = [*root.parameters(), *root.buffers()]
        if any(each.is_meta for each in tensors) or sum(each.nbytes for each in tensors) > _SMALL:
            name = type(error).__name__
            return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {name}.)"
    else:
        return seen, ""
    seen.clear()
    try:
        # A path that depends on the numbers themselves can only be found with them.
        _run_twin(root, args, kwargs, seen, None)
    except Exception as error:  # noqa: BLE001 - likewise
        return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {type(error).__name__}.)"
    return seen, ""


def _run_twin(
    root: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: list[tuple[torch.nn.Module, str]],
    shapes: ShapesOnly | None,
) -> None:
    twin = Twin(root, shapes)
    args, kwargs = twin.own((args, kwargs))
    noted: list[tuple[torch.nn.Module, str]] = []
    try:
        with torch.random.fork_rng(devices=[]), recording(twin.module.modules(), noted), torch.no_grad():
            with twin.running():
                twin.module(*args, **kwargs)
    finally:
        seen += [(twin.original(module), kind) for module, kind in noted]
