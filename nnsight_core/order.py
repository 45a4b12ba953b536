"""The order in which a model runs its modules, found by a dry run of a copy; only needed to explain an error."""

from __future__ import annotations

from typing import Any

import torch

from nnsight_core.dry_run import run_dry
from nnsight_core.operations import is_operation, operation_of
from nnsight_core.shapes import ShapesOnly
from nnsight_core.sites import Site
from nnsight_core.twin import is_small

#: Places in the order in which they come by: a module, and "input", "output", or an operation inside it.
Seen = list[tuple[torch.nn.Module, str]]


class _Enough(BaseException):
    """Ends a dry run that has shown what it was made for."""


def observed_order(
    root: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: ShapesOnly | None = None,
    inside: torch.nn.Module | None = None,
) -> tuple[Seen, str]:
    """Which modules of ``root`` are entered and left, in order, when ``root(*args, **kwargs)`` runs.

    Returns the list of (module, "input" or "output"), with the operations of the module ``inside`` among them; and a
    sentence of doubt: empty when the dry run came to its end, else what stopped it. ``shapes`` are those of the run
    that is asked about, if it has no numbers.
    """
    seen: Seen = []

    def note(module: torch.nn.Module, kind: str, *_: Any) -> None:
        seen.append((module, kind))

    if inside is None:
        try:
            run_dry(root, (args, kwargs), note, ShapesOnly.here())
        except Exception as error:  # noqa: BLE001 - a model may raise anything, and we are explaining another error
            if _has_no_numbers(root) or not is_small(root):
                name = type(error).__name__
                return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {name}.)"
        else:
            return seen, ""
        seen.clear()
    try:
        # A path that depends on the numbers themselves can only be found with them, and models take other ones where
        # they see that tensors are fake.
        run_dry(root, (args, kwargs), note, shapes or _where_needed(root), inside)
    except Exception as error:  # noqa: BLE001 - likewise
        return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {type(error).__name__}.)"
    return seen, ""


def observed_operations(
    root: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    module: torch.nn.Module,
    shapes: ShapesOnly | None = None,
) -> list[tuple[str, Site]] | None:
    """The operations of the first call of ``module`` when ``root(*args, **kwargs)`` runs: names, and the lines that
    call them. None if ``module`` is not called.

    The run is one of a copy up to the end of that call, with real numbers where the model has them and ``shapes`` is
    None. Whatever the model raises is raised.
    """
    found: dict[str, Site] = {}

    def note(one: torch.nn.Module, kind: str, value: Any, site: Any) -> None:
        if is_operation(kind):
            found.setdefault(operation_of(kind), site())
        elif one is module and kind == "output":
            raise _Enough

    try:
        run_dry(root, (args, kwargs), note, shapes or _where_needed(root), module)
    except _Enough:
        return list(found.items())
    return None


def _has_no_numbers(root: torch.nn.Module) -> bool:
    return any(each.is_meta for each in (*root.parameters(), *root.buffers()))


def _where_needed(root: torch.nn.Module) -> ShapesOnly | None:
    """Weights that are elsewhere, or not loaded, have a shape and nothing more."""
    return ShapesOnly.here() if _has_no_numbers(root) else None
