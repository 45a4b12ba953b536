"""Random programs with caches, skips and calls by their numbers: a live trace gives what plain hooks give."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_core import NNsight
from nnsight_core.cache import CacheOptions
from nnsight_core.counting import CallCounter
from tests import leaks, oracle
from tests.properties.test_live_programs import SHAPE, _modules

#: A call of a module: the place, and how many of the module have gone before it.
Call = tuple[oracle.Place, int]


@dataclasses.dataclass(frozen=True)
class Step:
    """``"save"`` or ``"scale"`` the first tensor of a value, or ``"skip"`` the call, which then gives its input."""

    call: Call
    path: oracle.Path
    kind: str
    #: Asked for by its number, and not as the next that comes.
    by_number: bool


@dataclasses.dataclass(frozen=True)
class Program:
    steps: tuple[Step, ...]
    #: The modules that a cache keeps; None for no cache, and () for all of them.
    cached: tuple[str, ...] | None
    inputs_too: bool


def calls_of(order: list[tuple[oracle.Place, list[oracle.Path]]]) -> list[tuple[Call, list[oracle.Path]]]:
    """The values of a run, each with the number of its call."""
    seen: dict[oracle.Place, int] = {}
    found = []
    for place, paths in order:
        number = seen[place] = seen.get(place, -1) + 1
        found.append(((place, number), paths))
    return found


def inside(path: str, place: oracle.Place) -> bool:
    return place[0].startswith(f"{path}.") if path else bool(place[0])


@st.composite
def _programs(draw: st.DrawFn, calls: list[tuple[Call, list[oracle.Path]]]) -> Program:
    steps: list[Step] = []
    last = until = -1
    # The calls that are made: those inside of a skipped one are not, and are not counted.
    made = list(range(len(calls)))
    for index in sorted(draw(st.sets(st.sampled_from(range(len(calls))), max_size=4))):
        (place, unskipped), paths = calls[index]
        path, kind = place
        if index <= until:
            continue
        same = [i for i in made if calls[i][0][0] == place]
        end = next(i for i, (each, _) in enumerate(calls) if each == ((path, "output"), unskipped)) if path else -1
        gives_its_like = bool(path) and kind == "input" and paths == [(0, 0)] and calls[end][1] == [()]
        chosen = draw(st.sampled_from(["save", "scale", *(["skip"] * gives_its_like)]))
        if chosen == "skip":
            until = end
            made = [i for i in made if not index < i < end]
        # The next that comes has to be this one; what the model stands at is given again.
        is_next = next(i for i in same if i > last) == index and not (steps and steps[-1].call[0] == place)
        steps.append(Step((place, same.index(index)), paths[0], chosen, not is_next or draw(st.booleans())))
        last = index
    names = sorted({place[0] for (place, _), _ in calls})
    cached = draw(st.none() | st.just(()) | st.sets(st.sampled_from(names), min_size=1).map(tuple))
    return Program(tuple(steps), cached, draw(st.booleans()))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[nn.Module, Program]:
    torch.manual_seed(draw(st.integers(0, 5)))
    model = nn.Sequential(draw(_modules()), nn.Linear(3, 3))
    return model, draw(_programs(calls_of(oracle.order(model, torch.ones(SHAPE)))))


class ByHooks:
    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.saved: list[torch.Tensor] = []
        self.cached: dict[str, dict[str, list[Any]]] = {}
        self._counts: dict[oracle.Place, int] = {}
        self._left = list(program.steps)
        self._skipped: str | None = None
        self._instead: Any = None

    def visit(self, place: oracle.Place, value: Any) -> tuple[Any] | None:
        if self._skipped is not None and inside(self._skipped, place):
            return None
        number = self._counts[place] = self._counts.get(place, -1) + 1
        if self._skipped is not None and place == (self._skipped, "output"):
            value, self._skipped = self._instead, None
        step = self._left[0] if self._left and self._left[0].call == (place, number) else None
        if step is not None:
            self._left.pop(0)
            tensor = oracle.get(value, step.path)
            if step.kind == "save":
                self.saved.append(tensor.clone())
            elif step.kind == "scale":
                value = oracle.put(value, step.path, tensor * -1.5)
            else:
                self._skipped, self._instead = place[0], tensor + 2
        self._keep(place, value)
        return (value,)

    def _keep(self, place: oracle.Place, value: Any) -> None:
        cached = self.program.cached
        if (
            cached is None
            or (cached and place[0] not in cached)
            or (place[1] == "input" and not self.program.inputs_too)
        ):
            return
        tensors = [oracle.get(value, path).clone() for path in oracle.tensor_paths(value)]
        self.cached.setdefault(place[0], {"input": [], "output": []})[place[1]].append(tensors)

    def run(self, x: torch.Tensor) -> None:
        with oracle.visiting(self.model, self.visit):
            self.saved.append(self.model(x))


class Traced:
    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = NNsight(model), program
        self.saved: list[Any] = []
        self.cache: Any = None

    def _step(self, step: Step, calls: dict[str, Any]) -> None:
        (path, kind), number = step.call
        envoy = self.model.get(path)
        at = calls[path][number] if step.by_number else envoy
        if step.kind == "skip":
            at.skip(at.input + 2)
            return
        value = getattr(at, kind)
        if kind == "input" and step.path and step.path[0] == 0:
            value = value[0][0]
        elif kind == "input":
            value = value[1][step.path[1]]
        else:
            for key in step.path:
                value = getattr(value, key) if dataclasses.is_dataclass(value.value) else value[key]
        if step.kind == "save":
            self.saved.append(value.clone().save())
        else:
            value.mul_(-1.5)

    def run(self, x: torch.Tensor) -> None:
        program = self.program
        with self.model.trace(x) as tracer:
            calls = {step.call[0][0]: self.model.get(step.call[0][0]).calls for step in program.steps if step.by_number}
            if program.cached is not None:
                chosen = {"modules": [self.model.get(path) for path in program.cached]} if program.cached else {}
                self.cache = tracer.cache(include_inputs=program.inputs_too, **chosen)
            for step in program.steps:
                self._step(step, calls)
            self.saved.append(self.model.output.save())


def kept(entries: list[Any]) -> list[list[torch.Tensor]]:
    return [[oracle.get(value, path) for path in oracle.tensor_paths(value)] for value in entries]


@torch.no_grad()
def check_program(model: nn.Module, program: Program) -> None:
    """Bit for bit, value by value and entry by entry; and nothing is left behind."""
    x = torch.linspace(-1, 1, 6).reshape(SHAPE)
    with leaks.watching([model]) as watch:
        hooked, traced = ByHooks(model, program), Traced(model, program)
        hooked.run(x.clone())
        traced.run(x.clone())
        assert len(traced.saved) == len(hooked.saved)
        for one, other in zip(traced.saved, hooked.saved, strict=True):
            assert torch.equal(one.value, other)
        if traced.cache is not None:
            assert set(traced.cache.keys()) == set(hooked.cached)
            for path, entries in hooked.cached.items():
                for kind, values in entries.items():
                    ours = kept(traced.cache[path].calls[kind])
                    assert [len(each) for each in ours] == [len(each) for each in values]
                    for one, other in zip(ours, values, strict=True):
                        assert all(map(torch.equal, one, other))
        del hooked, traced
        gc.collect()
    assert not watch.complaints()


def _runs_all_that_is_cached(case: tuple[nn.Module, Program]) -> bool:
    """Whether each module that a cache is to keep runs: what is inside a skipped one does not, which is an error."""
    model, program = case
    hooked = ByHooks(model, program)
    hooked.run(torch.ones(SHAPE))
    return set(program.cached or ()) <= set(hooked.cached)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(_cases().filter(_runs_all_that_is_cached))
def test_caches_skips_and_numbered_calls(case: tuple[nn.Module, Program]) -> None:
    check_program(*case)


# Twins: the harness sees an engine that is wrong.


def _one_of_each() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    second = Step((("0", "output"), 1), (), "scale", True)
    return model, Program((Step((("1", "input"), 0), (0, 0), "skip", False), second), (), True)


def test_the_harness_passes_a_right_engine() -> None:
    check_program(*_one_of_each())


def test_calls_inside_a_skipped_one_are_not_counted() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3))
    model = nn.Sequential(inner, inner)
    second = Step((("0.0", "input"), 0), (0, 0), "scale", True)
    check_program(model, Program((Step((("0", "input"), 0), (0, 0), "skip", False), second), (), True))


WRONG = {
    "values that are not copied": (CacheOptions, "kept", lambda self, tensor: tensor.mul_(1.5)),
    "calls that are not counted": (CallCounter, "begins", lambda self: None),
}


@pytest.mark.parametrize("owner, name, wrong", WRONG.values(), ids=WRONG)
def test_the_harness_catches(owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(Exception):  # noqa: B017 - the numbers differ, or a call that is asked for does not come
        check_program(*_one_of_each())
