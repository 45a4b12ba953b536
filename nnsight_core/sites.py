"""Where in the user's own code something happened: the nearest line that is not a library's."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

# Frames of these packages are never the user's line: the engine itself, and what calls back into it.
_LIBRARIES = {"nnsight_core", "torch", "einops", "contextlib"}
_is_library: dict[str, bool] = {}


def hide_package(name: str) -> None:
    """Count frames of the package ``name`` as library code, so that errors point past them to the user's line."""
    _LIBRARIES.add(name)
    _is_library.clear()


class Site:
    """One place in source code; the line number is worked out only when an error wants to show it."""

    __slots__ = ("_code", "_instruction")

    def __init__(self, code: CodeType, instruction: int) -> None:
        self._code = code
        self._instruction = instruction

    @property
    def file(self) -> str:
        """The file name as Python knows it; ``<stdin>`` and the like where there is no file."""
        return self._code.co_filename

    @property
    def line(self) -> int:
        """The line number, counted from 1."""
        for start, end, line in self._code.co_lines():
            if start <= self._instruction < end and line is not None:
                return line
        return self._code.co_firstlineno

    @property
    def short(self) -> str:
        """``demo.py:14``: the file without its folders, and the line."""
        return f"{self.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{self.line}"

    @property
    def source(self) -> str:
        """The text of the line, stripped; empty where the source is not at hand."""
        return linecache.getline(self.file, self.line).strip()


def _is_library_frame(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__") or ""
    found = name.partition(".")[0] in _LIBRARIES
    # exec'd strings share one file name and may be anybody's, so only real files are remembered.
    if not frame.f_code.co_filename.startswith("<"):
        _is_library[frame.f_code.co_filename] = found
    return found


def is_library(frame: FrameType) -> bool:
    """Whether the code of ``frame`` is a library's, and so never the line that a reader wants to see."""
    known = _is_library.get(frame.f_code.co_filename)
    return _is_library_frame(frame) if known is None else known


class _Recorded(threading.local):
    site: Site | None = None


_recorded = _Recorded()


@contextmanager
def on_behalf_of(site: Site | None) -> Iterator[None]:
    """While it lasts, what happens is the doing of the line ``site``, where it was recorded; of whoever is on the stack
    if that is None.
    """
    before = _recorded.site
    _recorded.site = site
    try:
        yield
    finally:
        _recorded.site = before


def user_site() -> Site:
    """The line of the user's own code that is at work: the innermost on the stack that is not a library's.

    Whoever calls this is taken for a library's without a look: making the frames of the stack visible is what costs.
    """
    recorded = _recorded.site
    if recorded is not None:
        return recorded
    frame = sys._getframe(2)
    if _is_library.get(frame.f_code.co_filename) is not False:
        frame = user_frame(frame)
    return Site(frame.f_code, frame.f_lasti)


def user_frame(frame: FrameType | None = None) -> FrameType:
    """The innermost frame on the stack, or from ``frame`` outwards, that is not a library's."""
    frame = frame or sys._getframe(1)
    last: FrameType | None = frame
    while frame is not None:
        known = _is_library.get(frame.f_code.co_filename)
        if not (_is_library_frame(frame) if known is None else known):
            return frame
        last, frame = frame, frame.f_back
    assert last is not None
    return last


def inside_autograd_function() -> bool:
    """Whether a custom ``torch.autograd.Function`` is at work, between here and the trace."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == "torch.autograd.function":
            return True
        frame = frame.f_back
    return False


def is_run_again_for_gradients() -> bool:
    """Whether what runs here is checkpointed: the backward pass is to run it a second time."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False
