"""What chosen modules take and give in one forward pass, written down in whatever order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from nnsight_core.hooks import collecting


def collect(
    call: Callable[[], Any], modules: Iterable[torch.nn.Module]
) -> tuple[dict[tuple[torch.nn.Module, str], Any], Any]:
    """Run ``call`` and keep what each of ``modules`` took and gave.

    Returns a dict from (module, "input") to ``(args, kwargs)`` and from (module, "output") to the result, of each
    module's first call; and the result of ``call``. Tensors are detached copies: what the model later writes into its
    own tensors does not reach them.
    """
    kept: dict[tuple[torch.nn.Module, str], Any] = {}
    with collecting(modules, kept):
        result = call()
    return kept, result
