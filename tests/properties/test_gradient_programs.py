"""Random reads and changes of gradients, in one body or several: what hooks on the tensors themselves give."""

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
from nnsight_core.rows import Rows
from tests import leaks, oracle

WIDTH, ROWS = 4, 2


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Forks(nn.Module):
    """Gives two things that both go on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(x), torch.sin(x)


class Joins(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.fork = Forks(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.fork(x)
        return one * other


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


@dataclasses.dataclass(frozen=True)
class Visit:
    """A tensor whose gradient is asked for: ``"read"``, or changed: ``"scale"`` it, ``"zero"`` a part, or both."""

    place: oracle.Place
    path: oracle.Path
    kind: str


@dataclasses.dataclass(frozen=True)
class Body:
    visits: tuple[Visit, ...]
    #: A change of the value at this place in the forward pass, before the gradients come.
    change: oracle.Place | None
    backwards: int


KINDS = ("read", "scale", "zero", "set and read")


@st.composite
def _cases(draw: st.DrawFn) -> tuple[nn.Module, tuple[Body, ...]]:
    torch.manual_seed(draw(st.integers(0, 5)))
    leaves = st.sampled_from([_linear, nn.Tanh, lambda: Residual(_linear()), lambda: Joins(_linear())])
    parts = [draw(leaves)() for _ in range(draw(st.integers(1, 3)))]
    model = nn.Sequential(_linear(), *parts, _linear()).double()
    places = tensors_of_their_own(model)
    bodies = []
    for _ in range(draw(st.integers(1, 3))):
        chosen = sorted(draw(st.sets(st.sampled_from(range(len(places))), min_size=1, max_size=3)))
        visits = tuple(Visit(*places[number], draw(st.sampled_from(KINDS))) for number in chosen)
        change = draw(st.none() | st.sampled_from([place for place, path in places if not path]))
        bodies.append(Body(visits, change, draw(st.integers(1, 2))))
    return model, tuple(bodies)


def tensors_of_their_own(model: nn.Module) -> list[tuple[oracle.Place, oracle.Path]]:
    """The outputs that are no other place's as well: what is done to a gradient there is done to nobody else's."""
    seen: dict[int, tuple[oracle.Place, oracle.Path]] = {}
    held = []

    def visit(place: oracle.Place, value: Any) -> None:
        for path in oracle.tensor_paths(value) if place[1] == "output" else ():
            tensor = oracle.get(value, path)
            held.append(tensor)
            seen.setdefault(id(tensor), (place, path))

    with oracle.visiting(model, visit):
        model(torch.ones(1, WIDTH, dtype=torch.float64))
    return list(seen.values())


def changed(kind: str, gradient: Any) -> Any:
    """What a program makes of a gradient."""
    if kind == "scale":
        return gradient * -1.5
    new = gradient.clone()
    new[..., 1:] = 0
    return new if kind == "zero" else new * 3


def by_hooks(model: nn.Module, body: Body, x: torch.Tensor) -> list[torch.Tensor]:
    """What is saved, in the order of the visits, for each backward pass; and the model's output."""
    gradients: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(body.visits))}
    left = dict(enumerate(body.visits))

    def visit(place: oracle.Place, value: Any) -> tuple[Any] | None:
        replaced = place == body.change
        if replaced:
            value = value * 0.5
        for number, each in list(left.items()):
            if each.place == place:
                del left[number]
                oracle.get(value, each.path).register_hook(
                    lambda grad, number=number, each=each: note(number, each, grad)
                )
        return (value,) if replaced else None

    def note(number: int, visit: Visit, gradient: torch.Tensor) -> torch.Tensor | None:
        new = None if visit.kind == "read" else changed(visit.kind, gradient)
        gradients[number].append(gradient if visit.kind == "read" else new)
        return new

    with oracle.visiting(model, visit):
        output = model(x)
    for number in range(body.backwards):
        (output**2).sum().backward(retain_graph=number < body.backwards - 1)
    model.zero_grad()
    return [value for number in range(len(body.visits)) for value in gradients[number]] + [output.detach()]


