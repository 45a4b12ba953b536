"""What every figure needs: plotly itself, and tokens as labels."""

from __future__ import annotations

from importlib.util import find_spec

from nnterp.errors import UsageError
from nnterp.lens_table import visible


def check_plotly() -> None:
    """Say at once, and not after a long sweep, that no picture can be drawn.

    Raises:
        UsageError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise UsageError("Pictures are drawn with plotly, which is not installed: pip install 'nnsight-core[display]'.")


def as_label(text: str, longest: int | None = None) -> str:
    """A token as it reads, with its spaces marked: for plotly, which takes labels for HTML.

    >>> as_label(" <b>")
    '␣&lt;b>'

    Args:
        text: the token.
        longest: how many characters are shown at most; all if None.
    """
    shown = visible(text)
    if longest is not None and len(shown) > longest:
        shown = f"{shown[: longest - 1]}…"
    return as_text(shown)


def as_text(text: str) -> str:
    """Text as it stands: for plotly, which takes it for HTML and, between two dollars, for a formula, wherever MathJax
    is at hand, as it is in notebooks.

    >>> as_text("<b> $x$")
    '&lt;b> &#36;x&#36;'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("$", "&#36;")
