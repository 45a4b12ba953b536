"""Random programs on random modules: a live trace and plain hooks give the same numbers, and leave nothing behind."""

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
from nnsight_core.events import Event
from nnsight_core.proxy import Proxy
from tests import leaks, oracle

SHAPE = (2, 3)


# Random modules. Every tensor has one shape, so that any value can stand in any place.


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor
    extra: tuple[torch.Tensor, ...] = ()


class Wrapper(nn.Module):
    """A module around one other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Takes(Wrapper):
    """Takes the tensors out of whatever its inner module gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.inner(x)
        return sum(oracle.get(value, path) for path in oracle.tensor_paths(value))


class GivesTuple(Wrapper):
    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        return self.inner(x), x, None


class GivesDict(Wrapper):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"hidden": self.inner(x), "more": {"x": x, "rest": [x * 2]}}


class GivesRecord(Wrapper):
    def forward(self, x: torch.Tensor) -> Record:
        return Record(self.inner(x), (x, x + 1))


class Residual(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Twice(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


class InPlace(Wrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).clone().add_(1).mul_(0.5)


class Named(nn.Module):
    def forward(self, *, hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return hidden * scale


class ByKeyword(Wrapper):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.named = Named()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.named(hidden=self.inner(x), scale=torch.full_like(x, 0.5))


class Backwards(nn.ModuleList):
    """Runs its modules in the reverse of the order in which they are registered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in reversed(self):
            x = module(x)
        return x


def _sharing(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Linear(3, 3), module)


_leaves = st.sampled_from([lambda: nn.Linear(3, 3), nn.Tanh, nn.Identity, lambda: nn.Hardtanh(inplace=False)])
_wraps = st.sampled_from(
    [
        lambda inner: Takes(GivesTuple(inner)),
        lambda inner: Takes(GivesDict(inner)),
        lambda inner: Takes(GivesRecord(inner)),
        Residual,
        Twice,
        InPlace,
        ByKeyword,
        _sharing,
    ]
)


@st.composite
def _modules(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    if depth == 0:
        return draw(_leaves)()
    if draw(st.booleans()):
        return draw(_wraps)(draw(_modules(depth - 1)))
    children = [draw(_modules(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    return nn.Sequential(*children) if draw(st.booleans()) else Backwards(children)


# Random programs: visits of places in forward order, each with steps that read, compute and write.


@dataclasses.dataclass(frozen=True)
class Step:
    """One statement on the tensor at `path` of the place; `at` picks one of the values computed so far."""

    kind: str
    path: oracle.Path
    at: int = 0
    number: float = 1.0


@dataclasses.dataclass(frozen=True)
class Visit:
    place: oracle.Place
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    visits: tuple[Visit, ...]
    ending: str


class Boom(Exception):
    """What a body or a model raises when the program says so."""


READS = ("read", "save", "combine")
WRITES = ("slice", "row", "add", "multiply", "replace", "fill", "method")
#: Only for inputs: the first argument, and the whole call.
CALL_WRITES = ("first", "first in place", "call")


@st.composite
def _programs(draw: st.DrawFn, order: list[tuple[oracle.Place, list[oracle.Path]]]) -> Program:
    chosen = sorted(draw(st.sets(st.sampled_from(range(len(order))), max_size=5)))
    visits: list[Visit] = []
    for place, paths in (order[number] for number in chosen):
        # Asked again right away, a place gives the same value again, not that of the module's next call.
        if visits and visits[-1].place == place:
            continue
        possible = READS + WRITES + (CALL_WRITES if place[1] == "input" else ())
        steps = []
        for kind in draw(st.lists(st.sampled_from(possible), min_size=1, max_size=3)):
            path = paths[0] if kind in CALL_WRITES else draw(st.sampled_from(paths))
            steps.append(Step(kind, path, draw(st.integers(0, 9)), draw(st.sampled_from([0.5, -2.0]))))
        visits.append(Visit(place, tuple(steps)))
    return Program(tuple(visits), draw(st.sampled_from(["end", "end", "end", "stop", "raise", "raise in model"])))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[nn.Module, Program]:
    torch.manual_seed(draw(st.integers(0, 5)))
    model = nn.Sequential(draw(_modules()), nn.Linear(3, 3))
    return model, draw(_programs(oracle.order(model, torch.ones(SHAPE))))


# The two ways to run a program.


def _changed(step: Step, old: torch.Tensor, other: Any) -> torch.Tensor:
    if step.kind in ("replace", "first", "call"):
        return old * step.number + other
    if step.kind == "fill":
        return torch.full_like(old, step.number)
    new = old.clone()
    if step.kind == "slice":
        new[:] = other
    elif step.kind == "row":
        new[0] = step.number
    elif step.kind == "add":
        new += other
    elif step.kind in ("multiply", "first in place"):
        new *= step.number
    else:
        assert step.kind == "method"
        new.mul_(step.number).add_(other)
    return new


class RunByHooks:
    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.values: list[torch.Tensor] = [torch.ones(SHAPE)]
        self.saved: list[torch.Tensor] = []
        self._left = list(program.visits)

    def _visit(self, place: oracle.Place, value: Any) -> tuple[Any] | None:
        if not self._left or self._left[0].place != place:
            return None
        for step in self._left.pop(0).steps:
            old = oracle.get(value, step.path)
            other = self.values[step.at % len(self.values)]
            if step.kind == "read":
                self.values.append(old)
            elif step.kind == "save":
                self.saved.append(old)
            elif step.kind == "combine":
                self.values.append(old * step.number + other)
                self.saved.append(self.values[-1])
            else:
                value = oracle.put(value, step.path, _changed(step, old, other))
        if not self._left and self.program.ending == "stop":
            raise Boom
        return (value,)

    def run(self, x: torch.Tensor) -> None:
        ending = self.program.ending
        if ending == "stop" and not self.program.visits:
            return
        with suppress(Boom), oracle.visiting(self.model, self._visit):
            output = self.model(x)
            if ending == "end":
                self.saved.append(output)


class RunLive:
    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = NNsight(model), program
        self.values: list[Any] = [torch.ones(SHAPE)]
        self.saved: list[Any] = []
        self.unsaved: list[weakref.ref[Proxy]] = []

    def _write_call(self, envoy: Any, step: Step, other: Any) -> None:
        if step.kind == "first":
            envoy.input = envoy.input * step.number + other
        elif step.kind == "first in place":
            envoy.input *= step.number
        else:
            args, kwargs = envoy.input
            name = None if args else next(iter(kwargs.keys()))
            new = (kwargs[name] if name else args[0]) * step.number + other
            envoy.inputs = ((), {**kwargs.value, name: new}) if name else ((new, *args[1:]), kwargs)

    def _write(self, envoy: Any, kind: str, step: Step, other: Any) -> None:
        if step.kind in CALL_WRITES:
            self._write_call(envoy, step, other)
            return
        if step.kind == "replace" and step.path == ():
            envoy.output = envoy.output * step.number + other
            return
        if step.kind == "fill" and step.path == ():
            envoy.output = step.number
            return
        if step.path == () and step.kind in ("add", "multiply"):
            if step.kind == "add":
                envoy.output += other
            else:
                envoy.output *= step.number
            return
        owner = getattr(envoy, kind)
        *way, last = step.path if step.path else (None,)
        for key in way:
            owner = getattr(owner, key) if dataclasses.is_dataclass(owner.value) else owner[key]
        if last is None:
            part = owner
        elif dataclasses.is_dataclass(owner.value):
            part = getattr(owner, last)
        else:
            part = owner[last]
        if step.kind == "slice":
            part[:] = other
        elif step.kind == "row":
            part[0] = step.number
        elif step.kind == "add":
            part += other
        elif step.kind == "multiply":
            part *= step.number
        elif step.kind == "method":
            part.mul_(step.number).add_(other)
        else:
            new = part * step.number + other if step.kind == "replace" else torch.full_like(part, step.number)
            if dataclasses.is_dataclass(owner.value):
                setattr(owner, last, new)
            else:
                owner[last] = new

    def _visit(self, visit: Visit) -> None:
        path, kind = visit.place
        envoy = self.model.get(path)
        for step in visit.steps:
            other = self.values[step.at % len(self.values)]
            if step.kind not in READS:
                self._write(envoy, kind, step, other)
                continue
            found = getattr(envoy, kind)
            for key in step.path:
                found = getattr(found, key) if dataclasses.is_dataclass(found.value) else found[key]
            if step.kind == "save":
                self.saved.append(found.save())
            elif step.kind == "read":
                self.values.append(found)
            else:
                self.values.append(found * step.number + other)
                self.saved.append(self.values[-1].save())

    def run(self, x: torch.Tensor) -> None:
        ending = self.program.ending
        with suppress(Boom), self.model.trace(x) as tracer:
            for visit in self.program.visits:
                self._visit(visit)
            if ending == "stop":
                tracer.stop()
            elif ending == "raise":
                raise Boom
            elif ending == "raise in model":
                assert self.model.output is not None
                raise Boom
            else:
                self.saved.append(self.model.output.save())
        self.unsaved = [weakref.ref(value.value) for value in self.values if isinstance(value, Proxy) and value._saved]


def check_same_numbers(live: RunLive, hooked: RunByHooks) -> None:
    """Bit for bit, value by value."""
    assert len(live.saved) == len(hooked.saved)
    for one, other in zip(live.saved, hooked.saved, strict=True):
        assert type(one.value) is torch.Tensor
        assert torch.equal(one.value, other)


def check_nothing_held(live: RunLive) -> None:
    """With the variables of the script gone, so are the tensors."""
    held = [weakref.ref(each.value) for each in live.saved] + live.unsaved
    live.values.clear()
    live.saved.clear()
    if any(each() is not None for each in held):
        gc.collect()
    assert not [each() for each in held if each() is not None]


def check_program(model: nn.Module, program: Program) -> None:
    """Run it both ways, twice."""
    # A model may hold a tensor of its own, which a value then is: frozen weights make every value a passing one.
    x = torch.linspace(-1, 1, 6).reshape(SHAPE)
    with leaks.watching([model]) as watch:
        plain = model(x)
        for _ in range(2):
            hooked, live = RunByHooks(model, program), RunLive(model, program)
            hooked.run(x.clone())
            live.run(x.clone())
            check_same_numbers(live, hooked)
            del hooked
            check_nothing_held(live)
        assert torch.equal(model(x), plain)
    assert not watch.complaints()


SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(_cases())
def test_a_live_trace_gives_what_hooks_give(case: tuple[nn.Module, Program]) -> None:
    check_program(*case)


@settings(max_examples=25, deadline=None)
@given(_cases())
def test_a_model_that_raises_half_way_leaves_nothing_behind(case: tuple[nn.Module, Program]) -> None:
    model, program = case

    def explode(*_: Any) -> None:
        raise Boom

    handle = model[1].register_forward_pre_hook(explode)
    x = torch.ones(SHAPE)
    before_the_end = tuple(visit for visit in program.visits if visit.place[0].startswith("0"))
    program = Program(before_the_end, "end")
    with leaks.watching([model]) as watch:
        hooked, live = RunByHooks(model, program), RunLive(model, program)
        hooked.run(x)
        live.run(x)
        check_same_numbers(live, hooked)
    assert not watch.complaints()
    handle.remove()
    check_program(model, program)


# Twins: the harness sees an engine that is wrong, and one that leaks.


def _one_write() -> tuple[nn.Module, Program]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return model, Program((Visit(("0", "output"), (Step("multiply", (), 0, -2.0),)),), "end")


def test_the_harness_passes_a_right_engine() -> None:
    check_program(*_one_write())


def test_the_harness_catches_a_dropped_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "write", lambda self, value: None)
    with pytest.raises(AssertionError):
        check_program(*_one_write())


def test_the_harness_catches_a_hook_that_stays() -> None:
    with leaks.hooks_that_stay(), pytest.raises(AssertionError):
        check_program(*_one_write())


def test_the_harness_catches_a_tensor_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, kept = Event.__init__, list[Any]()

    def hoarding(self: Event, module: nn.Module, kind: str, label: str, value: Any, *rest: Any) -> None:
        kept.append(value)
        honest(self, module, kind, label, value, *rest)

    monkeypatch.setattr(Event, "__init__", hoarding)
    model, program = _one_write()
    saving = Program((Visit(("0", "output"), (Step("save", ()),)),), program.ending)
    with pytest.raises(AssertionError):
        check_program(model, saving)
