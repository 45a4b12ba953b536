"""Random programs spread over several invokes: one batch gives what each invoke gives alone with plain hooks."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_core import NNsight
from nnsight_core.envoy import Envoy
from nnsight_core.events import Event
from nnsight_core.rows import Rows
from nnsight_core.scope import Scope
from tests import leaks, oracle

WIDTH = 5


class Scale(nn.Module):
    """Elementwise: its rows are exact in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + 0.25


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class GivesTuple(Wrapper):
    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        return self.inner(x), x, None


class Takes(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, rest, _ = self.inner(x)
        return hidden + rest


class Flat(Wrapper):  # two positions for each row, in one axis with the rows
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = torch.stack([x, x * 2], dim=1)
        return self.inner(doubled.flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


EXACT_LEAVES = [Scale, nn.Identity, nn.Hardtanh]
WRAPPERS = [lambda inner: Takes(GivesTuple(inner)), Flat]


@st.composite
def _models(draw: st.DrawFn, exact: bool) -> nn.Module:
    leaves = EXACT_LEAVES if exact else [*EXACT_LEAVES, _linear, nn.Tanh]
    torch.manual_seed(draw(st.integers(0, 5)))
    parts = []
    for _ in range(draw(st.integers(2, 3))):
        part = draw(st.sampled_from(leaves))()
        if draw(st.booleans()):
            part = draw(st.sampled_from(WRAPPERS))(part)
        parts.append(part)
    return nn.Sequential(*parts, Scale() if exact else _linear())


@dataclasses.dataclass(frozen=True)
class Step:
    """One statement on the tensor at `path` of the place; `at` picks one of the values known so far."""

    kind: str
    path: oracle.Path
    at: int
    number: float


@dataclasses.dataclass(frozen=True)
class Visit:
    place: oracle.Place
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Body:
    """One invoke: what it does, and how many rows its input has (0: none, it sees the whole batch)."""

    rows: int
    visits: tuple[Visit, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Several bodies; with `crossing` each may use the values of those before it, and the last one may raise."""

    bodies: tuple[Body, ...]
    crossing: bool = False
    raises: bool = False


PLAIN_KINDS = ["read", "save", "combine", "slice", "row", "add", "replace", "method"]


@st.composite
def _bodies(draw: st.DrawFn, order: Any, rows: int, looks: bool, skips: bool = True) -> Body:
    visits: list[Visit] = []
    until = -1
    for index in sorted(draw(st.sets(st.sampled_from(range(len(order))), min_size=1, max_size=4))):
        place, paths = order[index]
        if index <= until or (visits and visits[-1].place == place):
            continue
        kinds = draw(st.lists(st.sampled_from(PLAIN_KINDS + ["look"] * looks), min_size=1, max_size=3))
        steps = [
            Step(kind, draw(st.sampled_from(paths)), draw(st.integers(0, 9)), draw(st.sampled_from([0.5, -2.0])))
            for kind in kinds
        ]
        if skips and place[0] and place[1] == "input" and draw(st.booleans()):
            end = (place[0], "output")
            until, gives = next((i, gives) for i, (each, gives) in enumerate(order) if i > index and each == end)
            # It gives its input, changed; where it gives two tensors, that and its input.
            kind = "skip" if gives == [()] else "skip with a tuple"
            steps.append(Step(kind, paths[0], draw(st.integers(0, 9)), draw(st.sampled_from([0.5, -2.0]))))
        visits.append(Visit(place, tuple(steps)))
    return Body(rows, tuple(visits))


@st.composite
def _cases(
    draw: st.DrawFn, crossing: bool = False, looks: bool = False, whole: bool = False, exact: bool = False
) -> tuple[nn.Module, Program]:
    model = draw(_models(exact))
    order = oracle.order(model, torch.ones(1, WIDTH, dtype=torch.float64))
    sizes = draw(st.lists(st.integers(0 if whole else 1, 2), min_size=1, max_size=4).filter(any))
    bodies = tuple(draw(_bodies(order, rows, looks)) for rows in sizes)
    return model, Program(bodies, crossing, draw(st.integers(0, 5)) == 0)


def inputs_of(program: Program) -> list[torch.Tensor]:
    count = sum(body.rows for body in program.bodies)
    every = torch.linspace(-1, 1, count * WIDTH, dtype=torch.float64).reshape(count, WIDTH)
    return list(every.split([body.rows for body in program.bodies]))


def run_step(step: Step, value: Any, pool: list[Any], saved: list[Any]) -> Any:
    """What is to stand in the place of `value` (tensor or proxy), or None; values for later are of shape (WIDTH)."""
    other = pool[step.at % len(pool)]
    if step.kind == "read":
        pool.append(value[0] * step.number)
    elif step.kind == "save":
        saved.append(value.clone())
    elif step.kind == "combine":
        made = value * step.number + other
        pool.append(made[-1])
        saved.append(made)
    elif step.kind == "replace":
        return value * step.number + other
    elif step.kind == "look":
        return value * step.number if value.sum() > 0.123456789 else value + step.number
    return None


def change(step: Step, value: Any, other: Any) -> None:
    """The statements that change a value in place."""
    if step.kind == "slice":
        value[:] = other
    elif step.kind == "row":
        value[0] = step.number
    elif step.kind == "add":
        value += other
    elif step.kind == "method":
        value.mul_(step.number).add_(other)


IN_PLACE = ("slice", "row", "add", "method")


def instead(step: Step, value: Any, other: Any) -> Any:
    """What a module that is skipped gives, of its input."""
    made = value * step.number + other
    return made if step.kind == "skip" else (made, value, None)


class HookedBody:
    """One body as plain hooks would run it, on the rows that it is given."""

    def __init__(self, body: Body, pool: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
        self.pool, self.saved = pool, saved
        self._left = list(body.visits)
        #: The module that is being skipped, and what it gives.
        self._skipped: tuple[str, Any] | None = None

    def visit(self, place: oracle.Place, value: Any) -> tuple[Any] | None:
        skipped = self._skipped
        if skipped is not None:
            if place != (skipped[0], "output"):
                return None
            value, self._skipped = skipped[1], None
        if not self._left or self._left[0].place != place:
            return None if skipped is None else (value,)
        for step in self._left.pop(0).steps:
            old = oracle.get(value, step.path)
            if step.kind.startswith("skip"):
                self._skipped = place[0], instead(step, old, self.pool[step.at % len(self.pool)])
                continue
            if step.kind in IN_PLACE:
                new = old.clone()
                change(step, new, self.pool[step.at % len(self.pool)])
            else:
                new = run_step(step, old, self.pool, self.saved)
            if new is not None:
                value = oracle.put(value, step.path, new)
        return (value,)


def first_values() -> list[Any]:
    return [torch.full((WIDTH,), 0.75, dtype=torch.float64)]


def alone(model: nn.Module, program: Program) -> list[torch.Tensor]:
    """What is saved when each body runs alone, one after the other."""
    pool, saved = first_values(), list[torch.Tensor]()
    for body, x in zip(program.bodies, inputs_of(program), strict=True):
        with oracle.visiting(model, HookedBody(body, pool if program.crossing else first_values(), saved).visit):
            saved.append(model(x))
    return saved


def in_one_batch(model: nn.Module, program: Program) -> list[torch.Tensor]:
    """What is saved when all bodies have their turns, in their order, at every value of one batch."""
    inputs = inputs_of(program)
    total, start, runs = sum(len(x) for x in inputs), 0, []
    for body in program.bodies:
        rows = slice(start, start + body.rows) if body.rows else slice(0, total)
        start += body.rows
        runs.append((HookedBody(body, first_values(), []), rows))

    def visit(place: oracle.Place, value: Any) -> tuple[Any]:
        for run, rows in runs:
            tensors = oracle.tensor_paths(value)
            own = value
            for path in tensors:
                tensor = oracle.get(value, path)
                each = len(tensor) // total
                own = oracle.put(own, path, tensor[rows.start * each : rows.stop * each])
            changed = run.visit(place, own)
            for path in tensors if changed else ():
                tensor = oracle.get(value, path).clone()
                each = len(tensor) // total
                tensor[rows.start * each : rows.stop * each] = oracle.get(changed[0], path)
                value = oracle.put(value, path, tensor)
            if place == ("", "output"):
                run.saved.append(value[rows])
        return (value,)

    with oracle.visiting(model, visit):
        model(torch.cat(inputs))
    return [value for run, _ in runs for value in run.saved]


class Invoked:
    """The program as a user would write it."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = NNsight(model), program
        self.pool = first_values()
        self.saved: list[Any] = []
        self.forward_passes = 0

    def _visit(self, visit: Visit, pool: list[Any], saved: list[Any]) -> None:
        path, kind = visit.place
        envoy = self.model.get(path)
        for step in visit.steps:
            value = getattr(envoy, kind)
            for key in step.path:
                value = value[key]
            if step.kind in IN_PLACE:
                change(step, value, pool[step.at % len(pool)])
                continue
            if step.kind.startswith("skip"):
                envoy.skip(instead(step, value, pool[step.at % len(pool)]))
                continue
            new = run_step(step, value, pool, saved)
            if new is None:
                continue
            if kind == "input":
                envoy.input = new
            elif step.path:
                envoy.output[step.path[0]] = new
            else:
                envoy.output = new

    def run(self) -> None:
        program = self.program
        with suppress(KeyError), self.model.trace() as tracer:
            for body, x in zip(program.bodies, inputs_of(program), strict=True):
                pool, saved = self.pool if program.crossing else first_values(), list[Any]()
                with tracer.invoke(x) if body.rows else tracer.invoke():
                    for visit in body.visits:
                        self._visit(visit, pool, saved)
                    saved.append(self.model.output)
                    self.saved += [value.save() for value in saved]
                    if program.raises and body is program.bodies[-1]:
                        raise KeyError
        self.forward_passes = tracer.forward_passes


def check_program(model: nn.Module, program: Program, exact: bool = False, most_passes: int = 99) -> None:
    """Run it both ways: the same numbers, and nothing left behind."""
    together = any(body.rows == 0 for body in program.bodies)
    expected = in_one_batch(model, program) if together else alone(model, program)
    with leaks.watching([model]) as watch:
        live = Invoked(model, program)
        live.run()
        if not program.raises:
            assert live.forward_passes <= most_passes
            for one, other in zip(live.saved, expected, strict=True):
                assert type(one.value) is torch.Tensor
                close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-9, "atol": 1e-11}
                torch.testing.assert_close(one.value, other, **close)
            held = [weakref.ref(value.value) for value in live.saved]
            live.pool.clear()
            live.saved.clear()
            del one, other
            if any(each() is not None for each in held):
                gc.collect()
            own = {id(each) for each in model.parameters()}
            assert not [each() for each in held if each() is not None and id(each()) not in own]
    assert not watch.complaints()


SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(_cases(exact=True))
def test_one_pass_gives_every_bit_of_what_each_invoke_gives_alone(case: tuple[nn.Module, Program]) -> None:
    check_program(*case, exact=True, most_passes=1)


@SETTINGS
@given(_cases(crossing=True))
def test_values_cross_forwards_and_backwards(case: tuple[nn.Module, Program]) -> None:
    check_program(*case)


@SETTINGS
@given(_cases(whole=True))
def test_invokes_without_input_see_the_whole_batch(case: tuple[nn.Module, Program]) -> None:
    check_program(*case, most_passes=1)


@settings(SETTINGS, max_examples=60)
@given(_cases(crossing=True, looks=True))
def test_looking_and_crossing_together(case: tuple[nn.Module, Program]) -> None:
    check_program(*case)


# Twins: the harness sees an engine that is wrong, and one that leaks.


def _two_writes(raises: bool = False) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    visit = Visit(("0", "output"), (Step("save", (), 0, 1.0), Step("method", (), 0, -2.0)))
    skip = Visit(("1", "input"), (Step("skip", (0, 0), 0, 0.5),))
    model = nn.Sequential(_linear(), _linear(), _linear())
    return model, Program((Body(1, (visit,)), Body(2, (visit, skip))), False, raises)


def test_the_harness_passes_a_right_engine() -> None:
    check_program(*_two_writes())
    check_program(*_two_writes(raises=True))


def _first_rows(self: Rows, tensor: torch.Tensor, place: Any = None) -> tuple[slice]:
    return (slice(0, self.size),)


WRONG = {
    "somebody else's rows": (Rows, "_range", _first_rows),
    "a write that spills": (Rows, "put", lambda self, value, part, place=None: self.take(part).expand_as(value)),
    "a dropped write": (Event, "write", lambda self, value: None),
    "a dropped skip": (Envoy, "skip", lambda self, value: None),
}


@pytest.mark.parametrize("owner, name, wrong", WRONG.values(), ids=WRONG)
def test_the_harness_catches(owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_program(*_two_writes())


def test_the_harness_catches_a_tensor_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, kept = Scope.wrap, list[Any]()

    def hoarding(self: Scope, value: Any, origin: Any = None, site: Any = None) -> Any:
        kept.append(value)
        return honest(self, value, origin, site)

    monkeypatch.setattr(Scope, "wrap", hoarding)
    with pytest.raises(AssertionError):
        check_program(*_two_writes())


def test_the_harness_catches_a_hook_that_stays() -> None:
    with leaks.hooks_that_stay(), pytest.raises(AssertionError):
        check_program(*_two_writes())
