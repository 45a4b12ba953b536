"""What flows where inside a module: its torch operations in a dry run, with what each was called with and gave."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nnsight_core.compiled import Eager
from nnsight_core.flex import runs_flex
from nnsight_core.operations import MODULE_CALL, base_name
from nnsight_core.operators import changes_in_place
from nnsight_core.twin import Twin
from nnsight_core.values import map_tensors


@dataclass(frozen=True, eq=False)
class Step:
    """One torch operation of a dry run.

    Args:
        module: the module whose own operation it is; None if that is made on the fly.
        call: which call of the module it belongs to, counted from 0 in the call that is watched.
        name: as ``module.source`` names it.
        args: its arguments.
        kwargs: its keyword arguments.
        result: what it gave.
        is_in_place: whether it changed its first argument.
    """

    module: torch.nn.Module | None
    call: int
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    is_in_place: bool

    @property
    def function(self) -> str:
        """The function's plain name.

        >>> Step(None, 0, "masked_fill_0", (), {}, None, False).function
        'masked_fill'
        """
        return self.name.rpartition("_")[0]

    @property
    def taken(self) -> list[torch.Tensor]:
        """The tensors that it was called with."""
        return tensors_in((self.args, self.kwargs))

    @property
    def made(self) -> list[torch.Tensor]:
        """The tensors that it gave, or changed."""
        return tensors_in((self.result, self.args[:1] if self.is_in_place else ()))


@dataclass(frozen=True, eq=False)
class Flow:
    """One call of a module, with all operations inside it, those of its children among them.

    Args:
        args: its arguments.
        kwargs: its keyword arguments.
        steps: the operations in order.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: tuple[Step, ...]

    def makers(self, tensor: torch.Tensor, before: Step | None = None) -> list[Step]:
        """The operations that made the tensor or wrote into its memory, before ``before``."""
        earlier = self.steps if before is None else self.steps[: self.steps.index(before)]
        return [step for step in earlier if any(_is_written(each, step, tensor) for each in step.made)]

    def takers(self, tensor: torch.Tensor) -> list[Step]:
        """The operations that were called with this very tensor."""
        return [step for step in self.steps if any(each is tensor for each in step.taken)]

    def behind(self, tensor: torch.Tensor, before: Step, stops: Callable[[Step], bool]) -> Iterator[Step]:
        """The operations from which the tensor's numbers come, nearest first; not those behind one that ``stops``.

        What was only chosen by numbers, as by the indices of the largest, does not come from them.
        """
        seen: set[Step] = set()
        waiting = [(tensor, before)]
        while waiting:
            each, limit = waiting.pop(0)
            for step in self.makers(each, limit):
                if step not in seen:
                    seen.add(step)
                    yield step
                    if not stops(step):
                        waiting += [(given, step) for given in step.taken if given.is_floating_point()]

    def ahead(self, tensor: torch.Tensor, stops: Callable[[Step], bool]) -> Iterator[tuple[Step, torch.Tensor]]:
        """The operations into which the tensor goes, nearest first, each with what came to it; not those beyond one
        that ``stops``.
        """
        seen: set[Step] = set()
        waiting = [tensor]
        while waiting:
            each = waiting.pop(0)
            for step in self.takers(each):
                if step not in seen:
                    seen.add(step)
                    yield step, each
                    if not stops(step):
                        waiting += step.made


def _is_written(made: torch.Tensor, step: Step, tensor: torch.Tensor) -> bool:
    if made is tensor:
        return True
    return step.is_in_place and made.untyped_storage()._cdata == tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors inside containers of any kind, in order.

    >>> tensors_in({"a": (torch.zeros(1), None)})
    [tensor([0.])]
    """
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


class Watch:
    """Dry runs of a copy of a model, in which the flow inside some modules is written down.

    Args:
        root: the model.
        modules: those of its modules that are watched.

    Raises:
        CopyError: the model holds something that cannot be copied.
    """

    def __init__(self, root: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> None:
        self._twin = Twin(root, None)
        self._seen: dict[torch.nn.Module, list[Flow]] = {}
        self._devices = {each.device.index for each in root.parameters() if each.device.type == "cuda"}
        self._twin.module.eval()
        for module in dict.fromkeys(modules):
            self._watch(module, self._twin.of(module))

    def _watch(self, module: torch.nn.Module, twin: torch.nn.Module) -> None:
        forward = twin.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            recorder = _Recorder(self._twin)
            with recorder:
                result = forward(*args, **kwargs)
            self._seen.setdefault(module, []).append(Flow(args, kwargs, tuple(recorder.steps)))
            return result

        twin.__dict__["forward"] = watched

    def run(self, call: Callable[[torch.nn.Module], Any]) -> tuple[Any, dict[torch.nn.Module, list[Flow]]]:
        """What ``call(copy)`` gives, and the flow in each call of each module; in eval mode, without gradients."""
        self._seen.clear()
        uncompiled = Eager.on() if any(map(runs_flex, self._twin.module.modules())) else nullcontext()
        with torch.random.fork_rng(devices=self._devices), torch.no_grad(), uncompiled, self._twin.running():
            result = call(self._twin.module)
        return result, dict(self._seen)


class _Recorder(TorchFunctionMode):
    """Writes down every operation, with the module whose own it is."""

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._twin = twin
        self._originals: dict[torch.nn.Module, torch.nn.Module] = {}
        #: For each call of a module, by its frame, its number and how many operations of each name it has had.
        self._calls: dict[int, tuple[FrameType, int, dict[str, int]]] = {}
        self._numbers: dict[torch.nn.Module, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let ``func`` run, and write it down."""
        kwargs = kwargs or {}
        name = base_name(func, len(args) + len(kwargs))
        if name is None or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not MODULE_CALL:
            frame = frame.f_back
        owner: torch.nn.Module | None = None
        number = 0
        counts: dict[str, int] = {}
        if frame is not None:
            owner = frame.f_locals["self"]
            if id(frame) not in self._calls:
                self._numbers[owner] = self._numbers.get(owner, -1) + 1
                # The frame is held so that no other gets its place in memory.
                self._calls[id(frame)] = (frame, self._numbers[owner], {})
            _, number, counts = self._calls[id(frame)]
        count = counts.get(name, 0)
        counts[name] = count + 1
        result = func(*args, **kwargs)
        original = None if owner is None else self._twin.original(owner)
        known = None if original is owner else original
        in_place = changes_in_place(func.__name__.partition(".")[0], kwargs)
        self.steps.append(Step(known, number, f"{name}_{count}", tuple(args), kwargs, result, in_place))
        return result
