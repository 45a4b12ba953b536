"""The command line: ``nnterp COMMAND``, or ``python -m nnterp COMMAND``.

    nnterp lens "The Eiffel Tower is in the city of"                       # a table of the logit lens
    nnterp lens "The capital of Japan is" --model gpt2 --html lens.html    # and a heat map to open in a browser
    nnterp attention "The capital of Japan is" --layer 2                   # what each head looks at
    nnterp heads                                                           # which heads are induction heads, ...
    nnterp steer "I think" --toward "I love it" --away "I hate it"          # how it goes on when it is steered
    nnterp spec ./my-model                                                 # what the model is made of, as YAML
    nnterp check ./my-model                                                # does every promise hold on it?

Exit status: 0 if all went well, 1 if `check` found a promise that does not hold, 2 if what was asked for cannot be
done, 130 after Ctrl-C, 141 if nobody reads the output any more. A new command is a parser in ``commands/parsers.py``
and a file in ``nnterp/commands`` that is loaded when it is asked for: torch alone takes seconds, and help takes none.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nnterp.commands.parsers import COMMANDS
from nnterp.errors import NnterpError

__all__ = ["main"]

FAILED, INTERRUPTED, NO_READER = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status.

    >>> main(["lens", "The Eiffel Tower is in the city of", "--model", "demo-gpt2", "--top", "1"])  # doctest: +ELLIPSIS
    demo-gpt2 after "The Eiffel Tower is in the city of"
    layer 0 | ...
    0

    Args:
        argv: the words after the name of the program; those that it was started with if None.
    """
    if sys.stdout is None:  # `nnterp ... >&-`: pictures and vectors are written all the same.
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            return _run(argv)
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # `nnterp ... | head` has read enough. Python would flush once more as it ends, and complain.
        with open(os.devnull, "wb") as unread:
            os.dup2(unread.fileno(), sys.stdout.fileno())
        return NO_READER


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        arguments.check(arguments)
        return _carry_out(arguments)
    except SystemExit as end:
        # argparse has said what was wrong, or has shown the help.
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _carry_out(arguments: argparse.Namespace) -> int:
    from nnsight_core.errors import NNsightError

    try:
        with _quiet():
            status: int | None = import_module(f"nnterp.commands.{arguments.command}").run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (NNsightError, NnterpError, OSError) as error:
        sys.stderr.write(f"nnterp: {type(error).__name__}: {error}\n")
        return FAILED
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnterp",
        description="Look inside a causal language model.",
        epilog="'nnterp COMMAND --help' explains a command and shows examples.",
    )
    parser.set_defaults(check=lambda _: None)
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of other libraries, which are not about what was asked for; errors are shown.

    While a large model loads, a progress bar shows that something happens, to whoever sits at a terminal.
    """
    from transformers.utils import logging as transformers_logging

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
