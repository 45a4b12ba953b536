"""Inside a module: its torch operations are listed, read and set, and what plain PyTorch gives is what comes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from nnsight_core import (
    ModuleNotRunError,
    NNsight,
    NoSuchOperationError,
    NoTraceError,
    OutOfOrderError,
    SourceError,
)
from tests.core.small_attention import NAMES, Attention, X, attention_model, by_hand, model_of, plain_probabilities


@pytest.fixture
def model() -> NNsight:
    return attention_model()


# The list.


def test_the_list_names_operations_with_their_lines_in_order(model: NNsight) -> None:
    with model.trace(X):
        source = model[1].source
        assert [operation.name for operation in source] == NAMES
        assert len(source) == len(NAMES)
        assert "softmax_0" in source
        assert "softmax_1" not in source
        softmax = source["softmax_0"]
        assert (softmax.name, softmax.text) == ("softmax_0", "return functional.softmax(scores, dim=-1) @ values")
        assert softmax.file == inspect.getsourcefile(Attention)
        with open(softmax.file) as file:
            assert file.readlines()[softmax.line - 1].strip() == softmax.text
        text = str(source)
        assert text == repr(source)
        assert f"softmax_0     small_attention.py:{softmax.line}" in text
        assert text.startswith("1.source: 10 operations of Attention\n")
        assert "softmax_0" in dir(source)
        assert "softmax_0   small_attention.py" in repr(softmax)


def test_listing_changes_nothing_and_runs_nothing_of_the_pass(model: NNsight) -> None:
    norm = nn.BatchNorm1d(4)
    model = model_of(norm, Attention())
    before = norm.running_mean.clone()
    with model.trace(X):
        assert len(model[1].source) == len(NAMES)
        assert torch.equal(norm.running_mean, before)
        hidden = model[0].output.save()
    assert hidden.shape == X.shape
    assert not torch.equal(norm.running_mean, before)


def test_a_module_of_torchs_own_shows_its_forward(model: NNsight) -> None:
    with model.trace(X):
        (linear,) = model[0].source
    assert linear.name == "linear_0"
    assert linear.file.endswith("linear.py")
    assert linear.text == "return F.linear(input, self.weight, self.bias)"


def test_without_a_trace_a_general_model_has_no_input_to_list_with(model: NNsight) -> None:
    with pytest.raises(SourceError, match=r"with model.trace\(inputs\):\n        print\(1.source\)"):
        str(model[1].source)
    with pytest.raises(NoTraceError), model.trace(X):
        pass_over = model[1].source.softmax_0
        other = model_of(Attention())
        assert pass_over is not None
        _ = other[0].output


def test_a_module_that_is_not_called_has_no_list(model: NNsight) -> None:
    model = model_of(nn.Linear(3, 3))
    model._module.spare = Attention()
    model._module.forward = lambda x: model._module[0](x)
    with pytest.raises(ModuleNotRunError), model.trace(X):
        len(model.spare.source)


# Reading.


def test_every_operation_gives_what_it_gave(model: NNsight) -> None:
    net = model._module
    hidden = net[0](X)
    query, key = net[1].query(hidden), net[1].key(hidden)
    scores = query @ key.transpose(-1, -2) / 3**0.5
    with model.trace(X):
        source = model[1].source
        args, options = source.div_0.inputs
        assert options == {}
        divisor = args[1]
        shown = source.div_0.output.save()
        given = source.softmax_0.input.clone().save()
        options = source.softmax_0.input[1]
        assert options["dim"] == -1
        probabilities = source.softmax_0.output.save()
        first, second = source.split_0.output
        first.save(), second.save()
        output = model.output.save()
    assert divisor == 3**0.5
    assert torch.equal(shown, scores)
    assert torch.equal(given, scores)
    assert torch.equal(probabilities, scores.softmax(-1))
    mixed = scores.softmax(-1) @ hidden + hidden
    assert torch.equal(first, mixed[..., :1])
    assert torch.equal(second, mixed[..., 1:])
    assert torch.equal(output, net(X))


def test_operations_and_modules_stand_in_one_order(model: NNsight) -> None:
    with model.trace(X):
        source = model[1].source
        assert model[1].input is not None
        assert model[1].query.output is not None
        scores = source.softmax_0.input.clone()
        assert model[1].smooth.input is not None
        assert source.cat_0.output.shape == X.shape
        output = model[1].output.save()
    assert scores is not None
    assert torch.equal(output, model._module[1](model._module[0](X)))


def test_children_have_operations_of_their_own(model: NNsight) -> None:
    with model.trace(X):
        outer = model[1].source.softmax_0.output.save()
        inner = model[1].smooth.source.softmax_0.output.save()
    assert outer.shape == (2, 4, 4)
    assert inner.shape == (2, 4, 2)


# Setting.


def test_setting_a_part_is_seen_by_what_comes_later(model: NNsight) -> None:
    net = model._module

    def change(probabilities: torch.Tensor) -> torch.Tensor:
        probabilities = probabilities.clone()
        probabilities[:, :, 0] = 0
        return probabilities

    with model.trace(X):
        before = model[1].source.softmax_0.output.clone().save()
        model[1].source.softmax_0.output[:, :, 0] = 0
        after = model[1].source.matmul_1.input.clone().save()
        output = model.output.save()
    assert torch.equal(before[..., 1:], after[..., 1:])
    assert torch.equal(after[..., 0], torch.zeros(2, 4))
    assert torch.equal(output, net[2](by_hand(net[0](X), net[1], change)))
    assert torch.equal(net(X), net[2](by_hand(net[0](X), net[1], lambda p: p)))


def test_setting_the_whole_the_call_and_an_argument(model: NNsight) -> None:
    net = model._module
    uniform = net[2](by_hand(net[0](X), net[1], lambda p: torch.full_like(p, 0.25)))
    with model.trace(X):
        model[1].source.softmax_0.output = 0.25
        whole = model.output.save()
    with model.trace(X):
        model[1].source.softmax_0.input = model[1].source.softmax_0.input * 0
        first = model.output.save()
    with model.trace(X):
        model[1].source.softmax_0.input *= 0
        in_place = model.output.save()
    with model.trace(X):
        hidden = model[0].output
        model[1].source.matmul_1.input = ((torch.full((2, 4, 4), 0.25), hidden), {})
        call = model.output.save()
    with model.trace(X):
        model[1].source.matmul_1.input[0][0][:] = 0.25
        entry = model.output.save()
    for each in (whole, first, in_place, call, entry):
        assert torch.allclose(each, uniform, atol=1e-6)
    assert torch.equal(whole, uniform)


def test_setting_an_entry_of_a_tuple(model: NNsight) -> None:
    net = model._module
    with model.trace(X):
        model[1].source.split_0.output[0][:] = 7
        output = model[1].output.save()
    plain = net[1](net[0](X))
    assert torch.equal(output[..., 1:], plain[..., 1:])
    assert torch.equal(output[..., 0], 7 + 1 - net[0](X)[..., 0])


# In place.


class InPlace(nn.Module):
    """Changes tensors of its own, as statements and as expressions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = y.view(-1)
        z += 1
        y.masked_fill_(x > 0, 5.0)
        y[0] = y[0] + 1
        torch.mul(y, 2, out=y)
        return y


