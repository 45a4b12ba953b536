"""A figure as a file: a page that opens offline in any browser, or an image."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nnterp.errors import UsageError
from nnterp.pictures.drawing import check_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["check_figure_file", "FigureFileError", "PAGES", "save_figure"]

#: How the names of pages end.
PAGES = (".html", ".htm")
IMAGES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
#: Pixels of an image for each pixel of the figure, so that it is sharp in print.
SCALE = 2


class FigureFileError(UsageError):
    """The file of a figure cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"The figure cannot be written to '{path}': {reason}.\n"
            f"Give the name of a file, in a folder that exists and that you may write to: {PAGES[0]} for a page, "
            f"{', '.join(IMAGES[:3])} and the like for an image."
        )


def check_figure_file(path: str | Path) -> Path:
    """Say before the work, and not after it, that its figure could not be written there.

    Args:
        path: the file.

    Raises:
        FigureFileError: there is no such folder, one may not write there, the file's name is of no kind that a figure
            can be, or it is of an image and kaleido is not installed.
        UsageError: plotly is not installed.
    """
    check_plotly()
    file = Path(path)
    if file.is_dir():
        raise FigureFileError(file, "that is a folder")
    if not file.parent.is_dir():
        raise FigureFileError(file, f"there is no folder '{file.parent}'")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise FigureFileError(file, "you may not write there")
    suffix = file.suffix.lower()
    if suffix not in (*PAGES, *IMAGES):
        raise FigureFileError(file, f"its name ends in '{file.suffix}'" if suffix else "its name has no ending")
    if suffix in IMAGES and find_spec("kaleido") is None:
        raise FigureFileError(file, "images are made with kaleido, which is not installed (pip install kaleido)")
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
        path: the file; ``.html`` is a page, ``.png``, ``.svg``, ``.pdf``, ... an image, which takes kaleido.

    Raises:
        FigureFileError: the file cannot be written.
        UsageError: plotly is not installed.
    """
    file = check_figure_file(path)
    try:
        if file.suffix.lower() in PAGES:
            figure.write_html(file, include_plotlyjs=True)
        else:
            figure.write_image(file, scale=SCALE)
    except OSError as error:
        raise FigureFileError(file, error.strerror or str(error)) from error
    except RuntimeError as error:
        # The browser in which kaleido draws is not there, or does not start.
        raise FigureFileError(file, str(error)) from error
    return file
