"""The command line: ``nnterp COMMAND``, or ``python -m nnterp COMMAND``.

    nnterp lens "The Eiffel Tower is in the city of"                       # a table of the logit lens
    nnterp lens "The capital of Japan is" --model gpt2 --html lens.html    # and a heat map to open in a browser

Exit status: 0 if all went well, 2 if what was asked for cannot be done, 130 after Ctrl-C, 141 if nobody reads the
output any more. A new command is one function that adds its parser, and its line in ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from nnsight_core.errors import NNsightError
from nnterp.errors import NnterpError, UsageError
from nnterp.interventions.logit_lens import LensResult, lens_tokens
from nnterp.lens_page import lens_page
from nnterp.lens_table import cells, fit, lens_table, visible
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["HeatMapPathError", "main"]

DEFAULT_MODEL = "demo-llama"
#: How many tokens the box at a cell of the heat map shows, however few the table does.
HEAT_MAP_TOP = 5

FAILED, INTERRUPTED, NO_READER = 2, 130, 141


class HeatMapPathError(UsageError):
    """The file of a heat map cannot be written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"The heat map cannot be written to '{path}': {reason}.\n"
            "Give --html the name of a file, in a folder that exists and that you may write to."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status.

    >>> main(["lens", "The Eiffel Tower is in the city of", "--model", "demo-gpt2", "--top", "1"])  # doctest: +ELLIPSIS
    demo-gpt2 after "The Eiffel Tower is in the city of"
    layer 0 | ...
    0

    Args:
        argv: the words after the name of the program; those that it was started with if None.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # `nnterp ... | head` has read enough. Python would flush once more as it ends, and complain.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return NO_READER


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        with _quiet():
            arguments.run(arguments)
    except SystemExit as end:
        # argparse has said what was wrong, or has shown the help.
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (NNsightError, NnterpError, OSError) as error:
        sys.stderr.write(f"nnterp: {type(error).__name__}: {error}\n")
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnterp",
        description="Look inside a causal language model.",
        epilog="'nnterp COMMAND --help' explains a command and shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"nnterp {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def _version() -> str:
    try:
        return version("nnsight-core")
    except PackageNotFoundError:
        return "(not installed: running from its sources)"


LENS_EXAMPLES = f"""\
examples:
  nnterp lens "The Eiffel Tower is in the city of"
  nnterp lens "The Eiffel Tower is in the city of" --html lens.html
  nnterp lens "Two and two is" "Two and three is" --model gpt2 --top 3
  nnterp lens --model ./my-model -- "- a prompt that begins with a dash"

Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package:
nothing is downloaded."""


def _add_lens(commands: Any) -> None:
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
    _add_model(parser)
    parser.set_defaults(run=_lens)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help=f"a model's folder or its name on the Hugging Face hub (default: {DEFAULT_MODEL})",
    )


#: One line for each command: what adds its parser. The parser's default for `run` is what carries it out.
COMMANDS: tuple[Callable[[Any], None], ...] = (_add_lens,)


def _lens(arguments: argparse.Namespace) -> None:
    pages = _numbered(arguments.html, len(arguments.prompts)) if arguments.html else []
    for page in pages:
        _check_folder(page)
    model = StandardizedTransformer(arguments.model)
    name = _name(arguments.model)
    for index, prompt in enumerate(arguments.prompts):
        k = max(arguments.top, min(HEAT_MAP_TOP, model.vocab_size))
        lens = lens_tokens(model, prompt, k)
        # The file comes first: whoever reads the table may stop reading, and the heat map is there all the same.
        if pages:
            _write_page(pages[index], lens, name)
        _write(_heading(name, prompt) + lens_table(lens, top=arguments.top))
        if pages:
            _write(f"heat map: {pages[index]}\n")
        if index < len(arguments.prompts) - 1:
            _write("\n")


def _heading(name: str, prompt: str) -> str:
    """Which model after which prompt, in one line of the terminal; of a long prompt the end, which matters most."""
    start, text = f'{name} after "', visible(prompt, _encoding(), {" ": " "})
    room = shutil.get_terminal_size().columns - cells(start) - 1
    return f'{start}{fit(text[::-1], max(room, 20), _encoding())[::-1]}"\n'


def _name(model: str) -> str:
    """What to call the model in titles: the name of its folder, without the way there."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


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


def _write(text: str) -> None:
    """Write to stdout, with escapes for what its encoding has no characters for."""
    sys.stdout.write(text.encode(_encoding(), "backslashreplace").decode(_encoding()))


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of other libraries, which are not about what was asked for; errors are shown.

    While a large model loads, a progress bar shows that something happens, to whoever sits at a terminal.
    """
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # transformers before 5 has no such hook, and shows a bar for models in several files only.
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    hook = set_hook(_patient_bar) if set_hook else None
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        if set_hook:
            set_hook(hook)
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _patient_bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A progress bar for what takes more than a second, gone when it is done."""
    return factory(*args, **{**kwargs, "delay": 1, "leave": False})
