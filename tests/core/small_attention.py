"""A small attention by hand, and the same with its probabilities changed: what looking inside a module is tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from nnsight_core import NNsight

X = torch.linspace(-1, 1, 24).reshape(2, 4, 3)


def attend(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return functional.softmax(scores, dim=-1) @ values


class Attention(nn.Module):
    """One head, by hand; (batch, position, hidden) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 3)
        self.key = nn.Linear(3, 3)
        self.smooth = nn.Softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 3
        assert x.is_floating_point()
        query, key = self.query(x), self.key(x)
        scores = query @ key.transpose(-1, -2) / x.shape[-1] ** 0.5
        mixed = attend(scores, x)
        first, second = (mixed + x).split([1, 2], dim=-1)
        return torch.cat([first, self.smooth(second)], dim=-1) + 1 - x


NAMES = ["transpose_0", "matmul_0", "div_0", "softmax_0", "matmul_1", "add_0", "split_0", "cat_0", "add_1", "sub_0"]


def by_hand(x: torch.Tensor, net: nn.Module, probabilities: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same as `Attention`, with its probabilities changed."""
    query, key = net.query(x), net.key(x)
    scores = query @ key.transpose(-1, -2) / 3**0.5
    mixed = probabilities(functional.softmax(scores, dim=-1)) @ x
    first, second = (mixed + x).split([1, 2], dim=-1)
    return torch.cat([first, functional.softmax(second, dim=-1)], dim=-1) + 1 - x


def model_of(*modules: nn.Module) -> NNsight:
    return NNsight(nn.Sequential(*modules))


def attention_model() -> NNsight:
    """The attention between two linear modules."""
    return model_of(nn.Linear(3, 3), Attention(), nn.Linear(3, 3))


def plain_probabilities(model: NNsight) -> torch.Tensor:
    """What the attention of :func:`attention_model` weighs with, of shape (batch, query, key)."""
    with model.trace(X):
        found = model[1].source.softmax_0.output.save()
    return found.value
