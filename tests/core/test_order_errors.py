"""Asking too late, for what never comes, after a stop, outside a trace: the error says what, where, and the mend."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from torch import nn

from nnsight_core import (
    ModuleNotRunError,
    NNsight,
    NoSuchModuleError,
    NoTraceError,
    OrderError,
    OutOfOrderError,
    ReleasedValueError,
    TraceStoppedError,
)
from nnsight_core.errors import NNsightError
from nnsight_core.input_errors import MissingInputError

X = torch.linspace(-1, 1, 6).reshape(2, 3)
HERE = Path(__file__).name


def layers() -> nn.Sequential:
    return nn.Sequential(OrderedDict(a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3)))


def line() -> int:
    """The line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def check_says(error: BaseException, *parts: str) -> None:
    """Each part stands in the message, and the message is a few lines of text."""
    message = str(error)
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"
    assert 2 <= len(message.splitlines()) <= 8


def test_asking_too_late_names_both_values_both_lines_and_the_mend() -> None:
    model = NNsight(layers())
    with pytest.raises(OutOfOrderError) as caught, model.trace(X):
        assert model.b.output is not None
        read = line() - 1
        assert model.a.output is not None
    check_says(
        caught.value,
        "a.output was asked for after the forward pass had gone by it.",
        f"already read   b.output   {HERE}:{read}",
        f"asked for      a.output   {HERE}:{read + 2}",
        f"Move line {read + 2} above line {read}.",
    )
    assert isinstance(caught.value, OrderError)


def test_the_error_is_raised_at_the_line_that_asks() -> None:
    model = NNsight(layers())
    reached = []
    with pytest.raises(OutOfOrderError), model.trace(X):
        assert model.c.output is not None
        reached.append("before")
        assert model.a.output is not None
        reached.append("after")
    assert reached == ["before"]


@pytest.mark.parametrize("module", ["a", "b"])
def test_the_input_of_a_module_comes_before_its_output(module: str) -> None:
    model = NNsight(layers())
    with pytest.raises(OutOfOrderError, match=rf"{module}\.input was asked for"), model.trace(X):
        assert model.get(module).output is not None
        assert model.get(module).input is not None


def test_the_input_of_the_model_comes_before_everything() -> None:
    model = NNsight(layers())
    with pytest.raises(OutOfOrderError, match=r"model\.input was asked for"), model.trace(X):
        assert model.a.input is not None
        assert model.input is not None


def test_children_come_before_the_output_of_their_parent() -> None:
    model = NNsight(nn.Sequential(layers(), nn.Linear(3, 3)))
    with pytest.raises(OutOfOrderError) as caught, model.trace(X):
        model[0].output = torch.zeros(2, 3)
        assert model[0].b.output is not None
    check_says(caught.value, "0.b.output was asked for", "0.output")


def test_setting_a_whole_value_too_late() -> None:
    model = NNsight(layers())
    with pytest.raises(OutOfOrderError, match=r"a\.output"), model.trace(X):
        assert model.b.output is not None
        model.a.output = torch.zeros(2, 3)


def test_setting_too_late_is_called_setting() -> None:
    model = NNsight(layers())
    with pytest.raises(OutOfOrderError, match=r"a\.output was set after"), model.trace(X):
        assert model.b.output is not None
        model.a.output = torch.zeros(2, 3)


def add_one(hidden: Any) -> None:
    hidden += 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "slice": lambda h: h.__setitem__(slice(None), 0),
    "+=": add_one,
    "zero_": lambda h: h.zero_(),
    "add_": lambda h: h.add_(1),
    "copy_": lambda h: h.copy_(torch.zeros(2, 3)),
    "index_fill_": lambda h: h.index_fill_(0, torch.tensor([0]), 1),
    "set_value": lambda h: h.set_value(torch.zeros(2, 3)),
    "torch.relu_": lambda h: torch.relu_(h),
    "torch.relu_ by keyword": lambda h: torch.relu_(input=h),
    "out=": lambda h: torch.add(h, 1, out=h),
    "inplace=True": lambda h: nn.functional.relu(h, inplace=True),
    "a module in place": lambda h: nn.ReLU(inplace=True)(h),
    "nn.init": lambda h: nn.init.zeros_(h),
    "several at once": lambda h: torch._foreach_add_([h], 1),
    "view": lambda h: h.view(-1).zero_(),
    "reshape": lambda h: h.reshape(-1).zero_(),
    "slice of a view": lambda h: h[0][1:].zero_(),
    "transpose": lambda h: h.T.zero_(),
    "t()": lambda h: h.t().zero_(),
    ".t[0]": lambda h: h.t[0].zero_(),
    "torch.transpose": lambda h: torch.transpose(h, 0, 1).zero_(),
    "unsqueeze by keyword": lambda h: torch.unsqueeze(input=h, dim=0).zero_(),
    "chunk": lambda h: h.chunk(2)[0].zero_(),
    "torch.unbind": lambda h: torch.unbind(h)[0].zero_(),
    "rows": lambda h: [row.zero_() for row in h],
    "detach": lambda h: h.detach().zero_(),
    "data": lambda h: h.data.zero_(),
    "no change of type": lambda h: h.float().zero_(),
    "einops": lambda h: einops.rearrange(h, "a b -> b a").zero_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changing_a_value_too_late(change: Callable[[Any], Any]) -> None:
    model = NNsight(layers())
    with torch.no_grad(), pytest.raises(OutOfOrderError) as caught, model.trace(X):
        hidden = model.a.output
        read = line() - 1
        assert model.b.output is not None
        change(hidden)
    check_says(caught.value, "a.output was set after the forward pass had gone by it.", f"{HERE}:{read}", ".clone()")


