"""Gates: what stands in for the forward of a module that may be skipped, or whose operations are counted."""

from __future__ import annotations

import copy
import threading
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch

from nnsight_core.operations import Tap


class Board(Protocol):
    """Who has put up a gate, and says what is to be done at it."""

    def at_gate(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any] | None:
        """What ``module`` is to give instead of computing, in a one-tuple; None to let it."""

    def tap_of(self, module: torch.nn.Module) -> Tap | None:
        """What is to be on while ``module`` runs."""


class Gate:
    """Stands in for a module's ``forward`` while passes that may skip the module are under way.

    Several passes, in several threads, may hold one gate; the module gets its own forward back when none does.
    """

    lock = threading.Lock()
    _gates: ClassVar[dict[int, Gate]] = {}

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.own = module.__dict__.get("forward")
        self._forward = module.forward
        self._boards: list[Board] = []
        # Models look at the signatures of their own forwards.
        self.__wrapped__ = self._forward

    @classmethod
    def hold(cls, module: torch.nn.Module, board: Board) -> Gate:
        """Put up the gate of ``module`` for ``board``, or find it."""
        with cls.lock:
            gate = cls._gates.get(id(module))
            if gate is None:
                gate = cls._gates[id(module)] = cls(module)
                module.__dict__["forward"] = gate
            gate._boards.append(board)
            return gate

    def let_go(self, board: Board) -> None:
        """``board`` needs the gate no more."""
        with self.lock:
            self._boards.remove(board)
            if self._boards:
                return
            del self._gates[id(self._module)]
            # Somebody may have set a forward of their own since, which is not ours to take away. If it goes on to what
            # was there before, as that of a library that fetches weights does, that is not to be the gate for good.
            if self._module.__dict__.get("_old_forward") is self:
                self._module.__dict__["_old_forward"] = self._forward
            if self._module.__dict__.get("forward") is self:
                if self.own is None:
                    del self._module.__dict__["forward"]
                else:
                    self._module.__dict__["forward"] = self.own

    def __reduce__(self) -> Any:
        return getattr, (self._module, "forward") if self.own is None else (self.own, "__call__")

    def __deepcopy__(self, known: dict[int, Any]) -> Any:
        module = copy.deepcopy(self._module, known)
        return MethodType(type(module).forward, module) if self.own is None else copy.deepcopy(self.own, known)

    def __getattr__(self, name: str) -> Any:
        # Whatever else they look at: the name, the documentation, what a decorator has left there.
        return getattr(self.__dict__["_forward"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for board in list(self._boards):
            changed = board.at_gate(self._module, args, kwargs)
            if changed is not None:
                return changed[0]
            tap = board.tap_of(self._module)
            if tap is not None:
                return tap.run(self._forward, args, kwargs)
        return self._forward(*args, **kwargs)