def test_what_was_read_stays_what_it_was_when_it_is_changed_in_place() -> None:
    model = model_of(InPlace())
    x = torch.tensor([[-1.0, 1.0], [2.0, -3.0]])
    with torch.no_grad(), model.trace(x):
        source = model[0].source
        product = source.mul_0.output.save()
        view = source.view_0.output.save()
        into_add = source.add__0.input[0][0].save()
        added = source.add__0.output.save()
        filled = source.masked_fill__0.output.save()
        into_set = source.setitem_0.input[0][0].save()
        put = source.setitem_0.output.save()
        doubled = source.mul_1.output.save()
        output = model.output.save()
    assert product.tolist() == [[-2, 2], [4, -6]]
    assert view.tolist() == into_add.tolist() == [-2, 2, 4, -6]
    assert added.tolist() == [-1, 3, 5, -5]
    assert filled.tolist() == into_set.tolist() == [[-1, 5], [5, -5]]
    assert put.tolist() == [[0, 6], [5, -5]]
    assert doubled.tolist() == output.tolist() == [[0, 12], [10, -10]]
    assert model._module(x).tolist() == output.tolist()


@pytest.mark.parametrize("grad", [True, False])
def test_what_an_operation_in_place_gives_is_set_in_the_tensor_itself(grad: bool) -> None:
    model = model_of(InPlace())
    x = torch.tensor([[-1.0, 1.0], [2.0, -3.0]])
    results = {}
    with torch.set_grad_enabled(grad):
        for name in ("add__0", "masked_fill__0", "setitem_0", "mul_1"):
            with model.trace(x):
                getattr(model[0].source, name).output = 0
                results[name] = model.output.save()
        with model.trace(x):
            model[0].source.masked_fill__0.input[0][0][:] = 1
            filled = model.output.save()
    assert results["add__0"].tolist() == [[2, 12], [10, 0]]
    assert results["masked_fill__0"].tolist() == [[2, 2], [0, 0]]
    assert results["setitem_0"].tolist() == results["mul_1"].tolist() == [[0, 0], [0, 0]]
    assert filled.tolist() == [[4, 12], [10, 2]]
    with pytest.raises(ValueError, match="in place"), model.trace(x):
        model[0].source.masked_fill__0.output = torch.zeros(3)


