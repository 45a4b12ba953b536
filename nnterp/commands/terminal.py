"""What commands share: their options, and writing for machines and to a terminal that may not know every character."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "add_model",
    "add_output",
    "add_remote_code",
    "count",
    "DEFAULT_MODEL",
    "encoding",
    "finite",
    "model_name",
    "plain_text",
    "prompt_text",
    "write",
    "write_json",
]

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


def add_output(parser: argparse.ArgumentParser, json_object: str, drawn: str | None = None) -> None:
    """The option ``--json``, which gives one object, and, where something can be drawn, ``--html``.

    Args:
        parser: the command's parser.
        json_object: what the object has or stands for, as in "one JSON object with all scores".
        drawn: what is drawn, as in "also draw all scores".
    """
    if drawn is not None:
        parser.add_argument(
            "--html",
            metavar="FILE",
            type=Path,
            help=f"also draw {drawn}, in a file to open in a browser; or an image: .png, .svg, .pdf",
        )
    parser.add_argument("--json", action="store_true", help=f"one JSON object {json_object}")


def count(text: str) -> int:
    """A whole number of 1 or more, for an option."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: give 1 or more") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: give 1 or more")
    return number


def finite(text: str) -> float:
    """A number, for an option."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give one such as 2 or -0.5")
    return number


def plain_text(given: str) -> str:
    """A text, for an argument: without the bytes that the terminal's encoding has no characters for."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{given!r} is no text in the encoding of this terminal") from None
    return given


def prompt_text(given: str) -> str:
    """A text that is not empty, for an argument."""
    if not given:
        raise argparse.ArgumentTypeError("the prompt is empty: give at least one character of text")
    return plain_text(given)


def model_name(model: str) -> str:
    """What to call the model in titles: the name of its folder, without the way there."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


def write(text: str) -> None:
    """Write to stdout, with escapes for what its encoding has no characters for."""
    sys.stdout.write(text.encode(encoding(), "backslashreplace").decode(encoding()))


def write_json(found: Any) -> None:
    """Write one JSON value as a line of its own, in ASCII, so that no terminal's encoding can spoil it.

    JSON knows no NaN and no infinity: null is what is not there.
    """
    try:
        text = json.dumps(found, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(found), allow_nan=False)
    write(text + "\n")


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _finite(each) for name, each in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(each) for each in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def encoding() -> str:
    """The encoding of stdout."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"
