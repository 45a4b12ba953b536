"""Prompts, or any rows, in batches, with a progress bar where that takes more than a moment."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TypeVar

from tqdm import tqdm

from nnterp.errors import UsageError

__all__ = ["as_prompts", "in_batches", "progress"]

Row = TypeVar("Row")
Work = TypeVar("Work", bound=Sized)


def as_prompts(prompts: Sequence[str] | str, which: str = "") -> list[str]:
    """One prompt or several, as a list.

    >>> as_prompts("Paris is")
    ['Paris is']

    Args:
        prompts: the prompts.
        which: what to call them in an error, such as ``"negative"``.

    Raises:
        UsageError: there is none.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise UsageError(f"0 {which} prompts were given: give at least one prompt.".replace("  ", " "))
    return given


def in_batches(rows: Sequence[Row], size: int, title: str, unit: str = "batch") -> Sequence[Sequence[Row]]:
    """The rows, ``size`` at a time, with a progress bar where that is more than a moment.

    >>> [list(batch) for batch in in_batches("abc", 2, "letters")]
    [['a', 'b'], ['c']]

    Raises:
        UsageError: the size is below 1.
    """
    if size < 1:
        raise UsageError(f"A batch of {size} is none: give 1 or more.")
    return progress([rows[start : start + size] for start in range(0, len(rows), size)], title, unit)


def progress(work: Work, title: str, unit: str = "batch") -> Work:
    """The same pieces of work, with a progress bar on stderr where there are several and they take over a second."""
    bar: Work = tqdm(work, desc=title, unit=unit, disable=len(work) <= 1, delay=1, leave=False)
    return bar
