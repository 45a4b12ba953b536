"""A call of one of torch's attention kernels, whichever it is: its heads, in as many digits as the kernel has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class KernelCall(ABC):
    """What every kernel is called with: (..., head, query, size), and (..., head, key, size) twice."""

    #: How probable it is that a probability is dropped.
    dropout_p: float = 0.0

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self.query, self.key, self.value = query, key, value
        kind = query.device.type
        self._casts_to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def precisely(self) -> AbstractContextManager[Any]:
        """While it lasts, nothing is computed in fewer digits than it is given in."""
        return nullcontext() if self._casts_to is None else torch.autocast(self.query.device.type, enabled=False)

    def exact(self, tensor: torch.Tensor) -> torch.Tensor:
        """As the kernel has it within: what is given in half the digits of float32 is computed in all of them."""
        if self._casts_to is not None and tensor.dtype != torch.float64:
            tensor = tensor.to(self._casts_to)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    @abstractmethod
    def for_each_query(self, heads: torch.Tensor) -> torch.Tensor:
        """Keys or values, with a head for each head of queries."""

    @abstractmethod
    def scores(self) -> torch.Tensor:
        """(..., head, query, key): scaled and masked; what may not be seen, minus infinity or what the mask adds."""

    def values(self) -> torch.Tensor:
        """(..., head, key, size): what each query head weighs."""
        return self.for_each_query(self.value)
