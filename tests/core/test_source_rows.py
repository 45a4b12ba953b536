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
    """Attention that works on (head, batch * position, width), where the order of the fold is not to be seen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, position, hidden = x.shape
        each = self.mix(x).view(batch * position, self.heads, 2).transpose(0, 1)
        return torch.tanh(each).transpose(0, 1).reshape(batch, position, hidden)


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
    model = NNsight(Folded(heads))
    one, two = inputs((1, heads - 1), heads)
    with pytest.raises(RowsError, match="may or may not") as caught, model.trace() as tracer:
        with tracer.invoke(one):
            model.source.tanh_0.output.save()
        with tracer.invoke(two):
            model.output.save()
    assert "tanh_0.output.save()" in str(caught.value)
