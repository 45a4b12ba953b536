"""Attributions to tokens against autograd on the plain model, called with embeddings of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nnterp import StandardizedTransformer
from nnterp.errors import UsageError
from nnterp.interventions import gradient_x_input, integrated_gradients
from tests.families import tiny_model
from tests.small_tokenizers import byte_tokenizer

FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "opt", "falcon_h1")
PROMPTS = ["some text", "short", "and one more text"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[StandardizedTransformer, PreTrainedModel]:
    plain = tiny_model(request.param)
    return StandardizedTransformer(plain, tokenizer=byte_tokenizer()), plain


def by_hand(
    plain: PreTrainedModel, ids: torch.Tensor, factor: float, metric: Any, baseline: Any = 0.0
) -> tuple[torch.Tensor, ...]:
    """Embeddings, their gradient and the metric of one prompt, ``factor`` of the way from the baseline."""
    kept: list[torch.Tensor] = []

    def scale(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach() - baseline)
        kept.append((baseline + factor * kept[0]).requires_grad_())
        return kept[-1]

    handle = plain.get_input_embeddings().register_forward_hook(scale)
    value = metric(plain(ids).logits)[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(value, kept[1])
    return kept[0][0], gradient[0], value.detach()


def ids_of(model: StandardizedTransformer, prompt: str) -> torch.Tensor:
    return model.tokenizer(prompt, return_tensors="pt").input_ids


def test_gradient_x_input_is_what_autograd_gives_each_prompt_alone(
    pair: tuple[StandardizedTransformer, PreTrainedModel],
) -> None:
    model, plain = pair
    found = gradient_x_input(model, PROMPTS, batch_size=2)
    longest = max(map(len, PROMPTS))
    assert found.shape == (3, longest)
    for row, prompt in zip(found, PROMPTS, strict=True):
        embeddings, gradient, _ = by_hand(plain, ids_of(model, prompt), 1, lambda logits: logits[:, -1].amax(-1))
        assert torch.equal(row[: longest - len(prompt)], torch.zeros(longest - len(prompt)))
        assert torch.allclose(row[-len(prompt) :], (embeddings * gradient).sum(-1), atol=1e-4)


def test_integrated_gradients_are_the_mean_gradient_on_a_fine_grid(
    pair: tuple[StandardizedTransformer, PreTrainedModel],
) -> None:
    model, plain = pair

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 7] - logits[:, -2, 9]

    found = integrated_gradients(model, PROMPTS[1], metric, steps=60)
    grid = 150
    mean = plain.get_input_embeddings()(torch.arange(model.vocab_size)).detach().mean(0)
    ids = ids_of(model, PROMPTS[1])
    rows = [by_hand(plain, ids, (step + 0.5) / grid, metric, mean) for step in range(grid)]
    expected = (rows[0][0] * torch.stack([row[1] for row in rows]).mean(0)).sum(-1)
    assert torch.allclose(found[0], expected, rtol=0.02, atol=2e-3)


def test_integrated_gradients_sum_to_what_the_embeddings_bring(
    pair: tuple[StandardizedTransformer, PreTrainedModel],
) -> None:
    model, plain = pair
    baseline = torch.linspace(-0.5, 0.5, model.hidden_size)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 7]

    found = integrated_gradients(model, PROMPTS[0], metric, baseline, steps=60, batch_size=7)
    ids = ids_of(model, PROMPTS[0])
    with torch.no_grad():
        whole = metric(plain(ids).logits)
        handle = plain.get_input_embeddings().register_forward_hook(lambda _, __, out: baseline.expand_as(out))
        start = metric(plain(ids).logits)
        handle.remove()
    assert torch.allclose(found.sum(), whole - start, atol=2e-3)


def test_a_sum_that_is_off_is_said() -> None:
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=byte_tokenizer())
    with pytest.warns(UserWarning, match="2 steps are too few for this baseline"):
        integrated_gradients(model, "some text", baseline=torch.zeros(model.hidden_size), steps=2)


def test_nothing_is_left_on_frozen_or_trainable_parameters() -> None:
    for frozen in (True, False):
        plain = tiny_model("llama").requires_grad_(not frozen)
        model = StandardizedTransformer(plain, tokenizer=byte_tokenizer())
        with torch.no_grad():
            scores = gradient_x_input(model, "text")
        assert scores.abs().sum() > 0
        assert not scores.requires_grad
        assert all(each.grad is None for each in plain.parameters())


def test_on_the_shipped_model_the_country_decides_its_capital() -> None:
    model = StandardizedTransformer("demo-gpt2")
    prompt = "The capital of Japan is"
    tokyo, paris = (model.tokenizer.encode(city)[0] for city in (" Tokyo", " Paris"))
    scores = integrated_gradients(model, prompt, lambda logits: logits[:, -1, tokyo] - logits[:, -1, paris])[0]
    tokens = [model.token_text(each) for each in model.tokenizer.encode(prompt)]
    assert tokens[int(scores.argmax())] == " Japan"


def test_mistakes_are_named(pair: tuple[StandardizedTransformer, PreTrainedModel]) -> None:
    model, _ = pair
    with pytest.raises(UsageError, match="at least one prompt"):
        gradient_x_input(model, [])
    with pytest.raises(UsageError, match="1 or more"):
        integrated_gradients(model, "a", steps=0)
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        integrated_gradients(model, "a", baseline=torch.ones(3))
    with pytest.raises(UsageError, match="one number for each prompt"):
        gradient_x_input(model, ["a", "b"], lambda logits: logits[:, -1])
    with pytest.raises(UsageError, match="a float"):
        gradient_x_input(model, "a", lambda logits: 1.0)
