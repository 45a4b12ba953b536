"""What is promised of experts, held against plain hooks on routers and experts and against torch's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.matrix import hooks
from tests.matrix.models import Case
from tests.oracle import get as get_at
from tests.oracle import put, tensor_paths


def _layers(case: Case) -> list[tuple[int, torch.nn.Module]]:
    """The layers that have a router, with the module that holds it and the experts."""
    plans = enumerate(case.model._plan.layers)
    return [(index, case.module.get_submodule(each.router)) for index, each in plans if each.router]


def _same(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    expected = expected.reshape(seen.shape)
    assert torch.equal(seen, expected), f"{what}: off by {float((seen.double() - expected.double()).abs().max()):.3g}"


class _Changing(TorchFunctionMode):
    """Changes what the first call of a function with one of these names gives."""

    def __init__(self, names: tuple[str, ...], change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.names, self.change, self.kept = names, change, list[Any]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        if not self.kept and getattr(function, "__name__", "") in self.names:
            self.kept.append(given)
            given = self.change(given)
        return given


def router_logits(case: Case) -> None:
    """The router's logits: read, written back, and set, so that the router chooses by them."""
    for index, router in _layers(case):
        with hooks.inside(router, _Changing(("linear",), lambda given: given)) as plain:
            hooks.logits(case.module, case.ids)
        # The map that makes the logits is the last one: what stands before it, if anything, is the router's own.
        kept: list[Any] = []
        handle = router.register_forward_hook(lambda _, args, out, kept=kept: kept.append(out))
        hooks.logits(case.module, case.ids)
        handle.remove()
        with torch.no_grad(), case.model.trace(case.ids):
            seen = case.model.router_logits[index].save()
            case.model.router_logits[index] = case.model.router_logits[index].flip(-1) * 1.5
            logits = case.model.logits.save()
        assert seen.shape[:2] == case.ids.shape and plain.kept
        floats = [each for path in tensor_paths(kept[0]) if (each := get_at(kept[0], path)).is_floating_point()]
        width = seen.shape[-1]
        alike = [each for each in floats if each.numel() == seen[..., : each.shape[-1]].numel() and each.ndim > 1]
        assert any(torch.equal(each.reshape(*case.ids.shape, -1), seen[..., : each.shape[-1]]) for each in alike), (
            f"router_logits[{index}] is nothing that the router gives"
        )
        last = case.model._plan.layers[index].router_logits
        if last:
            place = (last, "output")
            truth = hooks.changed_logits(case.module, place, lambda each: each.flip(-1) * 1.5, case.ids)
        else:
            with hooks.inside(router, _Changing(("linear",), lambda given: given.flip(-1) * 1.5)):
                truth = hooks.logits(case.module, case.ids)
        assert width > 1 and torch.equal(logits, truth), f"router_logits[{index}], set"
        assert not torch.equal(truth, case.logits)


def _routing(value: Any) -> dict[str, tuple[Any, torch.Tensor]]:
    found: dict[str, tuple[Any, torch.Tensor]] = {}
    for path in tensor_paths(value):
        each = get_at(value, path)
        if each.dtype == torch.int64 and each.ndim == 2:
            found.setdefault("expert_indices", (path, each))
    for path in tensor_paths(value):
        each = get_at(value, path)
        chosen = found.get("expert_indices")
        if chosen and each.is_floating_point() and each.shape == chosen[1].shape:
            found.setdefault("expert_weights", (path, each))
    return found


def _truth(case: Case, index: int, name: str, change: Callable[[Any], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands there, and the logits when it is changed."""
    layer, router = case.model._plan.layers[index], dict(_layers(case))[index]
    operation = getattr(case.spec.layer, name)
    kept: list[torch.Tensor] = []
    if operation:
        entry = 1 if name == "expert_indices" else None

        def changed(given: Any) -> Any:
            kept.append((given if entry is None else given[entry]).clone())
            return change(given) if entry is None else (given[0], change(given[1]))

        with hooks.inside(router, _Changing((operation.rpartition("_")[0],), changed)):
            logits = hooks.logits(case.module, case.ids)
        return kept[0], logits

    def see(value: Any) -> Any:
        path, tensor = _routing(value)[name]
        kept.append(tensor.clone())
        return put(value, path, change(tensor))

    assert layer.experts is not None
    with hooks.hooked(case.module, (layer.experts, "input"), see):
        logits = hooks.logits(case.module, case.ids)
    return kept[0], logits


def _changed_routing(name: str, change: Callable[[Any], Any]) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        values = getattr(case.model, name)
        for index, _ in _layers(case):
            expected, truth = _truth(case, index, name, change)
            with torch.no_grad(), case.model.trace(case.ids):
                seen = values[index].save()
                values[index] = change(values[index])
                logits = case.model.logits.save()
            assert seen.shape[:2] == case.ids.shape and seen.ndim == 3
            _same(seen, expected, f"{name}[{index}]")
            assert torch.equal(logits, truth), f"{name}[{index}], set"
            assert not torch.equal(truth, case.logits), f"{name}[{index}], set: nothing came of it"
            _own_rows(case, name, index, seen)

    return check


def _own_rows(case: Case, name: str, index: int, whole: torch.Tensor) -> None:
    """Each of two inputs in one pass sees what is its own."""
    if "invokes" in case.spec.cannot:
        return
    values = getattr(case.model, name)
    with torch.no_grad(), case.model.trace() as tracer:
        kept = []
        for row in (case.ids[:1], case.ids[1:]):
            with tracer.invoke(row):
                kept.append(values[index].save())
    assert tracer.forward_passes == 1
    for row, seen in enumerate(kept):
        expected = whole[row : row + 1]
        assert seen.shape == expected.shape and torch.allclose(seen.float(), expected.float(), atol=1e-4)


def experts_output(case: Case) -> None:
    """What the experts give together, read and set."""
    for index, _ in _layers(case):
        experts = case.model._plan.layers[index].experts
        assert experts is not None
        expected = hooks.read(case.module, [(experts, "output")], case.ids)[experts, "output"]
        truth = hooks.changed_logits(case.module, (experts, "output"), lambda each: each * 0.5 + 0.1, case.ids)
        with torch.no_grad(), case.model.trace(case.ids):
            seen = case.model.experts_output[index].save()
            case.model.experts_output[index] = case.model.experts_output[index] * 0.5 + 0.1
            logits = case.model.logits.save()
        assert seen.shape == (*case.ids.shape, case.model.hidden_size)
        _same(seen, expected, f"experts_output[{index}]")
        assert torch.equal(logits, truth) and not torch.equal(truth, case.logits)
        _own_rows(case, "experts_output", index, seen)


def _turned(indices: Any) -> Any:
    """Each expert in the place of the one before it: no token gets one twice."""
    return (indices + 1) % (indices.max() + 1)


PROMISES: dict[str, Callable[[Case], None]] = {
    "router_logits": router_logits,
    "expert_indices": _changed_routing("expert_indices", _turned),
    "expert_weights": _changed_routing("expert_weights", lambda each: each * 0.5 + 0.1),
    "experts_output": experts_output,
}
PRESENT: dict[str, Callable[[Case], bool]] = {name: lambda case: bool(_layers(case)) for name in PROMISES}
