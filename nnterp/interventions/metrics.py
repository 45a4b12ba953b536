"""Metrics: one number for each prompt, from the model's logits.

metric = logit_difference(model, " Mary", " John")
metric = probability(model, " Mary")
metric = kl_divergence(clean_logits)
metric = loss(model, prompts)
metric = lambda logits: logits[:, -1].logsumexp(-1)         # any function like this will do

Sweeps take any callable from logits (prompt, position, vocab) to (prompt). The last position is that of a prompt's last
token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.prompts import token_rows
from nnterp.errors import UsageError

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = [
    "Answer",
    "check_gradients",
    "kl_divergence",
    "logit_difference",
    "loss",
    "measured",
    "Metric",
    "probability",
    "token_ids",
]

#: From logits (prompt, position, vocab) to one number for each prompt, (prompt).
Metric = Callable[[torch.Tensor], torch.Tensor]

#: A token as text or id, or one for each prompt.
Answer = str | int | Sequence[str | int] | torch.Tensor


def logit_difference(model: StandardizedTransformer, right: Answer, wrong: Answer) -> Metric:
    """The logit of one token after the prompt, minus that of another (Wang et al. 2022).

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> metric = logit_difference(model, " Mary", " John")
    >>> with model.trace("John and Mary went to the store. John handed the milk to"):
    ...     difference = metric(model.logits.value)
    >>> bool(difference > 0)
    True

    Args:
        model: whose tokens they are.
        right: the token that counts for, as text or id; or one for each prompt.
        wrong: the token that counts against, likewise.

    Raises:
        UsageError: a text is not one token of this model.
    """
    plus, minus = token_ids(model, right), token_ids(model, wrong)

    def difference(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1].float()
        return _at(last, plus) - _at(last, minus)

    return difference


def probability(model: StandardizedTransformer, token: Answer, log: bool = False) -> Metric:
    """The probability of a token after the prompt, 0 to 1.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> with model.trace("The Eiffel Tower is in the city of"):
    ...     paris = probability(model, " Paris")(model.logits.value)
    >>> bool(paris > 0.9)
    True

    Args:
        model: whose token it is.
        token: as text or id; or one for each prompt.
        log: give the natural logarithm of it instead.

    Raises:
        UsageError: a text is not one token of this model.
    """
    ids = token_ids(model, token)

    def of_token(logits: torch.Tensor) -> torch.Tensor:
        found = _at(logits[:, -1].float().log_softmax(-1), ids)
        return found if log else found.exp()

    return of_token


def kl_divergence(reference: torch.Tensor) -> Metric:
    """How far the prediction after the prompt is from a reference: KL(reference || prediction), in nats, 0 or more.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> with model.trace("The Eiffel Tower is in the city of"):
    ...     logits = model.logits.save()
    >>> bool(kl_divergence(logits.value)(logits.value).abs() < 1e-6)
    True

    Args:
        reference: logits of shape (prompt, position, vocab) or (prompt, vocab).

    Raises:
        UsageError: ``reference`` has another shape.
    """
    if reference.ndim not in (2, 3):
        raise UsageError(
            f"The reference is of shape {tuple(reference.shape)}: "
            "give logits, (prompt, position, vocab) or (prompt, vocab)."
        )
    last = reference.detach() if reference.ndim == 2 else reference.detach()[:, -1]
    expected = last.float().log_softmax(-1)

    def divergence(logits: torch.Tensor) -> torch.Tensor:
        found = logits[:, -1].float().log_softmax(-1)
        if found.shape != expected.shape:
            raise UsageError(
                f"The reference is for (prompt, vocab) = {tuple(expected.shape)}, the logits for {tuple(found.shape)}."
            )
        there = expected.to(found.device)
        return (there.exp() * (there - found)).sum(-1)

    return divergence


def loss(model: StandardizedTransformer, prompts: Sequence[str] | str | torch.Tensor) -> Metric:
    """The mean next-token loss of each prompt, in nats per token.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> prompt = "The Eiffel Tower is in the city of Paris"
    >>> with model.trace(prompt):
    ...     nats = loss(model, prompt)(model.logits.value)
    >>> nats.shape
    torch.Size([1])

    Args:
        model: whose tokens they are.
        prompts: the texts that are to be predicted, or token ids (prompt, position): of one length, of two tokens or
            more.

    Raises:
        UsageError: the prompts differ in length, or have no second token.
    """
    rows = token_rows(model.tokenizer, prompts, {})
    lengths = [len(row) for row in rows]
    if len(set(lengths)) != 1 or lengths[0] < 2:
        raise UsageError(f"The prompts have {lengths} tokens: the loss is for prompts of one length, 2 or more.")
    ids = torch.tensor(rows)

    def mean_loss(logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[:2] != ids.shape:
            raise UsageError(
                f"The loss is for (prompt, position) = {tuple(ids.shape)}, the logits for {tuple(logits.shape[:2])}."
            )
        found = logits[:, :-1].float().log_softmax(-1)
        return -found.gather(-1, ids[:, 1:, None].to(found.device))[..., 0].mean(-1)

    return mean_loss


def token_ids(model: StandardizedTransformer, answer: Answer) -> torch.Tensor:
    """The ids of an answer, (1) for all prompts or (prompt).

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> token_ids(model, [" Mary", 5]).shape
    torch.Size([2])

    Raises:
        UsageError: a text is not one token of this model, or an id is none of its vocabulary.
    """
    if isinstance(answer, torch.Tensor):
        given: list[Any] = torch.atleast_1d(answer).tolist()
    else:
        given = [answer] if isinstance(answer, (str, int)) else list(answer)
    return torch.tensor([_id(model, each) for each in given])


def _id(model: StandardizedTransformer, token: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool):
        if not 0 <= token < model.vocab_size:
            raise UsageError(f"There is no token {token}: give an id from 0 to {model.vocab_size - 1}.")
        return token
    if not isinstance(token, str) or model.tokenizer is None:
        raise UsageError(f"A token is given as its text, where the model has a tokenizer, or as its id, not {token!r}.")
    ids: list[int] = model.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        parts = [model.token_text(each) for each in ids]
        mend = "" if token.startswith(" ") else f" Within a text a word has its space before it: {' ' + token!r}."
        raise UsageError(f"{token!r} is not one token of this model, but {len(ids)}: {parts}.{mend}")
    return ids[0]


def _at(last: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """From (prompt, vocab) the entries of the ids, (prompt)."""
    if len(ids) not in (1, len(last)):
        raise UsageError(f"There are {len(ids)} answers for {len(last)} prompts: give one for all, or one for each.")
    return last.gather(-1, ids.to(last.device).expand(len(last))[:, None])[:, 0]


def check_gradients() -> None:
    """Say at once that no gradients can be had.

    Raises:
        UsageError: it is called inside ``torch.inference_mode()``, which cannot be left from within.
    """
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "Gradients are asked for inside torch.inference_mode(), where there are none: call it outside of that. "
            "Inside torch.no_grad() it works."
        )


def measured(metric: Metric, logits: torch.Tensor) -> torch.Tensor:
    """What a metric makes of logits (prompt, position, vocab): (prompt), float32, on their device.

    Raises:
        UsageError: it gives something else than one number for each prompt.
    """
    found = metric(logits)
    prompts = len(logits)
    if isinstance(found, torch.Tensor) and found.ndim == 0 and prompts == 1:
        found = found[None]
    if not isinstance(found, torch.Tensor) or found.shape != (prompts,):
        is_tensor = isinstance(found, torch.Tensor)
        got = f"a tensor of shape {tuple(found.shape)}" if is_tensor else f"a {type(found).__name__}"
        raise UsageError(
            f"The metric gave {got} for logits of shape {tuple(logits.shape)}, (prompt, position, vocab).\n"
            f"A metric gives one number for each prompt, a tensor of shape ({prompts},): "
            "the last position is logits[:, -1]."
        )
    return found.float()
