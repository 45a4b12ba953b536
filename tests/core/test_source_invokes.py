"""Inside a module: gradients of what is found there, and invokes with their own rows of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight_core import GradientError, NNsight, RowsError
from tests.core.small_attention import NAMES, X, attention_model, by_hand, model_of, plain_probabilities


@pytest.fixture
def model() -> NNsight:
    return attention_model()


# Gradients.


def test_gradients_go_through_what_is_read_and_set(model: NNsight) -> None:
    net = model._module
    hidden = net[0](X)
    scores = net[1].query(hidden) @ net[1].key(hidden).transpose(-1, -2) / 3**0.5
    probabilities = scores.softmax(-1)
    scores.retain_grad(), probabilities.retain_grad()
    mixed = probabilities * 2 @ hidden
    first, second = (mixed + hidden).split([1, 2], dim=-1)
    first.retain_grad()
    net[2](torch.cat([first, second.softmax(-1)], dim=-1) + 1 - hidden).sum().backward()
    wanted = net[1].query.weight.grad.clone()
    net.zero_grad()
    with model.trace(X):
        source = model[1].source
        into = source.softmax_0.input
        into_gradient = into.grad.save()
        given = source.softmax_0.output
        gradient = given.grad.save()
        source.softmax_0.output = given * 2
        part = source.split_0.output[0].grad.save()
        model.output.sum().backward()
    assert torch.allclose(gradient, probabilities.grad)
    assert torch.allclose(into_gradient, scores.grad)
    assert torch.allclose(part, first.grad)
    assert torch.allclose(net[1].query.weight.grad, wanted)


def test_a_gradient_is_set_inside(model: NNsight) -> None:
    net = model._module
    with model.trace(X):
        probabilities = model[1].source.softmax_0.output
        with model.output.sum().backward():
            probabilities.grad[:] = 0
    assert torch.equal(net[1].query.weight.grad, torch.zeros(3, 3))
    net.zero_grad()


def test_frozen_parameters(model: NNsight) -> None:
    model._module.requires_grad_(False)
    with model.trace(X):
        probabilities = model[1].source.softmax_0.output
        probabilities.requires_grad_()
        gradient = probabilities.grad.save()
        model.output.sum().backward()
    assert gradient.shape == (2, 4, 4)
    assert gradient.abs().sum() > 0


# Invokes.


def test_each_invoke_sees_and_changes_its_own_rows(model: NNsight) -> None:
    net = model._module
    one, two = X[:1], X[1:]
    with model.trace() as tracer:
        with tracer.invoke(one):
            mine = model[1].source.softmax_0.output.save()
            model[1].source.softmax_0.output = 0.25
            changed = model.output.save()
        with tracer.invoke(two):
            into = model[1].source.softmax_0.input.clone().save()
            other = model[1].source.softmax_0.output.save()
            untouched = model.output.save()
        with tracer.invoke():
            both = model[1].source.softmax_0.output.save()
    assert tracer.forward_passes == 1
    assert mine.shape == other.shape == into.shape == (1, 4, 4)
    assert both.shape == (2, 4, 4)
    assert torch.equal(both[0], torch.full((4, 4), 0.25))
    assert torch.equal(untouched, net(X)[1:])
    assert torch.allclose(changed, net[2](by_hand(net[0](one), net[1], lambda p: torch.full_like(p, 0.25))))


def test_a_body_that_looks_goes_on_live_in_its_rows(model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            assert model[1].query.output.shape == (1, 4, 3)
            mine = model[1].source.softmax_0.output.save()
        with tracer.invoke(X[1:]):
            assert len(model[1].source) == len(NAMES)
            other = model[1].source.softmax_0.output.save()
    assert torch.equal(torch.cat([mine, other]), plain_probabilities(model))


def test_gradients_in_invokes(model: NNsight) -> None:
    gradients = []
    with model.trace() as tracer:
        for x in (X[:1], X[1:]):
            with tracer.invoke(x):
                given = model[1].source.softmax_0.input
                probabilities = model[1].source.softmax_0.output
                with model.output.sum().backward(retain_graph=True):
                    gradients.append((probabilities.grad.save(), given.grad.save()))
    with model.trace(X):
        into = model[1].source.softmax_0.input.grad.save()
        whole = model[1].source.softmax_0.output.grad.save()
        model.output.sum().backward()
    assert tracer.forward_passes == 1
    assert torch.allclose(torch.cat([each for each, _ in gradients]), whole)
    assert torch.allclose(torch.cat([each for _, each in gradients]), into)


class Flattening(nn.Module):
    """Works on (batch * head, position, position), as some attentions do, and with tables that belong to no input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, position, hidden = x.shape
        heads = x.transpose(1, 2).reshape(batch * hidden, position, 1)
        scores = torch.baddbmm(torch.zeros(1, position, position), heads, heads.transpose(1, 2))
        table = torch.ones(1, position, position) * 2
        return (scores * table).sum(-1).view(batch, hidden, position).transpose(1, 2)


def test_rows_of_what_is_folded_and_of_tables() -> None:
    model = model_of(Flattening())
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            scores = model[0].source.baddbmm_0.output.save()
            table = model[0].source.mul_0.output.save()
            mine = model[0].source.view_0.output.save()
        with tracer.invoke(X[1:]):
            theirs = model[0].source.baddbmm_0.output.save()
            model.output.save()
        with tracer.invoke():
            whole = model[0].source.baddbmm_0.output.save()
    assert table.shape == (1, 4, 4)
    assert mine.shape == (1, 3, 4)
    assert whole.shape == (6, 4, 4)
    with model.trace(X[:1]):
        alone = model[0].source.baddbmm_0.output.save()
    assert torch.equal(alone, whole[:3])
    assert torch.equal(alone, scores) and torch.equal(theirs, whole[3:])
    with pytest.raises(RowsError, match="one for all"), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            model[0].source.mul_0.output = 3
        with tracer.invoke(X[1:]):
            model.output.save()


def test_a_body_that_sees_the_whole_batch_lists_and_reads_it(model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            mine = model[1].source.softmax_0.output.save()
        with tracer.invoke(X[1:]):
            model.output.save()
        with tracer.invoke():
            assert [operation.name for operation in model[1].source] == NAMES
            both = model[1].source.softmax_0.output.save()
    assert torch.equal(both, plain_probabilities(model))
    assert torch.equal(mine, both[:1])


def test_a_gradient_of_a_view_in_an_invoke_is_refused_and_not_wrong(model: NNsight) -> None:
    with pytest.raises(GradientError), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            part = model[1].source.split_0.output[0]
            with model.output.sum().backward():
                part.grad.save()
        with tracer.invoke(X[1:]):
            model.output.save()
