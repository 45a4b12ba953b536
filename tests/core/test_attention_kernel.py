"""Inside torch's fused attention: scores and probabilities are those of torch's own composite, read and set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnsight_core import NNsight, OutOfOrderError, SourceError
from nnsight_core import operations as core_operations
from nnsight_core.kernels import run_open

ATTEND = functional.scaled_dot_product_attention
QUERIES, KEYS = 3, 5


def heads(count: int = 4, positions: int = KEYS, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, positions, 6, generator=generator).to(dtype)


ALLOWED = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()
ADDED = torch.linspace(-3, 3, 2 * 1 * QUERIES * KEYS).reshape(2, 1, QUERIES, KEYS)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.7},
    "allowed": {"attn_mask": ALLOWED},
    "added": {"attn_mask": ADDED},
    "minus infinity": {"attn_mask": torch.zeros(ALLOWED.shape).masked_fill(~ALLOWED, -torch.inf)},
    "the least number": {"attn_mask": torch.zeros(ALLOWED.shape).masked_fill(~ALLOWED, torch.finfo().min)},
    "shared keys": {"enable_gqa": True, "is_causal": True},
}


def call(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A call of the kernel: its arguments and keyword arguments."""
    kwargs = dict(CALLS[name])
    shared = 2 if kwargs.get("enable_gqa") else 4
    if "attn_mask" in kwargs and kwargs["attn_mask"].dtype != torch.bool:
        kwargs["attn_mask"] = kwargs["attn_mask"].to(dtype)
    args = (heads(4, QUERIES, dtype, 1), heads(shared, KEYS, dtype, 2), heads(shared, KEYS, dtype, 3))
    return args, kwargs


def opened(
    args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], **changes: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What an opened call gives, and what it shows; ``changes`` are made to what is shown."""
    shown = {}

    def show(name: str, value: torch.Tensor) -> tuple[torch.Tensor] | None:
        shown[name] = value
        if name not in changes:
            return None
        shown[name] = changes[name](value)
        return (shown[name],)

    return run_open(ATTEND, args, kwargs, show), shown


def composite(args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch's own composite of the kernel gives, and its probabilities."""
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        kwargs = {**kwargs, "attn_mask": torch.zeros(mask.shape).to(args[0]).masked_fill(~mask, -torch.inf)}
    result: tuple[torch.Tensor, torch.Tensor] = torch._scaled_dot_product_attention_math(*args, **kwargs)
    return result


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_probabilities_are_those_of_torchs_composite(name: str, dtype: torch.dtype) -> None:
    args, kwargs = call(name, dtype)
    result, shown = opened(args, kwargs)
    assert torch.equal(result, ATTEND(*args, **kwargs))
    if dtype != torch.float64:
        args = tuple(each.float() for each in args)
        kwargs = {key: each.float() if getattr(each, "dtype", 0) == dtype else each for key, each in kwargs.items()}
    expected = composite(args, kwargs)[1]
    assert shown["probabilities"].dtype == expected.dtype
    assert (shown["probabilities"] - expected).abs().max() < 1e-6
    seen = (shown["scores"] > -torch.inf).any(-1)
    sums = shown["probabilities"].sum(-1)
    assert torch.allclose(sums[seen], torch.ones(()).to(sums.dtype))
    assert not sums[~seen].any()
    assert torch.allclose(shown["scores"].softmax(-1)[seen], shown["probabilities"][seen])


