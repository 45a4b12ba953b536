"""What torch's fused attentions compute on their way and show nobody: the scores of keys, and the probabilities.

The kernel runs all the same, and what it gives stays to the last bit where nobody changes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.flex import FLEX, FlexCall
from nnsight_core.kernel_call import KernelCall
from nnsight_core.values import first_tensor, with_first_tensor

#: The operations that have values inside, and how these are called, in the order in which they are made.
INNER = {"scaled_dot_product_attention": ("scores", "probabilities"), FLEX: ("scores", "probabilities")}

#: Called with the name of a value inside and the value; gives its replacement in a one-tuple, or None for no change.
Show = Callable[[str, torch.Tensor], "tuple[Any] | None"]


@dataclass(frozen=True)
class Shut:
    """Stands for a value inside a call that cannot be told; says why."""

    why: str


def why_shut(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the values inside a call of an attention kernel cannot be told; None if they can.

    >>> heads = torch.zeros(1, 2, 3, 4)
    >>> why_shut(torch.nn.functional.scaled_dot_product_attention, (heads, heads, heads), {"dropout_p": 0.1})
    'the kernel drops out probabilities at random (dropout_p=0.1) and does not say which; model.eval() turns that off.'
    """
    call = _call_of(func, args, kwargs)
    if call.dropout_p > 0:
        what = f"drops out probabilities at random (dropout_p={call.dropout_p}) and does not say which"
        return f"the kernel {what}; model.eval() turns that off."
    if any(each.is_nested for each in (call.query, call.key, call.value)):
        return "its heads are nested tensors, which have no one shape."
    return None


def run_open(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], show: Show) -> Any:
    """What ``func``, one of the kernels of `INNER`, gives for a call, with ``show`` told of what is inside.

    Queries whose probabilities stay as they are get what the kernel gives them. Where gradients are wanted they go by
    way of scores and probabilities.

    >>> attention = torch.nn.functional.scaled_dot_product_attention
    >>> query, key, value = torch.randn(3, 1, 2, 5, 4).unbind()
    >>> shown = {}
    >>> result = run_open(attention, (query, key, value), {}, lambda name, it: shown.update({name: it}))
    >>> torch.equal(result, attention(query, key, value))
    True
    >>> torch.allclose(shown["probabilities"] @ value, result, atol=1e-6)
    True

    Raises:
        ValueError: ``show`` gives something of another shape.
    """
    call = _call_of(func, args, kwargs)
    with call.precisely():
        scores = call.scores()
        own = _probabilities(scores)
    given = show("scores", scores)
    probabilities = own
    if given is not None:
        with call.precisely():
            probabilities = _probabilities(_like(scores, given[0], "scores"))
    changed = show("probabilities", probabilities)
    if changed is not None:
        probabilities = _like(probabilities, changed[0], "probabilities")
    given_by_kernel = func(*args, **kwargs)
    wants_gradient = torch.is_grad_enabled() and probabilities.requires_grad
    if given is None and changed is None and not wants_gradient:
        return given_by_kernel
    result = first_tensor(given_by_kernel)
    with call.precisely():
        weighted = (probabilities @ call.values()).to(result.dtype)
    queries = (probabilities != own).any(-1, keepdim=True)
    if wants_gradient:
        kept: torch.Tensor = _KernelsNumbers.apply(weighted, result.detach(), queries)  # type: ignore[no-untyped-call]
        return with_first_tensor(given_by_kernel, kept)
    return with_first_tensor(given_by_kernel, torch.where(queries, weighted, result))


class _Call(KernelCall):
    """A call of ``scaled_dot_product_attention``."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__(query, key, value)
        self.dropout_p = dropout_p
        self._mask, self._is_causal = attn_mask, is_causal
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._shares_keys = enable_gqa

    def for_each_query(self, heads: torch.Tensor) -> torch.Tensor:
        heads = self.exact(heads)
        return heads.repeat_interleave(self.query.shape[-3] // heads.shape[-3], -3) if self._shares_keys else heads

    def scores(self) -> torch.Tensor:
        scores = self.exact(self.query) @ self.for_each_query(self.key).mT * self._scale
        mask = self._mask
        if self._is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + self.exact(mask)


def _call_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelCall:
    return FlexCall(*args, **kwargs) if func.__name__ == FLEX else _Call(*args, **kwargs)


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    # A query that may see nothing at all gets nothing, as from the kernel; a softmax of it, and its gradient, would
    # be no numbers.
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(sees_nothing, 0.0).softmax(-1).masked_fill(sees_nothing, 0.0)


def _like(own: torch.Tensor, given: Any, name: str) -> torch.Tensor:
    if not isinstance(given, torch.Tensor) or given.shape != own.shape:
        what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else f"{given!r:.80}"
        raise ValueError(f"The {name} of attention are of shape {tuple(own.shape)} and cannot be set to {what}.")
    return given.to(own)


class _KernelsNumbers(torch.autograd.Function):
    """What the kernel gives, and ``weighted`` for ``queries`` that changed; the gradient is that of ``weighted``."""

    @staticmethod
    def forward(ctx: Any, weighted: torch.Tensor, result: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        return torch.where(queries, weighted, result)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None
