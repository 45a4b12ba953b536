"""In which order a model ran its modules, and what is wrong when a value does not come."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nnsight_core.asked import Asked
from nnsight_core.errors import ModuleNotRunError, NNsightError, NoSuchOperationError, OutOfOrderError
from nnsight_core.kinds import place_of
from nnsight_core.operations import is_operation, operation_of

#: Which modules are entered and left, in order, and what stands in the way of being sure.
Order = tuple[list[tuple[torch.nn.Module, str]], str]


def verdict(order: Order, asked: Asked, last: Asked | None) -> str:
    """Whether the value asked for came ``"before"`` or ``"never"``, or its module was ``"running"`` already when
    ``last`` was there.
    """
    seen, _ = order
    # A call that could have been skipped came when its input did.
    kind = place_of(asked.kind)
    if (asked.module, kind) not in seen:
        return "never"
    if last is None or kind == "input" or (last.module, place_of(last.kind)) not in seen:
        return "before"
    if (last.module, place_of(last.kind)) == (asked.module, kind):
        # What is derived of a call comes before its plain result.
        return "before"
    here = seen.index((last.module, place_of(last.kind)))
    runs = (asked.module, "input") in seen[:here] and (asked.module, "output") in seen[here:]
    return "running" if runs else "before"


def too_late_or_never(asked: Asked, last: Asked | None, order: Order) -> NNsightError:
    """Why the value of a module's own call did not come.

    Args:
        asked: what was asked for.
        last: the last value that was there.
        order: how the modules ran.
    """
    found = verdict(order, asked, last)
    if found == "running" and last is not None:
        return OutOfOrderError(asked.label, asked.site, last.label, last.site, runs_inside=True)
    if found == "before":
        label, site = ("the end of the forward pass", None) if last is None else (last.label, last.site)
        return OutOfOrderError(asked.label, asked.site, label, site, setting=asked.setting)
    return ModuleNotRunError(asked.label, asked.site, order[1])


def missing_operation(
    asked: Asked, last: Asked | None, ran: list[str] | None, look: Callable[[torch.nn.Module], Order]
) -> NNsightError:
    """Why the value of an operation did not come.

    Args:
        asked: what was asked for.
        last: the last value that was there.
        ran: the operations that its module called; None if nobody has counted them.
        look: finds them out.
    """
    if ran is None:
        seen, doubt = look(asked.module)
        kinds = [kind for module, kind in seen if module is asked.module]
        if doubt or not kinds:
            return ModuleNotRunError(asked.label, asked.site, doubt)
        ran = [operation_of(kind) for kind in kinds if is_operation(kind)]
    if operation_of(asked.kind) not in ran:
        return NoSuchOperationError(operation_of(asked.kind), asked.label.rsplit(".", 2)[0], ran, asked.site)
    label, site = ("the end of the forward pass", None) if last is None else (last.label, last.site)
    return OutOfOrderError(asked.label, asked.site, label, site, setting=asked.setting)
