"""What a test may not leave behind: a hook, a patched forward, a suspended greenlet, a changed torch setting.

Walking every live object after every test would cost more than the tests. Instead every hook that torch hands out while
a test runs is remembered (all of them are made as `RemovableHandle`), every module that the engine hooks and every
greenlet that is switched to as well, and the modules that live for the whole session are compared with what they were.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import greenlet
import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from nnsight_core.forward_pass import is_idle
from nnsight_core.hooks import HookBoard

#: The modules that outlive a test, and so could carry something of it into the next.
WATCHED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

# transformers keeps hooks on a model once it has been asked for hidden states; torch and accelerate have their own.
_OWN_AFFAIRS = ("torch", "transformers", "accelerate")
_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOK_DICTS = tuple(
    sorted(name for name in vars(torch_module) if name.startswith("_global_") and "hooks" in name)
)


def hooks_on(modules: Iterable[torch.nn.Module]) -> dict[str, int]:
    """How many hooks each place holds, and which modules have a `forward` of their own; empty places are left out."""
    counts: dict[str, int] = {}
    for number, root in enumerate(modules):
        for path, module in root.named_modules():
            place = f"module {number} {type(root).__name__} at {path or 'its root'}"
            for name in _HOOK_DICTS:
                if found := [hook for hook in getattr(module, name).values() if not _is_own_affair(hook)]:
                    counts[f"{place}: {name}"] = len(found)
            if "forward" in vars(module):
                counts[f"{place}: forward in its __dict__"] = 1
    return counts


def process_state() -> dict[str, Any]:
    """What belongs to no module: global hooks, and the torch settings of this thread."""
    state: dict[str, Any] = {f"torch.{name}": len(getattr(torch_module, name)) for name in _GLOBAL_HOOK_DICTS}
    state["grad enabled"] = torch.is_grad_enabled()
    state["inference mode"] = torch.is_inference_mode_enabled()
    state["autocast on the CPU"] = torch.is_autocast_enabled("cpu")
    state["default dtype"] = torch.get_default_dtype()
    state["default device"] = torch.get_default_device()
    state["torch function modes"] = torch._C._len_torch_function_stack()
    state["torch dispatch modes"] = torch._C._len_torch_dispatch_stack()
    return state


def _is_own_affair(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] in _OWN_AFFAIRS


class Watch:
    """What has been registered and started since the watch began, and how everything was then."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._modules = tuple(modules)
        self._hooks_before = hooks_on(self._modules)
        self._state_before = process_state()
        self._handles: list[tuple[weakref.ref[dict[int, Any]], int]] = []
        self._hooked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._greenlets: weakref.WeakSet[greenlet.greenlet] = weakref.WeakSet()

    def note_handle(self, handle: RemovableHandle) -> None:
        self._handles.append((handle.hooks_dict_ref, handle.id))

    def note_hooks(self, modules: Iterable[torch.nn.Module]) -> None:
        self._hooked.update(modules)

    def note_switch(self, event: str, switch: tuple[greenlet.greenlet, greenlet.greenlet]) -> None:
        self._greenlets.add(switch[1])

    def complaints(self) -> list[str]:
        """One line for each thing left behind."""
        if self._leftovers():
            # A model, or an abandoned trace, that only a reference cycle keeps has left nothing behind.
            gc.collect()
        return self._leftovers()

    def _leftovers(self) -> list[str]:
        return [*self._changes(), *self._live_hooks(), *self._suspended()]

    def _changes(self) -> Iterator[str]:
        before = {**self._hooks_before, **self._state_before}
        after = {**hooks_on(self._modules), **process_state()}
        for name in sorted(before.keys() | after.keys()):
            if before.get(name, 0) != after.get(name, 0):
                yield f"{name}: {before.get(name, 0)} before, {after.get(name, 0)} after"

    def _live_hooks(self) -> Iterator[str]:
        for reference, key in self._handles:
            hook = (reference() or {}).get(key)
            if hook is not None and not _is_own_affair(hook):
                yield f"a hook is still registered: {hook!r}"
        for module in self._hooked:
            # The engine's own keys are negative; torch's are not.
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                yield from (f"a hook is still registered: {hook!r}" for key, hook in hooks.items() if key < 0)

    def _suspended(self) -> Iterator[str]:
        for one in self._greenlets:
            # The greenlet without a parent is the thread itself.
            if one and one.parent is not None and one is not greenlet.getcurrent() and not is_idle(one):
                yield f"a greenlet is still suspended: {one!r}"


@contextmanager
def watching(modules: Iterable[torch.nn.Module] | None = None) -> Iterator[Watch]:
    """Remember what is registered and started inside the block; greenlets only in the thread that opened it."""
    watch = Watch(WATCHED if modules is None else modules)
    plain_init = RemovableHandle.__init__
    plain_trace = greenlet.gettrace()
    plain_watch = HookBoard.watch

    @functools.wraps(plain_init)
    def remembering_init(self: RemovableHandle, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        watch.note_handle(self)

    @functools.wraps(plain_watch)
    def remembering_watch(self: HookBoard, module: torch.nn.Module, kind: str, ancestors: Any) -> None:
        watch.note_hooks((module, *ancestors))
        plain_watch(self, module, kind, ancestors)

    def remembering_trace(event: str, switch: tuple[greenlet.greenlet, greenlet.greenlet]) -> None:
        watch.note_switch(event, switch)
        if plain_trace is not None:
            plain_trace(event, switch)

    RemovableHandle.__init__ = remembering_init
    HookBoard.watch = remembering_watch  # type: ignore[method-assign]
    greenlet.settrace(remembering_trace)
    try:
        yield watch
    finally:
        greenlet.settrace(plain_trace)
        HookBoard.watch = plain_watch  # type: ignore[method-assign]
        RemovableHandle.__init__ = plain_init


@contextmanager
def hooks_that_stay() -> Iterator[None]:
    """While it lasts, the engine takes no hook away; what is watched for has to be seen."""
    left, clear = list[HookBoard](), HookBoard.clear

    def careless(self: HookBoard) -> None:
        left.append(self)

    HookBoard.clear = careless  # type: ignore[method-assign]
    try:
        yield
    finally:
        HookBoard.clear = clear  # type: ignore[method-assign]
        for board in left:
            board.clear()
