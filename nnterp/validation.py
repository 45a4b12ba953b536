"""Are the names right? Checked by numbers, with one small forward pass, when a model is opened.

A specification promises where the residual stream runs and what is added to it. Each promise is one row of a table
(what it is about, which line of which YAML file says so, what was seen), and one loop goes through the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.cache import collect
from nnsight_core.devices import input_device
from nnsight_core.values import first_tensor
from nnterp.accessors import logits_of
from nnterp.dimensions import Dimensions
from nnterp.errors import ValidationError
from nnterp.rename_plan import LayerPlan, RenamePlan
from nnterp.spec import ROLES, ArchitectureSpec

BATCH, POSITIONS = 2, 5
#: How far two ways to the same number may differ, relative to its size: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Row:
    """One promise: two tensors that ought to be the same.

    Args:
        promise: the relation, in words.
        origin: which line of which file says so.
        seen: what the model gave.
        expected: what it ought to have given; a shape where only the shape is promised.
    """

    promise: str
    origin: str
    seen: torch.Tensor
    expected: torch.Tensor | tuple[int, ...]

    def disagreement(self) -> str | None:
        """What is wrong, in words; None where the promise holds."""
        seen, expected = self.seen, self.expected
        shape = expected if isinstance(expected, tuple) else tuple(expected.shape)
        if tuple(seen.shape) != shape:
            return f"the shape is {tuple(seen.shape)} where {shape} is promised"
        if isinstance(expected, tuple):
            return None
        seen, expected = seen.double(), expected.double()
        largest = float((seen - expected).abs().max())
        allowed = TOLERANCE.get(self.seen.dtype, 1e-1) * (1e-6 + float(expected.abs().max()))
        # A comparison with NaN is false, so that NaN on one side only does not pass.
        if largest <= allowed or (torch.equal(torch.isnan(seen), torch.isnan(expected)) and bool(seen.isnan().all())):
            return None
        return f"the numbers differ by up to {largest:.3g} (allowed: {allowed:.3g})"


class Probe:
    """What the modules took and gave in one pass, by path."""

    def __init__(self, module: torch.nn.Module, plan: RenamePlan) -> None:
        paths = {path for layer in plan.layers for path in _paths(layer)}
        paths |= {path for path in (*plan.embed, *plan.unembed) if path}
        self._modules = {path: module.get_submodule(path) for path in sorted(paths)}
        vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        device = input_device(module)
        ids = (torch.arange(BATCH * POSITIONS, device=device).reshape(BATCH, POSITIONS) * 7 + 3) % vocabulary
        with _evaluating(module), torch.no_grad():
            self._kept, output = collect(lambda: module(input_ids=ids), self._modules.values())
        self.logits: torch.Tensor = logits_of(output)

    def input(self, path: str) -> torch.Tensor:
        """The first tensor that the module at ``path`` took."""
        return self._get(path, "input")

    def output(self, path: str) -> torch.Tensor:
        """The first tensor that the module at ``path`` gave."""
        return self._get(path, "output")

    def _get(self, path: str, kind: str) -> torch.Tensor:
        key = (self._modules[path], kind)
        if key not in self._kept:
            raise ValidationError(path, "this module runs", "it did not run in a forward pass over text", "")
        value = first_tensor(self._kept[key])
        if value.ndim == 2 and value.shape[0] == BATCH * POSITIONS:
            return value.reshape(BATCH, POSITIONS, -1)
        return value


def _paths(layer: LayerPlan) -> list[str]:
    fields = ("path", "attention", "mlp_input", "mlp_output", "attention_contribution", "mlp_contribution")
    found = [getattr(layer, name) for name in (*fields, "attention_sum_norm", "mlp_sum_norm")]
    return [path for path in found if path]


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The model without dropout; each module gets its own mode back."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


def validate(
    module: torch.nn.Module,
    plan: RenamePlan,
    spec: ArchitectureSpec,
    sizes: Dimensions,
    unembed: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Check every promise of ``plan`` and ``spec`` on the model itself.

    Args:
        module: the causal language model.
        plan: which module plays which part.
        spec: how the parts work together.
        sizes: the model's dimensions.
        unembed: from the last layer's output, (batch, position, hidden), to logits (batch, position, vocab).

    Raises:
        ValidationError: names the first promise that does not hold, the line that makes it, and what was seen.
    """
    probe = Probe(module, plan)
    with _evaluating(module), torch.no_grad():
        for row in _rows(probe, plan, spec, sizes, unembed):
            wrong = row.disagreement()
            if wrong is not None:
                raise ValidationError(row.origin, row.promise, wrong, spec.family)


