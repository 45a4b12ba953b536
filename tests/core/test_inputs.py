"""`.input` is the call, `(args, kwargs)`, to an index and to unpacking, and the first argument to everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Scaled(nn.Module):
    def forward(self, hidden: torch.Tensor, other: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
        return hidden * scale + (0 if other is None else other)


class Calls(nn.Module):
    """Calls its module in the way that it is told."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.first, self.scaled = nn.Linear(3, 3), Scaled()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.scaled, self.first(x))


def by_position(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, x + 1, scale=2.0)


def by_name(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(hidden=x, other=x + 1, scale=2.0)


def test_an_index_and_unpacking_see_the_call() -> None:
    net = Calls(by_position)
    model = NNsight(net)
    with model.trace(X):
        whole = model.scaled.input
        args, kwargs = whole
        assert len(args) == 2
        assert kwargs["scale"] == 2.0
        assert torch.equal(whole[0][0].value, args[0].value)
        assert whole[1]["scale"] == 2.0
        assert whole[-1]["scale"] == 2.0
        kept = whole.save()
    assert torch.equal(kept[0][1], net.first(X) + 1)
    assert kept.value[1] == {"scale": 2.0}


@pytest.mark.parametrize("call", [by_position, by_name])
def test_everything_else_sees_the_first_argument(call: Any) -> None:
    net = Calls(call)
    model = NNsight(net)
    with model.trace(X):
        given = model.scaled.input
        assert isinstance(given, torch.Tensor)
        assert given.shape == (2, 3)
        assert len(given) == 2
        column = given[:, -1].save()
        doubled = (given * 2).save()
        summed = torch.sum(given).save()
        kept = model.scaled.input.save()
    first = net.first(X)
    assert torch.equal(column.value, first[:, -1])
    assert torch.equal(doubled.value, first * 2)
    assert torch.equal(summed.value, first.sum())
    assert kept.shape == (2, 3)
    assert torch.equal(kept + 0, first)


CHANGES = {
    "set": lambda envoy: setattr(envoy, "input", torch.ones(2, 3)),
    "computed": lambda envoy: setattr(envoy, "input", envoy.input * 0 + 1),
    "inputs": lambda envoy: setattr(envoy, "inputs", envoy.inputs * 0 + 1),
    "slice": lambda envoy: envoy.input.__setitem__(slice(None), 1),
    "method": lambda envoy: envoy.input.fill_(1),
    "view": lambda envoy: envoy.input.view(-1).fill_(1),
}


@pytest.mark.parametrize("call", [by_position, by_name])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_first_argument_is_replaced(call: Any, change: Any) -> None:
    net = Calls(call)
    model = NNsight(net)
    with torch.no_grad(), model.trace(X):
        change(model.scaled)
        result = model.output.save()
    assert torch.equal(result.value, torch.ones(2, 3) * 2 + net.first(X) + 1)


def test_a_pair_replaces_the_call() -> None:
    net = Calls(by_position)
    model = NNsight(net)
    with model.trace(X):
        args, kwargs = model.scaled.input
        model.scaled.input = ((args[1],), {"other": args[0], "scale": kwargs["scale"] + 1})
        result = model.output.save()
    first = net.first(X)
    assert torch.equal(result.value, (first + 1) * 3.0 + first)


def test_single_arguments_are_replaced() -> None:
    net = Calls(by_position)
    model = NNsight(net)
    with model.trace(X):
        model.scaled.input[0][1] = torch.zeros(2, 3)
        model.scaled.input[1]["scale"] = 5.0
        model.scaled.input[0][0][:, 0] = 1
        result = model.output.save()
    first = net.first(X).detach().clone()
    first[:, 0] = 1
    assert torch.equal(result.value, first * 5.0)


def test_the_input_of_one_module_becomes_the_output_of_another() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model = NNsight(net)
    with model.trace(X):
        model[1].output = model[1].input
        result = model.output.save()
    assert torch.equal(result.value, net[2](net[0](X)))


def test_the_input_of_one_module_becomes_the_input_of_another() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model = NNsight(net)
    with model.trace(X):
        given = model[1].input
        model[2].input = given
        result = model.output.save()
    assert torch.equal(result.value, net[2](net[0](X)))


def test_a_model_called_by_name_only() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, *, values: torch.Tensor) -> torch.Tensor:
            return self.linear(input=values)

    net = Model()
    model = NNsight(net)
    with model.trace(values=X):
        assert torch.equal(model.input[1]["values"].value, X)
        model.linear.input = model.linear.input + 1
        result = model.output.save()
    assert torch.equal(result.value, net.linear(X + 1))


def test_a_module_without_arguments_has_no_first_one() -> None:
    class Constant(nn.Module):
        def forward(self) -> torch.Tensor:
            return torch.ones(2, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = Constant()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.constant()

    model = NNsight(Model())
    with model.trace(X):
        args, kwargs = model.constant.input
        assert args.value == ()
        assert kwargs.value == {}
        model.constant.output = model.constant.output * 2
        result = model.output.save()
    assert torch.equal(result.value, X + 2)
