"""Whether a model gives a prompt that is padded on the left the numbers that it gives it alone.

Models differ: some are told the positions, some count them by the mask, some count the padding too, and recurrent ones
let it run through their state. Nothing in a model says which it is, so it is tried out: once for each model, with a few
tokens, when a batch is padded for the first time.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from nnsight_core.dry_run import run_dry
from nnsight_core.values import NoTensorError, first_tensor

#: How many tokens are tried, and how much padding before them.
_TOKENS, _PADS = 4, 3

_known: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def counted_positions(mask: torch.Tensor) -> torch.Tensor:
    """The positions of tokens, (batch, position), where the padding is not counted."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def way_to_pad(module: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, filler: int) -> str:
    """``"counted"`` if the model is to be told positions that do not count the padding, ``"plain"`` if it is to be told
    none, and ``"impossible"`` if neither gives a padded prompt its own numbers.

    Args:
        module: the model.
        ids: a padded batch, (batch, position), whose tokens are used for trying.
        mask: 1 where there is a token.
        filler: the token that stands under the mask.
    """
    found = _known.get(module)
    if found is None:
        takes_positions = "position_ids" in inspect.signature(module.forward).parameters
        ways = ["counted", "plain"] if takes_positions else ["plain"]
        if not _can_be_tried(module, ids):
            return ways[0]
        row = int(mask.sum(-1).argmax())
        tokens = ids[row][mask[row] != 0][-_TOKENS:]
        found = _known[module] = _tried(module, tokens[None], filler, ways)
    return found


def _can_be_tried(module: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Whether the model gives numbers here, and the same ones each time."""
    if module.training or isinstance(ids, FakeTensor) or _get_current_dispatch_mode() is not None:
        return False
    return not any(each.is_meta for each in module.parameters())


def _tried(module: torch.nn.Module, tokens: torch.Tensor, filler: int, ways: list[str]) -> str:
    mask = torch.ones_like(tokens)
    padded = torch.nn.functional.pad(tokens, (_PADS, 0), value=filler)
    padded_mask = torch.nn.functional.pad(mask, (_PADS, 0))
    try:
        alone = _numbers(module, tokens, mask)
        for way in ways:
            positions = {"position_ids": counted_positions(padded_mask)} if way == "counted" else {}
            beside = _numbers(module, padded, padded_mask, **positions)
            if beside.shape != alone.shape:
                beside = beside[:, _PADS:]
            if _agree(alone, beside):
                return way
    except Exception:  # noqa: BLE001 - a model may raise anything at all; what is wrong with it shows when it is run
        return ways[0]
    return "impossible"


def _numbers(module: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        positions = {**positions, "decoder_input_ids": ids[:, -1:]}
    outputs: list[Any] = []

    def note(one: torch.nn.Module, kind: str, value: Any, site: Any) -> None:
        if one is module and kind == "output":
            outputs.append(value)

    run_dry(module, ((), {"input_ids": ids, "attention_mask": mask, **positions}), note, None)
    try:
        return first_tensor(outputs[-1])
    except NoTensorError:
        return torch.zeros(1)


def _agree(alone: torch.Tensor, beside: torch.Tensor) -> bool:
    if alone.shape != beside.shape:
        return False
    # A batch that is padded is rounded differently; positions that are off by one are off by far more.
    tolerance = max(1e-3, 32 * torch.finfo(alone.dtype).eps)
    alone, beside = alone.double(), beside.double()
    return float((alone - beside).abs().max()) <= tolerance * float((alone - alone.mean()).abs().max())
