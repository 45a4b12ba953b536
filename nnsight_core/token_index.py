"""Positions counted by the tokens of one's own prompt, whatever the padding."""

from __future__ import annotations

from typing import Any

import torch

from nnsight_core.values import with_entry


class TokenIndex:
    """Indexing by the tokens of one's own prompt: ``value.t[0]`` is its first token, however far it is padded."""

    __slots__ = ("_proxy",)

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy

    def __call__(self) -> Any:
        if self._proxy._is_pending:
            return self._proxy._defer(_transposed)
        return self._proxy._call_method("t")

    def _key(self, token: Any) -> tuple[Any, Any]:
        value = self._proxy._plain()
        scope = self._proxy._scope
        padding = scope.padding
        # With a key-value cache a later step holds the newest token alone, and no padding with it.
        if not padding or not any(padding) or value.shape[1] < scope.prompt_length:
            return (slice(None), token)
        length = value.shape[1]
        own = [list(range(left, length)) for left in padding]
        if isinstance(token, (int, slice)):
            columns: list[int | list[int]] = [row[token] for row in own]
        else:
            columns = [[row[each] for each in torch.as_tensor(token).tolist()] for row in own]
        lengths = [len(row) for row in columns if isinstance(row, list)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f".t[{token}] is a different number of tokens in each prompt of this batch: {lengths}. "
                "Count from the end, or take one prompt at a time."
            )
        index = torch.as_tensor(columns, device=value.device)
        rows = torch.arange(len(own), device=value.device)
        return (rows if index.ndim == 1 else rows[:, None], index)

    def __getitem__(self, token: Any) -> Any:
        if self._proxy._is_pending:
            return self._proxy._defer(_get_tokens, token)
        key = self._key(token)
        # Rows that are padded differently are gathered, which copies; what is written there goes back all the same.
        return self._proxy._seen(
            self._proxy._plain()[key], lambda value: value[key], lambda value, part: with_entry(value, key, part)
        )

    def __setitem__(self, token: Any, value: Any) -> None:
        if self._proxy._is_pending:
            self._proxy._defer(_set_tokens, token, value)
            return
        self._proxy[self._key(token)] = value


def _get_tokens(proxy: Any, token: Any) -> Any:
    return proxy.t[token]


def _set_tokens(proxy: Any, token: Any, value: Any) -> None:
    proxy.t[token] = value


def _transposed(proxy: Any) -> Any:
    return proxy.t()
