"""The call of a module as a value of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight_core.arguments import PENDING, pending_tape, unwrap
from nnsight_core.proxy import Proxy
from nnsight_core.values import first_argument, fitting_call, is_pair, map_tensors, with_entry, with_first_argument


class InputProxy(Proxy):
    """The call of a module, ``(args, kwargs)``.

    An integer index or unpacking sees that pair; everything else sees the first argument, which is what one nearly
    always wants: ``module.input.shape``, ``module.input[:, -1]``, ``args, kwargs = module.input``.
    """

    __slots__ = ()

    def _plain(self) -> Any:
        return first_argument(self._get())

    def _first(self, whole: Any) -> Any:
        return first_argument(whole)

    def _put(self, value: Any) -> None:
        place = self._place()
        pair = with_first_argument(self._get() if place is None else place.read(), value)
        Proxy._put(self, pair)

    def set_call(self, value: Any) -> None:
        """Let the module be called with ``value``: a pair ``(args, kwargs)``, or else another first argument."""
        tape = pending_tape((self, value))
        if tape is not None:
            tape.record(InputProxy.set_call, self, value)
            return
        value = value._get() if issubclass(type(value), InputProxy) else unwrap(value)
        if is_pair(value):
            Proxy._put(self, fitting_call(self._get(), value))
        else:
            self._put(map_tensors(torch.clone, value))

    def set_result(self, value: Any) -> None:
        """Let the call give ``value`` without being made."""
        tape = pending_tape((self, value))
        if tape is not None:
            tape.record(InputProxy.set_result, self, value)
            return
        place = self._place()
        assert place is not None
        # As everything that is set it is copied, for the model may write into it.
        place.write(map_tensors(torch.clone, unwrap(value)))

    def _seen(self, part: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> Any:
        def put_in_pair(pair: Any, part: Any) -> Any:
            return with_first_argument(pair, put(first_argument(pair), part))

        return self._part(part, lambda pair: get(first_argument(pair)), put_in_pair)

    def __getitem__(self, key: Any) -> Any:
        if self._value is PENDING or not isinstance(key, int):
            return Proxy.__getitem__(self, key)
        return self._part(self._get()[key], lambda pair: pair[key], lambda pair, new: with_entry(pair, key, new))

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._value is not PENDING and isinstance(key, int):
            Proxy._put(self, with_entry(self._get(), key, unwrap(value)))
        else:
            Proxy.__setitem__(self, key, value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[0], self[1]])
