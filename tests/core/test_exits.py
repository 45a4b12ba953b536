"""However a trace is left, the model is as it was: no hook, no greenlet, no tensor held, and the next trace works."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight
from tests import leaks

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Boom(Exception):
    """Raised by bodies and models."""


class Explodes(nn.Module):
    """Raises what it is told, once."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return x


def explosive() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), Explodes(), nn.Linear(3, 3))


def check_as_before(net: nn.Module) -> None:
    """A trace of the model gives what the model gives."""
    model = NNsight(net)
    with model.trace(X):
        hidden = model[0].output.save()
        output = model.output.save()
    assert torch.equal(hidden.value, net[0](X))
    assert torch.equal(output.value, net(X))


ERRORS = [Boom("boom"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]
IDS = [type(error).__name__ for error in ERRORS]


@pytest.mark.parametrize("error", ERRORS, ids=IDS)
def test_an_exception_in_the_body(error: BaseException) -> None:
    net = explosive()
    model = NNsight(net)
    with leaks.watching([net]) as watch:
        with pytest.raises(type(error)) as caught, model.trace(X):
            assert model[0].output is not None
            raise error
        assert caught.value is error
    assert not watch.complaints()
    check_as_before(net)


@pytest.mark.parametrize("error", ERRORS, ids=IDS)
@pytest.mark.parametrize("when", ["asked", "at the end"])
def test_an_exception_in_the_model(error: BaseException, when: str) -> None:
    net = explosive()
    model = NNsight(net)
    net[1].error = error
    with leaks.watching([net]) as watch:
        with pytest.raises(type(error)) as caught, model.trace(X):
            assert model[0].output is not None
            if when == "asked":
                assert model[2].output is not None
                pytest.fail("the model raised before this")
        assert caught.value is error
    assert not watch.complaints()
    check_as_before(net)


def test_an_exception_in_the_model_shows_the_models_own_line() -> None:
    net = explosive()
    model = NNsight(net)
    net[1].error = Boom("inside")
    with pytest.raises(Boom) as caught, model.trace(X):
        assert model[2].output is not None
    names = [entry.name for entry in caught.traceback]
    assert "test_an_exception_in_the_model_shows_the_models_own_line" in names
    assert caught.traceback[-1].path.name == "test_exits.py"
    assert caught.traceback[-1].name == "forward"


def test_an_exception_that_the_body_catches_is_over() -> None:
    net = explosive()
    model = NNsight(net)
    net[1].error = Boom()
    with model.trace(X):
        hidden = model[0].output.save()
        with pytest.raises(Boom):
            assert model[2].output is not None
        doubled = (hidden * 2).save()
    assert torch.equal(doubled.value, net[0](X) * 2)
    check_as_before(net)


def test_an_exception_before_anything_was_asked_runs_nothing() -> None:
    net = explosive()
    ran: list[int] = []
    handle = net[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(Boom), NNsight(net).trace(X):
        raise Boom
    handle.remove()
    assert not ran


class Cleans(nn.Module):
    """Has a block of its own to leave, and catches more than it should."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.cleaned = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            try:
                return self.b(self.a(x))
            except Exception:  # noqa: BLE001 - as models do that catch more than they should
                pytest.fail("unwinding is no Exception")
            finally:
                self.cleaned += 1


def test_unwinding_runs_the_models_own_cleanup() -> None:
    net = Cleans()
    model = NNsight(net)
    with pytest.raises(Boom), model.trace(X):
        assert model.a.output is not None
        raise Boom
    assert net.cleaned == 1
    with model.trace(X) as tracer:
        assert model.a.output is not None
        tracer.stop()
        assert net.cleaned == 2
        assert torch.is_grad_enabled()


def traced(model: NNsight, x: torch.Tensor, result: list[Any] | None = None) -> Iterator[Any]:
    with model.trace(x):
        for layer in model:
            yield layer.output.save()
        if result is not None:
            result.append(model.output.save())


def test_a_generator_that_is_closed_half_way() -> None:
    net = explosive()
    with leaks.watching([net]) as watch:
        values = traced(NNsight(net), X)
        first = next(values)
        values.close()
        assert torch.equal(first.value, net[0](X))
    assert not watch.complaints()
    check_as_before(net)


def test_a_generator_that_is_dropped_half_way() -> None:
    net = explosive()
    with leaks.watching([net]) as watch:
        values = traced(NNsight(net), X)
        next(values)
        del values
    assert not watch.complaints()
    check_as_before(net)


def test_a_trace_entered_by_hand_and_dropped() -> None:
    net = explosive()
    model = NNsight(net)
    with leaks.watching([net]) as watch:
        tracer = model.trace(X)
        tracer.__enter__()
        hidden = model[0].output
        held = weakref.ref(hidden.value)
        del hidden, tracer
        gc.collect()
        assert held() is None
    assert not watch.complaints()
    check_as_before(net)


def test_a_trace_that_is_made_and_never_entered() -> None:
    net = explosive()
    with leaks.watching([net]) as watch:
        NNsight(net).trace(X)
    assert not watch.complaints()


def test_a_trace_can_be_left_by_return_break_and_continue() -> None:
    net = explosive()
    model = NNsight(net)

    def returns() -> Any:
        with model.trace(X):
            return model[0].output.save()

    assert torch.equal(returns().value, net[0](X))
    for _ in range(2):
        with model.trace(X):
            assert model[0].output is not None
            break
    for _ in range(2):
        with model.trace(X):
            assert model[0].output is not None
            continue
    check_as_before(net)


def test_a_tracer_is_open_once() -> None:
    tracer = NNsight(explosive()).trace(X)
    with tracer, pytest.raises(RuntimeError, match="open already"):
        tracer.__enter__()


# Memory.


def held_after(use: Callable[[NNsight], Any]) -> list[Any]:
    """Which intermediate values are alive when only the result of `use` is kept; no garbage collection helps."""
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).requires_grad_(False)
    made: list[weakref.ref[torch.Tensor]] = []
    handles = [layer.register_forward_hook(lambda m, a, output: made.append(weakref.ref(output))) for layer in net]
    gc.collect()
    gc.disable()
    try:
        result = use(NNsight(net))
        alive = [number for number, value in enumerate(made) if value() is not None]
        del result
        left = [number for number, value in enumerate(made) if value() is not None]
    finally:
        gc.enable()
    for handle in handles:
        handle.remove()
    return [alive, left]


def one_saved(model: NNsight) -> Any:
    with model.trace(X):
        first = model[0].output
        second = model[1].output.save()
        third = model[2].output + first
        assert third is not None
    return second


def none_saved(model: NNsight) -> Any:
    with model.trace(X):
        return model[0].output, model[3].output


def stopped(model: NNsight) -> Any:
    with model.trace(X) as tracer:
        first = model[0].output.save()
        assert model[1].output is not None
        tracer.stop()
    return first


def raised(model: NNsight) -> Any:
    try:
        with model.trace(X):
            first = model[0].output.save()
            assert model[1].output is not None
            raise Boom
    except Boom:
        return first


@pytest.mark.parametrize(
    ("use", "expected"), [(one_saved, [1]), (none_saved, []), (stopped, [0]), (raised, [0])], ids=lambda each: None
)
def test_only_what_was_saved_is_held_and_only_while_it_is_wanted(use: Any, expected: list[int]) -> None:
    assert held_after(use) == [expected, []]


def test_a_saved_value_does_not_hold_the_input() -> None:
    class ByName(nn.Module):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = NNsight(ByName())
    mine = torch.ones(3)
    held = weakref.ref(mine)
    with model.trace(x=mine):
        output = model.output.save()
    del mine
    assert held() is None
    assert output.shape == (3,)


def test_a_finished_tracer_does_not_hold_the_input() -> None:
    model = NNsight(explosive().requires_grad_(False))
    mine = X.clone()
    held = weakref.ref(mine)
    with model.trace(mine) as tracer:
        assert model[0].output is not None
    del mine
    assert held() is None
    assert tracer is not None


def test_a_script_that_ends_inside_a_trace_ends_quietly() -> None:
    script = """
import torch
from nnsight_core import NNsight
model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)))
tracer = model.trace(torch.ones(1, 3))
tracer.__enter__()
hidden = model[0].output
print(tuple(hidden.shape))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 3)\n", "")
