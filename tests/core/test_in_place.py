"""Modules that work in place: what was read stays as it was, and what is set stays the script's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight, WrittenOverError


class Block(nn.Module):
    """Calls a module that works in place, and goes on with the tensor that it has worked on, not with what it gave."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation, self.norm = nn.Linear(4, 4), activation, nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        self.activation(hidden)
        return self.norm(hidden) + x


def net() -> nn.Sequential:
    return nn.Sequential(Block(nn.ReLU(inplace=True)), Block(nn.Hardtanh(-0.2, 0.2, inplace=True)))


X = torch.linspace(-3, 3, 12).view(3, 4)


def plain(module: nn.Sequential) -> dict[str, torch.Tensor]:
    """Every value by hand, computed without anything in place."""
    found, x = {}, X
    for number, block in enumerate(module):
        found[f"{number}.linear.input"] = x
        found[f"{number}.linear.output"] = found[f"{number}.activation.input"] = block.linear(x)
        activation = type(block.activation)() if number == 0 else nn.Hardtanh(-0.2, 0.2)
        found[f"{number}.activation.output"] = activation(block.linear(x))
        x = block.norm(found[f"{number}.activation.output"]) + x
        found[f"{number}.output"] = x
    return found


PLACES = [
    f"{number}.{place}" for number in "01" for place in ("linear.output", "activation.input", "activation.output")
]


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_was_read_stays_as_it_was(place: str, with_gradients: bool) -> None:
    module = net()
    model, expected = NNsight(module), plain(module)
    path, _, kind = place.rpartition(".")
    with torch.set_grad_enabled(with_gradients), model.trace(X):
        value = getattr(model.get(path), kind)
        first = value[0][0] if kind == "input" else value
        whole, part, turned = first.save(), value[:, 1:].save(), first.T.save()
        output = model.output.save()
    for one, right in ((whole, expected[place]), (part, expected[place][:, 1:]), (turned, expected[place].T)):
        torch.testing.assert_close(one.value, right)
    torch.testing.assert_close(output.value, expected["1.output"])


@torch.no_grad()
def test_it_does_in_invokes_and_caches() -> None:
    module = net()
    model, expected = NNsight(module), plain(module)
    with model.trace() as tracer:
        for x in (X[:1], X[1:]):
            with tracer.invoke(x):
                cache = tracer.cache(include_inputs=True).save()
                values = [model.get(place.rpartition(".")[0]).output.save() for place in PLACES if "output" in place]
    assert tracer.forward_passes == 1
    for place, value in zip([place for place in PLACES if "output" in place], values, strict=True):
        torch.testing.assert_close(value.value, expected[place][1:])
        torch.testing.assert_close(cache[place.rpartition(".")[0]].output, expected[place][1:])


def test_gradients_are_those_of_what_was_read() -> None:
    module = net()
    model = NNsight(module)
    with model.trace(X):
        before = model[0].linear.output
        after = model[1].linear.output
        with model.output.square().sum().backward():
            last = after.grad.save()
            first = before.grad.save()
    expected, x = [], X
    for number, block in enumerate(module):
        hidden = block.linear(x)
        hidden.retain_grad()
        expected.append(hidden)
        x = block.norm(hidden.relu() if number == 0 else nn.functional.hardtanh(hidden, -0.2, 0.2)) + x
    x.square().sum().backward()
    torch.testing.assert_close(first.value, expected[0].grad)
    torch.testing.assert_close(last.value, expected[1].grad)


SETS: dict[str, Callable[[Any, torch.Tensor], None]] = {
    "output": lambda model, value: setattr(model[0].linear, "output", value),
    "input": lambda model, value: setattr(model[0].activation, "input", value),
    "input, as a pair": lambda model, value: setattr(model[0].activation, "input", ((value,), {})),
    "skip": lambda model, value: model[0].linear.skip(value),
}


@torch.no_grad()
@pytest.mark.parametrize("change", SETS.values(), ids=SETS)
def test_a_tensor_that_is_set_is_not_written_into(change: Callable[[Any, torch.Tensor], None]) -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu_()

    for activation in (nn.ReLU(inplace=True), Plain()):
        module = nn.Sequential(nn.Sequential())
        module[0].linear, module[0].activation = nn.Linear(4, 4), activation
        model, mine = NNsight(module), -torch.ones(3, 4)
        with model.trace(X):
            change(model, mine)
            output = model.output.save()
        assert torch.equal(mine, -torch.ones(3, 4))
        assert torch.equal(output.value, torch.zeros(3, 4))


class Adds(nn.Module):
    """Writes into what its first module has given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(x)
        hidden += self.second(x)
        return hidden


LOOKS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda value: value,
    "part": lambda value: value[:, 1:],
    "view": lambda value: value.T,
}


@torch.no_grad()
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("in_invokes", [False, True])
def test_what_a_forward_writes_over_is_an_error_unless_a_copy_is_saved(
    look: Callable[[Any], Any], in_invokes: bool
) -> None:
    module = nn.Sequential(Adds())
    model = NNsight(module)

    def read(keep: Callable[[Any], Any]) -> Any:
        if not in_invokes:
            with model.trace(X):
                unsaved = model[0].first.output
                value, double = keep(look(unsaved)).save(), (2 * unsaved).save()
        else:
            with model.trace() as tracer:
                with tracer.invoke(X):
                    unsaved = model[0].first.output
                    value, double = keep(look(unsaved)).save(), (2 * unsaved).save()
                with tracer.invoke(X):
                    model[0].second.output.save()
        torch.testing.assert_close(double.value, 2 * module[0].first(X))
        return value.value

    with pytest.raises(
        WrittenOverError, match=r"first\.output was saved(?s:.*)test_in_place\.py:\d+(?s:.*)\.clone\(\)"
    ):
        read(lambda value: value)
    torch.testing.assert_close(read(lambda value: value.clone()), look(module[0].first(X)))
    # What the body itself sets is not written into.
    with model.trace(X):
        model[0].first.output = mine = torch.ones(3, 4)
        output = model.output.save()
    assert torch.equal(mine, torch.ones(3, 4))
    torch.testing.assert_close(output.value, 1 + module[0].second(X))


def test_where_torch_does_not_count_what_is_written_nothing_is_said() -> None:
    model = NNsight(nn.Sequential(Adds()))
    with torch.inference_mode(), model.trace(X):
        value = model[0].first.output.save()
    assert value.shape == (3, 4)
