"""The coroutine in which the model runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from types import FunctionType
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from nnsight_core.flex import say_what_else

#: How many coroutines a thread keeps for its next passes: a trace inside a trace takes a second one.
_KEPT = 2
#: In bytes: from a stack so much deeper than where it began, a coroutine would have to move that much at each turn.
_FAR = 16384
#: In words: a frame of this size makes CPython fetch memory for the frames of a whole model at once. Else it fetches
#: a piece, and gives it back, each time that a call crosses the end of the last.
_ROOM = 8300
#: In how many calls of C's a coroutine stands. Each error of torch's notes the 64 innermost calls of the machine's
#: stack. Beyond the beginning of a coroutine other calls stand by now than when it began, and looking there may crash.
_DEPTH = 72


class Unwind(BaseException):
    """Thrown into a suspended forward pass so that it leaves every block that it is in."""


class _Idle(threading.local):
    """The coroutines of a thread that stand idle."""

    def __init__(self) -> None:
        self.coroutines: list[greenlet] = []


_idle = _Idle()


class ForwardPass:
    """One call of the model, and the coroutine that it runs in.

    A coroutine that has served its pass stands idle until the next one of its thread, with nothing in hand: to fetch
    the memory of a stack anew is a good part of what a short trace costs.

    Args:
        call: calls the model.
    """

    #: What the call gave, once it has ended by itself.
    result: Any = None
    has_begun = False
    has_ended = False
    _error: BaseException | None = None

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call
        idle = _idle.coroutines
        self.coroutine: greenlet | None = idle.pop() if idle and not _is_followed() else _begun()

    @property
    def is_under_way(self) -> bool:
        """Whether the call stands somewhere in its middle."""
        return self.has_begun and not self.has_ended

    def run(self) -> None:
        """Call the model where the caller stands."""
        self.has_begun = True
        call, self._call = self._call, None
        assert call is not None
        try:
            self.result = call()
        except Unwind:
            pass
        except NotImplementedError as error:
            say_what_else(error)
            raise
        finally:
            self.has_ended = True

    def _run_aside(self) -> None:
        try:
            self.run()
        except GreenletExit:
            # Nobody has the coroutine any more.
            raise
        except BaseException as error:  # noqa: BLE001 - it is raised where the body waits
            self._error = error

    def resume(self, error: BaseException | None = None) -> None:
        """Let the call go on in its coroutine, from its beginning or from where it stands, there with ``error``.

        Raises:
            BaseException: what the call has ended with.
        """
        assert self.coroutine is not None
        if error is None:
            self.coroutine.switch(self._run_aside)
        else:
            self.coroutine.throw(error)
        if self._error is not None:
            failure, self._error = self._error, None
            try:
                raise failure
            finally:
                # Its traceback holds this frame.
                del failure

    def park(self) -> None:
        """The call is over, or is not to be made: let the coroutine serve other passes."""
        coroutine, self.coroutine = self.coroutine, None
        if coroutine is None or coroutine.dead or len(_idle.coroutines) >= _KEPT or _is_followed():
            return
        # Whoever waits for it may be another coroutine, which is not to be kept.
        while coroutine.parent.parent is not None:
            coroutine.parent = coroutine.parent.parent
        coroutine.gr_context = None
        _idle.coroutines.append(coroutine)


def is_idle(coroutine: greenlet) -> bool:
    """Whether ``coroutine`` belongs to no pass."""
    return any(each is coroutine for each in _idle.coroutines)


def _is_followed() -> bool:
    """Whether a debugger or a profiler is on: in some versions of Python it is on for the coroutines begun since."""
    return sys.gettrace() is not None or sys.getprofile() is not None


def _begun() -> greenlet:
    """A new coroutine, which stands idle."""
    if _is_followed():
        # What follows calls would never see the end of the one that waits for work.
        return greenlet(lambda run: next(_deep(run), None))
    coroutine = greenlet(next)
    coroutine.switch(_deep(_serve), None)
    return coroutine


def _deep(call: Callable[[], None]) -> Iterator[None]:
    """Makes the call in the middle of many others of C's, which no traceback shows, when it is asked for the next."""
    calls: Iterator[None] = iter(call, None)
    for _ in range(_DEPTH):
        calls = islice(calls, None)
    return calls


def _serve_passes() -> None:
    while (waiting := getcurrent().parent)._stack_saved <= _FAR:
        run = waiting.switch()
        waiting = None
        run()
        run = None


_serve = FunctionType(_serve_passes.__code__.replace(co_stacksize=_ROOM), globals())
