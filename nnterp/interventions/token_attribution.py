"""Which tokens of a prompt does a prediction rest on? Gradients with respect to the token embeddings.

gradient_x_input(model, "The Eiffel Tower is in the city of")         # one backward pass, (prompt, position)
integrated_gradients(model, "The Eiffel Tower is in the city of")     # sums to what the embeddings bring

Gradient x input is a first-order estimate (Shrikumar et al. 2016, "Not Just a Black Box",
https://arxiv.org/abs/1605.01713). Integrated gradients go from a baseline to the embeddings and add up exactly
(Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", https://arxiv.org/abs/1703.01365).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import torch

from nnterp.errors import UsageError
from nnterp.interventions.batching import as_prompts, in_batches
from nnterp.interventions.metrics import Metric, check_gradients, measured

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["gradient_x_input", "integrated_gradients", "mean_embedding"]

#: How many tokens are embedded at once, and in rows of how many.
_TOKENS_AT_ONCE, _ROW = 8192, 16


def gradient_x_input(
    model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    metric: Metric | None = None,
    batch_size: int = 32,
) -> torch.Tensor:
    """Each token's embedding times the gradient of the metric with respect to it.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> scores = gradient_x_input(model, ["The Eiffel Tower is in the city of", "The capital of Japan is"])
    >>> scores.shape[0]
    2

    The parameters' own ``.grad`` stay as they are, and gradients may be off around the call.

    Args:
        model: the model.
        prompts: one prompt or several.
        metric: what is explained: a function from logits, (prompt, position, vocab), to one number for each prompt. The
            logit of the token that the model finds most probable after each prompt if None.
        batch_size: how many prompts go through the model at once.

    Returns:
        scores of shape (prompt, position), float32 on the CPU, in units of the metric. Prompts are padded on the left
        to the longest of all, and where there is no token the score is 0.

    Raises:
        UsageError: there is no prompt, or the metric gives something else than one number for each prompt.
        InputError: a prompt has no token, or more than the model has positions.
        CannotError: the family has no token embeddings.
    """
    check_gradients()
    rows: list[torch.Tensor] = []
    for batch in map(list, in_batches(as_prompts(prompts), batch_size, "gradient x input")):
        embeddings, mask = _embeddings(model, batch)
        gradient = _gradients(model, batch, embeddings, metric or _top)
        rows += list(((embeddings * gradient).sum(-1) * mask).float().cpu())
    return _padded(rows)


def integrated_gradients(
    model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    metric: Metric | None = None,
    baseline: torch.Tensor | None = None,
    steps: int = 32,
    batch_size: int = 32,
) -> torch.Tensor:
    """The gradients along the straight way from a baseline to the embeddings, times that way.

    The scores of a prompt sum to its metric minus the metric at the baseline. The integral is a Gauss-Legendre sum,
    which is exact for polynomials up to degree ``2 * steps - 1``. Where it is off by more than 5 % of the difference, a
    warning says so: then ``steps`` are too few, or the model jumps on the way. Models with RMSNorm do so near a
    baseline of zeros, and those that route tokens to experts wherever the routing changes.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> integrated_gradients(model, "The capital of Japan is", steps=8).shape[0]
    1

    Args:
        model: the model.
        prompts: one prompt or several.
        metric: as for :func:`gradient_x_input`; the token it takes by default is the one after the whole prompt.
        baseline: the embedding to start from at every position, (hidden); the mean over the vocabulary if None.
        steps: at how many points of the way the gradient is taken.
        batch_size: how many of these points go through the model at once.

    Returns:
        scores of shape (prompt, position), as :func:`gradient_x_input` gives them.

    Raises:
        UsageError: there is no prompt, ``steps`` is below 1, the baseline is of another shape, or the metric gives
            something else than one number for each prompt.
        InputError: a prompt has no token, or more than the model has positions.
        CannotError: the family has no token embeddings.
    """
    check_gradients()
    if steps < 1:
        raise UsageError(f"steps={steps} gives no point to take the gradient at: give 1 or more.")
    points, weights = numpy.polynomial.legendre.leggauss(steps)
    places, shares = torch.tensor((points + 1) / 2), torch.tensor(weights / 2)
    rows: list[torch.Tensor] = []
    given = as_prompts(prompts)
    baseline = mean_embedding(model) if baseline is None else baseline
    for (prompt,) in in_batches(given, 1, "integrated gradients", "prompt"):
        embeddings, _ = _embeddings(model, [prompt])
        start = _baseline(baseline, embeddings)
        explained = metric or _logit_of(model, prompt)
        total = torch.zeros_like(embeddings[0])
        for place, share in zip(places.split(batch_size), shares.split(batch_size), strict=True):
            way = start + place.to(embeddings)[:, None, None] * (embeddings - start)
            gradients = _gradients(model, [prompt] * len(place), way, explained)
            total += torch.einsum("sph,s->ph", gradients, share.to(gradients))
        rows.append(((embeddings - start)[0] * total).sum(-1).float().cpu())
        _check_sum(model, prompt, float(rows[-1].sum()), torch.cat([start, embeddings]), explained, steps)
    return _padded(rows)


def _embeddings(model: StandardizedTransformer, prompts: list[str] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts' embeddings, (prompt, position, hidden), and 1 where there is a token, (prompt, position)."""
    with torch.no_grad(), model.trace(prompts) as tracer:
        mask = model.attention_mask.value
        embeddings = model.token_embeddings.save()
        tracer.stop()
    return embeddings.value, mask


