"""What the messages of errors are made of: names that may have been meant, and the lines that they speak of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from nnsight_core.sites import Site


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names most like ``name``, best first; empty when none is near."""
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question whether one of the names most like ``name`` was meant; empty when none is near."""
    found = nearest(name, known)
    return f"Did you mean {' or '.join(repr(each) for each in found)}?" if found else ""


def table(rows: Sequence[tuple[str, str, Site | None]]) -> str:
    """Lines of a label, what it is about, and where that stands in the script."""
    wide = max(len(label) for label, _, _ in rows)
    named = max(len(what) for _, what, _ in rows)
    return "\n".join(
        f"  {label:<{wide}}   {what:<{named}}   {site.short if site else ''}".rstrip() for label, what, site in rows
    )