@pytest.mark.parametrize("name", CALLS)
def test_what_is_set_changes_its_queries_alone(name: str) -> None:
    args, kwargs = call(name)
    before = ATTEND(*args, **kwargs)

    def change(probabilities: torch.Tensor) -> torch.Tensor:
        changed = probabilities.clone()
        changed[1, 2, 2] = torch.tensor([0.5, 0.0, -1.0, 2.0, 0.25])
        return changed

    result, shown = opened(args, kwargs, probabilities=change)
    values = args[2].repeat_interleave(4 // args[2].shape[1], 1)
    assert torch.allclose(result[1, 2, 2], shown["probabilities"][1, 2, 2] @ values[1, 2], atol=1e-6)
    same = torch.ones(before.shape[:3], dtype=torch.bool)
    same[1, 2, 2] = False
    assert torch.equal(result[same], before[same])


@pytest.mark.parametrize("name", CALLS)
def test_scores_that_are_set_make_the_probabilities(name: str) -> None:
    args, kwargs = call(name)
    bias = torch.zeros(2, 4, QUERIES, KEYS)
    bias[0, 1, 2, 1] = 1.5
    result, shown = opened(args, kwargs, scores=lambda scores: scores + bias)
    _, plain = opened(args, kwargs)
    # The same by the kernel itself, with what its mask adds.
    added = torch.zeros(()).masked_fill(plain["scores"] == -torch.inf, -torch.inf) + bias
    if name == "added" or name == "the least number":
        added = added + kwargs["attn_mask"]
    values = [each.repeat_interleave(4 // each.shape[1], 1) for each in args]
    expected = ATTEND(*values, attn_mask=added, scale=kwargs.get("scale"))
    assert (result - expected).abs().max() < 1e-6
    assert not torch.equal(shown["probabilities"][0, 1, 2], plain["probabilities"][0, 1, 2])
    assert torch.equal(result[1], ATTEND(*args, **kwargs)[1])


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_the_kernels_and_go_by_the_probabilities(name: str) -> None:
    args, kwargs = call(name, torch.float64)
    leaves = [each.requires_grad_() for each in args]
    result, shown = opened(args, kwargs)
    assert torch.equal(result, ATTEND(*args, **kwargs))
    weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).reshape(result.shape)
    ours = torch.autograd.grad((result * weights).sum(), [*leaves, shown["probabilities"]], retain_graph=True)
    # The composite's, for the fused kernel's own backward gives keys too much where all have the least number.
    theirs = torch.autograd.grad((composite(args, kwargs)[0] * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=False):
        assert one.isfinite().all()
        assert (one - other).abs().max() < 1e-6
    values = args[2].repeat_interleave(4 // args[2].shape[1], 1)
    assert torch.allclose(ours[3], weights @ values.mT)


def test_gradients_of_what_is_set_are_those_of_numerical_differences() -> None:
    args, kwargs = call("causal", torch.float64)
    factor = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).reshape(4, 1, 1).requires_grad_()

    def attend(query: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return opened((query, *args[1:]), kwargs, probabilities=lambda each: each * factor)[0]

    assert torch.autograd.gradcheck(attend, (args[0].requires_grad_(), factor))


def test_autocast_is_what_the_kernel_sees() -> None:
    args, kwargs = call("causal")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, shown = opened(args, kwargs)
        assert torch.equal(result, ATTEND(*args, **kwargs))
    expected = composite(tuple(each.bfloat16().float() for each in args), kwargs)[1]
    assert (shown["probabilities"] - expected).abs().max() < 1e-6


def test_another_shape_is_refused() -> None:
    args, kwargs = call("plain")
    with pytest.raises(ValueError, match=r"scores of attention are of shape \(2, 4, 3, 5\)"):
        opened(args, kwargs, scores=lambda scores: scores[0])


# In a trace.


class Block(nn.Module):
    """Two calls of the kernel with two heads, and a linear map between."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.within = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        first = ATTEND(heads, heads, heads, is_causal=True, dropout_p=dropout)
        hidden = self.within(first.transpose(1, 2).flatten(2))
        again = hidden.unflatten(-1, (2, 3)).transpose(1, 2)
        return ATTEND(again, heads, heads).transpose(1, 2).flatten(2)


X = torch.linspace(-2, 2, 3 * 4 * 6).sin().reshape(3, 4, 6)


@pytest.fixture
def model() -> NNsight:
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(6, 6), Block(), nn.Linear(6, 6)))


def test_each_call_has_its_own_in_order(model: NNsight) -> None:
    with torch.no_grad():
        plain = model._module(X)
    with torch.no_grad(), model.trace(X):
        source = model[1].source
        query = source.scaled_dot_product_attention_0.input[0][0]
        scores = source.scaled_dot_product_attention_0.scores
        first = source.scaled_dot_product_attention_0.probabilities.save()
        assert torch.allclose(scores.softmax(-1), first)
        assert torch.allclose(first @ query, source.scaled_dot_product_attention_0.output, atol=1e-6)
        second = source.scaled_dot_product_attention_1.probabilities.save()
        assert [each.name for each in source if "attention" in each.name] == [
            "scaled_dot_product_attention_0",
            "scaled_dot_product_attention_1",
        ]
        result = model.output.save()
    assert first.shape == second.shape == (3, 2, 4, 4)
    assert not torch.allclose(first, second)
    assert torch.equal(result, plain)


def test_nothing_is_opened_that_nobody_asks_for(model: NNsight, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return run_open(*args)

    monkeypatch.setattr(core_operations, "run_open", counted)
    with model.trace(X):
        _ = model[1].source.scaled_dot_product_attention_0.output
        _ = model[1].source.scaled_dot_product_attention_1.output
    assert not calls
    with model.trace(X):
        _ = model[1].source.scaled_dot_product_attention_1.probabilities
    assert len(calls) == 1


def test_what_comes_too_late_says_so(model: NNsight) -> None:
    with pytest.raises(OutOfOrderError, match=r"attention_0\.scores was asked for after"), model.trace(X):
        operation = model[1].source.scaled_dot_product_attention_0
        _ = operation.probabilities
        _ = operation.scores
    with pytest.raises(OutOfOrderError, match=r"attention_0\.probabilities was asked for after"), model.trace(X):
        _ = model[1].within.output
        _ = model[1].source.scaled_dot_product_attention_0.probabilities


def test_a_call_that_is_half_way_can_be_joined(model: NNsight) -> None:
    with torch.no_grad(), model.trace(X):
        expected = model[1].source.scaled_dot_product_attention_1.probabilities.save()
    with torch.no_grad(), model.trace(X):
        _ = model[1].within.output
        found = model[1].source.scaled_dot_product_attention_1.probabilities.save()
    assert torch.equal(found, expected)


def test_rows_of_inputs_are_their_own(model: NNsight) -> None:
    with torch.no_grad(), model.trace(X):
        expected = model[1].source.scaled_dot_product_attention_0.probabilities.save()
        plain = model.output.save()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            one = model[1].source.scaled_dot_product_attention_0.probabilities.save()
            first = model.output.save()
        with tracer.invoke(X[1:]):
            operation = model[1].source.scaled_dot_product_attention_0
            two = operation.scores.save()
            operation.probabilities[:, 1] = 0
            second = model.output.save()
    assert torch.equal(one, expected[:1])
    assert torch.allclose(two.softmax(-1), expected[1:])
    assert torch.equal(first, plain[:1])
    assert not torch.allclose(second, plain[1:])


def test_a_pass_without_numbers_shows_shapes(model: NNsight) -> None:
    with model.scan(X):
        operation = model[1].source.scaled_dot_product_attention_1
        shapes = tuple(operation.scores.shape), tuple(operation.probabilities.shape), tuple(operation.output.shape)
    assert shapes == ((3, 2, 4, 4), (3, 2, 4, 4), (3, 2, 4, 3))


def test_an_edit_stays(model: NNsight) -> None:
    with torch.no_grad(), model.trace(X):
        model[1].source.scaled_dot_product_attention_0.probabilities[:, 0] *= 0.5
        expected = model.output.save()
    with model.edit() as edited:
        edited[1].source.scaled_dot_product_attention_0.probabilities[:, 0] *= 0.5
    with torch.no_grad(), edited.trace(X):
        result = edited.output.save()
    assert torch.equal(result, expected)


def test_what_is_dropped_out_cannot_be_told() -> None:
    model = NNsight(nn.Sequential(Block(dropout=0.25)).train())
    with pytest.raises(SourceError, match=r"dropout_p=0\.25.*\n.*test_attention_kernel.py") as caught, model.trace(X):
        _ = model[0].source.scaled_dot_product_attention_0.probabilities
    assert "model.eval()" in str(caught.value)
    model._module.eval()
    with model.trace(X):
        found = model[0].source.scaled_dot_product_attention_1.probabilities.save()
    assert found.shape == (3, 2, 4, 4)


def test_other_operations_have_none() -> None:
    model = NNsight(nn.Sequential(Block()))
    with pytest.raises(SourceError, match="transpose_0 has no scores"), model.trace(X):
        _ = model[0].source.transpose_0.scores