def test_changing_a_copy_is_nobodys_business() -> None:
    model = NNsight(layers())
    with torch.no_grad(), model.trace(X):
        hidden = model.a.output
        assert model.b.output is not None
        for copy in (hidden.clone(), hidden * 1, hidden[[0, 1]], hidden.repeat(2, 1), hidden.t[0].clone()):
            copy.zero_()
        assert hidden.abs().sum() > 0


class GivesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.linear(x)}


class UsesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gives, self.last = GivesDict(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.gives(x)["hidden"])


DICT_CHANGES: dict[str, Callable[[Any], Any]] = {
    "entry": lambda d: d.__setitem__("hidden", 0),
    "del": lambda d: d.__delitem__("hidden"),
    "inside an entry": lambda d: d["hidden"].zero_(),
    "get": lambda d: d.get("hidden").zero_(),
    "values": lambda d: [value.zero_() for value in d.values()],
    "items": lambda d: [value.zero_() for _, value in d.items()],
    "update": lambda d: d.update(hidden=0),
    "pop": lambda d: d.pop("hidden"),
    "clear": lambda d: d.clear(),
    "|=": lambda d: d.__ior__({"hidden": 0}),
}


@pytest.mark.parametrize("change", DICT_CHANGES.values(), ids=DICT_CHANGES)
def test_changing_a_dict_too_late(change: Callable[[Any], Any]) -> None:
    model = NNsight(UsesDict())
    with torch.no_grad(), pytest.raises(OutOfOrderError), model.trace(X):
        given = model.gives.output
        assert model.last.input is not None
        change(given)


def test_changing_part_of_an_input_too_late() -> None:
    model = NNsight(layers())
    for change in (
        lambda call: call[0].__setitem__(0, X),
        lambda call: call[1].__setitem__("x", X),
        lambda call: call.__setitem__(0, (X,)),
        lambda call: call.zero_(),
        lambda call: call[0][0].zero_(),
    ):
        with torch.no_grad(), pytest.raises(OutOfOrderError, match=r"b\.input was set"), model.trace(X):
            call = model.b.input
            assert model.b.output is not None
            change(call)


def test_changing_a_value_after_a_stop() -> None:
    model = NNsight(layers())
    with pytest.raises(OrderError), model.trace(X) as tracer:
        hidden = model.a.output
        tracer.stop()
        hidden[:] = 0


