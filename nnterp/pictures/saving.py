"""A figure as a file: a page that opens offline in any browser, or an image."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nnterp.errors import UsageError
from nnterp.files import why_not_writable
from nnterp.pictures.drawing import check_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["check_figure_file", "FigureFileError", "PAGES", "save_figure"]

#: How the names of pages end.
PAGES = (".html", ".htm")
IMAGES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
#: Pixels of an image for each pixel of the figure, so that it is sharp in print.
SCALE = 2
NAMES = (
    f"Give the name of a file, in a folder that exists and that you may write to: {PAGES[0]} for a page, "
    f"{', '.join(IMAGES[:3])} and the like for an image."
)
DRAWING = (
    "Images are drawn by kaleido 1 or newer in Chrome or Chromium: pip install -U 'kaleido>=1' plotly, and install a "
    "browser, or name its program in the environment variable BROWSER_PATH. A page takes neither: a name in .html."
)


class FigureFileError(UsageError):
    """The file of a figure cannot be written."""

    def __init__(self, path: Path, reason: str, mend: str = NAMES) -> None:
        super().__init__(f"The figure cannot be written to '{path}': {reason}.\n{mend}")


def check_figure_file(path: str | Path) -> Path:
    """Say before the work, and not after it, that its figure could not be written there.

    Whether an image can be drawn is found out by drawing an empty one, which takes some seconds.

    Args:
        path: the file.

    Raises:
        FigureFileError: there is no such folder, one may not write there, the file's name is of no kind that a figure
            can be, or it is of an image and there is no kaleido, or no browser in which it can draw.
        UsageError: plotly is not installed.
    """
    file = _check_name(path)
    if file.suffix.lower() in IMAGES:
        from plotly.graph_objects import Figure

        _draw(file, lambda: Figure().to_image(format="png", width=10, height=10))
    return file


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file: a page with all that it needs, or an image of twice the figure's size.

    >>> from tempfile import TemporaryDirectory
    >>> from plotly.graph_objects import Figure
    >>> with TemporaryDirectory() as folder:
    ...     page = save_figure(Figure(), f"{folder}/empty.html").read_text(encoding="utf-8")
    >>> "<html>" in page
    True

    Args:
        figure: any plotly figure.
        path: the file; ``.html`` is a page, ``.png``, ``.svg``, ``.pdf``, ... an image, which takes kaleido and Chrome
            or Chromium.

    Raises:
        FigureFileError: the file cannot be written.
        UsageError: plotly is not installed.
    """
    file = _check_name(path)
    try:
        if file.suffix.lower() in PAGES:
            figure.write_html(file, include_plotlyjs=True)
        else:
            _draw(file, lambda: figure.write_image(file, scale=SCALE))
    except OSError as error:
        raise FigureFileError(file, error.strerror or str(error)) from error
    return file


def _check_name(path: str | Path) -> Path:
    check_plotly()
    file = Path(path)
    reason = why_not_writable(file)
    if reason is not None:
        raise FigureFileError(file, reason)
    suffix = file.suffix.lower()
    if suffix not in (*PAGES, *IMAGES):
        raise FigureFileError(file, f"its name ends in '{file.suffix}'" if suffix else "its name has no ending")
    if suffix in IMAGES and find_spec("kaleido") is None:
        raise FigureFileError(file, "kaleido is not installed", DRAWING)
    return file


def _draw(file: Path, draw: Callable[[], object]) -> None:
    try:
        draw()
    except (RuntimeError, ValueError) as error:
        # There is no browser, it does not start, or the releases do not fit one another (of plotly 5 a ValueError).
        reason = " ".join(" ".join(map(str, error.args)).split()).rstrip(".")
        raise FigureFileError(file, reason, DRAWING) from error
