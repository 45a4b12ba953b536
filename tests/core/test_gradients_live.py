"""Autograd runs through a live trace as through a plain forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight_core import NNsight

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def gradients(net: nn.Module) -> list[torch.Tensor]:
    found = []
    for parameter in net.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def check_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("when", ["inside", "after", "before the end"])
def test_gradients_are_those_of_the_plain_model(when: str) -> None:
    net = network()
    net(X).square().sum().backward()
    expected = gradients(net)
    model = NNsight(net)
    with model.trace(X):
        assert model[0].output is not None
        logits = model[2].output if when == "before the end" else model.output
        loss = logits.square().sum().save()
        if when != "after":
            loss.backward()
    if when == "after":
        loss.backward()
    check_equal(gradients(net), expected)


def test_gradients_flow_through_a_change() -> None:
    net = network()
    model = NNsight(net)
    direction = torch.zeros(4, requires_grad=True)
    with model.trace(X):
        model[0].output = model[0].output + direction
        model[1].output[:, 0] = 0
        model.output.sum().backward()
    found, direction.grad = direction.grad, None
    parameters = gradients(net)
    hidden = net[1](net[0](X) + direction).clone()
    hidden[:, 0] = 0
    net[2](hidden).sum().backward()
    assert found is not None
    assert direction.grad is not None
    assert torch.equal(found, direction.grad)
    check_equal(parameters, gradients(net))


def test_the_gradient_of_a_value_inside() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X):
        hidden = model[1].output.save()
        (inside,) = torch.autograd.grad(model.output.sum(), hidden)
        inside.save()
    plain = net[1](net[0](X))
    (expected,) = torch.autograd.grad(net[2](plain).sum(), plain)
    assert torch.equal(inside.value, expected)


def test_a_training_step_inside_a_trace() -> None:
    net, twin = network(), network()
    twin.load_state_dict(net.state_dict())
    model = NNsight(net)
    mine, theirs = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        with model.trace(X):
            loss = model.output.square().mean()
            mine.zero_grad()
            loss.backward()
        mine.step()
        theirs.zero_grad()
        twin(X).square().mean().backward()
        theirs.step()
    check_equal(list(net.parameters()), list(twin.parameters()))
