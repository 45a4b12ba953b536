"""What is promised of heads, held against the output projection of the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from tests.matrix import hooks
from tests.matrix.models import Case

#: Families that norm all heads together before their output projection: a change of one head reaches the others there.
NORMED = ("bitnet",)


def _layers(case: Case) -> Iterator[tuple[int, hooks.Place]]:
    """The layers with attention, and where its output stands."""
    for index in range(case.num_layers):
        place = case.place("attentions", index, "output")
        if place is not None:
            yield index, place


def projection(case: Case, index: int, place: hooks.Place) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The map whose result is the attention's output, told by its numbers; what comes to it, and that output."""
    ends = [case.place("attentions", index, kind) for kind in ("input", "output")]
    inside = tuple(path for end in ends if end for path in (end[0], end[0].rpartition(".")[0]))
    maps = {
        path: module
        for path, module in case.module.named_modules()
        if path.startswith(inside) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
    seen = hooks.read(case.module, [place, *((path, kind) for path in maps for kind in ("input", "output"))], case.ids)
    output = seen[place]
    found = [
        path
        for path in maps
        if (path, "output") in seen
        and seen[path, "output"].numel() == output.numel()
        and torch.equal(seen[path, "output"].flatten(), output.flatten())
    ]
    assert len(found) == 1, f"{found} all give what the attention of layer {index} gives"
    return found[0], seen[found[0], "input"], output


def by_hand(module: Any, given: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head's columns of the projection times its share of the input: (head, ...)."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    width = given.shape[-1] // heads
    columns = [slice(head * width, (head + 1) * width) for head in range(heads)]
    return torch.stack([linear(given[..., each], weight[:, each]) for each in columns])


class _WeakerHead(TorchFunctionMode):
    """Halves one head: what it attends with, or what its attention gives."""

    def __init__(self, head: int, heads: int) -> None:
        super().__init__()
        self.head, self.heads, self.met = head, heads, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name not in ("softmax", "scaled_dot_product_attention", "exp") or given.ndim < 3:
            return given
        if given.ndim == 3 and given.shape[0] % self.heads == 0:
            self.met, given = self.met + 1, given.clone()
            given[self.head :: self.heads] *= 0.5
        elif given.ndim > 3 and given.shape[1] == self.heads:
            self.met, given = self.met + 1, given.clone()
            given[:, self.head] *= 0.5
        return given


def _whose(case: Case, index: int, path: str, given: torch.Tensor) -> None:
    """What enters the projection as the share of a head is what this head made."""
    heads = case.model.num_heads
    module = case.module.get_submodule(case.model._plan.layers[index].attention or "")
    if isinstance(module, torch.nn.ModuleList):
        # Of several attentions in one layer, the one that is meant.
        module = case.module.get_submodule((case.place("attentions", index, "input") or ("", ""))[0])
    for head in range(heads):
        with hooks.inside(module, _WeakerHead(head, heads)) as mode:
            seen = hooks.read(case.module, [(path, "input")], case.ids)[path, "input"]
        assert mode.met, f"nothing in layer {index} has a head of its own"
        changed = (seen - given).abs().unflatten(-1, (heads, -1)).flatten(0, -3).amax((0, 2)) > 1e-7
        alone = torch.arange(heads) == head
        assert bool(changed[head]), f"head {head} of layer {index} is not in its share"
        assert case.model_type in NORMED or torch.equal(changed, alone), f"head {head} is in {changed.tolist()}"


def _view(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, 32:] if case.model_type == "cpmant" else tensor


def heads_contribution(case: Case) -> None:
    """What each head adds: read, summed up, written back, and set, which leaves all other heads as they are."""
    known: set[type] = set()
    for index, place in _layers(case):
        heads = case.model.num_heads
        path, given, output = projection(case, index, place)
        module = case.module.get_submodule(path)
        with torch.no_grad():
            parts = by_hand(module, given, heads)
        bias = getattr(module, "bias", None)
        total = parts.sum(0) + (0 if bias is None else bias.detach())
        _close(total, output, f"the sum of layer {index} by hand")
        with torch.no_grad(), case.model.trace(case.ids):
            seen = case.model.heads_contribution[index].save()
            case.model.heads_contribution[index] = case.model.heads_contribution[index]
            attention = case.model.attentions_output[index].save()
            back = case.model.logits.save()
        for head in range(heads):
            _close(seen[:, head], _view(case, parts[head]), f"heads_contribution[{index}], head {head}")
        _close(seen.sum(1) + (0 if bias is None else bias.detach()), attention.value, f"the sum of layer {index}")
        assert torch.equal(back, case.logits), f"writing back heads_contribution[{index}]"
        _ablate(case, index, (path, "output"), parts, seen.value)
        if type(module) not in known:
            _whose(case, index, path, given)
            known.add(type(module))


def _ablate(case: Case, index: int, place: hooks.Place, parts: torch.Tensor, seen: torch.Tensor) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        _view(case, tensor).sub_(_view(case, parts[1]))
        return tensor

    truth = hooks.changed_logits(case.module, place, change, case.ids)
    with torch.no_grad(), case.model.trace(case.ids):
        case.model.heads_contribution[index][:, 1] = 0
        after = case.model.heads_contribution[index].save()
        logits = case.model.logits.save()
    assert not after[:, 1].any() and torch.equal(after[:, 2:], seen[:, 2:]) and torch.equal(after[:, 0], seen[:, 0])
    _close(logits, truth, f"logits without head 1 of layer {index}")
    assert not torch.equal(logits, case.logits), f"head 1 of layer {index}: nothing came of it"


def _close(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert seen.shape == expected.shape, f"{what}: {tuple(seen.shape)} where {tuple(expected.shape)} is right"
    error = float((seen - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error < 1e-4, f"{what}: off by {error:.3g} of its size"


def _has_attention(case: Case) -> bool:
    return any(True for _ in _layers(case))


PROMISES: dict[str, Callable[[Case], None]] = {"heads_contribution": heads_contribution}
PRESENT: dict[str, Callable[[Case], bool]] = {"heads_contribution": _has_attention}
