"""Positions counted by the tokens of one's own prompt, whatever the padding."""

from __future__ import annotations

from typing import Any

import torch

from nnsight_core.values import with_entry


class TokenIndex:
    """Indexing by the tokens of one's own prompt: ``value.t[0]`` is its first token, however far it is padded.

    Args:
        proxy: the value, whose positions are its second axis unless somebody has said otherwise.
        axis: which axis the positions are; 0 if nobody knows.
    """

    __slots__ = ("_axis", "_proxy")

    def __init__(self, proxy: Any, axis: int) -> None:
        self._proxy = proxy
        self._axis = axis

    def __call__(self) -> Any:
        if self._proxy._is_pending:
            return self._proxy._defer(_transposed)
        return self._proxy._call_method("t")

    def _key(self, token: Any) -> tuple[Any, ...]:
        value = self._proxy._plain()
        scope = self._proxy._scope
        axis = self._axis or _usual_axis(value, scope.prompt_length)
        padding = scope.padding
        # With a key-value cache a later step holds the newest token alone, and no padding with it.
        if not padding or not any(padding) or value.shape[axis] < scope.prompt_length:
            return (*[slice(None)] * axis, token)
        length = value.shape[axis]
        own = [list(range(left, length)) for left in padding]
        columns: list[int | list[int]]
        try:
            if isinstance(token, (int, slice)):
                columns = [row[token] for row in own]
            else:
                columns = [[row[each] for each in torch.as_tensor(token).tolist()] for row in own]
        except IndexError:
            raise IndexError(
                f".t[{token}] is not in every prompt of this batch: they have {[len(row) for row in own]} tokens. "
                "Count from the end, or take one prompt at a time."
            ) from None
        lengths = [len(row) for row in columns if isinstance(row, list)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f".t[{token}] is a different number of tokens in each prompt of this batch: {lengths}. "
                "Count from the end, or take one prompt at a time."
            )
        index = torch.as_tensor(columns, device=value.device)
        # Every axis up to the positions is counted out: a slice between two lists would change the order of axes.
        before = [torch.arange(size, device=value.device) for size in value.shape[:axis]]
        after = index.ndim - 1
        grid = [each.reshape(-1, *[1] * (axis - 1 - at + after)) for at, each in enumerate(before)]
        return (*grid, index.reshape(len(own), *[1] * (axis - 1), *index.shape[1:]))

    def __getitem__(self, token: Any) -> Any:
        if self._proxy._is_pending:
            return self._proxy._defer(_get_tokens, self._axis, token)
        key = self._key(token)
        # Rows that are padded differently are gathered, which copies; what is written there goes back all the same.
        return self._proxy._seen(
            self._proxy._plain()[key], lambda value: value[key], lambda value, part: with_entry(value, key, part)
        )

    def __setitem__(self, token: Any, value: Any) -> None:
        if self._proxy._is_pending:
            self._proxy._defer(_set_tokens, self._axis, token, value)
            return
        self._proxy[self._key(token)] = value


def positions_at(proxy: Any, axis: int) -> Any:
    """The proxy itself, whose ``.t[i]`` counts along ``axis`` from now on."""
    object.__setattr__(proxy, "_token_axis", axis)
    return proxy


def _usual_axis(value: Any, prompt_length: int) -> int:
    """The second axis, as long as nothing speaks against it.

    Raises:
        ValueError: it may be the heads that stand there.
    """
    is_plain = value.ndim < 4 or not prompt_length or value.shape[1] == 1
    if not is_plain and (value.shape[1] != prompt_length or value.shape[2] == prompt_length):
        raise ValueError(
            f".t[...] counts tokens, and which axis of a value of shape {tuple(value.shape)} they are cannot be told: "
            f"the prompts are {prompt_length} positions long. Index the axis itself, as in value[:, :, -1]."
        )
    return 1


def _get_tokens(proxy: Any, axis: int, token: Any) -> Any:
    return TokenIndex(proxy, axis)[token]


def _set_tokens(proxy: Any, axis: int, token: Any, value: Any) -> None:
    TokenIndex(proxy, axis)[token] = value


def _transposed(proxy: Any) -> Any:
    return proxy.t()
