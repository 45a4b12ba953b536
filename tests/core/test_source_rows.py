"""Inside a module an axis may be as long as the batch by coincidence: rows are cut along the batch all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight_core import NNsight, RowsError


class HeadsFirst(nn.Module):
    """Attention that works on (head, batch, position, width)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix = nn.Linear(heads * 2, heads * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, position, hidden = x.shape
        each = self.mix(x).view(batch, position, self.heads, 2).permute(2, 0, 1, 3)
        weights = torch.softmax(each @ each.transpose(-1, -2), dim=-1)
        return (weights @ each).permute(1, 2, 0, 3).reshape(batch, position, hidden)


class Folded(HeadsFirst):
    """Works on (head, batch * position, width), or on (head, position * batch, width)."""

    def __init__(self, heads: int, across: bool) -> None:
        super().__init__(heads)
        self.across = across

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.across:
            x = x.transpose(0, 1)
        first, second, hidden = x.shape
        each = self.mix(x).reshape(first * second, self.heads, 2).transpose(0, 1)
        mixed = torch.tanh(each).transpose(0, 1).reshape(first, second, hidden)
        return mixed.transpose(0, 1) if self.across else mixed


def inputs(sizes: tuple[int, ...], heads: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, 3, heads * 2) for size in sizes]


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (1, 1, 1, 1), (2, 2)])
@pytest.mark.parametrize("looks", [False, True])
def test_heads_that_are_as_many_as_inputs(heads: int, sizes: tuple[int, ...], looks: bool) -> None:
    net = nn.Sequential(HeadsFirst(heads), HeadsFirst(heads))
    model = NNsight(net)
    given = inputs(sizes, heads)
    seen, outputs = [], []
    with model.trace() as tracer:
        for number, x in enumerate(given):
            with tracer.invoke(x):
                weights = model[1].source.softmax_0.output
                if looks:
                    assert weights.shape == (heads, len(x), 3, 3)
                seen.append(weights.clone().save())
                if number == 0:
                    model[1].source.softmax_0.output = weights * 0
                outputs.append(model.output.save())
    for number, x in enumerate(given):
        each = net[1].mix(net[0](x)).view(len(x), 3, heads, 2).permute(2, 0, 1, 3)
        torch.testing.assert_close(seen[number].value, torch.softmax(each @ each.transpose(-1, -2), dim=-1))
        torch.testing.assert_close(outputs[number].value, net(x) * (number != 0))


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_heads_before_a_fold_are_not_taken_for_inputs(heads: int) -> None:
    net = Folded(heads, across=False)
    model = NNsight(net)
    # The rows are found by what they hold, so that inputs which are alike have to be told apart all the same.
    one = inputs((1,), heads)[0]
    two = one.repeat(heads - 1, 1, 1)
    with model.trace() as tracer:
        with tracer.invoke(one):
            mine = model.source.tanh_0.output.save()
            model.source.tanh_0.output = 0
            zeros = model.output.save()
        with tracer.invoke(two):
            theirs = model.source.tanh_0.output.save()
            output = model.output.save()
    right = torch.tanh(net.mix(two).view(-1, heads, 2).transpose(0, 1))
    torch.testing.assert_close(mine.value, right[:, :3])
    torch.testing.assert_close(theirs.value, right)
    assert not zeros.value.any()
    torch.testing.assert_close(output.value, net(two))


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_rows_of_a_fold_that_do_not_stand_side_by_side(heads: int) -> None:
    model = NNsight(Folded(heads, across=True))
    one, two = inputs((1, heads - 1), heads)
    with pytest.raises(RowsError, match="may or may not") as caught, model.trace() as tracer:
        with tracer.invoke(one):
            model.source.tanh_0.output.save()
        with tracer.invoke(two):
            model.output.save()
    assert "tanh_0.output.save()" in str(caught.value)


class AllAlike(nn.Module):
    """Makes (batch * position, 2) that is the same everywhere, so that no numbers show whose rows are whose."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(x[..., :2].flatten(0, 1)) * 2
        return x.sum(-1) + ones.sum(-1).view(x.shape[:2])


@torch.no_grad()
def test_a_fold_of_which_nothing_shows_the_order_is_an_error() -> None:
    model = NNsight(AllAlike())
    with pytest.raises(RowsError, match="may or may not"), model.trace() as tracer:
        for x in inputs((1, 1), 2):
            with tracer.invoke(x):
                model.source.mul_0.output.save()
