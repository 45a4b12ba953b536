"""Random forwards, random reads and writes of their operations: a trace gives what the same steps by hand give."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from nnsight_core import NNsight
from nnsight_core.operations import Tap
from tests import leaks

SHAPE = (4, 3)

# What a forward may do. All tensors have one shape; each row depends on the same row alone. An operation in place is a
# statement or an expression: either way its tensor is changed.


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    call: Callable[..., Any]
    arguments: int
    in_place: bool = False
    #: What is kept of what it gives.
    pick: Callable[[Any], torch.Tensor] = lambda value: value


def _set_item(x: torch.Tensor, y: torch.Tensor) -> None:
    x[:, 1:] = y[:, 1:] * 1


KINDS = (
    Kind("softmax", lambda x: functional.softmax(x, dim=-1), 1),
    Kind("add", lambda x, y: x + y, 2),
    Kind("rsub", lambda x: 1 - x, 1),
    Kind("mul", torch.mul, 2),
    Kind("view", lambda x: x.view(x.shape), 1),
    Kind("contiguous", lambda x: x.contiguous(), 1),
    Kind("chunk", lambda x: x.chunk(1, dim=-1), 1, pick=lambda value: value[0] * 1),
    Kind("max", lambda x: x.max(-1, keepdim=True), 1, pick=lambda value: value.values.repeat(1, 3)),
    Kind("cat", lambda x, y: torch.cat([x, y], dim=-1), 2, pick=lambda value: value.narrow(1, 1, 3)),
    Kind("add_", lambda x, y: x.add_(y), 2, in_place=True),
    Kind("tanh_", lambda x: x.tanh_(), 1, in_place=True),
)
#: Operations in `pick`, which are counted as well.
PICKS = {"chunk": ("mul",), "max": ("repeat",), "cat": ("narrow",)}


@dataclasses.dataclass(frozen=True)
class Line:
    """`values.append(kind(values[arguments...]))`; kind None is the child module."""

    kind: Kind | None
    arguments: tuple[int, ...]
    as_statement: bool = False


class Interpreted(nn.Module):
    def __init__(self, lines: tuple[Line, ...]) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Linear(3, 3), nn.Softmax(dim=-1))
        self.lines = lines

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for line in self.lines:
            arguments = [values[at] for at in line.arguments]
            if line.kind is None:
                values.append(self.child(arguments[0]))
            elif line.as_statement:
                line.kind.call(*arguments)
                values.append(arguments[0])
            else:
                values.append(line.kind.pick(line.kind.call(*arguments)))
        return values[-1]


# What a script does at an operation.


@dataclasses.dataclass(frozen=True)
class Action:
    at: int
    kind: str


ACTIONS = ("read input", "read output", "set output", "set part", "set input", "add to input")


@dataclasses.dataclass(frozen=True)
class Case:
    lines: tuple[Line, ...]
    actions: tuple[Action, ...]
    seed: int
    half_way: bool


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    lines: list[Line] = []
    for number in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from((*KINDS, None)))
        # The input is the caller's, and an operation in place of its own would change it for the next run.
        first = 1 if kind is not None and kind.in_place else 0
        if first > number:
            kind = KINDS[0]
            first = 0
        count = 1 if kind is None else kind.arguments
        places = tuple(draw(st.integers(first, number)) for _ in range(count))
        lines.append(Line(kind, places, as_statement=bool(kind and kind.in_place and draw(st.booleans()))))
    possible = [number for number, line in enumerate(lines) if line.kind is not None]
    actions: list[Action] = []
    for at in sorted(draw(st.sets(st.sampled_from(possible), max_size=4))) if possible else ():
        chosen = draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3))
        # The call comes before what it gives.
        chosen.sort(key=lambda kind: "output" in kind or kind == "set part")
        actions += [Action(at, kind) for kind in chosen]
    return Case(tuple(lines), tuple(actions), draw(st.integers(0, 3)), draw(st.booleans()))


def names_of(lines: tuple[Line, ...]) -> list[str]:
    """How the operation of each line is called; empty for the child."""
    counts: dict[str, int] = {}
    names = []
    for line in lines:
        name = "" if line.kind is None else line.kind.name
        names.append(f"{name}_{counts.get(name, 0)}" if name else "")
        for each in (name, *PICKS.get(name, ())):
            counts[each] = counts.get(each, 0) + 1
    return names


def _changed(value: Any) -> Any:
    return type(value)([value[0] * 2 + 1, *value[1:]]) if isinstance(value, tuple) else value * 2 + 1


def _part_changed(value: Any) -> Any:
    first = (value[0] if isinstance(value, tuple) else value).clone()
    first[:, 0] = 5
    return type(value)([first, *value[1:]]) if isinstance(value, tuple) else first


def _kept(value: Any) -> torch.Tensor:
    return (value[0] if isinstance(value, (tuple, list)) else value).clone()


def by_hand(module: Interpreted, case: Case, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the actions read, and the output: the lines taken one by one, with the changes in between."""
    read: list[torch.Tensor] = []
    values = [x]
    for number, line in enumerate(module.lines):
        arguments = [values[at] for at in line.arguments]
        if line.kind is None:
            values.append(module.child(arguments[0]))
            continue
        kinds = [action.kind for action in case.actions if action.at == number]
        target = arguments[0]
        for kind in kinds:
            if kind == "read input":
                read.append(arguments[0].clone())
            elif kind in ("set input", "add to input"):
                new = arguments[0] * 2 + 1 if kind == "set input" else arguments[0] + 1
                if line.kind.in_place:
                    # The same tensor may be the second argument, which is not the one that is set.
                    arguments[1:] = [each.clone() for each in arguments[1:]]
                    target.data.copy_(new)
                else:
                    arguments[0] = new
        value = line.kind.call(*arguments)
        for kind in kinds:
            if kind == "read output":
                read.append(_kept(value))
            elif kind in ("set output", "set part"):
                new = _changed(value) if kind == "set output" else _part_changed(value)
                if line.kind.in_place:
                    target.data.copy_(new)
                else:
                    value = new
        values.append(target if line.kind.in_place else line.kind.pick(value))
    return read, values[-1]


