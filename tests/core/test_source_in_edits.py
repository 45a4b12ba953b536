"""Operations inside modules, asked for by edits and in calls with hook=True: what plain PyTorch gives is what comes."""

from __future__ import annotations

import pytest
import torch

from nnsight_core import EditError, NNsight, NoSuchOperationError, OutOfOrderError
from tests.core.small_attention import Attention, X, attention_model, by_hand, plain_probabilities
from tests.leaks import hooks_on


def without_first(probabilities: torch.Tensor) -> torch.Tensor:
    kept = probabilities.clone()
    kept[..., 0] = 0
    return kept


def expected(model: NNsight, x: torch.Tensor) -> torch.Tensor:
    net = model._module
    result: torch.Tensor = net[2](by_hand(net[0](x), net[1], without_first))
    return result


@pytest.fixture
def model() -> NNsight:
    return attention_model()


def test_an_edit_reads_and_sets_an_operation_in_every_trace(model: NNsight) -> None:
    plain = model._module(X)
    probabilities = plain_probabilities(model)
    with model.edit() as edited:
        before = edited[1].source.softmax_0.output.clone().save()
        edited[1].source.softmax_0.output[..., 0] = 0
    for x in (X, -2 * X, X):
        with edited.trace(x):
            seen = edited[1].source.softmax_0.output.save()
            result = edited.output.save()
        assert torch.allclose(result, expected(model, x))
        assert torch.equal(seen, without_first(before.value))
    assert torch.equal(before, probabilities)
    assert torch.allclose(edited(X), expected(model, X))
    assert torch.equal(model._module(X), plain)
    assert not hooks_on([model._module])


def test_an_edit_comes_to_an_operation_after_a_child_of_its_module(model: NNsight) -> None:
    with model.edit() as edited:
        edited[1].query.output[:] *= 1
        edited[1].source.softmax_0.output[..., 0] = 0
    with edited.trace(X):
        result = edited.output.save()
    assert torch.allclose(result, expected(model, X))


def test_an_edit_of_an_operation_is_made_to_all_invokes(model: NNsight) -> None:
    with model.edit() as edited:
        edited[1].source.softmax_0.output[..., 0] = 0
    with edited.trace() as tracer:
        with tracer.invoke(X):
            one = edited.output.save()
        with tracer.invoke(-2 * X):
            inside = edited[1].source.softmax_0.output.save()
            two = edited.output.save()
    assert torch.allclose(one, expected(model, X))
    assert torch.allclose(two, expected(model, -2 * X))
    assert inside.shape == (2, 4, 4) and inside[..., 0].abs().sum() == 0


def test_an_operation_that_an_edit_names_wrongly_is_an_error_that_names_the_edit(model: NNsight) -> None:
    with model.edit("wrong") as edited:
        edited[1].source.softmax_3.output[..., 0] = 0
    with pytest.raises(NoSuchOperationError, match=r"softmax_3(?s:.)*Edit 'wrong'"), edited.trace(X):
        pass
    assert not hooks_on([model._module])


def test_operations_cannot_be_listed_in_an_edit_of_a_model_without_an_example(model: NNsight) -> None:
    with pytest.raises(EditError, match="no input to run it on"), model.edit() as edited:
        len(edited[1].source)


class Aside(torch.nn.Module):
    """Calls one attention, and has another one that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.attention = Attention()
        self.extra = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attention(self.first(x))
        return result


def test_an_edit_sets_an_operation_inside_a_call_with_hook() -> None:
    net = Aside()
    with NNsight(net).edit() as edited:
        edited.extra.source.softmax_0.output[..., 0] = 0
    with edited.trace(X):
        hidden = edited.first.output
        given = edited.extra(hidden, hook=True).save()
        edited.first.output = given
        result = edited.output.save()
    wanted = by_hand(net.first(X), net.extra, without_first)
    assert torch.allclose(given, wanted)
    assert torch.allclose(result, net.attention(wanted))
    assert not hooks_on([net])


def test_an_edit_makes_a_call_and_a_body_sets_an_operation_inside_it() -> None:
    net = Aside()
    with NNsight(net).edit() as edited:
        edited.first.output = edited.extra(edited.first.output, hook=True)
    with edited.trace(X):
        edited.extra.source.softmax_0.output[..., 0] = 0
        result = edited.output.save()
    assert torch.allclose(result, net.attention(by_hand(net.first(X), net.extra, without_first)))


@pytest.mark.parametrize("is_counted", [True, False])
def test_an_operation_of_a_call_that_is_over_comes_too_late(is_counted: bool) -> None:
    net = Aside()
    model = NNsight(net)
    with pytest.raises(OutOfOrderError, match="softmax_0"), model.trace(X):
        source = model.extra.source if is_counted else None
        model.extra(model.first.output, hook=True)
        (source or model.extra.source).softmax_0.output.save()
    assert not hooks_on([net])
