"""Values are read and set as the forward pass goes by, and equal what plain hooks see and do."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import einops
import pytest
import torch
from torch import nn

from nnsight_core import NNsight, OutOfOrderError, Proxy
from tests import oracle

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def two_layers() -> nn.Sequential:
    return nn.Sequential(OrderedDict(layer1=nn.Linear(3, 5), layer2=nn.Linear(5, 2)))


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: torch.Tensor


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor
    extra: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: torch.Tensor
    extra: torch.Tensor


class Gives(nn.Module):
    """Gives its result in the kind of container that it is told."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        values = (self.linear(x), x)
        return tuple(values) if self.kind is tuple else self.kind(*values)


class Holder(nn.Module):
    """Takes the two tensors out of the container again, and remembers what it was given."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.part = Gives(kind)
        self.last = nn.Linear(3, 3)
        self.seen: list[type] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.part(x)
        hidden, extra = value if isinstance(value, tuple) else (value.hidden, value.extra)
        self.seen = [type(hidden), type(extra)]
        return self.last(hidden) + extra


def dictionary(hidden: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden": hidden, "extra": extra}


def test_every_place_reads_as_hooks_read_it() -> None:
    net = nn.Sequential(two_layers(), nn.ReLU(), two_layers()[:0], nn.Linear(2, 2))
    places = [place for place, _ in oracle.order(net, X)]
    truth = oracle.read(net, places, X)
    model = NNsight(net)
    with model.trace(X):
        for path, kind in places:
            value = getattr(model.get(path), kind).save().value
            expected = truth[path, kind]
            if kind == "input":
                assert torch.equal(value[0][0], expected[0][0])
                assert value[1] == expected[1]
            else:
                assert torch.equal(value, expected)


def test_a_value_is_at_hand_inside_the_block() -> None:
    net = two_layers()
    model = NNsight(net)
    with model.trace(X):
        hidden = model.layer1.output
        assert isinstance(hidden, Proxy)
        assert isinstance(hidden, torch.Tensor)
        assert hidden.shape == (2, 5)
        assert torch.equal(hidden.value, net.layer1(X))
        if hidden.sum() > 1e9:
            pytest.fail("the sum is an ordinary number")


def test_a_whole_output_is_set() -> None:
    net = two_layers()
    model = NNsight(net)
    with model.trace(X):
        model.layer1.output = model.layer1.output * 2
        result = model.output.save()
    assert torch.equal(result.value, oracle.write(net, {("layer1", "output"): lambda value: value * 2}, X))


def test_one_column_is_set_to_zero() -> None:
    net = two_layers()
    model = NNsight(net)
    with model.trace(X):
        before = model.layer1.output.clone().save()
        model.layer1.output[:, 0] = 0
        after = model.layer1.output.save()
        result = model.output.save()
    assert torch.equal(before.value, net.layer1(X))
    assert torch.equal(after.value[:, 0], torch.zeros(2))
    assert torch.equal(after.value[:, 1:], before.value[:, 1:])
    assert torch.equal(result.value, net.layer2(after.value))


@pytest.mark.parametrize("number", [0, 1.5, True, torch.tensor(3.0).item()])
def test_a_number_set_as_an_output_fills_it(number: float) -> None:
    net = two_layers()
    model = NNsight(net)
    with model.trace(X):
        model.layer1.output = number
        filled = model.layer1.output.save()
        result = model.output.save()
    assert torch.equal(filled.value, torch.full((2, 5), float(number)))
    assert torch.equal(result.value, net.layer2(filled.value))


def test_a_number_set_as_the_entry_of_a_tuple_fills_it() -> None:
    model = NNsight(Holder(tuple))
    with model.trace(X):
        model.part.output[0] = 0
        assert torch.equal(model.part.output[0].value, torch.zeros(2, 3))


def test_a_number_set_as_an_input_fills_it() -> None:
    net = two_layers()
    model = NNsight(net)
    with model.trace(X):
        model.layer2.input = 0
        result = model.output.save()
    assert torch.equal(result.value, net.layer2(torch.zeros(2, 5)))


def test_none_is_no_output() -> None:
    model = NNsight(two_layers())
    with pytest.raises(ValueError, match=r"layer1\.output cannot be set to None"), model.trace(X):
        model.layer1.output = None


@pytest.mark.parametrize("kind", [tuple, Pair])
def test_an_entry_of_a_tuple_is_set(kind: Any) -> None:
    net = Holder(kind)
    model = NNsight(net)
    with model.trace(X):
        model.part.output[0] = model.part.output[0] * 3
        model.part.output[1][:, 0] = 7
        result = model.output.save()
        assert type(model.part._module(X)) is kind
    hidden, extra = net.part(X)
    extra = extra.clone()
    extra[:, 0] = 7
    assert torch.equal(result.value, net.last(hidden * 3) + extra)


@pytest.mark.parametrize("kind", [Record, Frozen, Pair])
def test_a_field_is_set(kind: Any) -> None:
    net = Holder(kind)
    model = NNsight(net)
    with model.trace(X):
        model.part.output.hidden = model.part.output.hidden * 3
        model.part.output.extra += 1
        model.part.output.extra[0] = 0
        result = model.output.save()
    extra = X + 1
    extra[0] = 0
    assert torch.equal(result.value, net.last(net.part(X)[0] * 3 if kind is Pair else net.part(X).hidden * 3) + extra)


@pytest.mark.parametrize("kind", [tuple, Pair, Record, Frozen])
def test_a_container_built_around_live_values_reaches_the_model_as_plain_tensors(kind: Any) -> None:
    net = Holder(kind)
    model = NNsight(net)
    with model.trace(X):
        whole = model.part.output
        hidden, extra = whole if isinstance(whole, tuple) else (whole.hidden, whole.extra)
        model.part.output = (hidden * 3, extra) if kind is tuple else kind(hidden * 3, extra)
        result = model.output.save()
    assert net.seen == [torch.Tensor, torch.Tensor]
    assert torch.equal(result.value, net.last(net.part.linear(X) * 3) + X)


def test_two_views_of_one_tuple_keep_each_others_changes() -> None:
    net = Holder(tuple)
    model = NNsight(net)
    first, second = torch.full((2, 3), 5.0), torch.full((2, 3), 7.0)
    with model.trace(X):
        whole = model.part.output
        model.part.output[0] = first
        whole[1] = second
        result = model.output.save()
    assert torch.equal(result.value, net.last(first) + second)


CHANGES = {
    "view": lambda h: h.view(-1).zero_(),
    "slice": lambda h: h[:, :2].mul_(0),
    "row of the transpose": lambda h: h.T[0].zero_(),
    "chunk": lambda h: h.chunk(2, 0)[1].add_(1),
    "torch.transpose": lambda h: torch.transpose(h, 0, 1).copy_(torch.ones(5, 2)),
    "unbind": lambda h: h.unbind(0)[1].fill_(2),
    "slice of a row": lambda h: h[0][1:3].clamp_(min=0),
    "mask": lambda h: h.__setitem__(h > 0, 0.0),
    "torch function": lambda h: torch.relu_(h),
    "masked_fill_": lambda h: h.masked_fill_(h < 0, 9.0),
    "reordered by keyword": lambda h: torch.unsqueeze(input=h, dim=0).zero_(),
    "einops": lambda h: einops.rearrange(h, "a b -> b a")[0].zero_(),
    "inplace=True": lambda h: nn.functional.relu(h, inplace=True),
    "a module in place": lambda h: nn.ReLU(inplace=True)(h),
    "out=": lambda h: torch.mul(h, 2, out=h),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_through_a_view_reaches_the_model(change: Any) -> None:
    net = two_layers()
    model = NNsight(net)
    with torch.no_grad(), model.trace(X):
        change(model.layer1.output)
        result = model.output.save()

    def changed(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        change(value)
        return value

    with torch.no_grad():
        assert torch.equal(result.value, oracle.write(net, {("layer1", "output"): changed}, X))


def test_a_change_through_a_view_shows_in_the_variable_too() -> None:
    model = NNsight(two_layers())
    with torch.no_grad(), model.trace(X):
        hidden = model.layer1.output
        hidden[:, 0].zero_()
        assert hidden[:, 0].abs().sum() == 0


def test_the_same_variable_sees_its_own_changes() -> None:
    net = two_layers()
    model = NNsight(net)
    with model.trace(X):
        hidden = model.layer1.output
        hidden += 1
        hidden[:, 0] = 0
        hidden *= 2
        kept = hidden.save()
        result = model.output.save()
    expected = net.layer1(X) + 1
    expected[:, 0] = 0
    assert torch.equal(kept.value, expected * 2)
    assert torch.equal(result.value, net.layer2(expected * 2))


def test_the_callers_own_tensor_is_not_changed() -> None:
    model = NNsight(two_layers())
    mine = X.clone()
    with model.trace(mine):
        model.input[:] = 0
        model.layer1.input += 3
    assert torch.equal(mine, X)


def test_a_module_called_twice_gives_its_calls_one_after_the_other() -> None:
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Tanh(), shared)
    model = NNsight(net)
    with model.trace(X):
        first = model[0].output.save()
        between = model[1].output.save()
        second = model[2].output.save()
    assert torch.equal(first.value, shared(X))
    assert torch.equal(between.value, shared(X).tanh())
    assert torch.equal(second.value, shared(between.value))


class CallsItsGuest(nn.Module):
    def forward(self, x: torch.Tensor, guest: nn.Module) -> torch.Tensor:
        return guest(x) * 2


class Host(nn.Module):
    """Its `norm` runs inside the call of a module that is not its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(3, 3)
        self.block = CallsItsGuest()
        self.last = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(x, self.norm))