class Traced:
    """The bodies as a user would write them."""

    def __init__(self, model: nn.Module, bodies: tuple[Body, ...]) -> None:
        self.model, self.bodies = NNsight(model), bodies
        self.saved: list[Any] = []

    def _values(self, body: Body) -> list[Any]:
        """The tensors whose gradients are wanted, and the loss."""
        found: list[Any] = []
        places = dict.fromkeys(each.place for each in body.visits)
        if body.change is not None:
            order = [place for place, _ in tensors_of_their_own(self.model._module)]
            places = dict.fromkeys(sorted({*places, body.change}, key=order.index))
        for place in places:
            envoy = self.model.get(place[0])
            if place == body.change:
                envoy.output = envoy.output * 0.5
            value = envoy.output
            for each in body.visits:
                if each.place == place:
                    part = value
                    for key in each.path:
                        part = part[key]
                    found.append(part)
        return found

    def _body(self, body: Body) -> list[Any]:
        values = self._values(body)
        output = self.model.output
        loss = (output**2).sum()
        saved: list[list[Any]] = [[] for _ in values]
        for number in range(body.backwards):
            with loss.backward(retain_graph=number < body.backwards - 1):
                # Gradients come in the reverse of the order of their values.
                for index, value in reversed(list(enumerate(values))):
                    kind = body.visits[index].kind
                    if kind == "zero":
                        value.grad[..., 1:] = 0
                    elif kind != "read":
                        value.grad = changed(kind, value.grad)
                    saved[index].append(value.grad.save())
        return [each for row in saved for each in row] + [output.detach().save()]

    def run(self, inputs: list[torch.Tensor]) -> None:
        if len(inputs) == 1:
            with self.model.trace(inputs[0]):
                self.saved = self._body(self.bodies[0])
            return
        with self.model.trace() as tracer:
            for body, x in zip(self.bodies, inputs, strict=True):
                with tracer.invoke(x):
                    self.saved += self._body(body)
        assert tracer.forward_passes == 1


def check_program(model: nn.Module, bodies: tuple[Body, ...]) -> None:
    """The same gradients as with hooks, for each body alone, and nothing left behind."""
    count = len(bodies) * ROWS * WIDTH
    inputs = list(torch.linspace(-1, 1, count, dtype=torch.float64).view(-1, WIDTH).split(ROWS))
    expected = [value for body, x in zip(bodies, inputs, strict=True) for value in by_hooks(model, body, x)]
    with leaks.watching([model]) as watch:
        traced = Traced(model, bodies)
        traced.run([x.clone() for x in inputs])
        assert len(traced.saved) == len(expected)
        for one, other in zip(traced.saved, expected, strict=True):
            torch.testing.assert_close(one.value, other, rtol=1e-9, atol=1e-11)
        del traced, one
        gc.collect()
    model.zero_grad()
    assert not watch.complaints()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_cases())
def test_gradients_are_those_of_hooks(case: tuple[nn.Module, tuple[Body, ...]]) -> None:
    check_program(*case)


# Twins: the harness sees an engine that is wrong.


def _two_bodies() -> tuple[nn.Module, tuple[Body, ...]]:
    torch.manual_seed(0)
    visits = (Visit(("0", "output"), (), "read"), Visit(("1", "output"), (), "scale"))
    model = nn.Sequential(_linear(), nn.Tanh(), _linear()).double()
    return model, (Body(visits, None, 1), Body(visits[:1], ("1", "output"), 2))


def test_the_harness_passes_a_right_engine() -> None:
    check_program(*_two_bodies())


def test_the_harness_catches_somebody_elses_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "_range", lambda self, tensor, place=None: (slice(0, self.size),))
    with pytest.raises((AssertionError, RuntimeError)):
        check_program(*_two_bodies())