# Order.


def test_an_operation_that_has_gone_by(model: NNsight) -> None:
    with model.trace(X):
        source = model[1].source
        matmul = source.matmul_1.output
        with pytest.raises(OutOfOrderError, match=r"source\.softmax_0\.output was asked for after") as error:
            source.softmax_0.output  # noqa: B018
        assert matmul is not None
    assert "1.source.matmul_1.output" in str(error.value)
    with pytest.raises(OutOfOrderError, match="gone by"), model.trace(X):
        assert model[2].output is not None
        model[1].source.softmax_0.output = 0
    with model.trace(X):
        probabilities = model[1].source.softmax_0.output
        assert model[1].source.matmul_1.output is not None
        with pytest.raises(OutOfOrderError):
            probabilities[:] = 0
        output = model.output.save()
    assert torch.equal(output, model._module(X))


def test_an_operation_that_does_not_occur(model: NNsight) -> None:
    with pytest.raises(NoSuchOperationError, match=r"Did you mean 'softmax_0'") as error, model.trace(X):
        model[1].source.softmax_7.output = 0
    assert "transpose_0, matmul_0, div_0" in str(error.value)
    with model.trace(X):
        with pytest.raises(NoSuchOperationError, match="Did you mean 'softmax_0'"):
            model[1].source.softmx_0  # noqa: B018
        with pytest.raises(NoSuchOperationError):
            model[1].source["is_floating_point_0"].output  # noqa: B018
        assert not hasattr(model[1].source, "nothing")
        with pytest.raises(AttributeError, match=r"source\.softmax_0\.output = "):
            model[1].source.softmax_0 = 1
        with pytest.raises(TypeError, match="Operations have names"):
            model[1].source[0]


def test_asked_for_when_the_module_is_half_way(model: NNsight) -> None:
    net = model._module
    with model.trace(X):
        assert model[1].key.output is not None
        probabilities = model[1].source.softmax_0.output.save()
        matmul = model[1].source.matmul_1.output.save()
        assert model[1].smooth.output is not None
        model[1].source.cat_0.output = 0
        output = model[1].output.save()
    hidden = net[0](X)
    scores = net[1].query(hidden) @ net[1].key(hidden).transpose(-1, -2) / 3**0.5
    assert torch.equal(probabilities, scores.softmax(-1))
    assert torch.equal(matmul, scores.softmax(-1) @ hidden)
    assert torch.equal(output, 0 + 1 - hidden)
    with model.trace(X):
        assert model[1].smooth.output is not None
        with pytest.raises(OutOfOrderError):
            model[1].source.softmax_0.output  # noqa: B018