def test_a_module_called_inside_one_that_is_not_its_parent() -> None:
    net = Host()
    model = NNsight(net)
    with model.trace(X):
        # The tree does not say that the one calls the other; asking for its input makes the host known in time.
        came_in = model.block.input.save()
        inner = model.norm.output.save()
        outer = model.block.output.save()
        result = model.last.output.save()
    assert torch.equal(came_in[0][0], X)
    assert torch.equal(inner.value, net.norm(X))
    assert torch.equal(outer.value, inner.value * 2)
    assert torch.equal(result.value, net(X))
    with model.trace(X):
        assert model.norm.output is not None
        with pytest.raises(OutOfOrderError, match=r"running already(.|\n)*Ask for block.input before norm.output"):
            assert model.block.output is not None


def test_an_ancestor_asked_for_while_it_runs() -> None:
    net = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh())))
    model = NNsight(net)
    with model.trace(X):
        model[0][0][0].output = 1
        inner = model[0][0].output.save()
        model[0].output += 1
        result = model.output.save()
    assert torch.equal(result.value, inner.value + 1)
    assert torch.equal(inner.value, torch.ones(2, 3).tanh())


def test_trace_false_gives_the_plain_output() -> None:
    net = two_layers()
    output = NNsight(net).trace(X, trace=False)
    assert type(output) is torch.Tensor
    assert torch.equal(output, net(X))


