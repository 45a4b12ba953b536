"""A run of a model's twin whose values somebody is told of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from nnsight_core.compiled import Eager, is_compiled
from nnsight_core.hooks import observing
from nnsight_core.kinds import Derived
from nnsight_core.operations import Memory, Tap
from nnsight_core.shapes import ShapesOnly
from nnsight_core.sites import Site
from nnsight_core.twin import Twin

#: Where a tensor stands: the module, "input", "output" or the same of an operation inside it, and the keys that lead
#: to it.
Place = tuple[torch.nn.Module, str, tuple[Any, ...]]

#: Called with a module, what of it comes by, the value, and, for an operation, what gives the line of its call.
Note = Callable[[torch.nn.Module, str, Any, "Callable[[], Site] | None"], None]

#: A module, or all modules of a class, whose inside somebody looks into.
Inside = torch.nn.Module | type[torch.nn.Module] | None


def run_dry(
    root: torch.nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    note: Note,
    shapes: ShapesOnly | None,
    inside: Inside = None,
    derived: Derived | None = None,
) -> None:
    """Run a copy of ``root``, and tell ``note`` what each of its modules takes and gives.

    Args:
        root: the model.
        call: its arguments, of which copies are used.
        note: told of every value, with the model's own modules.
        shapes: makes fake tensors; None runs with numbers.
        inside: the module whose operations ``note`` is told of, too, or the class of such modules.
        derived: what is worked out of the calls of the module ``inside``, and told in the place of its operations.

    Raises:
        Exception: whatever the model raises, or ``note`` does.
    """
    # It takes the blow: counters, batch statistics, whatever a forward writes down.
    twin = Twin(root, shapes)

    calls: dict[torch.nn.Module, Any] = {}

    def told(module: torch.nn.Module, kind: str, value: Any, site: Callable[[], Site] | None = None) -> None:
        original = twin.original(module)
        note(original, kind, value, site)
        if derived is not None and original is inside:
            if kind == "input":
                calls[module] = value
            else:
                note(original, derived, derived.get((module, calls.pop(module), value)), None)

    for module in twin.module.modules() if derived is None else ():
        if type(module) is inside or (inside is not None and twin.original(module) is inside):
            _tap(module, told)
    args, kwargs = twin.own(call)
    devices = {each.device.index for each in root.parameters() if each.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), observing(twin.module.modules(), told), torch.no_grad():
        # Whoever looks at every module looks at those inside compiled ones, too.
        uncompiled = Eager.on() if any(map(is_compiled, root.modules())) else nullcontext()
        with uncompiled, twin.running():
            twin.module(*args, **kwargs)


def _tap(module: torch.nn.Module, note: Note) -> None:
    """Let ``note`` be told of the operations of ``module``, which is a copy."""
    forward = module.forward

    @functools.wraps(forward)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        def visit(kind: str, value: Any, memory: Memory) -> None:
            note(module, kind, value, tap.site)

        tap = Tap(module, visit)
        return tap.run(forward, args, kwargs)

    module.__dict__["forward"] = tapped