def _rows(
    probe: Probe,
    plan: RenamePlan,
    spec: ArchitectureSpec,
    sizes: Dimensions,
    unembed: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[Row]:
    stream = (BATCH, POSITIONS, sizes.hidden_size)
    yield Row(
        "token_embeddings is (batch, position, hidden)",
        _said(plan, "embed_tokens"),
        probe.output(plan.embed[-1]),
        stream,
    )
    for index, layer in enumerate(plan.layers):
        yield from _layer_rows(probe, plan, spec, index, layer, stream)
    for index, (layer, following) in enumerate(zip(plan.layers, plan.layers[1:], strict=False)):
        promise = f"layers_output[{index}] is layers_input[{index + 1}]"
        yield Row(promise, _said(plan, "layers"), probe.input(following.path), probe.output(layer.path))
    yield Row(
        "logits is (batch, position, vocab)",
        spec.where("dimensions.vocab_size"),
        probe.logits,
        (BATCH, POSITIONS, sizes.vocab_size),
    )
    last = probe.output(plan.layers[-1].path)
    value = last
    for path in plan.unembed:
        role = next((name for name in ROLES if plan.modules.get(name) == path), None)
        origin = _said(plan, role) if role else spec.where("unembed")
        promise = f"{path} takes its turn in {' of '.join(reversed(spec.unembed))} of the last layer's output"
        yield Row(promise, origin, probe.input(path), value)
        value = probe.output(path)
    origin = spec.where("logits.softcap" if spec.logits.softcap else "unembed")
    yield Row("logits is what project_on_vocab makes of the last layer's output", origin, probe.logits, unembed(last))


def _layer_rows(
    probe: Probe, plan: RenamePlan, spec: ArchitectureSpec, index: int, layer: LayerPlan, stream: tuple[int, ...]
) -> Iterator[Row]:
    places: list[tuple[str, str, str | None, Any]] = [
        ("layers_input", "modules.layers", layer.path, probe.input),
        ("attentions_input", "layer.attention", layer.attention, probe.input),
        ("attentions_output", "layer.attention", layer.attention, probe.output),
        ("mlps_input", "layer.mlp", layer.mlp_input, probe.input),
        ("mlps_output", "layer.mlp", layer.mlp_output, probe.output),
        ("layers_output", "modules.layers", layer.path, probe.output),
    ]
    for name, origin, path, read in places:
        if path:
            said = plan.origins.get(origin) or spec.where(origin)
            yield Row(f"{name}[{index}] is (batch, position, hidden)", said, read(path), stream)
    if layer.attention_contribution and layer.mlp_contribution:
        yield from _stream_rows(probe, spec, index, layer)


def _stream_rows(probe: Probe, spec: ArchitectureSpec, index: int, layer: LayerPlan) -> Iterator[Row]:
    """The residual stream through one layer: what comes in, what is added, what the stream's own norms make of it."""
    assert layer.attention_contribution and layer.mlp_contribution
    value = probe.input(layer.path) + probe.output(layer.attention_contribution)
    if layer.attention_sum_norm:
        promise = f"the stream of layer {index} goes through {layer.attention_sum_norm} after its attention"
        yield Row(promise, spec.where("block.attention_sum_norm"), probe.input(layer.attention_sum_norm), value)
        value = probe.output(layer.attention_sum_norm)
    value = value + probe.output(layer.mlp_contribution)
    if layer.mlp_sum_norm:
        promise = f"the stream of layer {index} goes through {layer.mlp_sum_norm} after its MLP"
        yield Row(promise, spec.where("block.mlp_sum_norm"), probe.input(layer.mlp_sum_norm), value)
        value = probe.output(layer.mlp_sum_norm)
    promise = f"layers_output[{index}] is layers_input[{index}] + the attention's and the MLP's contributions"
    yield Row(promise, spec.where("block"), probe.output(layer.path), value)


def _said(plan: RenamePlan, role: str) -> str:
    return plan.origins.get(f"modules.{role}", "")