def test_a_tracer_spells_the_models_names() -> None:
    net = two_layers()
    with NNsight(net).trace(X) as tracer:
        hidden = tracer.layer1.output.save()
        output = tracer.output.save()
    assert torch.equal(hidden.value, net.layer1(X))
    assert torch.equal(output.value, net(X))


def test_a_body_that_asks_for_nothing_runs_the_model_once() -> None:
    calls = []
    net = two_layers()
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    with NNsight(net).trace(X):
        assert not calls
    assert calls == [1]


def test_stop_ends_the_pass_and_keeps_what_was_read() -> None:
    net = two_layers()
    ran = []
    net.layer2.register_forward_pre_hook(lambda *_: ran.append(1))
    model = NNsight(net)
    with model.trace(X) as tracer:
        hidden = model.layer1.output.save()
        tracer.stop()
        doubled = (hidden * 2).save()
    assert not ran
    assert torch.equal(doubled.value, net.layer1(X) * 2)


def test_stop_before_anything_runs_nothing() -> None:
    ran = []
    net = two_layers()
    net.register_forward_pre_hook(lambda *_: ran.append(1))
    with NNsight(net).trace(X) as tracer:
        tracer.stop()
        tracer.stop()
    assert not ran


def test_a_module_put_in_the_place_of_another_is_traced() -> None:
    model = NNsight(two_layers())
    assert model.layer1 is not None
    model.layer1 = nn.Linear(3, 5)
    with model.trace(X):
        hidden = model.layer1.output.save()
    assert torch.equal(hidden.value, model._module.layer1(X))
