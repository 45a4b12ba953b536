"""A copy that stands in for a model whose own numbers do not show its structure.

A model without numbers, on the meta device, has the structure of one with any, so the copy has random ones. In half
precision what adds up and what does not may lie too near each other, so the copy is in single precision.
"""

from __future__ import annotations

import copy

import torch

from nnterp.inference.errors import ProbeError

__all__ = ["with_numbers"]

#: How many numbers a copy may have: 4 GiB of them.
LARGEST = 2**30


#: The types of numbers that single precision holds exactly.
EXACT = (torch.float32, torch.float16, torch.bfloat16)


def with_numbers(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, or a copy: with random numbers where it has none, with its own where they are half precision.

    A model of half precision that is too large for a copy stands for itself.

    Raises `ProbeError` where a copy with random numbers would be too large.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # Weights that hooks fetch, and those that are packed into whole numbers, are not to be had by a copy.
    if any(hasattr(each, "_hf_hook") for each in model.modules()):
        return model
    total = sum(each.numel() for each in tensors)
    if not any(each.is_meta for each in tensors):
        kinds = {each.dtype for each in model.parameters()}
        is_half = kinds <= set(EXACT) and bool(kinds - {torch.float32})
        return copy.deepcopy(model).float() if is_half and total <= LARGEST else model
    if total > LARGEST:
        reason = f"its weights are not loaded, and a copy with {total:.1e} random numbers would be too large"
        raise ProbeError(type(model).__name__, reason)
    stand_in = copy.deepcopy(model).float().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stand_in.parameters():
            if parameter.is_floating_point():
                # Maps keep the size of what goes through them; norms and biases differ from one another.
                scale = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
                parameter.normal_(mean=1.0 if parameter.ndim < 2 else 0.0, std=scale, generator=generator)
            else:
                parameter.zero_()
        for buffer in stand_in.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.1, 1.0, generator=generator)
            else:
                # Masks let everything through, and indices are some that are there.
                buffer.fill_(buffer.dtype == torch.bool)
    return stand_in
