"""``nnterp check``: does every promise of the interface hold on a model of one's own?"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator

from nnsight_core.errors import NNsightError
from nnsight_core.input_errors import ModelNotFoundError
from nnterp.commands.terminal import model_name, write, write_json
from nnterp.contract import Verdict, run_contract
from nnterp.errors import NnterpError
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run"]

NOT_KEPT = 1


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
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
