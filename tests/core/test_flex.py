"""torch's flex attention, compiled and not: what is inside is shown, and what it gives stays to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nnsight_core import NNsight
from nnsight_core.compiled import Eager

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS, SHARED, SIZE, LENGTH = 4, 2, 8, 6
X = torch.randn(2, LENGTH, HEADS * SIZE, generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) > 0


def doubling(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """A compiler whose code gives twice what it should, so that one sees whether it has run."""
    return lambda *args: tuple(2 * each for each in graph(*args))


class Attention(nn.Module):
    """Causal, with padding, shared keys, scores that are capped, and a bias for each head and distance."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="flex_attention")
        self.maps = nn.ModuleList(nn.Linear(HEADS * SIZE, heads * SIZE) for heads in (HEADS, SHARED, SHARED))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.flex: Any = torch.compile(flex_attention) if compiled else flex_attention

    def score(self, score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        """What becomes of one score."""
        return 2 * torch.tanh(score / 2) + self.bias[head][query][key] + self.bias[head, key, query]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, position, hidden)."""
        query, key, value = (each(hidden).unflatten(-1, (-1, SIZE)).transpose(1, 2) for each in self.maps)
        mask = create_block_mask(
            lambda b, h, q, k: (q >= k) & REAL[b, k], len(hidden), None, LENGTH, LENGTH, device="cpu"
        )
        output = self.flex(query, key, value, score_mod=self.score, block_mask=mask, enable_gqa=True, scale=0.3)
        return output.transpose(1, 2).flatten(2).tanh()

    def by_hand(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, probabilities, and what heads give, without anything of flex attention."""
        query, key, value = (each(hidden).unflatten(-1, (-1, SIZE)).transpose(1, 2) for each in self.maps)
        key, value = (each.repeat_interleave(HEADS // SHARED, 1) for each in (key, value))
        scores = 2 * torch.tanh(query @ key.mT * 0.3 / 2) + self.bias + self.bias.mT
        scores = scores.masked_fill(~(torch.ones(LENGTH, LENGTH).tril() > 0) | ~REAL[:, None, None], -torch.inf)
        probabilities = scores.softmax(-1).nan_to_num(0.0)
        return scores, probabilities, probabilities @ value


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    assert Eager._count == 0
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [True, False])
def test_scores_and_probabilities_are_shown_and_nothing_changes(compiled: bool) -> None:
    net = nn.Sequential(Attention(compiled))
    model = NNsight(net)
    with torch.compiler.set_stance("default", force_backend="eager" if compiled else None):
        plain = net(X)
        with model.trace(X):
            operation = model[0].source.flex_attention_0
            scores, probabilities = operation.scores.save(), operation.probabilities.save()
            heads = operation.output[0].save()
            output = model.output.save()
        assert "flex_attention_0" in [each.name for each in _listed(model)]
    for seen, expected in zip((scores, probabilities, heads), net[0].by_hand(X), strict=True):
        torch.testing.assert_close(seen.value, expected)
    assert torch.equal(output.value, plain)


def _listed(model: NNsight) -> Any:
    with model.trace(X):
        return list(model[0].source)


def test_the_compiled_kernel_is_the_one_that_runs() -> None:
    net = nn.Sequential(Attention(True))
    model = NNsight(net)
    uncompiled = nn.Sequential(Attention(False))
    uncompiled.load_state_dict(net.state_dict())
    with torch.compiler.set_stance("default", force_backend=doubling):
        plain = net(X)
        with model.trace(X):
            _ = model[0].source.flex_attention_0.probabilities
            output = model.output.save()
        with model.trace(X):
            query = model[0].source.flex_attention_0.input[0][0].save()
            heads = model[0].source.flex_attention_0.output[0].save()
        with model.trace(X):
            (query, *rest), options = model[0].source.flex_attention_0.input
            model[0].source.flex_attention_0.input = (query * 2, *rest), options
            other = model[0].source.flex_attention_0.output[0].save()
        again = net(X)
    assert torch.equal(output.value, plain) and torch.equal(again, plain)
    assert not torch.allclose(plain, uncompiled(X))
    torch.testing.assert_close(heads.value, 2 * net[0].by_hand(X)[2])
    assert not torch.allclose(other.value, heads.value)


@pytest.mark.parametrize("what", ["scores", "probabilities"])
def test_what_is_set_changes_those_queries_alone(what: str) -> None:
    net = nn.Sequential(Attention(True))
    model = NNsight(net)
    _, own, _ = net[0].by_hand(X)
    with torch.compiler.set_stance("default", force_backend="eager"):
        with model.trace(X):
            before = model[0].source.flex_attention_0.output[0].save()
        with model.trace(X):
            operation = model[0].source.flex_attention_0
            if what == "scores":
                operation.scores[1, 2, 4, :2] = -torch.inf
            else:
                operation.probabilities[1, 2, 4, :2] = 0
            after = operation.output[0].save()
            output = model.output.save()
    changed = torch.zeros(2, HEADS, LENGTH, dtype=torch.bool)
    changed[1, 2, 4] = True
    assert torch.equal((after.value != before.value).any(-1), changed)
    weights = own[1, 2, 4].clone()
    weights[:2] = 0
    weights = weights / weights.sum() if what == "scores" else weights
    values = net[0].maps[2](X).unflatten(-1, (-1, SIZE)).transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close(after.value[1, 2, 4], weights @ values[1, 2])
    assert torch.equal(output.value, after.value.transpose(1, 2).flatten(2).tanh())


def test_the_refusal_of_gradients_says_what_else_there_is() -> None:
    model = NNsight(nn.Sequential(Attention(False)))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="'sdpa' or 'eager'"), model.trace(X):
        model[0].output.save()


def test_an_error_on_the_way_leaves_compiled_code_in_use() -> None:
    net = nn.Sequential(Attention(True))
    model = NNsight(net)
    with torch.compiler.set_stance("default", force_backend=doubling):
        plain = net(X)
        with pytest.raises(KeyError), model.trace(X):
            _ = model[0].source.flex_attention_0.probabilities
            raise KeyError
        with model.trace(X) as tracer:
            _ = model[0].source.flex_attention_0.scores
            tracer.stop()
        assert Eager._count == 0
        assert torch.equal(net(X), plain)
