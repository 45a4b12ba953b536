"""Metrics against the same written out in numpy, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import UsageError
from nnterp.interventions import kl_divergence, logit_difference, loss, probability
from tests.matrix.models import Case


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(3, 5, 1634)


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_numbers(demo_gpt2: StandardizedTransformer, logits: torch.Tensor) -> None:
    array = logits.numpy()
    mary, john = (demo_gpt2.tokenizer.encode(text)[0] for text in (" Mary", " John"))
    for right, wrong, ids in (
        (" Mary", " John", [(mary, john)] * 3),
        ([mary, " John", 7], john, [(mary, john), (john, john), (7, john)]),
        (torch.tensor([1, 2, 3]), torch.tensor(4), [(1, 4), (2, 4), (3, 4)]),
    ):
        expected = [array[row, -1, plus] - array[row, -1, minus] for row, (plus, minus) in enumerate(ids)]
        np.testing.assert_allclose(logit_difference(demo_gpt2, right, wrong)(logits), expected, atol=1e-5)
    probs = np.exp(log_softmax(array)[:, -1, mary])
    np.testing.assert_allclose(probability(demo_gpt2, " Mary")(logits), probs, rtol=1e-4)
    np.testing.assert_allclose(probability(demo_gpt2, " Mary", log=True)(logits), np.log(probs), atol=1e-5)


def test_divergence(logits: torch.Tensor) -> None:
    other = torch.randn_like(logits)
    p, q = log_softmax(other.numpy())[:, -1], log_softmax(logits.numpy())[:, -1]
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(kl_divergence(other)(logits), expected, rtol=1e-5)
    np.testing.assert_allclose(kl_divergence(other[:, -1])(logits), expected, rtol=1e-5)
    with pytest.raises(UsageError, match=r"\(1, 1634\), the logits for \(3, 1634\)"):
        kl_divergence(other[:1])(logits)
    with pytest.raises(UsageError, match=r"of shape \(1634,\)"):
        kl_divergence(other[0, 0])


def test_loss_is_the_model_s_own() -> None:
    case = Case("llama")
    with torch.no_grad():
        for row in case.ids:
            own = case.module(row[None], labels=row[None]).loss
            found = loss(case.model, row[None])(case.module(row[None]).logits)
            assert torch.allclose(found, own[None], atol=1e-5)
    with pytest.raises(UsageError, match=r"\(2, 12\), the logits for \(1, 12\)"):
        loss(case.model, case.ids)(case.logits[:1])
    with pytest.raises(UsageError, match=r"have \[1\] tokens"):
        loss(case.model, case.ids[:1, :1])


def test_half_precision_is_measured_in_float32(demo_gpt2: StandardizedTransformer, logits: torch.Tensor) -> None:
    half = logits.bfloat16()
    for metric in (logit_difference(demo_gpt2, 3, 4), probability(demo_gpt2, 5), kl_divergence(logits)):
        assert metric(half).dtype == torch.float32
        assert torch.equal(metric(half), metric(half.float()))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("Mary and", r"'Mary and' is not one token of this model, but .* has its space before it: ' Mary and'"),
        ("", "'' is not one token of this model, but 0"),
        (1634, "There is no token 1634: give an id from 0 to 1633"),
        (-1, "There is no token -1"),
        (2.5, "not 2.5"),
    ],
)
def test_what_is_no_token(demo_gpt2: StandardizedTransformer, answer: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probability(demo_gpt2, [answer])


def test_as_many_answers_as_prompts(demo_gpt2: StandardizedTransformer, logits: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="There are 2 answers for 3 prompts"):
        probability(demo_gpt2, [1, 2])(logits)


def test_a_model_without_a_tokenizer_takes_ids() -> None:
    model = Case("llama").model
    with pytest.raises(UsageError, match="where the model has a tokenizer, or as its id, not ' Mary'"):
        probability(model, " Mary")
    assert probability(model, 3)(torch.zeros(1, 1, 10)).item() == pytest.approx(0.1)
