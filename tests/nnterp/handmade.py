"""A language model that somebody wrote by hand: no config, no class of transformers', no name that others use."""

from __future__ import annotations

import math

import torch
from torch import nn


class Looking(nn.Module):
    """Attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, positions, width = x.shape
        split = self.into(x).view(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(width // self.heads)
        ahead = torch.ones(positions, positions, dtype=torch.bool, device=x.device).triu(1)
        made = scores.masked_fill(ahead, -math.inf).softmax(-1) @ split[2]
        return self.out(made.transpose(1, 2).reshape(x.shape))


class Stage(nn.Module):
    """One layer; ``parallel`` and ``factor`` change how its parts are put together."""

    def __init__(self, width: int, heads: int, parallel: bool, factor: float) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.looking = Looking(width, heads)
        self.thinking = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.parallel, self.factor = parallel, factor

    def forward(self, x):
        seen = self.looking(self.one(x)) * self.factor
        if self.parallel:
            return x + seen + self.thinking(self.two(x)) * self.factor
        x = x + seen
        return x + self.thinking(self.two(x)) * self.factor


class Handmade(nn.Module):
    """Tokens in, a tuple out whose first entry are the logits."""

    def __init__(
        self,
        stages: int = 3,
        width: int = 24,
        heads: int = 3,
        parallel: bool = False,
        factor: float = 1.0,
        cap: float = 0,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(101, width), nn.Embedding(64, width)
        self.stages = nn.ModuleList(Stage(width, heads, parallel, factor) for _ in range(stages))
        self.last, self.speak = nn.LayerNorm(width), nn.Linear(width, 101, bias=False)
        self.cap = cap

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for stage in self.stages:
            x = stage(x)
        logits = self.speak(self.last(x))
        return (self.cap * torch.tanh(logits / self.cap) if self.cap else logits), None


def handmade(**options) -> Handmade:
    """One with numbers that no two of its norms share."""
    torch.manual_seed(0)
    model = Handmade(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()
