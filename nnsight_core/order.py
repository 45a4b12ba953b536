"""The order in which a model runs its modules, and the operations in them, found by a dry run that changes nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from nnsight_core.hooks import hookless_copy, recording
from nnsight_core.operations import Memory, Tap, operation_of
from nnsight_core.sites import Site

#: Up to this many bytes a model may be copied for a dry run with its real numbers.
_SMALL = 2**30

#: Places in the order in which they come by: a module, and "input", "output", or an operation inside it.
Seen = list[tuple[torch.nn.Module, str]]


class _Enough(BaseException):
    """Ends a dry run that has shown what it was made for."""


def observed_order(
    root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inside: torch.nn.Module | None = None
) -> tuple[Seen, str]:
    """Which modules of ``root`` are entered and left, in order, when ``root(*args, **kwargs)`` runs.

    Returns the list of (module, "input" or "output"), with the operations of the module ``inside`` among them; and a
    sentence of doubt: empty when the dry run came to its end, else what stopped it.
    """
    seen: Seen = []
    if inside is None:
        try:
            _run_copy(root, args, kwargs, seen, FakeTensorMode(allow_non_fake_inputs=True))
        except Exception as error:  # noqa: BLE001 - a model may raise anything, and we are explaining another error
            if _bytes(root) > _SMALL:
                name = type(error).__name__
                return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {name}.)"
        else:
            return seen, ""
        seen.clear()
    try:
        # A path that depends on the numbers themselves can only be found with them, and models take other ones where
        # they see that tensors are fake.
        _run_copy(root, args, kwargs, seen, None, _taps(inside, lambda tap, kind: None))
    except Exception as error:  # noqa: BLE001 - likewise
        return seen, f"(Whether it ran earlier could not be told: the dry run stopped with {type(error).__name__}.)"
    return seen, ""


def observed_operations(
    root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], module: torch.nn.Module
) -> list[tuple[str, Site]] | None:
    """The operations of the first call of ``module`` when ``root(*args, **kwargs)`` runs: names, and the lines that
    call them. None if ``module`` is not called.

    The run is one of a copy, with real numbers, up to the end of that call. Whatever the model raises is raised.
    """
    found: dict[str, Site] = {}

    def note(tap: Tap, kind: str) -> None:
        found.setdefault(operation_of(kind), tap.site())

    try:
        _run_copy(root, args, kwargs, [], None, _taps(module, note, ends=True))
    except _Enough:
        return list(found.items())
    return None


def _bytes(root: torch.nn.Module) -> int:
    return sum(each.nbytes for each in (*root.parameters(), *root.buffers()))


#: Prepares the copy for a run: called with what finds the copy of a module, and what to note in.
_Prepare = Callable[[dict[torch.nn.Module, torch.nn.Module], Seen], None]


def _taps(inside: torch.nn.Module | None, note: Callable[[Tap, str], None], ends: bool = False) -> _Prepare:
    """Lets the operations of ``inside`` be noted, and the run end when its first call does."""

    def prepare(copies: dict[torch.nn.Module, torch.nn.Module], noted: Seen) -> None:
        if inside is None or inside not in copies:
            return
        module = copies[inside]
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


def _own(tensor: torch.Tensor, is_small: bool) -> torch.Tensor:
    # A forward does not write into its parameters, and for those of a large model there may be no room twice.
    shared = isinstance(tensor, torch.nn.Parameter) and not is_small
    return tensor.detach() if shared else tensor.detach().clone()


def _run_copy(
    root: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: Seen,
    mode: FakeTensorMode | None,
    prepare: _Prepare | None = None,
) -> None:
    """Run a copy, which takes the blow: counters, batch statistics, whatever a forward writes down."""
    known: dict[int, Any] = {}
    kept = [value for module in root.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    is_small = _bytes(root) <= _SMALL
    for each in (*root.parameters(), *root.buffers(), *kept):
        known[id(each)] = mode.from_tensor(each.detach()) if mode else _own(each, is_small)
    dry = hookless_copy(root, known)
    originals = dict(zip(dry.modules(), root.modules(), strict=True))
    args, kwargs = copy.deepcopy((args, kwargs))
    noted: Seen = []
    if prepare is not None:
        prepare({original: module for module, original in originals.items()}, noted)
    devices = {each.device.index for each in root.parameters() if each.device.type == "cuda"}
    try:
        with (
            torch.random.fork_rng(devices=devices),
            recording(dry.modules(), noted),
            torch.no_grad(),
            mode or nullcontext(),
        ):
            if mode:
                args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            dry(*args, **kwargs)
    finally:
        seen += [(originals[module], kind) for module, kind in noted]
