"""PyTorch's thread-local state, so that each side of a switch keeps its own.

The body of a trace and the model's forward pass share one thread. Grad mode, inference mode, autocast, default
device, the two mode stacks and the hooks on what autograd saves belong to the thread, so whoever gives up its turn
hands them over in the state in which the other side left them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _device, _python_dispatch

_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack

_autocast_caches = torch.is_autocast_cache_enabled
_saving = torch._C._autograd._top_saved_tensors_default_hooks

# (grad, inference, autocast, function modes, dispatch modes, whether autocast caches, hooks on what autograd saves)
State = tuple[bool, bool, Any, Any, Any, bool, Any]


def _autocast_state() -> tuple[Any, ...]:
    devices = torch._C._autocast_supported_devices()
    each = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    return each


def _function_mode_state() -> tuple[Any, ...]:
    # A default device is a function mode at the bottom of the stack, remembered in two more places.
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return (tuple(torch.overrides._get_current_function_mode_stack()), _device.CURRENT_DEVICE, context)


_NO_FUNCTION_MODES = ((), None, None)


def snapshot() -> State:
    """This thread's state as it is now; cheap where nothing unusual is on."""
    return (
        _is_grad_enabled(),
        _is_inference(),
        _autocast_state() if _any_autocast() else None,
        _function_mode_state() if _function_modes() else None,
        tuple(_python_dispatch._get_current_dispatch_mode_stack()) if _dispatch_modes() else None,
        _autocast_caches(),
        _saving_hooks() if _saving(False) else None,
    )


def with_function_mode(state: State, mode: Any) -> State:
    """``state`` with ``mode`` beneath all of its function modes: blocks that are under way take off the highest.

    A default device is to be found lowest of all by whoever takes it off.
    """
    modes, device, context = state[3] or _NO_FUNCTION_MODES
    lowest = 0 if device is None else 1
    return (*state[:3], ((*modes[:lowest], mode, *modes[lowest:]), device, context), *state[4:])


def _set_autocast(state: tuple[Any, ...] | None) -> None:
    if state is None:
        for device in torch._C._autocast_supported_devices():
            torch.set_autocast_enabled(device, False)
        # What autocast has cast stays cached only while some autocast is on.
        torch.clear_autocast_cache()
        return
    for device, enabled, dtype in state:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _set_function_modes(state: tuple[Any, ...] | None) -> None:
    if state is None and not _function_modes():
        return
    modes, device, context = state or _NO_FUNCTION_MODES
    while _function_modes():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    _device.CURRENT_DEVICE = device
    torch._GLOBAL_DEVICE_CONTEXT.device_context = context


def _set_dispatch_modes(modes: tuple[Any, ...] | None) -> None:
    for mode in reversed(_python_dispatch._get_current_dispatch_mode_stack()):
        _python_dispatch._pop_mode(getattr(mode, "_mode_key", None))
    for mode in modes or ():
        _python_dispatch._push_mode(mode)


def _saving_hooks() -> tuple[Any, ...]:
    """The pairs of hooks, outermost first: checkpointing and saving on the CPU put them there."""
    found: list[Any] = []
    while (top := _saving(False)) is not None:
        found.insert(0, top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    _push_saving_hooks(found)
    return tuple(found)


def _push_saving_hooks(hooks: Iterable[Any]) -> None:
    for pack, unpack in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _set_saving_hooks(hooks: tuple[Any, ...] | None) -> None:
    while _saving(False) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    _push_saving_hooks(hooks or ())


def blended(state: State, before: State, now: State) -> State:
    """``now`` with whatever of ``state`` differs from ``before``."""
    parts = zip(state, before, now, strict=True)
    return tuple(own if own != was else here for own, was, here in parts)


def enter(state: State, now: State) -> Any:
    """Put the thread into ``state``, given that it is in ``now``; what comes back goes to :func:`leave`."""
    guard = None
    if state[1] != now[1]:
        guard = torch._C._InferenceMode(state[1])
        guard.__enter__()
    if state[2] != now[2]:
        _set_autocast(state[2])
    torch.set_autocast_cache_enabled(state[5])
    if state[4] != now[4]:
        _set_dispatch_modes(state[4])
    if state[6] != now[6]:
        _set_saving_hooks(state[6])
    # A function mode would take the setting of the grad mode for an operation of the user's.
    if _function_modes():
        _set_function_modes(None)
    torch._C._set_grad_enabled(state[0])
    _set_function_modes(state[3])
    return guard


def leave(guard: Any, state: State) -> None:
    """Undo :func:`enter` on the same side: drop its guard and make sure the thread is in ``state`` again."""
    if guard is not None:
        guard.__exit__(None, None, None)
    now = snapshot()
    if now != state:
        # Inference mode is held by guards on the stacks of both sides; here they have all been dropped.
        enter((state[0], now[1], *state[2:]), now)
