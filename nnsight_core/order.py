"""The order in which a model runs its modules, found by a dry run: shapes only, nothing computed, nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from nnsight_core.hooks import recording


def observed_order(
    root: torch.nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[tuple[torch.nn.Module, str]], str]:
    """Which modules of ``root`` are entered and left, in order, when ``call(*args, **kwargs)`` runs.

    Returns the list of (module, "input" or "output"), and a sentence of doubt: empty when the dry run came to its
    end, else what stopped it (a model whose path depends on the numbers themselves has none without them).
    """
    seen: list[tuple[torch.nn.Module, str]] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        # Caches among the inputs would be written to; the copy takes the blow.
        args, kwargs = copy.deepcopy((args, kwargs))
        with recording(root.modules(), seen), torch.no_grad(), mode:
            args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - a model may raise anything at all, and we are explaining another error
        return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {type(error).__name__}.)"
    return seen, ""
