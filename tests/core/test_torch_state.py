"""What the body switches on in torch does not reach the model, nor the other way about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnsight_core import NNsight
from tests import leaks

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class CountsFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class CountsDispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def settings() -> dict[str, Any]:
    """All of torch's state that belongs to a thread."""
    # The engine's own hooks on all modules come and go with the body's turn, and are watched in the other tests.
    state = {name: value for name, value in leaks.process_state().items() if "hooks" not in name}
    return state | {
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
    }


class Notes(nn.Module):
    """Writes down the settings that it runs under."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.notes: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes.append(settings())
        return self.linear(x)


class Under(nn.Module):
    """Runs its two modules under a context of its own."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        super().__init__()
        self.a, self.b, self.after = Notes(), Notes(), Notes()
        self.context = context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.context():
            x = self.b(self.a(x).clone())
        return self.after(x.clone().float())


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    "device": lambda: torch.device("meta"),
    "function mode": CountsFunctions,
    "dispatch mode": CountsDispatches,
}
FOR_MODELS = {name: make for name, make in CONTEXTS.items() if name != "device"}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_what_the_body_opens_does_not_reach_the_model(context: Callable[[], Any]) -> None:
    net = Under()
    model = NNsight(net)
    outside = settings()
    with model.trace(X):
        with context():
            inside = settings()
            assert inside != outside
            hidden = model.a.output
            assert settings() == inside
            assert model.b.output is not None
            assert settings() == inside
        assert settings() == outside
        output = model.output.save()
        assert settings() == outside
    assert settings() == outside
    assert [note for part in (net.a, net.b, net.after) for note in part.notes] == [outside] * 3
    assert hidden is not None
    assert torch.equal(output.value, net(X))
    assert output.requires_grad
    assert output.device == X.device
    assert not output.is_inference()


@pytest.mark.parametrize("context", FOR_MODELS.values(), ids=FOR_MODELS)
def test_what_the_model_opens_does_not_reach_the_body(context: Callable[[], Any]) -> None:
    net = Under(context)
    plain = net(X)
    in_model = net.a.notes.pop()
    net.b.notes.clear()
    net.after.notes.clear()
    model = NNsight(net)
    outside = settings()
    with model.trace(X):
        hidden = model.a.output
        assert settings() == outside
        product = torch.ones(3, 3) @ torch.ones(3, 3, requires_grad=True)
        assert product.requires_grad
        assert product.dtype == torch.float32
        assert not product.is_inference()
        assert hidden is not None
        assert model.b.output is not None
        assert settings() == outside
        assert model.after.output is not None
        assert settings() == outside
        output = model.output.save()
    assert settings() == outside
    assert net.a.notes == [in_model]
    assert net.b.notes == [in_model]
    assert net.after.notes == [outside]
    assert torch.equal(output.value, plain)


COMMON = [name for name in CONTEXTS if name != "autocast without cache"]


@pytest.mark.parametrize("mine", [CONTEXTS[name] for name in COMMON], ids=COMMON)
@pytest.mark.parametrize("models", [CONTEXTS[name] for name in COMMON if name != "device"], ids=COMMON[:3] + COMMON[4:])
def test_both_open_something(mine: Callable[[], Any], models: Callable[[], Any]) -> None:
    net = Under(models)
    plain = net(X)
    in_model = net.a.notes.pop()
    model = NNsight(net)
    outside = settings()
    with model.trace(X):
        assert model.a.input is not None
        with mine():
            inside = settings()
            assert model.a.output is not None
            assert settings() == inside
        assert settings() == outside
        assert model.b.output is not None
        with mine():
            assert model.after.output is not None
            assert settings() == inside
        output = model.output.save()
    assert settings() == outside
    assert net.a.notes == [in_model]
    assert torch.equal(output.value, plain)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("leave", ["stop", "raise", "end"])
def test_a_context_that_is_left_together_with_the_trace(context: Callable[[], Any], leave: str) -> None:
    net = Under(torch.no_grad)
    model = NNsight(net)
    outside = settings()
    try:
        with model.trace(X) as tracer, context():
            assert model.a.output is not None
            if leave == "stop":
                tracer.stop()
            if leave == "raise":
                raise KeyError
    except KeyError:
        pass
    assert settings() == outside


def test_a_trace_inside_no_grad_runs_the_model_without_gradients() -> None:
    net = Under()
    model = NNsight(net)
    with torch.no_grad(), model.trace(X):
        hidden = model.a.output.save()
        output = model.output.save()
        assert not torch.is_grad_enabled()
    assert not hidden.requires_grad
    assert not output.requires_grad
    assert torch.is_grad_enabled()


def test_a_trace_inside_inference_mode() -> None:
    net = Under()
    model = NNsight(net)
    with torch.inference_mode():
        with model.trace(X):
            output = model.output.save()
        assert torch.is_inference_mode_enabled()
        assert output.value.is_inference()


def test_a_switch_without_a_block_stays_with_its_side() -> None:
    net = Under()
    model = NNsight(net)
    try:
        with model.trace(X):
            assert model.a.output is not None
            torch.set_grad_enabled(False)
            assert model.b.output is not None
            assert not torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
        assert net.after.notes[0]["grad enabled"]
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("mode", [CountsFunctions, CountsDispatches])
def test_a_mode_of_the_body_sees_the_bodys_operations_alone(mode: Any) -> None:
    net = Under()
    model = NNsight(net)
    with model.trace(X):
        with mode() as counter:
            hidden = model.b.output
            assert not counter.seen
            assert torch.sigmoid(hidden) is not None
        assert any("sigmoid" in name for name in counter.seen)
        assert not any("linear" in name or "addmm" in name for name in counter.seen)


@pytest.mark.parametrize("mode", [CountsFunctions, CountsDispatches])
def test_a_mode_of_the_model_sees_the_models_operations_alone(mode: Any) -> None:
    counter = mode()
    model = NNsight(Under(lambda: counter))
    with model.trace(X):
        hidden = model.a.output
        assert torch.sigmoid(hidden) is not None
        assert model.b.output is not None
    assert any("linear" in name or "addmm" in name for name in counter.seen)
    assert not any("sigmoid" in name for name in counter.seen)


def test_gradients_flow_through_what_the_body_computes_while_the_model_forbids_them() -> None:
    net = Under(torch.no_grad)
    model = NNsight(net)
    factor = torch.ones((), requires_grad=True)
    with model.trace(X):
        scaled = model.b.output * factor
        assert scaled.requires_grad
        assert not model.b.output.requires_grad
        model.b.output = scaled
        model.output.sum().backward()
    assert factor.grad is not None


def test_the_default_device_of_the_body_is_its_own() -> None:
    net = Under()
    model = NNsight(net)
    with model.trace(X):
        with torch.device("meta"):
            assert model.a.output.device == X.device
            assert torch.ones(1).device.type == "meta"
        assert torch.ones(1).device == X.device
