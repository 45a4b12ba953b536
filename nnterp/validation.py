"""Are the names right? Checked by numbers, with one small forward pass, when a model is opened.

A specification promises where the residual stream runs and what is added to it. Each promise is one row of a table
(what it is about, which line of which YAML file says so, what was seen), and one loop goes through the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.cache import collect
from nnsight_core.values import first_tensor
from nnterp.accessors import StreamShape, logits_of
from nnterp.additions import Addition
from nnterp.calling import call_model, config_of, evaluating, some_tokens
from nnterp.dimensions import Dimensions
from nnterp.errors import ValidationError
from nnterp.multipliers import times
from nnterp.rename_plan import LayerPlan, RenamePlan
from nnterp.spec import ROLES, ArchitectureSpec
from nnterp.spec_layer import KINDS

BATCH, POSITIONS = 2, 5
#: What the accessors of a part are called.
PART_NAMES = {"attention": "attentions", "mlp": "mlps", "also_added": "mlps"}
#: How far two ways to the same number may differ, relative to its size: rounding, not meaning.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Row:
    """Two tensors that ought to be the same.

    Args:
        kind: which of the promises of `nnterp.spec.PROMISES` it belongs to.
        promise: the relation, in words.
        origin: which line of which file says so.
        seen: what the model gave.
        expected: what it ought to have given; a shape where only the shape is promised.
        subject: the path of the module that is in question, where there is one.
    """

    kind: str
    promise: str
    origin: str
    seen: torch.Tensor
    expected: torch.Tensor | tuple[int, ...]
    subject: str = ""

    def disagreement(self) -> str | None:
        """What is wrong, in words; None where the promise holds."""
        seen, expected = self.seen, self.expected
        shape = expected if isinstance(expected, tuple) else tuple(expected.shape)
        if tuple(seen.shape) != shape:
            return f"the shape is {tuple(seen.shape)} where {shape} is promised"
        if isinstance(expected, tuple):
            return None
        # Some models round to half precision on the way to logits that are float32.
        coarsest = max(TOLERANCE.get(each.dtype, 1e-1) for each in (seen, expected))
        seen, expected = seen.double(), expected.double()
        largest = float((seen - expected).abs().max())
        allowed = coarsest * (1e-6 + float(expected.abs().max()))
        # A comparison with NaN is false, so that NaN on one side only does not pass.
        if largest <= allowed or (torch.equal(torch.isnan(seen), torch.isnan(expected)) and bool(seen.isnan().all())):
            return None
        return f"the numbers differ by up to {largest:.3g} (allowed: {allowed:.3g})"


class Probe:
    """What the modules took and gave in one pass, by path."""

    def __init__(self, module: torch.nn.Module, plan: RenamePlan) -> None:
        paths = {path for layer in plan.layers for path in _paths(layer)}
        paths |= {*plan.embed, *plan.unembed}
        self._modules = {path: module.get_submodule(path) for path in sorted(paths)}
        self.layer = module.get_submodule
        ids = some_tokens(module, BATCH, POSITIONS)
        given: dict[tuple[torch.nn.Module, str], Any] = {}
        with evaluating(module), torch.no_grad():
            self._kept, output = collect(lambda: call_model(module, ids), self._modules.values(), given)
        self.logits: torch.Tensor = logits_of(output)
        #: Modules into whose output the model wrote after they had given it.
        self.written_over = tuple(path for path in self._modules if self._is_changed(path, given))

    def _is_changed(self, path: str, given: dict[tuple[torch.nn.Module, str], Any]) -> bool:
        key = (self._modules[path], "output")
        if key not in given:
            return False
        one, other = first_tensor(given[key]), first_tensor(self._kept[key])
        return not torch.equal(one.nan_to_num(), other.nan_to_num())

    def input(self, path: str) -> torch.Tensor:
        """The first tensor that the module at ``path`` took."""
        return self._get(path, "input")

    def output(self, path: str) -> torch.Tensor:
        """The first tensor that the module at ``path`` gave."""
        return self._get(path, "output")

    def ran(self, path: str) -> bool:
        """Whether the module at ``path`` was called."""
        return (self._modules[path], "output") in self._kept

    def _get(self, path: str, kind: str) -> torch.Tensor:
        key = (self._modules[path], kind)
        if key not in self._kept:
            raise ValidationError(path, "this module runs", "it did not run in a forward pass over text", "")
        value = first_tensor(self._kept[key])
        if value.ndim == 2 and value.shape[0] == BATCH * POSITIONS:
            return value.reshape(BATCH, POSITIONS, -1)
        return value


def _paths(layer: LayerPlan) -> set[str]:
    """Every module that takes part in what is promised of a layer."""
    fields = ("input", "output", "contribution", "norm", "projection", "stream", "sum_norm")
    return {layer.input, layer.output} | {
        path for part in layer.parts for name in fields if (path := getattr(part, name))
    }


def validate(
    module: torch.nn.Module,
    plan: RenamePlan,
    spec: ArchitectureSpec,
    sizes: Dimensions,
    unembed: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, str]:
    """Check every promise of ``plan`` and ``spec`` on the model itself.

    Args:
        module: the causal language model.
        plan: which module plays which part.
        spec: how the parts work together.
        sizes: the model's dimensions.
        unembed: from the last layer's output, (batch, position, hidden), to logits (batch, position, vocab).

    Gives the output projections that do not give what their attention gives, each with what was seen: mostly their
    names are but a guess, and all else holds without them.

    Raises:
        ValidationError: names the first promise that does not hold, the line that makes it, and what was seen.
    """
    doubtful: dict[str, str] = {}
    for row in promised(module, plan, spec, sizes, unembed):
        wrong = row.disagreement()
        if wrong is not None and row.kind == "heads_contribution":
            doubtful[row.subject] = wrong
        elif wrong is not None:
            raise ValidationError(row.origin, row.promise, wrong, spec.family)
    return doubtful


def promised(
    module: torch.nn.Module,
    plan: RenamePlan,
    spec: ArchitectureSpec,
    sizes: Dimensions,
    unembed: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[Row]:
    """What `validate` checks, row by row, without what the specification says cannot hold."""
    probe = Probe(module, plan)
    for path in probe.written_over:
        if path not in plan.written_over:
            promise = f"what {path} gives stays as it is, as `written_over` does not list it"
            raise ValidationError(spec.where("written_over"), promise, "the model writes into it later", spec.family)
    with evaluating(module), torch.no_grad():
        for row in _Table(probe, plan, spec, config_of(module), sizes).rows(unembed):
            if row.kind not in spec.cannot:
                yield row


class _Table:
    """The promises of one model, row by row."""

    def __init__(self, probe: Probe, plan: RenamePlan, spec: ArchitectureSpec, config: Any, sizes: Dimensions) -> None:
        self.probe = probe
        self.plan = plan
        self.spec = spec
        self.config = config
        self.sizes = sizes
        self.stream = StreamShape.of("layers", spec, config, sizes.hidden_size)
        self.parts = StreamShape.of("parts", spec, config, sizes.hidden_size)

    def rows(self, unembed: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Row]:
        """All rows; a later one may need what an earlier one promises."""
        plan, probe, spec = self.plan, self.probe, self.spec
        if plan.embed:
            yield from self._embedding_rows()
        for index, layer in enumerate(plan.layers):
            yield from self._shapes(index, layer)
            yield from self._projections(index, layer)
            if "contributions" not in spec.cannot and layer.is_whole:
                yield from self._sum(index, layer)
        for index, (layer, following) in enumerate(zip(plan.layers, plan.layers[1:], strict=False)):
            promise = f"layers_output[{index}] is layers_input[{index + 1}]"
            origin = self._said("layers")
            yield Row("chain", promise, origin, probe.input(following.input), probe.output(layer.output))
        logits = (BATCH, POSITIONS, self.sizes.vocab_size)
        yield Row(
            "logits", "logits is (batch, position, vocab)", spec.where("dimensions.vocab_size"), probe.logits, logits
        )
        if "project_on_vocab" not in spec.cannot:
            yield from self._unembedding(unembed)

    def _embedding_rows(self) -> Iterator[Row]:
        plan, probe, spec = self.plan, self.probe, self.spec
        embeddings = StreamShape.of("embeddings", spec, self.config, self.sizes.hidden_size)
        seen = probe.output(plan.embed[-1])
        promise = f"token_embeddings is ({embeddings.named})"
        wanted = embeddings.sizes(BATCH, POSITIONS, seen.shape)
        yield Row("token_embeddings", promise, self._said("embed_tokens"), seen, wanted)
        if spec.embedding_multiplier:
            promise = f"layers_input[0] is token_embeddings * {spec.embedding_multiplier.text}"
            value = times(spec.embedding_multiplier, probe.output(plan.embed[-1]), self.config)
            yield Row("chain", promise, spec.where("embedding_multiplier"), probe.input(plan.layers[0].input), value)

    def _shapes(self, index: int, layer: LayerPlan) -> Iterator[Row]:
        places: list[tuple[str, str, str, Any]] = [("layers_input", "modules.layers", layer.input, self.probe.input)]
        for part in layer.parts:
            name = PART_NAMES.get(part.kind, "mixers")
            origin = f"layer.{part.kind}"
            places += [(f"{name}_input", origin, part.input, self.probe.input)]
            places += [(f"{name}_output", origin, part.output, self.probe.output)]
        places += [("layers_output", "modules.layers", layer.output, self.probe.output)]
        for name, origin, path, see in places:
            kind = name.partition("_")[0]
            if kind in self.spec.cannot:
                continue
            said = self.plan.origins.get(origin) or self.spec.where(origin)
            shape, seen = self.stream if kind == "layers" else self.parts, see(path)
            yield Row(
                kind, f"{name}[{index}] is ({shape.named})", said, seen, shape.sizes(BATCH, POSITIONS, seen.shape)
            )

    def _projections(self, index: int, layer: LayerPlan) -> Iterator[Row]:
        for part in layer.parts:
            # What does not run in this pass gives nothing that could be held against it.
            if part.projection and self.probe.ran(part.projection):
                made, whole = self.probe.output(part.projection), self.probe.output(part.output)
                promise = f"{part.projection} gives what the {part.kind} of layer {index} gives"
                expected = whole.reshape(made.shape) if whole.numel() == made.numel() else whole
                origin = self.spec.where(f"layer.{part.kind}.projection")
                yield Row("heads_contribution", promise, origin, made, expected, part.projection)

    def _sum(self, index: int, layer: LayerPlan) -> Iterator[Row]:
        """The residual stream through one layer: what comes in, what is added, what its own norms make of it."""
        probe = self.probe
        value = start = probe.input(layer.input)
        for part in layer.parts:
            origin = self.spec.where(f"layer.{part.kind}")
            name = part.kind.replace("_", " ")

            def row(promise: str, seen: torch.Tensor, expected: torch.Tensor, origin: str = origin) -> Row:
                return Row("contributions", promise, origin, seen, expected)

            if part.stream:
                promise = f"the stream of layer {index} goes through {part.stream} before its {name}"
                yield row(promise, probe.input(part.stream), value)
                value = start = probe.output(part.stream)
            if part.norm:
                # What a layer has to mix positions stands side by side, if there is more than one.
                beside = self.spec.layout == "parallel" or part.kind in KINDS
                reads = "the layer's input" if beside else "the stream so far"
                promise = f"the {name} of layer {index} reads {reads} through {part.norm}"
                yield row(promise, probe.input(part.norm), start if beside else value)
                yield row(promise, probe.input(part.input), probe.output(part.norm))
            addition = Addition(part, self.config, probe.layer(layer.path))
            value = addition.stream(value) + addition.contribution(probe.output(part.contribution))
            if part.sum_norm:
                promise = f"the stream of layer {index} goes through {part.sum_norm} after its {name}"
                yield row(promise, probe.input(part.sum_norm), value)
                value = probe.output(part.sum_norm)
        value = times(layer.multiplier, value, self.config, probe.layer(layer.path))
        promise = f"layers_output[{index}] is layers_input[{index}] + the contributions of its parts"
        yield Row("contributions", promise, self.spec.where("layer"), probe.output(layer.output), value)

    def _unembedding(self, unembed: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Row]:
        plan, probe, spec = self.plan, self.probe, self.spec
        last = value = self.stream.view(probe.output(plan.layers[-1].output))
        steps = [f"logits.{name}" for name in ("softcap", "multiplier") if getattr(spec.logits, name)]
        origin = spec.where(steps[0] if steps else "unembed")
        promise = "logits is what project_on_vocab makes of the last layer's output"
        whole = Row("project_on_vocab", promise, origin, probe.logits, unembed(last))
        if whole.disagreement():
            # Which step is wrong? Only asked then: a module that runs elsewhere as well has other numbers there.
            value = self.stream.joined(value)
            for path in plan.unembed:
                role = next((name for name in ROLES if plan.modules.get(name) == path), None)
                said = self._said(role) if role else spec.where("unembed")
                promise = f"{path} takes its turn in {' of '.join(reversed(spec.unembed))} of the last layer's output"
                yield Row("project_on_vocab", promise, said, probe.input(path), value)
                value = probe.output(path)
        yield whole

    def _said(self, role: str) -> str:
        return self.plan.origins.get(f"modules.{role}", "")
