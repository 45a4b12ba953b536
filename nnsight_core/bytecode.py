"""What a script is about to do with what a call gives, by the instruction that follows in its bytecode."""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType, FrameType


def opens_block(frame: FrameType) -> bool:
    """Whether what the frame is calling now is the head of a ``with`` statement."""
    return any(start <= frame.f_lasti < end for start, end in _block_heads(frame.f_code))


@lru_cache(maxsize=256)
def _block_heads(code: CodeType) -> tuple[tuple[int, int], ...]:
    # As ranges, for within a call the position may already be that of its inline caches.
    found = []
    instructions = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    for call, after, then in zip(instructions, instructions[1:], [*instructions[2:], None], strict=False):
        # Before Python 3.14 one instruction enters a block; since then the methods are looked up one by one.
        looks_up = after.opname == "COPY" and then is not None and then.opname == "LOAD_SPECIAL"
        if after.opname in ("BEFORE_WITH", "SETUP_WITH") or looks_up:
            found.append((call.offset, after.offset))
    return tuple(found)


def drops_result(frame: FrameType) -> bool:
    """Whether the frame keeps nothing of what it is getting now, as ``with call():`` without ``as`` does."""
    return _after(frame) == "POP_TOP"


def unpacks_result(frame: FrameType) -> bool:
    """Whether the frame takes apart what it is getting now, as ``with call() as (one, other):`` does."""
    return _after(frame) == "UNPACK_SEQUENCE"


def _after(frame: FrameType) -> str:
    following = (each.opname for each in dis.get_instructions(frame.f_code) if each.offset > frame.f_lasti)
    return next((name for name in following if name != "CACHE"), "")
