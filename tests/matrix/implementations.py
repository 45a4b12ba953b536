"""The inside of attention, the same whatever runs it: held against the same weights under the family's own choice.

    agrees("llama", "flex_attention")

What that choice gives is held against attention written out by hand, see ``attention.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.matrix import attention
from tests.matrix.attention import NAMES
from tests.matrix.models import Case
from tests.matrix.promises import restored

MORE = ("queries_pre_rope", "keys_pre_rope", "heads_contribution")


def opened(case: Case, layer: int) -> list[str]:
    """What can be had of a layer."""
    found = []
    for name in (*NAMES, *MORE):
        try:
            getattr(case.model, name).place(layer)
        except Exception:  # noqa: BLE001, S112 - what it may be is held elsewhere
            continue
        found.append(name)
    return found


def _read(case: Case, names: dict[int, list[str]], mask: torch.Tensor | None = None) -> dict[Any, torch.Tensor]:
    """Values by layer and name, and the logits."""
    found: dict[Any, Any] = {}
    mask = torch.ones_like(case.ids) if mask is None else mask
    # What comes before the rotation may be made in modules inside the attention, and has a pass of its own.
    for group in (NAMES, MORE):
        with torch.no_grad(), case.model.trace({"input_ids": case.ids, "attention_mask": mask}):
            for layer, there in names.items():
                for name in (each for each in group if each in there):
                    found[layer, name] = getattr(case.model, name)[layer].save()
            found["logits", group] = case.model.logits.save()
    return {key: each.value for key, each in found.items()}


def _same(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if "scores" in what:
        # Some subtract each row's largest first, which changes nothing; what is masked has not one value everywhere.
        hidden = expected < -1e30
        seen, expected = (each - each.amax(-1, keepdim=True) for each in (seen, expected))
        seen, expected = seen.masked_fill(hidden, -torch.inf), expected.masked_fill(hidden, -torch.inf)
    attention._close(seen, expected, what)


def agrees(model_type: str, chosen: str) -> list[str]:
    """What can be had under ``chosen``, all of it the same as under the family's own choice, read and set."""
    own, case = Case(model_type), Case(model_type, chosen)
    layers = attention.layers(own)
    names = {layer: opened(own, layer) for layer in layers}
    there = {layer: opened(case, layer) for layer in layers}
    assert there == names, f"{chosen}: {there} where there is {names}"
    expected, seen = _read(own, names), _read(case, names)
    for key, value in seen.items():
        _same(value, expected[key], f"{chosen}: {key}")
        if key[0] == "logits":
            assert torch.equal(value, case.logits), f"{chosen}: reading changes the logits"
    if "padding" not in case.spec.cannot:
        _padded(own, case, {layers[-1]: names[layers[-1]]})
    middle = layers[len(layers) // 2]
    for name in names[middle]:
        _set(own, case, name, middle, "heads_output" in names[middle] and name in NAMES)
    if "attention_probabilities" in names[layers[0]]:
        if case.spec.family == model_type:
            attention._of_inputs(case)
        _next_token(own, case, layers[0])
    restored(case)
    return sorted({name for each in names.values() for name in each})


def _padded(own: Case, case: Case, names: dict[int, list[str]]) -> None:
    mask = torch.ones_like(case.ids)
    mask[0, :4] = 0
    plain = _read(case, {}, mask)["logits", NAMES]
    seen, expected = (_read(each, names, mask) for each in (case, own))
    assert torch.equal(seen["logits", NAMES], plain), "reading changes the logits of a padded batch"
    for key, value in seen.items():
        # What the queries of padding do is nobody's business.
        at = 1 if key[0] == "logits" else 2
        real = [slice(None)] * at + [slice(4, None)]
        _same(value[tuple(real)], expected[key][tuple(real)], f"padded: {key}")


def _changed(case: Case, name: str, layer: int, heads: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad(), case.model.trace(case.ids):
        access = getattr(case.model, name)
        access[layer] = attention._some(name)(access[layer])
        output = case.model.heads_output[layer].save() if heads else None
        logits = case.model.logits.save()
    return logits.value, None if output is None else output.value


def _set(own: Case, case: Case, name: str, layer: int, heads: bool) -> None:
    (expected, _), (logits, output) = _changed(own, name, layer, heads), _changed(case, name, layer, heads)
    _same(logits, expected, f"logits after a change of {name}[{layer}]")
    assert not torch.equal(logits, case.logits), f"{name}[{layer}], set: nothing came of it"
    if output is not None and name in ("attention_scores", "attention_probabilities", "heads_output"):
        before = _read(case, {layer: ["heads_output"]})[layer, "heads_output"]
        assert torch.equal(output[:, 1:], before[:, 1:]), f"{name}[{layer}], set: other heads change"
        assert torch.equal(output[:, 0, :4], before[:, 0, :4]), f"{name}[{layer}], set: other queries change"


def _next_token(own: Case, case: Case, layer: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    kept: list[list[Any]] = []
    for each in (own, case):
        kept.append([])
        with torch.no_grad(), each.model.generate(each.ids[:1], **options) as tracer:
            for _ in tracer.iter[:]:
                kept[-1].append(each.model.attention_probabilities[layer].save())
    for step, (expected, seen) in enumerate(zip(*kept, strict=True)):
        _same(seen.value, expected.value, f"probabilities of step {step}")