class Counting(nn.Module):
    """Takes another path in each run, so that a dry run shows another one than the run itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        path = Counting.runs
        Counting.runs += 1
        y = self.inner(x)
        return (y.tanh() if path % 2 else y.sigmoid()) + y.exp()

    runs = 0


def test_half_way_and_the_dry_run_goes_another_way() -> None:
    model = model_of(Counting())
    with pytest.raises(OutOfOrderError), model.trace(X):
        assert model[0].inner.output is not None
        model[0].source.exp_0.output.save()
    with model.trace(X):
        source = model[0].source
        assert model[0].inner.output is not None
        exponential = source.exp_0.output.save()
    assert torch.equal(exponential, model._module[0].inner(X).exp())


def test_a_module_that_is_called_several_times() -> None:
    attention = Attention()
    model = model_of(attention, nn.Linear(3, 3), attention)
    net = model._module
    with model.trace(X):
        first = model[0].source.softmax_0.output.save()
        model[0].source.cat_0.output = 0
        second = model[0].source.softmax_0.output.save()
        output = model.output.save()
    hidden = net[1](1 - X)

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        return (attention.query(x) @ attention.key(x).transpose(-1, -2) / 3**0.5).softmax(-1)

    assert torch.equal(first, probabilities(X))
    assert torch.equal(second, probabilities(hidden))
    assert torch.equal(output, attention(hidden))


# What cannot be seen, and names that clash.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_scripted_and_compiled_modules_say_so() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager")
    own = nn.Sequential(nn.Linear(3, 3))
    own.compile(backend="eager")
    model = model_of(scripted, compiled, own)
    with model.trace(X):
        for envoy in (model[0], model[0][0], model[1], model[1]._orig_mod[0], model[2], model[2][0]):
            with pytest.raises(SourceError, match=r"torch\.jit|compiled"):
                envoy.source  # noqa: B018
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_around_a_compiled_child() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), backend="eager")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.exp()).sigmoid()

    model = model_of(Around())
    for _ in range(2):
        with model.trace(X):
            exponential = model[0].source.exp_0.output.save()
            squashed = model[0].source.sigmoid_0.output.save()
        assert torch.equal(exponential, X.exp())
        assert torch.allclose(squashed, model._module(X))
    torch._dynamo.reset()


def test_a_child_of_that_name() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.source(x).tanh()

    model = model_of(Holder())
    with model.trace(X):
        child = model[0]["source"].output.save()
        tanh = model[0].source.tanh_0.output.save()
    assert torch.equal(child.tanh(), tanh)


def test_outside_a_trace_values_are_refused(model: NNsight) -> None:
    with model.trace(X):
        operation = model[1].source.softmax_0
    with pytest.raises(NoTraceError, match=r"1\.source\.softmax_0\.output"):
        operation.output  # noqa: B018
    with model.trace(X):
        found = operation.output.save()
    assert torch.equal(found, plain_probabilities(model))


def test_operations_under_vmap_are_not_listed() -> None:
    class Mapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(lambda row: row.exp())(x).tanh()

    model = model_of(Mapped())
    with model.trace(X):
        assert [operation.name for operation in model[0].source] == ["tanh_0"]
        tanh = model[0].source.tanh_0.output.save()
    assert torch.equal(tanh, X.exp().tanh())


def test_an_inference_mode_around_everything(model: NNsight) -> None:
    with torch.inference_mode():
        with model.trace(X):
            assert model[1].key.output is not None
            half_way = model[1].source.softmax_0.output.save()
        with model.trace(X):
            model[1].source.softmax_0.output[:] = 0.25
            output = model.output.save()
    net = model._module
    assert torch.equal(half_way, plain_probabilities(model))
    assert torch.equal(output, net[2](by_hand(net[0](X), net[1], lambda p: torch.full_like(p, 0.25))))
