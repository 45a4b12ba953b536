"""A tensor that is made early and used late, shown and set in between."""

from __future__ import annotations

import pytest
import torch

from nnsight_core import NNsight, OutOfOrderError, SourceError
from nnsight_core.carried import MARK, Carried
from nnsight_core.flow import Watch

KIND = Carried("matmul_0", (("mul_0", None), ("chunk_0", 1))).kind


class Module(torch.nn.Module):
    """Makes what it uses last before it multiplies."""

    def __init__(self, entry: bool = False, again: bool = False) -> None:
        super().__init__()
        self.entry = entry
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        late = x.chunk(2, -1)[1] if self.entry else x * 3
        product = torch.matmul(x, x.mT)
        if self.again:
            late = late + 1
        return product.softmax(-1) @ late


def _expected(x: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
    return (x @ x.mT).softmax(-1) @ late


@pytest.mark.parametrize("entry", [False, True])
def test_it_is_shown_with_the_call_and_set_for_whoever_takes_it(entry: bool) -> None:
    model, x = NNsight(torch.nn.Sequential(Module(entry))), torch.rand(3, 4)
    late = x.chunk(2, -1)[1] if entry else x * 3
    with torch.no_grad(), model.trace(x):
        _ = model[0].source
        call = model[0].read(KIND)
        seen = call[1][MARK].save()
        product = call[0][0].save()
    assert torch.equal(seen, late) and torch.equal(product, x)
    with torch.no_grad(), model.trace(x):
        _ = model[0].source
        call = model[0].read(KIND)
        call[1][MARK][0] = 7
        result = model.output.save()
    changed = late.clone()
    changed[0] = 7
    assert torch.equal(result, _expected(x, changed))
    assert torch.equal(model._module(x), _expected(x, late))


def test_it_is_set_also_where_it_is_the_last_thing_that_is_asked_for() -> None:
    model, x = NNsight(torch.nn.Sequential(Module())), torch.rand(3, 4)
    given: list[torch.Tensor] = []
    model._module.register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad(), model.trace(x):
        _ = model[0].source
        model[0].read(KIND)[1][MARK][:] = 0
    assert not given[0].any()


def test_what_nobody_takes_is_an_error() -> None:
    model, x = NNsight(torch.nn.Sequential(Module(again=True))), torch.rand(3, 4)
    kind = Carried("softmax_0", (("mul_0", None),)).kind
    with pytest.raises(SourceError, match="no operation took it"), torch.no_grad(), model.trace(x):
        _ = model[0].source
        model[0].read(kind)[1][MARK][:] = 0


def test_it_comes_at_its_operation_and_not_later() -> None:
    model, x = NNsight(torch.nn.Sequential(Module())), torch.rand(3, 4)
    with pytest.raises(OutOfOrderError), torch.no_grad(), model.trace(x):
        model[0].source.softmax_0.output.save()
        model[0].read(KIND)


def test_names_say_what_they_are_made_of() -> None:
    assert Carried.of(KIND) == Carried("matmul_0", (("mul_0", None), ("chunk_0", 1)))
    assert Carried.of("source.matmul_0.input") is None


def test_the_flow_has_the_names_of_source_and_tells_what_comes_from_what() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.inner(x)
            kept = hidden.clone()
            kept[..., 0] = 0
            top = hidden.topk(2).indices
            return torch.nn.Softmax(-1)(kept) + top.sum()

    outer = Outer()
    model, x = NNsight(torch.nn.Sequential(outer)), torch.rand(2, 4)
    _, seen = Watch(model._module, [outer]).run(lambda copy: copy(x))
    (flow,) = seen[outer]
    own = [step.name for step in flow.steps if step.module is outer]
    with model.trace(x):
        listed = [operation.name for operation in model[0].source]
    assert own == listed
    softmax = next(step for step in flow.steps if step.function == "softmax")
    assert softmax.module is None
    assert [step.function for step in flow.behind(softmax.taken[0], softmax, lambda step: False)][-1] == "linear"
    last = flow.steps[-1]
    assert "topk" not in [step.function for step in flow.behind(last.taken[0], last, lambda step: False)]
    linear = next(step for step in flow.steps if step.module is outer.inner)
    assert softmax in [step for step, _ in flow.ahead(linear.result, lambda step: False)]
