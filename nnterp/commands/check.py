"""``nnterp check``: does every promise of the interface hold on a model of one's own?"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nnsight_core.errors import NNsightError
from nnsight_core.input_errors import ModelNotFoundError
from nnterp.commands.terminal import add_output, add_remote_code, model_name, write, write_json
from nnterp.contract import Verdict, run_contract
from nnterp.errors import NnterpError
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["add_check"]

NOT_KEPT = 1

EXAMPLES = """\
examples:
  nnterp check demo-llama
  nnterp check ./my-model                      a model that no file serves, by its structure
  nnterp check ./my-model --spec my_model.yaml
  nnterp check ./my-model --json               for scripts

ok      what hooks on the plain model see is what the interface gives
not     it is something else, and why
cannot  the specification, or the model, says why the promise makes no sense here

Exit status: 0 if no answer is `not`, else 1."""


def add_check(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "check",
        help="does every promise of the interface hold on a model?",
        description="Open a model and compare what the interface reads and writes with plain PyTorch hooks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a model's folder or its name on the Hugging Face hub")
    parser.add_argument("--spec", metavar="FILE", help="a specification of one's own")
    add_output(parser, "instead of a table")
    add_remote_code(parser)
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    verdicts = []
    for verdict in _verdicts(arguments):
        verdicts.append(verdict)
        if not arguments.json:
            write(_line(verdict))
    kept = all(verdict.answer != "not" for verdict in verdicts)
    if arguments.json:
        rows = [dataclasses.asdict(verdict) for verdict in verdicts]
        write_json({"model": model_name(arguments.model), "kept": kept, "promises": rows})
    else:
        counts = Counter(verdict.answer for verdict in verdicts)
        write(f"{model_name(arguments.model)}: {', '.join(f'{count} {answer}' for answer, count in counts.items())}\n")
    return 0 if kept else NOT_KEPT


def _verdicts(arguments: argparse.Namespace) -> Iterator[Verdict]:
    question = "the model opens under its names"
    try:
        model = StandardizedTransformer(
            arguments.model,
            trust_remote_code=arguments.trust_remote_code,
            check_renaming=False,
            spec=arguments.spec,
        )
    except ModelNotFoundError:
        raise
    except (NNsightError, NnterpError) as error:
        yield Verdict("load", question, "not", str(error))
        return
    yield Verdict("load", question, "ok", f"by {model._spec.source}")
    yield from run_contract(model)


def _line(verdict: Verdict) -> str:
    width = max(shutil.get_terminal_size().columns, 60)
    what = verdict.question if verdict.answer == "ok" else f"{verdict.question}: {verdict.why}"
    start = f"{verdict.answer:<7} {verdict.promise:<13} "
    text = "\n".join(
        textwrap.fill(part, width, initial_indent=start if first else " " * 22, subsequent_indent=" " * 22)
        for first, part in _numbered(what.splitlines())
    )
    return text + "\n"


def _numbered(parts: list[str]) -> Iterator[tuple[bool, str]]:
    return ((index == 0, part.strip()) for index, part in enumerate(parts))
