"""The taps of one pass: which modules have their operations counted, and which operations are waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent

from nnsight_core.carried import Carried, Carrier
from nnsight_core.operations import Memory, Tap, operation_of
from nnsight_core.values import map_tensors

#: Called with (module, place, value, whose memory it is, if it is that of an operation); gives the changed value in a
#: one-tuple, or None for no change.
Deliver = Callable[..., "tuple[Any] | None"]


class Taps:
    """Makes a tap for each call of a module that somebody has asked about.

    Args:
        coroutine: gives the coroutine in which the pass runs.
        deliver: told of what is listened for.
    """

    def __init__(self, coroutine: Callable[[], Any], deliver: Deliver) -> None:
        self._coroutine = coroutine
        self._deliver = deliver
        self._modules: set[torch.nn.Module] = set()
        self._listening: set[tuple[torch.nn.Module, str]] = set()
        self._carried: dict[torch.nn.Module, dict[Carried, None]] = {}
        self._carriers: list[Carrier] = []
        #: For each module that has been tapped while it ran, the operations that there were.
        self._ran: dict[torch.nn.Module, dict[str, None]] = {}
        self._joined: list[Tap] = []

    def add(self, module: torch.nn.Module) -> None:
        """Count the operations of ``module`` from the start of its next call on."""
        self._modules.add(module)

    def listen(self, module: torch.nn.Module, kind: str) -> None:
        """Deliver ``kind``, a value of an operation of ``module``, from now on."""
        self._listening.add((module, kind))
        carried = Carried.of(kind)
        if carried is not None:
            self._carried.setdefault(module, {})[carried] = None

    def names(self, module: torch.nn.Module) -> list[str] | None:
        """The operations in calls of ``module``, so far; None if none has run with the tap on."""
        ran = self._ran.get(module)
        return None if ran is None else list(ran)

    def tap_of(self, module: torch.nn.Module) -> Tap | None:
        """What is to be on while ``module``, which is about to run, runs."""
        if module not in self._modules or getcurrent() is not self._coroutine():
            return None
        return self._new(module, None)

    def inside(
        self,
        module: torch.nn.Module,
        call: FrameType,
        gone: Sequence[str],
        coming: Sequence[str],
        astray: Callable[[], None],
    ) -> Tap:
        """A tap for ``call`` of ``module``, which is under way and has ``gone`` by operations; calls ``astray`` if
        others come than ``coming``.
        """
        left = iter(coming)

        def compare(name: str) -> None:
            if next(left, None) != name:
                astray()

        tap = self._new(module, compare)
        tap.join(call, gone)
        self._ran[module].update(dict.fromkeys(gone))
        self._joined.append(tap)
        return tap

    def has_joined(self, call: FrameType) -> bool:
        """Whether ``call`` has got a tap while it was under way."""
        return any(tap.is_of(call) for tap in self._joined)

    def end_of(self, call: FrameType | None) -> None:
        """``call`` is over: its tap, if it has got one while it was under way, goes."""
        for tap in self._joined:
            if tap.is_of(call):
                tap.end()

    def _new(self, module: torch.nn.Module, compare: Callable[[str], None] | None) -> Tap:
        ran, carrier = self._ran.setdefault(module, {}), Carrier()
        self._carriers.append(carrier)

        def visit(kind: str, value: Any, memory: Memory) -> tuple[Any] | None:
            if kind.endswith(".input"):
                ran[operation_of(kind)] = None
                if compare is not None:
                    compare(operation_of(kind))
            if getcurrent() is not self._coroutine():
                return None
            carried = self._carried.get(module)
            if carried is None:
                return self._visit(module, kind, value, memory)
            if not kind.endswith(".input"):
                changed = self._visit(module, kind, value, memory)
                # What is changed in place stays the tensor that it is.
                carrier.made(carried, kind, value if changed is None or memory == "in place" else changed[0])
                return changed
            call = carrier.replaced(value)
            changed = self._visit(module, kind, call, memory)
            call = call if changed is None else changed[0]
            call = carrier.shown(carried, kind, call, lambda kind, call: self._deliver(module, kind, call, "shared"))
            return None if call is value else (call,)

        return Tap(module, visit, lambda kind: (module, kind) in self._listening, carrier.ended)

    def _visit(self, module: torch.nn.Module, kind: str, value: Any, memory: Memory) -> tuple[Any] | None:
        if (module, kind) not in self._listening:
            return None
        changed = self._deliver(module, kind, value, memory)
        if not kind.endswith(".output") or (changed is None and memory != "own"):
            return changed
        # The model may change it in place, and whoever has looked is to keep what was.
        return (map_tensors(torch.Tensor.clone, value if changed is None else changed[0]),)

    @property
    def are_carrying(self) -> bool:
        """Whether a tensor that was shown is still on its way to those who take it."""
        return any(each.is_on_its_way for each in self._carriers)

    def clear(self) -> None:
        """Listen for nothing any more."""
        self._modules.clear()
        self._listening.clear()
        self._carried.clear()
        self._carriers.clear()
        for tap in self._joined:
            tap.close()
        self._joined.clear()
