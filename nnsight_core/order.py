"""The order in which a model runs its modules, found by a dry run of a copy; only needed to explain an error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nnsight_core.hooks import recording
from nnsight_core.operations import Memory, Tap, operation_of
from nnsight_core.shapes import ShapesOnly
from nnsight_core.sites import Site
from nnsight_core.twin import Twin

#: Up to this many bytes a model may be copied for a dry run with its real numbers.
_SMALL = 2**30

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
    if inside is None:
        try:
            _run_twin(root, args, kwargs, seen, ShapesOnly.here())
        except Exception as error:  # noqa: BLE001 - a model may raise anything, and we are explaining another error
            if _has_no_numbers(root) or _bytes(root) > _SMALL:
                name = type(error).__name__
                return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {name}.)"
        else:
            return seen, ""
        seen.clear()
    try:
        # A path that depends on the numbers themselves can only be found with them, and models take other ones where
        # they see that tensors are fake.
        _run_twin(root, args, kwargs, seen, shapes or _where_needed(root), _taps(inside, lambda tap, kind: None))
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

    def note(tap: Tap, kind: str) -> None:
        found.setdefault(operation_of(kind), tap.site())

    try:
        _run_twin(root, args, kwargs, [], shapes or _where_needed(root), _taps(module, note, ends=True))
    except _Enough:
        return list(found.items())
    return None


def _has_no_numbers(root: torch.nn.Module) -> bool:
    return any(each.is_meta for each in (*root.parameters(), *root.buffers()))


def _where_needed(root: torch.nn.Module) -> ShapesOnly | None:
    """Weights that are elsewhere, or not loaded, have a shape and nothing more."""
    return ShapesOnly.here() if _has_no_numbers(root) else None


def _bytes(root: torch.nn.Module) -> int:
    return sum(each.nbytes for each in (*root.parameters(), *root.buffers()))


#: Prepares the copy for a run: called with it, and what to note in.
_Prepare = Callable[[Twin, Seen], None]


def _taps(inside: torch.nn.Module | None, note: Callable[[Tap, str], None], ends: bool = False) -> _Prepare:
    """Lets the operations of ``inside`` be noted, and the run end when its first call does."""

    def prepare(twin: Twin, noted: Seen) -> None:
        if inside is None or twin.of(inside) is inside:
            return
        module = twin.of(inside)
        forward = module.forward

        @functools.wraps(forward)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            def visit(kind: str, value: Any, memory: Memory) -> None:
                noted.append((module, kind))
                note(tap, kind)

            tap = Tap(module, visit)
            result = tap.run(forward, args, kwargs)
            if ends:
                raise _Enough
            return result

        module.__dict__["forward"] = tapped

    return prepare


def _run_twin(
    root: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: Seen,
    shapes: ShapesOnly | None,
    prepare: _Prepare | None = None,
) -> None:
    """Run a copy, which takes the blow: counters, batch statistics, whatever a forward writes down."""
    # A forward does not write into its parameters, and for those of a large model there may be no room twice.
    twin = Twin(root, shapes, shares_parameters=_bytes(root) > _SMALL)
    args, kwargs = twin.own((args, kwargs))
    noted: Seen = []
    if prepare is not None:
        prepare(twin, noted)
    devices = {each.device.index for each in root.parameters() if each.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices), recording(twin.module.modules(), noted), torch.no_grad():
            with twin.running():
                twin.module(*args, **kwargs)
    finally:
        seen += [(twin.original(module), kind) for module, kind in noted]