def _gradients(
    model: StandardizedTransformer, prompts: list[str], embeddings: torch.Tensor, metric: Metric
) -> torch.Tensor:
    """The metric's gradient where the model starts from ``embeddings``, and of their shape."""
    with torch.enable_grad(), model.trace(prompts) as tracer:
        leaf = embeddings.detach().clone().requires_grad_()
        model.token_embeddings = leaf
        found = measured(metric, model.logits.value)
        tracer.stop()
        # Not backward(), which would add to the gradients of the parameters as well.
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return gradient


def _top(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].amax(-1)


def _logit_of(model: StandardizedTransformer, prompt: str) -> Metric:
    """The logit of the token that the model gives the prompt itself, wherever on the way the embeddings are."""
    with torch.no_grad(), model.trace(prompt):
        token = model.logits[0, -1].argmax().save()
    index = int(token)
    return lambda logits: logits[:, -1, index]


def mean_embedding(model: StandardizedTransformer) -> torch.Tensor:
    """The mean of the embeddings of all tokens of the vocabulary, (hidden): a token that says nothing."""
    total = torch.zeros(model.hidden_size)
    for ids in torch.arange(model.vocab_size).split(_TOKENS_AT_ONCE):
        # In short rows, for a model may have few positions; what is left over stands in a row of its own.
        whole = len(ids) // _ROW * _ROW
        for rows in (ids[:whole].view(-1, _ROW), ids[whole:].view(1, -1)):
            if rows.numel():
                total += _embeddings(model, rows)[0].float().sum((0, 1)).cpu()
    return total / model.vocab_size


def _check_sum(
    model: StandardizedTransformer, prompt: str, total: float, ends: torch.Tensor, metric: Metric, steps: int
) -> None:
    with torch.no_grad(), model.trace([prompt] * 2):
        model.token_embeddings = ends
        start, end = measured(metric, model.logits.value).tolist()
    if abs(total - (end - start)) > 0.05 * abs(end - start) + 1e-3:
        warnings.warn(
            f"The integrated gradients of {prompt!r} sum to {total:.4g}, and the metric goes from {start:.4g} to "
            f"{end:.4g}: {steps} steps are too few for this baseline. Give more steps, or another baseline.",
            stacklevel=3,
        )


def _baseline(given: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    size = embeddings.shape[-1]
    if given.shape != (size,):
        raise UsageError(f"The baseline is of shape {tuple(given.shape)}; an embedding here is of shape ({size},).")
    return given.to(embeddings).expand_as(embeddings)


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