class Branches(nn.Module):
    """Runs one of its two modules; which one depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.never = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.left(x) if x.sum() > 100 else self.right(x))


def test_a_module_that_never_runs() -> None:
    model = NNsight(Branches())
    with pytest.raises(ModuleNotRunError) as caught, model.trace(X):
        asked = line() + 1
        assert model.never.output is not None
    check_says(caught.value, "never.output was asked for", "did not run", f"{HERE}:{asked}", "print(model)")


def test_a_module_that_never_runs_asked_for_among_others() -> None:
    model = NNsight(nn.Sequential(layers()))
    model._module.spare = nn.Linear(3, 3)
    model._module.forward = lambda x: model._module[0](x)
    with pytest.raises(ModuleNotRunError, match=r"spare\.output"), model.trace(X):
        assert model[0].a.output is not None
        assert model.spare.output is not None


def test_a_branch_that_is_not_taken_is_known_not_to_have_run() -> None:
    model = NNsight(Branches())
    with pytest.raises(ModuleNotRunError) as caught, model.trace(X):
        assert model.right.output is not None
        assert model.left.output is not None
    # Only with real numbers can a dry run tell which branch is taken.
    check_says(caught.value, "left.output was asked for", "did not run")
    assert "could not be told" not in str(caught.value)


def test_what_has_passed_while_another_was_looked_for_is_not_said_never_to_run() -> None:
    model = NNsight(Branches())
    with model.trace(X):
        with pytest.raises(ModuleNotRunError):
            assert model.never.output is not None
        with pytest.raises(OutOfOrderError):
            assert model.right.output is not None


def test_after_a_stop() -> None:
    model = NNsight(layers())
    with pytest.raises(TraceStoppedError) as caught, model.trace(X) as tracer:
        assert model.a.output is not None
        tracer.stop()
        stopped = line() - 1
        assert model.b.output is not None
    check_says(
        caught.value,
        "b.output was asked for after tracer.stop()",
        f"{HERE}:{stopped}",
        f"{HERE}:{stopped + 2}",
        "before you stop",
    )


@pytest.mark.parametrize("kind", ["output", "input"])
def test_outside_a_trace(kind: str) -> None:
    model = NNsight(layers())
    with pytest.raises(NoTraceError) as caught:
        getattr(model.a, kind)
    check_says(caught.value, f"a.{kind} was asked for outside a trace", HERE, "with model.trace(")


def test_setting_outside_a_trace() -> None:
    model = NNsight(layers())
    with pytest.raises(NoTraceError, match=r"a\.output"):
        model.a.output = 0


def test_in_the_trace_of_another_model() -> None:
    one, other = NNsight(layers()), NNsight(layers())
    with pytest.raises(NoTraceError), one.trace(X):
        assert other.a.output is not None


def test_after_the_trace() -> None:
    model = NNsight(layers())
    with model.trace(X):
        hidden = model.a.output
        made = line() - 1
    for use in (lambda: hidden.value, lambda: hidden + 1, lambda: hidden.shape, lambda: torch.sum(hidden)):
        with pytest.raises(ReleasedValueError) as caught:
            use()
        check_says(caught.value, "Accessing Proxy value before it's been set", f"{HERE}:{made}", ".save()")
    assert "released" in repr(hidden)
    assert isinstance(caught.value, ValueError)


def test_saving_after_the_trace_is_too_late() -> None:
    model = NNsight(layers())
    with model.trace(X):
        hidden = model.a.output
    with pytest.raises(ReleasedValueError):
        hidden.save()


def test_a_name_that_is_not_there() -> None:
    model = NNsight(nn.Sequential(OrderedDict(layer1=nn.Linear(3, 3), layer2=nn.Linear(3, 3))))
    with pytest.raises(NoSuchModuleError) as caught:
        assert model.layr1
    check_says(caught.value, "'layr1'", "Did you mean 'layer1'", "layer2")
    assert isinstance(caught.value, AttributeError)
    with pytest.raises(NoSuchModuleError, match="ouput"):
        model.layer1.ouput = 3


def test_nothing_to_run_on() -> None:
    model = NNsight(layers())
    with pytest.raises(MissingInputError, match="without an input"), model.trace():
        pass


def test_an_error_in_a_helper_names_the_helpers_line() -> None:
    model = NNsight(layers())

    def helper() -> Any:
        return model.a.output

    with pytest.raises(OutOfOrderError) as caught, model.trace(X):
        assert model.b.output is not None
        helper()
    asked = inspect.getsourcelines(helper)[1] + 1
    assert re.search(rf"asked for +a\.output +{HERE}:{asked}", str(caught.value))


def test_every_mistake_is_of_one_family() -> None:
    for kind in (OutOfOrderError, ModuleNotRunError, TraceStoppedError, NoTraceError, ReleasedValueError):
        assert issubclass(kind, NNsightError)


class Remembers(nn.Module):
    """Keeps its last value, as many models do with their caches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last: torch.Tensor | None = None
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = self.a(x)
        return self.b(self.last)


def test_explaining_an_error_leaves_the_model_as_it_was() -> None:
    net = Remembers()
    model = NNsight(net)
    heard: list[type] = []
    net.a.register_forward_hook(lambda module, args, output: heard.append(type(output)))
    with pytest.raises(OutOfOrderError), model.trace(X):
        assert model.b.output is not None
        assert model.a.output is not None
    assert type(net.last) is torch.Tensor
    assert net.calls == 1
    assert heard == [torch.Tensor]


def test_explaining_an_error_leaves_batch_statistics_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))
    model = NNsight(net)
    torch.manual_seed(1)
    with model.trace(X):
        assert model[3].output is not None
    once = {name: value.clone() for name, value in net.state_dict().items()}
    chance = torch.rand(1)
    net[1].reset_running_stats()
    torch.manual_seed(1)
    with pytest.raises(OutOfOrderError), model.trace(X):
        assert model[3].output is not None
        assert model[0].output is not None
    assert torch.equal(torch.rand(1), chance)
    for name, value in net.state_dict().items():
        assert torch.equal(value, once[name]), name
