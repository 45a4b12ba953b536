"""Copies of modules without the hooks and gates of whoever is at work on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nnsight_core.gates import Gate
from nnsight_core.hooks import HOOK_DICTS


def hooked(root: torch.nn.Module) -> list[str]:
    """The paths of the modules of ``root`` that have hooks, or another forward than their class's."""
    return [
        path
        for path, module in root.named_modules()
        if "forward" in module.__dict__ or any(module.__dict__[name] for name in HOOK_DICTS)
    ]


def hookless_copy(root: torch.nn.Module, known: dict[int, Any], but_own: bool = False) -> torch.nn.Module:
    """A deep copy of ``root`` without hooks and gates; ``known`` are copies there are already, by the originals' ids.

    ``but_own`` leaves the hooks that the model's own library has put there, which are part of what it computes. The
    original is not touched, for other threads may be running it.
    """
    left: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    with Gate.lock:
        for module in root.modules():
            own = _own_keys(module, root) if but_own else set()
            for hooks in (module.__dict__[name] for name in HOOK_DICTS if module.__dict__.get(name) is not None):
                known[id(hooks)] = empty = type(hooks)()
                left.append((empty, {key: hook for key, hook in hooks.items() if key in own}))
            gate = module.__dict__.get("forward")
            if isinstance(gate, Gate):
                known[id(gate)] = gate
        copied = copy.deepcopy(root, known)
    for hooks, kept in left:
        # Once all modules are copied, for hooks may be methods of theirs.
        hooks.update(copy.deepcopy(kept, known))
    for module in copied.modules():
        gate = module.__dict__.get("forward")
        if isinstance(gate, Gate):
            del module.__dict__["forward"]
            if gate.own is not None:
                module.__dict__["forward"] = copy.deepcopy(gate.own, known)
    return copied


class _InTheirPlace(TorchFunctionMode):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What takes the place of a tensor that is about to be copied."""
        if func is torch.Tensor.__deepcopy__:
            return self._function(args[0])
        return func(*args, **(kwargs or {}))


def with_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A deep copy of ``value``, objects of all classes included, in which ``function`` says what becomes of tensors.

    >>> with_tensors({"x": [torch.zeros(3)]}, lambda tensor: tensor[:1])
    {'x': [tensor([0.])]}
    """
    with _InTheirPlace(function):
        return copy.deepcopy(value)


def _own_keys(module: torch.nn.Module, root: torch.nn.Module) -> set[Any]:
    """The keys of the hooks on ``module`` that come from its own library; torch gives each key once."""
    hooks = [each for name in HOOK_DICTS for each in (module.__dict__.get(name) or {}).items()]
    return {key for key, hook in hooks if _is_own(hook, module, root)}


def _is_own(hook: Any, *modules: torch.nn.Module) -> bool:
    """Whether a hook comes from the library that one of ``modules`` comes from."""
    while isinstance(hook, partial):
        hook = hook.func
    return _package_of(hook) in {_package_of(type(module)) for module in modules}


def _package_of(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]
