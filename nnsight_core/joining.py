"""Operations asked for when their module is half-way through its call: ``attn.c_attn.output`` was read, and now
``attn.source.softmax_0.output`` is asked for.

Operations are counted from the start of a call. A dry run tells how many of each name there have been where the call
is now, and from here on what comes is compared with what came there.
"""

from __future__ import annotations

from types import FrameType

import torch

from nnsight_core.asked import Asked
from nnsight_core.errors import OutOfOrderError
from nnsight_core.interleaver import Interleaver
from nnsight_core.kinds import place_of
from nnsight_core.operations import MODULE_CALL, Tap, is_operation, operation_of
from nnsight_core.order import Seen


def join_running_call(interleaver: Interleaver, asked: Asked, last: Asked | None) -> None:
    """If a call of the module that is asked for is under way, and nobody counts its operations, begin to.

    Raises:
        OutOfOrderError: it cannot be told how far the call is.
    """
    event = interleaver.event
    if event is None or last is None or (event.module is asked.module and not is_operation(event.kind)):
        # Not under way: it stands before its forward, or behind.
        return
    call = _uncounted_call(interleaver.turns.suspended_at(), interleaver.hooks.stand_in(asked.module))
    if call is None or interleaver.hooks.has_joined(call):
        return
    late = OutOfOrderError(asked.label, asked.site, last.label, last.site, runs_inside=True)
    # A generation calls the model in ways of its own; and where torch has not looked for hooks at the start of the
    # call, it does not at the end, which has to be known.
    if interleaver.step is not None or "inner" not in call.f_locals:
        raise late
    seen, doubt = interleaver.order(asked.module)
    names = None if doubt else _names_of_call(seen, asked.module, (event.module, place_of(event.kind)))
    if names is None:
        raise late
    before, after = names
    tap = interleaver.hooks.tap_inside(asked.module, call, before, after, lambda: interleaver.turns.fail(late))
    interleaver.turns.put_under_model(tap)


def _uncounted_call(frame: FrameType | None, module: torch.nn.Module) -> FrameType | None:
    """The innermost call of ``module`` that is under way at ``frame``; None if there is none, or it is tapped."""
    while frame is not None:
        if frame.f_code is MODULE_CALL and frame.f_locals.get("self") is module:
            return frame
        if frame.f_code is Tap.run.__code__ and frame.f_locals["self"].module is module:
            return None
        frame = frame.f_back
    return None


def _names_of_call(
    seen: Seen, module: torch.nn.Module, here: tuple[torch.nn.Module, str]
) -> tuple[list[str], list[str]] | None:
    """The operations of the only call of ``module`` before it comes by ``here``, and after; None if that is unclear."""
    starts = [index for index, place in enumerate(seen) if place == (module, "input")]
    ends = [index for index, place in enumerate(seen) if place == (module, "output")]
    if len(starts) != 1 or len(ends) != 1:
        return None
    inside = seen[starts[0] : ends[0]]
    if inside.count(here) != 1:
        return None
    position = inside.index(here)
    return _operations(inside[:position], module), _operations(inside[position:], module)


def _operations(places: Seen, module: torch.nn.Module) -> list[str]:
    kinds = [kind for one, kind in places if one is module and is_operation(kind) and kind.endswith(".input")]
    return [operation_of(kind) for kind in kinds]
