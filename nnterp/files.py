"""Whether a file can be written: asked before the work whose result it is to hold."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["why_not_writable"]


def why_not_writable(file: Path) -> str | None:
    """Why a file could not be written; None if it could.

    >>> why_not_writable(Path.cwd())
    'that is a folder'
    """
    if file.is_dir():
        return "that is a folder"
    if not file.parent.is_dir():
        return f"there is no folder '{file.parent}'"
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        return "you may not write there"
    return None
