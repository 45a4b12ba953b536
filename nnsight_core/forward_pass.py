"""The coroutine in which the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenlet import greenlet


class Unwind(BaseException):
    """Thrown into a suspended forward pass so that it leaves every block that it is in."""


class ForwardPass(greenlet):  # type: ignore[misc]  # greenlet ships no types for its class
    """The coroutine in which the model runs."""

    #: What the call gave, once it has ended by itself.
    result: Any = None

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call

    def run(self) -> None:
        """Call the model; in the coroutine when it is switched to, or else where the caller stands."""
        call, self._call = self._call, None
        assert call is not None
        try:
            self.result = call()
        except Unwind:
            return
