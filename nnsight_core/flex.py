"""torch's flex attention: the one operation that every call of it ends in, what that computes on its way, and how it
runs as if nobody looked on.

It is compiled wherever it is called for use, and compiled code shows no operation. A module that says it runs it is
therefore tapped uncompiled, and the operation itself, once it has been shown, is given over to the compiled function.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nnsight_core.compiled import Eager
from nnsight_core.kernel_call import KernelCall

#: What the operation is called.
FLEX = "flex_attention"

#: A score, or whether a key may be seen, by score, batch, head, query and key, or the last four of them.
Mod = Callable[..., torch.Tensor]


def runs_flex(module: torch.nn.Module) -> bool:
    """Whether a module says of itself that it runs flex attention, as those of transformers do by their config."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == FLEX


def say_what_else(error: NotImplementedError) -> None:
    """Let torch's refusal of gradients say what to do about it; any other error is left as it is."""
    if "FlexAttention does not support backward" in str(error) and len(error.args) == 1:
        error.args = (
            f"{error}\n"
            "The model runs its attention with torch's flex_attention. Run it under torch.no_grad(), or load it with "
            "attn_implementation='sdpa' or 'eager', through which gradients go on any device.",
        )


class FlexCall(KernelCall):
    """A call of the operation: (batch, head, query, size), and (batch, head, key, size) twice.

    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> heads = torch.ones(1, 2, 3, 4)
    >>> mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, 3, 3, device="cpu")
    >>> FlexCall(heads, heads, heads, lambda score, b, h, query, key: score - key, mask.as_tuple(), 0.5).scores()[0, 0]
    tensor([[2., -inf, -inf],
            [2., 1., -inf],
            [2., 1., 0.]])
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        score_mod: Mod,
        block_mask: tuple[Any, ...],
        scale: float,
        kernel_options: Any = None,
        score_mod_other_buffers: tuple[Any, ...] = (),
        mask_mod_other_buffers: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(query, key, value)
        self._score_mod, self._mask_mod, self._scale = score_mod, block_mask[-1], scale
        self._score_buffers, self._mask_buffers = score_mod_other_buffers, mask_mod_other_buffers

    def for_each_query(self, heads: torch.Tensor) -> torch.Tensor:
        """Keys or values, with a row and a head for each of the queries'."""
        heads = self.exact(heads)
        heads = heads.repeat_interleave(self.query.shape[1] // heads.shape[1], 1)
        return heads.expand(self.query.shape[0], *heads.shape[1:])

    def scores(self) -> torch.Tensor:
        """(batch, head, query, key): scaled and modified, and minus infinity where the mask lets nothing be seen."""
        scores = self.exact(self.query) @ self.for_each_query(self.key).mT * self._scale
        places = [torch.arange(size, device=scores.device) for size in scores.shape]
        with _Indexing():
            allowed = _over_all(self._mask_mod, (), len(self._mask_buffers))(*places, *self._mask_buffers)
            score_mod = _over_all(self._score_mod, (0,), len(self._score_buffers))
            modified = score_mod(scores, *places, *self._score_buffers)
        return torch.where(allowed, modified.to(scores.dtype), -torch.inf)


def _over_all(mod: Mod, score: tuple[int, ...], buffers: int) -> Mod:
    """The same for all batches, heads, queries and keys at once: ``mod`` is written for one."""
    rest = (None,) * buffers
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        mod = torch.vmap(mod, in_dims=(*score, *dims, *rest), out_dims=0)
    return mod


class _Indexing(TorchFunctionMode):
    """``table[index]`` with an index that stands for many, which plain indexing would take for a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let ``func`` run."""
        if func is torch.Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(each, torch.Tensor) for each in indices):
                return torch.ops.aten.index.Tensor(args[0], list(indices))
        return func(*args, **(kwargs or {}))


def as_called(operation: Callable[..., Any], own: tuple[Any, ...], taps: type[TorchFunctionMode]) -> Callable[..., Any]:
    """What gives for a call of the operation what the function that is under way would, if nobody looked on.

    Args:
        operation: the operation.
        own: what that function calls it with.
        taps: the function modes that are on because somebody looks.
    """

    @functools.wraps(operation)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = _compiled_call(args, own)
        if call is None:
            return operation(*args, **kwargs)
        with torch.no_grad():
            # How many tensors there are beside what the heads give depends on the release.
            plain = operation(*(each.detach() for each in args[:3]), *args[3:], **kwargs)
        from torch.nn.attention.flex_attention import flex_attention

        with Eager.paused(), _without(taps):
            result = torch.compile(flex_attention)(*call.args, **call.kwargs)
        if isinstance(result, torch.Tensor):
            return (result, *plain[1:])
        kept = (getattr(result[1], "lse", result[1]), getattr(result[1], "max_scores", None))
        pairs = zip(plain[1:], kept, strict=False)
        return (result[0], *(own if given is None else given / math.log(2) for own, given in pairs))

    return run


def _compiled_call(args: tuple[Any, ...], own: tuple[Any, ...]) -> inspect.BoundArguments | None:
    """The call of the compiled function that is under way, with the heads of ``args``; None if it is not compiled, or
    has been called with something of the user's that it cannot be given.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if type(args[0]).__name__ == "FakeTensor" or any(args[at] is not own[at] for at in (3, 5)):
        return None
    if args[4][-1] is not own[4][-1]:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not flex_attention.__code__:
        frame = frame.f_back
    caller = None if frame is None else frame.f_back
    if caller is None or not caller.f_globals.get("__name__", "").startswith("torch._dynamo"):
        return None
    given = caller.f_locals
    if "args" not in given or "kwargs" not in given:
        return None
    call = inspect.signature(flex_attention).bind(*given["args"], **given["kwargs"])
    call.arguments.update(zip(("query", "key", "value"), args[:3], strict=True))
    return call


@contextmanager
def _without(taps: type[TorchFunctionMode]) -> Iterator[None]:
    """While it lasts, nobody looks on."""
    modes: list[Any] = []
    while torch._C._len_torch_function_stack():
        modes.insert(0, torch._C._pop_torch_function_stack())
    rest = [each for each in modes if not isinstance(each, taps)]
    for mode in rest:
        torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        for _ in rest:
            torch._C._pop_torch_function_stack()
        for mode in modes:
            torch._C._push_on_torch_function_stack(mode)
