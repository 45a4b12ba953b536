"""What a body has read in one run of a model, kept apart from what whoever runs the model does with the result.

A generation may write into the logits that it gets, as transformers does where it samples with an assistant.
"""

from __future__ import annotations

from typing import Any

import torch

from nnsight_core.values import map_tensors, memory_of


class HandedOut:
    """The memory of the values that have been handed out in the run of the model that is under way.

    >>> handed = HandedOut()
    >>> logits = torch.zeros(2, 3)
    >>> handed.add(logits[:1])
    >>> handed.apart((logits, None))[0] is logits
    False
    >>> handed.clear()
    >>> handed.apart((logits, None))[0] is logits
    True
    """

    def __init__(self) -> None:
        self._memory: set[int] = set()

    def add(self, value: Any) -> None:
        """``value`` is in somebody's hands."""
        map_tensors(self._note, value)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            self._memory.add(memory_of(tensor))
        return tensor

    def apart(self, result: Any) -> Any:
        """``result`` with copies of the tensors that lie where somebody's values lie; itself if there are none."""
        return map_tensors(self._apart, result)

    def _apart(self, tensor: torch.Tensor) -> torch.Tensor:
        is_held = tensor.layout is torch.strided and memory_of(tensor) in self._memory
        return tensor.clone() if is_held else tensor

    def clear(self) -> None:
        """Another run begins, or none."""
        self._memory.clear()
