"""The same reads and writes with plain PyTorch hooks: what the interface is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from nnsight_core.hooks import observing
from nnsight_core.values import map_tensors

__all__ = ["changed_run", "plain_run", "Spot", "visiting", "Visiting"]

#: A module's path, and "input" or "output".
Spot = tuple[str, str]
Visit = Callable[[Spot, Any], "tuple[Any] | None"]
#: `visiting(model, visit)`: while it lasts, `visit` sees the input `(args, kwargs)` and the output of every call of
#: every module, and gives a replacement in a one-tuple, or None.
Visiting = Callable[[torch.nn.Module, Visit], AbstractContextManager[None]]


def visiting(model: torch.nn.Module, visit: Visit) -> AbstractContextManager[None]:
    """The oracle that is used where no other is given."""
    paths = {module: path for path, module in model.named_modules()}
    return observing(paths, lambda module, kind, value: visit((paths[module], kind), value))


def plain_run(
    model: torch.nn.Module, spots: Iterable[Spot], run: Callable[[], Any], oracle: Visiting
) -> tuple[dict[Spot, Any], Any]:
    """The first value at each of `spots`, as copies, and what `run` gives."""
    wanted, found = set(spots), dict[Spot, Any]()

    def visit(spot: Spot, value: Any) -> None:
        if spot in wanted and spot not in found:
            found[spot] = map_tensors(lambda tensor: tensor.detach().clone(), value)

    with oracle(model, visit):
        result = run()
    return found, result


def changed_run(
    model: torch.nn.Module, changes: Mapping[Spot, Callable[[Any], Any]], run: Callable[[], Any], oracle: Visiting
) -> Any:
    """What `run` gives when the first value at each spot is replaced by what its function makes of it."""
    left = dict(changes)

    def visit(spot: Spot, value: Any) -> tuple[Any] | None:
        change = left.pop(spot, None)
        return None if change is None else (change(value),)

    with oracle(model, visit):
        return run()
