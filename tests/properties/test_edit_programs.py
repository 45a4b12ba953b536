"""Random edits under random bodies, run again and again: each run gives what plain hooks give, edits first."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_core import NNsightError
from nnsight_core.edits import Edit
from nnsight_core.interleaver import Interleaver
from tests import leaks, oracle
from tests.properties import test_invoke_programs as invokes
from tests.properties.test_invoke_programs import SETTINGS, WIDTH, Body, Invoked, Program, Step, Visit, first_values


@st.composite
def _cases(draw: st.DrawFn, alone: bool = False) -> tuple[nn.Module, tuple[Body, ...], Program]:
    model = draw(invokes._models(False))
    order = oracle.order(model, torch.ones(1, WIDTH, dtype=torch.float64))
    # What an edit or a single body skips does not run for anybody, so that others may not ask for what is inside.
    edits = tuple(draw(invokes._bodies(order, 0, False, skips=False)) for _ in range(draw(st.integers(1, 3))))
    sizes = [draw(st.integers(1, 2))]
    if not alone:
        sizes = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any))
    bodies = tuple(draw(invokes._bodies(order, rows, False, skips=not alone)) for rows in sizes)
    return model, edits, Program(bodies)


class Edited(Invoked):
    """The program on an edited model, as a user would write it."""

    def __init__(self, model: nn.Module, edits: tuple[Body, ...], program: Program) -> None:
        super().__init__(model, program)
        self.kept: list[list[Any]] = []
        self.original = self.model
        for edit in edits:
            pool, saved = first_values(), list[Any]()
            with self.model.edit() as edited:
                for visit in edit.visits:
                    self._visit(visit, pool, saved)
                saved.append(self.model.output)
                self.kept.append([value.save() for value in saved])
            self.model = edited

    def run_live(self) -> None:
        pool, saved = first_values(), list[Any]()
        (body,), (x,) = self.program.bodies, invokes.inputs_of(self.program)
        with self.model.trace(x):
            for visit in body.visits:
                self._visit(visit, pool, saved)
            saved.append(self.model.output)
            self.saved += [value.save() for value in saved]


def check_edits(model: nn.Module, edits: tuple[Body, ...], program: Program, live: bool = False) -> None:
    """Run it both ways, several times: the same numbers, and nothing left behind."""
    together = invokes.in_one_batch(model, Program((*edits, *program.bodies)))
    only = invokes.in_one_batch(model, Program((*edits, *(Body(body.rows, ()) for body in program.bodies))))
    plain = model(torch.cat(invokes.inputs_of(program)))
    with leaks.watching([model]) as watch:
        edited = Edited(model, edits, program)
        for _ in range(2):
            edited.saved.clear()
            if live:
                edited.run_live()
            else:
                edited.run()
                assert edited.forward_passes == 1
            # What the edits saved comes first, as they do.
            everything = [*(value for kept in edited.kept for value in kept), *edited.saved]
            for one, other in zip(everything, together, strict=True):
                assert type(one.value) is torch.Tensor
                torch.testing.assert_close(one.value, other, rtol=1e-9, atol=1e-11)
            called = edited.model(torch.cat(invokes.inputs_of(program)))
            kept = [value.value for each in edited.kept for value in each]
            # The last that the edits see of the whole batch's output is what the call gives.
            for one, other in zip([*kept, called], [*only[: len(kept)], only[len(kept) - 1]], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert torch.equal(edited.original(torch.cat(invokes.inputs_of(program))), plain)
        held = [weakref.ref(value.value) for value in edited.saved]
        del edited, everything, called, kept, one, other
        if any(each() is not None for each in held):
            gc.collect()
        own = {id(each) for each in model.parameters()}
        assert not [each() for each in held if each() is not None and id(each()) not in own]
    assert not watch.complaints()


@settings(SETTINGS, max_examples=60)
@given(_cases())
def test_edits_under_invokes(case: tuple[nn.Module, tuple[Body, ...], Program]) -> None:
    check_edits(*case)


@settings(SETTINGS, max_examples=40)
@given(_cases(alone=True))
def test_edits_under_a_live_body(case: tuple[nn.Module, tuple[Body, ...], Program]) -> None:
    check_edits(*case, live=True)


# Twins: the harness sees an engine that is wrong.


def _simple() -> tuple[nn.Module, tuple[Body, ...], Program]:
    torch.manual_seed(0)
    visit = Visit(("0", "output"), (Step("save", (), 0, 1.0), Step("method", (), 0, -2.0)))
    edit = Visit(("0", "output"), (Step("combine", (), 0, 0.5), Step("row", (), 0, -2.0)))
    model = nn.Sequential(invokes._linear(), invokes._linear())
    return model, (Body(0, (edit,)),), Program((Body(1, (visit,)), Body(2, (visit,))))


def test_the_harness_passes_a_right_engine() -> None:
    check_edits(*_simple())


def _late(self: Interleaver, client: Any) -> None:
    # Whoever comes later has the earlier turn.
    self._order.setdefault(client, -len(self._order))


WRONG = {
    "bodies before edits": (Interleaver, "enrol", _late),
    "values of an earlier trace": (Edit, "keep", lambda self, results, in_session: None),
    "an edit that is not made": (Edit, "instructions", property(lambda self: [], lambda self, value: None)),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_harness_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong = WRONG[name]
    monkeypatch.setattr(owner, method, wrong, raising=False)
    with pytest.raises((AssertionError, IndexError, NNsightError)):
        check_edits(*_simple())
