"""How often a module has been called in a pass."""

from __future__ import annotations


class CallCounter:
    """Counts the calls of one module in a pass."""

    def __init__(self) -> None:
        #: The call that has begun last, counted from 0; -1 before the first.
        self.now = -1

    def reset(self) -> None:
        """Begin anew, with a pass or with a run of the model in it."""
        self.now = -1

    def begins(self) -> None:
        """A call begins."""
        self.now += 1
