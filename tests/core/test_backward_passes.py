"""Several backward passes and several bodies: each gets the gradients that autograd gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nnsight_core
from nnsight_core import GradientError, LanguageModel, NNsight, RecomputedError
from tests.families import tiny_model

A = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.0]], dtype=torch.float64)
B = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def model(net: nn.Sequential) -> NNsight:
    return NNsight(net)


def by_hand(net: nn.Sequential, x: torch.Tensor, at: int = 2, scale: float = 1.0) -> torch.Tensor:
    """The gradient of the squared outputs' sum at the value between `net[at - 1]` and `net[at]`."""
    hidden = net[:at](x)
    return torch.autograd.grad(net[at:](hidden).square().sum() * scale, hidden)[0]


def close(one: Any, other: torch.Tensor) -> None:
    torch.testing.assert_close(one.value, other, rtol=1e-12, atol=1e-14)


# Bodies that share one graph.


@pytest.mark.parametrize("block", [True, False])
def test_each_invoke_has_its_own_backward_pass(block: bool, net: nn.Sequential, model: NNsight) -> None:
    gradients = []
    with model.trace() as tracer:
        for x in (A, B):
            with tracer.invoke(x):
                hidden = model[1].output
                if block:
                    with model.output.square().sum().backward():
                        gradients.append(hidden.grad.save())
                else:
                    gradients.append(hidden.grad.save())
                    model.output.square().sum().backward()
    assert tracer.forward_passes == 1
    for x, gradient in zip((A, B), gradients, strict=True):
        close(gradient, by_hand(net, x))
    found = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    for x in (A, B):
        net(x).square().sum().backward()
    for one, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_what_one_invoke_sets_is_not_set_for_the_other(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            early, late = model[0].output, model[1].output
            late.grad[:] = 0
            cut = early.grad.save()
            model.output.square().sum().backward()
        with tracer.invoke(B):
            early, late = model[0].output, model[1].output
            late.grad *= 3
            whole = early.grad.save()
            model.output.square().sum().backward()
    assert not cut.value.any()
    close(whole, by_hand(net, B, at=1, scale=3))


def test_one_loss_over_two_invokes(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(B):
            first, output = model[1].output, model.output
        with tracer.invoke(B * 2):
            second = model[1].output
            with (model.output * output).sum().backward():
                gradients = [first.grad.save(), second.grad.save()]
                together = (first.grad + second.grad).save()
    hidden = [net[:2](B), net[:2](B * 2)]
    expected = torch.autograd.grad((net[2](hidden[0]) * net[2](hidden[1])).sum(), hidden)
    for one, other in zip(gradients, expected, strict=True):
        close(one, other)
    close(together, expected[0] + expected[1])


def test_autograd_grad_in_an_invoke(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            hidden = model[1].output
            gradient = torch.autograd.grad(model.output.square().sum(), hidden)[0].save()
        with tracer.invoke(B):
            pass
    close(gradient, by_hand(net, A))


def test_kept_gradients_in_an_invoke(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            hidden = model[1].output.save()
            hidden.retain_grad()
            loss = model.output.square().sum().save()
        with tracer.invoke(B):
            pass
    loss.backward()
    torch.testing.assert_close(hidden.grad, by_hand(net, A))


# Several backward passes.


def test_the_gradient_of_an_input_in_each_of_two_passes(net: nn.Sequential, model: NNsight) -> None:
    x = A.clone().requires_grad_()
    with model.trace(x):
        given, output = model[0].input, model.output
        with output.square().sum().backward(retain_graph=True):
            first = given.grad.save()
        with (output.square().sum() * 2).backward():
            second = given.grad.save()
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    close(first, expected)
    close(second, 2 * expected)
    torch.testing.assert_close(x.grad, 3 * expected)


def test_a_gradient_from_before_the_trace_is_not_the_one_asked_for(net: nn.Sequential, model: NNsight) -> None:
    x = A.clone().requires_grad_()
    net(x).sum().backward()
    with model.trace(x):
        gradient = model.input.grad.save()
        model.output.square().sum().backward()
    close(gradient, torch.autograd.grad(net(x).square().sum(), x)[0])


def test_plain_autograd_functions_in_the_body(net: nn.Sequential, model: NNsight) -> None:
    with model.trace(A):
        hidden = model[1].output
        gradient = hidden.grad.save()
        loss = model.output.square().sum()
        torch.autograd.backward(loss, retain_graph=True)
        torch.autograd.backward(loss)
    close(gradient, by_hand(net, A))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_of_gradients(net: nn.Sequential, model: NNsight) -> None:
    with model.trace(A):
        hidden = model[1].output
        with model.output.square().sum().backward(create_graph=True):
            gradient = hidden.grad.save()
        with gradient.square().sum().backward():
            again = hidden.grad.save()
    value = net[:2](A)
    (first,) = torch.autograd.grad(net[2](value).square().sum(), value, create_graph=True)
    close(gradient, first)
    close(again, torch.autograd.grad(first.square().sum(), value)[0])
    net.zero_grad()


def test_a_gradient_that_is_set_and_saved_twice(net: nn.Sequential, model: NNsight) -> None:
    with model.trace(A):
        early, hidden = model[0].output, model[1].output
        with model.output.square().sum().backward():
            before = hidden.grad.save()
            hidden.grad[:, 0] = 0
            hidden.grad *= 2
            after, reached = hidden.grad.save(), early.grad.save()
    expected = by_hand(net, A)
    close(before, expected)
    changed = expected.clone()
    changed[:, 0] = 0
    close(after, changed * 2)
    value = net[0](A)
    close(reached, torch.autograd.grad(net[1](value), value, changed * 2)[0])


def test_gradients_in_training_mode_with_dropout() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    model = NNsight(net)
    torch.manual_seed(3)
    with model.trace(A):
        hidden = model[0].output
        with model.output.square().sum().backward():
            gradient = hidden.grad.save()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    value = net[0](A)
    close(gradient, torch.autograd.grad(net[1:](value).square().sum(), value)[0])
    assert torch.equal(drawn, torch.rand(1))


# What belongs to the caller stays as it was.


@pytest.mark.parametrize("spelled", ["method", "attribute"])
def test_asking_for_gradients_of_an_input_leaves_the_callers_tensor_alone(spelled: str, net: nn.Sequential) -> None:
    frozen = net.requires_grad_(False)
    model, x = NNsight(frozen), A.clone()
    with model.trace(x):
        if spelled == "method":
            given = model.input.requires_grad_()
        else:
            given = model.input
            given.requires_grad = True
        hidden = model[1].output
        with model.output.square().sum().backward():
            gradients = [given.grad.save(), hidden.grad.save()]
    assert not x.requires_grad
    close(gradients[1], by_hand(net.requires_grad_(), x))
    asked = x.clone().requires_grad_()
    close(gradients[0], torch.autograd.grad(net(asked).square().sum(), asked)[0])


def test_asking_for_gradients_of_a_frozen_parameter_that_a_module_gives() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table(x)

    net = Uses()
    model = NNsight(net)
    with model.trace(A):
        weight = model.table.output.requires_grad_()
        with model.output.sum().backward():
            gradient = weight.grad.save()
    assert not net.table.weight.requires_grad and net.table.weight.grad is None
    close(gradient, A.sum(0))


def test_a_loss_that_no_gradient_can_come_from() -> None:
    model = LanguageModel(tiny_model("gpt2"))
    with pytest.raises(GradientError, match="requires one"), model.generate([3, 4], max_new_tokens=1, do_sample=False):
        model.lm_head.output.sum().backward()
    with pytest.raises(GradientError, match="requires one"), torch.no_grad(), model.trace() as tracer:
        with tracer.invoke([3, 4]):
            model.output.logits.sum().backward()


# Checkpointing runs a module a second time, in the backward pass.


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 3), reentrant

    def _inside(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x)) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.b(self._inside(x))
        return self.b(checkpoint(self._inside, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_change_inside_a_checkpointed_module_is_refused_where_gradients_would_miss_it(reentrant: bool) -> None:
    net = Checkpointed(reentrant).double()
    model, x = NNsight(net), A.clone().requires_grad_()
    with pytest.raises(RecomputedError, match=r"a\.output"), model.trace(x):
        model.a.output = model.a.output * 2
        model.output.sum().backward()
    with pytest.raises(RecomputedError, match=r"a\.output"), model.trace() as tracer, tracer.invoke(x):
        model.a.output[:] = 0
    with torch.no_grad(), model.trace(x):
        model.a.output[:] = 0
        output = model.output.save()
    assert torch.equal(output.value, net.b(torch.zeros_like(A)))


def test_what_is_read_inside_a_checkpointed_module_does_not_disturb_its_second_run() -> None:
    net = Checkpointed(False).double()
    model, x = NNsight(net), A.clone().requires_grad_()
    with model.trace(x):
        hidden = model.a.output
        # Both save tensors for autograd, which are not the model's.
        norm = (hidden * hidden).sum().sqrt().exp().save()
        model.b.output *= 2
        with model.output.square().sum().backward():
            gradient = hidden.grad.save()
    found = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    net.reentrant = None
    value = net.a(x)
    value.retain_grad()
    (net.b(torch.tanh(value) * 2) * 2).square().sum().backward()
    assert norm.value.requires_grad
    close(gradient, value.grad)
    for one, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_transformers_own_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        module = tiny_model("llama").train()
        if checkpointed:
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable()
            module.config.use_cache = False
        model = LanguageModel(module)
        with model.trace([5, 6, 7]):
            inside, hidden = model.model.layers[0].mlp.output, model.model.layers[1].output
            model.model.norm.output[:, 0] = 0
            with model.output.logits.square().sum().backward():
                found.append([inside.grad.save(), hidden.grad.save()])
        found[-1].append(nnsight_core.save(module.model.embed_tokens.weight.grad.clone()))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(getattr(plain, "value", plain), getattr(again, "value", again))


def test_a_gradient_of_an_edit_comes_with_the_backward_pass_of_the_trace() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
    model = NNsight(torch.nn.Sequential(first, second))
    with model.edit() as edited:
        gradient = edited[0].output.grad.save()
    with edited.trace(torch.ones(2, 3)):
        edited.output.sum().backward()
    torch.testing.assert_close(gradient.value, second.weight.detach().sum(0).expand(2, 3))