def act(envoy: Any, action: Action, name: str, read: list[Any]) -> None:
    operation = getattr(envoy.source, name)
    is_tuple = name.startswith(("chunk", "max"))
    # Of a list of tensors the first is what the script is after.
    if action.kind == "read input":
        read.append((operation.input[0][0][0] if name.startswith("cat") else operation.input[0][0]).save())
    elif action.kind == "set input":
        if name.startswith("cat"):
            operation.input[0][0][0] = operation.input[0][0][0] * 2 + 1
        else:
            operation.input = operation.input * 2 + 1
    elif action.kind == "add to input":
        if name.startswith("cat"):
            operation.input[0][0][0] += 1
        else:
            operation.input += 1
    elif action.kind == "read output":
        read.append((operation.output[0] if is_tuple else operation.output).save())
    elif action.kind == "set output":
        if is_tuple:
            operation.output[0] = operation.output[0] * 2 + 1
        else:
            operation.output = operation.output * 2 + 1
    elif is_tuple:
        operation.output[0][:, 0] = 5
    else:
        operation.output[:, 0] = 5


def _model(case: Case) -> NNsight:
    torch.manual_seed(case.seed)
    return NNsight(nn.Sequential(Interpreted(case.lines), nn.Linear(3, 3)).requires_grad_(case.seed % 2 == 0))


def _input(case: Case) -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(SHAPE) * (case.seed + 1)


def check_live(case: Case) -> None:
    model, x = _model(case), _input(case)
    names = names_of(case.lines)
    with leaks.watching([model._module]) as watch, torch.set_grad_enabled(case.seed < 2):
        wanted, output = by_hand(model._module[0], case, x.clone())
        read: list[Any] = []
        with model.trace(x.clone()):
            listed = [operation.name for operation in model[0].source] if case.seed == 3 else None
            if case.half_way:
                assert model[0].input is not None
            for action in case.actions:
                act(model[0], action, names[action.at], read)
            found = model[0].output.save()
        assert listed is None or [name for name in names if name] == [name for name in listed if name in names]
        assert torch.equal(found, output)
        assert [torch.equal(*pair) for pair in zip(read, wanted, strict=True)] == [True] * len(wanted)
        held = [weakref.ref(each.value) for each in read]
        read.clear()
        del found
        if any(each() is not None for each in held):
            gc.collect()
        assert not [each for each in held if each() is not None]
    assert not watch.complaints()


SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(_cases())
def test_a_trace_gives_what_the_steps_by_hand_give(case: Case) -> None:
    check_live(case)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_cases(), st.integers(1, 3))
def test_each_invoke_has_the_operations_on_its_own_rows(case: Case, split: int) -> None:
    # A view that is set, or made of what is set, is no view any more, for all rows: what the model writes into it later
    # stays out of the tensor that it was a view of.
    views = [number for number, line in enumerate(case.lines) if line.kind and line.kind.name in ("view", "contiguous")]
    in_place = any(line.kind and line.kind.in_place for line in case.lines)
    assume(not in_place or not any(each.at in views and "read" not in each.kind for each in case.actions))
    model, x = _model(case), _input(case)
    names = names_of(case.lines)
    wanted, output = by_hand(model._module[0], case, x[:split].clone())
    plain = model._module[0](x.clone())
    read: list[Any] = []
    with model.trace() as tracer:
        with tracer.invoke(x[:split].clone()):
            for action in case.actions:
                act(model[0], action, names[action.at], read)
            found = model[0].output.save()
        with tracer.invoke(x[split:].clone()):
            other = model[0].output.save()
    assert tracer.forward_passes == 1
    torch.testing.assert_close(found.value, output)
    torch.testing.assert_close(other.value, plain[split:])
    for one, two in zip(read, wanted, strict=True):
        torch.testing.assert_close(one.value, two)


# A twin: the harness sees a tap that is wrong.


def _one_set() -> Case:
    return Case((Line(KINDS[0], (0,)), Line(KINDS[1], (1, 1))), (Action(0, "set output"),), 0, False)


def test_the_harness_passes_a_right_tap() -> None:
    check_live(_one_set())


def test_the_harness_catches_a_dropped_change(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Tap._show
    monkeypatch.setattr(Tap, "_show", lambda self, *args: honest(self, *args) and None)
    with pytest.raises(AssertionError):
        check_live(_one_set())
