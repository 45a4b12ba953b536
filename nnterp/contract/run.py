"""Putting the questions to a model, one after the other, whatever becomes of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from nnsight_core.errors import NNsightError
from nnterp.accessors import logits_of
from nnterp.calling import evaluating
from nnterp.contract.oracle import Visiting, visiting
from nnterp.contract.promises import PROMISES, Promise
from nnterp.contract.subject import Broken, CannotTell, Subject
from nnterp.errors import CannotError, MissingPartError, NnterpError
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run_contract", "Verdict"]

#: Layers beyond this many are sampled: the first, the last, and some between.
MANY_LAYERS = 6


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer to one question.

    `answer` is "ok", "not", or "cannot" where the model's specification, or the model itself, says why it cannot be.
    """

    promise: str
    question: str
    answer: str
    why: str = ""


def run_contract(model: StandardizedTransformer, oracle: Visiting = visiting) -> Iterator[Verdict]:
    """Every promise with its answer, as they come.

        model = StandardizedTransformer("demo-gpt2", check_renaming=False)
        all(verdict.answer == "ok" for verdict in run_contract(model))        # True

    Args:
        model: opened with `check_renaming=False`, so that a wrong specification is an answer and not an error.
        oracle: the hooks that the interface is compared with, see `nnterp.contract.oracle.visiting`.
    """
    with evaluating(model._module):
        with torch.no_grad():
            subject = Subject(model, model._module, oracle, _layers(model.num_layers))
            before = logits_of(subject.run()).clone()
        for promise in PROMISES:
            yield _asked(promise, subject)
        with torch.no_grad():
            after = logits_of(subject.run())
    if not subject.same(after, before):
        yield Verdict("unchanged", "the plain model gives what it gave", "not", "its logits are others than before")


def _layers(count: int) -> tuple[int, ...]:
    if count <= MANY_LAYERS:
        return tuple(range(count))
    return tuple(dict.fromkeys(round(index * (count - 1) / (MANY_LAYERS - 1)) for index in range(MANY_LAYERS)))


def _asked(promise: Promise, subject: Subject) -> Verdict:
    said: Any = subject.model._spec.cannot
    excuse = next((said[name] for name in promise.cannot if name in said), None)
    if excuse is not None:
        return Verdict(promise.name, promise.question, "cannot", excuse)
    try:
        # With gradients, torch may choose other kernels, and those round otherwise.
        with torch.no_grad():
            promise.check(subject)
    except (CannotTell, CannotError, MissingPartError) as error:
        return Verdict(promise.name, promise.question, "cannot", str(error))
    except (Broken, NNsightError, NnterpError) as error:
        return Verdict(promise.name, promise.question, "not", str(error))
    except Exception as error:  # noqa: BLE001 - the model's own code may fail in any way, and that is an answer
        return Verdict(promise.name, promise.question, "not", f"{type(error).__name__}: {error}")
    return Verdict(promise.name, promise.question, "ok")
