"""``nnterp lens``: what the model would say next if it stopped after each layer."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NoReturn

from nnterp.commands.terminal import DEFAULT_MODEL, add_model, encoding, model_name, write
from nnterp.errors import UsageError
from nnterp.interventions.logit_lens import LensResult, lens_tokens
from nnterp.lens_page import lens_page
from nnterp.lens_table import cells, fit, lens_table, visible
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["add_lens", "HeatMapPathError"]

#: How many tokens the box at a cell of the heat map shows, however few the table does.
HEAT_MAP_TOP = 5


class HeatMapPathError(UsageError):
    """The file of a heat map cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"The heat map cannot be written to '{path}': {reason}.\n"
            "Give --html the name of a file, in a folder that exists and that you may write to."
        )


LENS_EXAMPLES = f"""\
examples:
  nnterp lens "The Eiffel Tower is in the city of"
  nnterp lens "The Eiffel Tower is in the city of" --html lens.html
  nnterp lens "Two and two is" "Two and three is" --model gpt2 --top 3
  nnterp lens --model ./my-model -- "- a prompt that begins with a dash"

Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package:
nothing is downloaded."""


def add_lens(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "lens",
        help="what the model would say next if it stopped after each layer",
        description="The logit lens: what would the model say next if it stopped after this layer?\n"
        "Shows the most probable next tokens after the prompt, one line for each layer.",
        epilog=LENS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", type=_prompt, help="a text for the model to go on with")
    parser.add_argument(
        "--top", metavar="K", type=_count, default=5, help="how many tokens for each layer (default: 5)"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        help="also draw all positions of the prompt as a heat map, in a file to open in a browser; "
        "for several prompts the files are numbered: lens-1.html, lens-2.html, ...",
    )
    add_model(parser)
    parser.set_defaults(run=_lens)


def _lens(arguments: argparse.Namespace) -> None:
    pages = _numbered(arguments.html, len(arguments.prompts)) if arguments.html else []
    for page in pages:
        _check_folder(page)
    model = StandardizedTransformer(arguments.model)
    name = model_name(arguments.model)
    for index, prompt in enumerate(arguments.prompts):
        k = max(arguments.top, min(HEAT_MAP_TOP, model.vocab_size))
        # The table is of the last position alone, and unembedding the others takes most of the time.
        lens = lens_tokens(model, prompt, k, None if pages else [-1])
        # The file comes first: whoever reads the table may stop reading, and the heat map is there all the same.
        if pages:
            _write_page(pages[index], lens, name)
        write(_heading(name, prompt) + lens_table(lens, top=arguments.top))
        if pages:
            write(f"heat map: {pages[index]}\n")
        if index < len(arguments.prompts) - 1:
            write("\n")


def _heading(name: str, prompt: str) -> str:
    """Which model after which prompt, in one line of the terminal; of a long prompt the end, which matters most."""
    start, text = f'{name} after "', visible(prompt, encoding(), {" ": " "})
    room = shutil.get_terminal_size().columns - cells(start) - 1
    return f'{start}{fit(text[::-1], max(room, 20), encoding())[::-1]}"\n'


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def _check_folder(page: Path) -> None:
    """Said before the model is loaded, which may take minutes."""
    if page.is_dir():
        raise HeatMapPathError(page, "that is a folder")
    if not page.parent.is_dir():
        raise HeatMapPathError(page, f"there is no folder '{page.parent}'")


def _write_page(page: Path, lens: LensResult, name: str) -> None:
    try:
        page.write_text(lens_page(lens, name), encoding="utf-8")
    except OSError as error:
        raise HeatMapPathError(page, error.strerror or str(error)) from error


def _refuse(reason: str) -> NoReturn:
    raise argparse.ArgumentTypeError(reason)


def _prompt(text: str) -> str:
    return text if text else _refuse("the prompt is empty: give at least one character of text")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        _refuse(f"{text!r} is no whole number: give 1 or more")
    return count if count >= 1 else _refuse(f"{count} is too few: give 1 or more")
