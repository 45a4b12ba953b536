"""In which order a model ran its modules, found out once something has gone wrong."""

from __future__ import annotations

import torch

from nnsight_core.asked import Asked

#: Which modules are entered and left, in order, and what stands in the way of being sure.
Order = tuple[list[tuple[torch.nn.Module, str]], str]


def verdict(order: Order, asked: Asked, last: Asked | None) -> str:
    """Whether the value asked for came ``"before"`` or ``"never"``, or its module was ``"running"`` already when
    ``last`` was there.
    """
    seen, _ = order
    # A call that could have been skipped came when its input did.
    kind = "input" if asked.kind == "skip" else asked.kind
    if (asked.module, kind) not in seen:
        return "never"
    if last is None or kind == "input" or (last.module, last.kind) not in seen:
        return "before"
    here = seen.index((last.module, last.kind))
    runs = (asked.module, "input") in seen[:here] and (asked.module, "output") in seen[here:]
    return "running" if runs else "before"
