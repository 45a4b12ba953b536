"""What commands share: the option that names a model, and writing to a terminal that may not know every character."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["add_model", "add_remote_code", "count", "DEFAULT_MODEL", "encoding", "model_name", "write"]

DEFAULT_MODEL = "demo-llama"


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option ``--model``."""
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help=f"a model's folder or its name on the Hugging Face hub (default: {DEFAULT_MODEL})",
    )


def add_remote_code(parser: argparse.ArgumentParser) -> None:
    """The option ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the modelling code that comes with the model; read it first",
    )


def count(text: str) -> int:
    """A whole number of 1 or more, for an option."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: give 1 or more") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: give 1 or more")
    return number


def model_name(model: str) -> str:
    """What to call the model in titles: the name of its folder, without the way there."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


def write(text: str) -> None:
    """Write to stdout, with escapes for what its encoding has no characters for."""
    sys.stdout.write(text.encode(encoding(), "backslashreplace").decode(encoding()))


def encoding() -> str:
    """The encoding of stdout."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"
