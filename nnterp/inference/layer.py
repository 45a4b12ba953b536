"""One layer's parts: what moves things between positions, the MLP, and how each reads the stream and adds to it."""

from __future__ import annotations

import dataclasses

import torch

from nnterp.inference.flow import Flow
from nnterp.inference.numbers import alike, shaped_like
from nnterp.inference.probe import Call
from nnterp.inference.sums import Added, find_sum

__all__ = ["examine_layer", "LayerFinding", "PartFinding"]


@dataclasses.dataclass(frozen=True)
class PartFinding:
    """One part of a layer, by the calls that were seen.

    `kind` is "attention", one of the other kinds of mixers, "mlp" or "also_added". Where no module is the part,
    `module` is None, and `input` and `output` are its first and its last one.
    """

    kind: str
    module: Call | None
    input: Call
    output: Call
    #: What is added to the stream, and by which number it is multiplied; None where the sum was not understood.
    added: Added | None = None
    #: The call whose output is added, where that is not the part's own.
    contribution: Call | None = None
    #: The norm through which the part reads the stream.
    norm: Call | None = None


@dataclasses.dataclass(frozen=True)
class LayerFinding:
    """What was found about one layer, its parts in the order in which they begin."""

    flow: Flow
    parts: tuple[PartFinding, ...]
    layout: str
    #: The module that chooses experts.
    router: Call | None
    #: Whether it is known what the layer adds to the stream.
    adds_up: bool

    def part(self, *kinds: str) -> PartFinding | None:
        """The first part of one of these kinds."""
        return next((part for part in self.parts if part.kind in kinds), None)


def examine_layer(layer: Call) -> LayerFinding:
    """Find one layer's parts from the call of it that a probe saw."""
    flow = Flow(layer)
    total = find_sum(flow)
    added = None if total is None else total.added
    parts = _by_work(flow) if added is None else [*_by_sum(flow, added), *_silent(flow, added)]
    parts = sorted((_around(flow, part) for part in parts), key=lambda part: part.input.begin)
    layout = _layout(flow, parts)
    parts = _with_norms(flow, parts, layout)
    mlps = [part.module for part in parts if part.kind == "mlp" and part.module]
    adds_up = total is not None and total.factor == 1
    return LayerFinding(flow, tuple(parts), layout, _router(mlps[0]) if mlps else None, adds_up)


def _by_sum(flow: Flow, added: tuple[Added, ...]) -> list[PartFinding]:
    """The parts, each from what it adds."""
    parts: list[PartFinding] = []

    def is_taken(kind: str) -> bool:
        return any(part.kind == kind for part in parts)

    for each in added:
        origin = flow.origin(each.call)
        attention = _attention(flow, origin)
        before = flow.producer(origin.given, origin.begin)
        if attention is None and before is not None and _matrices(before) > 1 >= _matrices(origin):
            # A single map beside a whole part, a convolution over what the MLP gave say, belongs to that part.
            origin = before
        mixer = None if attention else flow.mixer_kind(origin)
        if mixer == "convolution" and each is added[-1] and parts and not is_taken("mlp"):
            # RWKV's MLP looks at the position before, and is an MLP all the same.
            mixer = None
        if attention is not None and not is_taken("attention"):
            parts.append(PartFinding("attention", attention, attention, attention, each))
        elif mixer is not None and not is_taken(mixer):
            parts.append(PartFinding(mixer, origin, origin, origin, each))
        elif not is_taken("mlp"):
            parts.append(_mlp(flow, origin, each, parts[-1] if parts else None))
        else:
            whole = origin if _matrices(origin) > 1 else each.call
            parts.append(PartFinding("also_added", whole, whole, whole, each))
    return parts


def _silent(flow: Flow, added: tuple[Added, ...]) -> list[PartFinding]:
    """Parts that add nothing, as a part does whose weights are zero still: they are told by their work."""
    known = {part.kind for part in _by_sum(flow, added)}
    parts = [part for part in _by_work(flow) if part.kind not in known and part.kind in ("attention", "mlp")]
    silent = [part for part in parts if part.output.made is not None and not bool(part.output.made.any())]
    return [dataclasses.replace(part, added=Added(part.output), contribution=None) for part in silent]


def _attention(flow: Flow, origin: Call) -> Call | None:
    """The attention that a contribution comes from: where the heads are put together by a module beside them, what
    holds both, or the part that makes the pattern."""
    if origin.patterns:
        return origin
    if _matrices(origin) > 1:
        return None
    around = [call for call in flow.calls if call.holds(origin) and call.patterns]
    before = flow.producer(origin.given, origin.begin)
    if around:
        return min(around, key=lambda call: call.begin)
    return before if before is not None and before.patterns else None


def _matrices(call: Call) -> int:
    return sum(parameter.ndim > 1 for parameter in call.module.parameters())


def _mlp(flow: Flow, origin: Call, added: Added | None, before: PartFinding | None) -> PartFinding:
    """The MLP that ends in `origin`: what holds all of it, or from its first module to its last."""
    if _matrices(origin) > 1:
        return PartFinding("mlp", origin, origin, origin, added)
    start = before.output.end if before else flow.layer.begin
    holders = [call for call in flow.calls if call.holds(origin) and call.begin > start and _matrices(call) > 1]
    if holders and not _holds_more(flow, holders, origin):
        whole = min(holders, key=lambda call: call.begin)
        return PartFinding("mlp", whole, whole, whole, added)
    children = [call for call in flow.layer.children if start < call.begin < origin.begin and _matrices(call)]
    return PartFinding("mlp", None, children[0] if children else origin, origin, added)


def _holds_more(flow: Flow, holders: list[Call], origin: Call) -> bool:
    """Whether the first map of the MLP is outside of what holds its last one."""
    whole = min(holders, key=lambda call: call.begin)
    read = origin.given
    made_inside = flow.producer(read, origin.begin)
    return made_inside is not None and not whole.holds(made_inside)


def _by_work(flow: Flow) -> list[PartFinding]:
    """Where the sum is not understood: the parts by what they do, without a word on what they add."""
    children = [call for call in flow.layer.children if _matrices(call)]
    parts: list[PartFinding] = []
    mixing = [call for call in children if call.patterns] or [call for call in children if flow.mixer_kind(call)]
    if mixing:
        kind = "attention" if mixing[0].patterns else str(flow.mixer_kind(mixing[0]))
        parts.append(PartFinding(kind, mixing[0], mixing[0], mixing[0]))
    after = [call for call in children if call not in mixing and not flow.mixer_kind(call) and not flow.is_norm(call)]
    after = [call for call in after if not mixing or call.begin > mixing[0].end]
    whole = [call for call in after if _matrices(call) > 1]
    if len(after) > 1 and _matrices(after[0]) == 1 and alike(after[0].made, after[1].given):
        parts.append(PartFinding("mlp", None, after[0], after[-1]))
    elif whole:
        # Of several the one with the most numbers in it does the work.
        mlp = max(whole, key=lambda call: sum(parameter.numel() for parameter in call.module.parameters()))
        parts.append(PartFinding("mlp", mlp, mlp, mlp))
    elif len(after) > 1:
        parts.append(PartFinding("mlp", None, after[0], after[-1]))
    return [dataclasses.replace(part, contribution=_normed(flow, part.output)) for part in parts]


def _normed(flow: Flow, made: Call) -> Call | None:
    """The norm that takes what a part gave, and nothing else, before it is added."""
    after = [call for call in flow.calls if call.begin > made.end and alike(call.given, made.made)]
    return next((call for call in after if flow.is_norm(call)), None)


def _around(flow: Flow, part: PartFinding) -> PartFinding:
    """The part with the module whose output is added: one inside it, where the part adds the residual itself, or one
    that takes what it gives."""
    added = part.added.call if part.added else None
    if added is None or added is part.output:
        return part
    if part.module is not None and part.module.holds(added):
        return dataclasses.replace(part, output=flow.origin(added))
    if added.parent is not flow.layer and added.parent is part.output.parent and flow.changes_nothing(added):
        return part
    return dataclasses.replace(part, contribution=added)


def _with_norms(flow: Flow, parts: list[PartFinding], layout: str) -> list[PartFinding]:
    """The parts with the norms through which they read the stream: what takes the stream as it is then, and gives what
    the part takes."""
    start = stream = flow.given
    found = []
    for part in parts:
        before, after = (part.added.before, part.added.after) if part.added else (None, None)
        if before is not None and before.made is not None:
            start = stream = before.made.reshape(stream.shape)
        streams = [stream] if layout == "sequential" else [start, stream]
        reader = _reader(flow, part, streams) if part.kind != "also_added" else None
        part = dataclasses.replace(part, norm=reader if reader not in (before, after) else None)
        found.append(_with_holder(flow, _with_inner_norm(flow, part, streams)))
        if part.added is not None:
            added = part.added.factor * part.added.call.made.reshape(stream.shape)  # type: ignore[union-attr]
            stream = part.added.stream_factor * stream + added
        if after is not None and after.made is not None:
            stream = after.made.reshape(stream.shape)
    return found


def _reader(flow: Flow, part: PartFinding, streams: list[torch.Tensor]) -> Call | None:
    """The module that a part reads the stream through."""
    fits = [call for call in flow.calls if call.end < part.input.begin and alike(call.made, part.input.given)]
    if part.added is None:
        # What the stream is by then is not known, but for the first part.
        fits = [call for call in fits if flow.is_norm(call) and (part.kind == "mlp" or alike(call.given, flow.given))]
    else:
        fits = [call for call in fits if any(alike(shaped_like(call.given, each), each) for each in streams)]
    # In place of a norm there may be nothing, under the norm's name.
    fits = [call for call in fits if not flow.changes_nothing(call) or isinstance(call.module, torch.nn.Identity)]
    return max(fits, key=lambda call: call.end, default=None)


def _with_inner_norm(flow: Flow, part: PartFinding, streams: list[torch.Tensor]) -> PartFinding:
    """The part where its module takes the stream as it is and norms it inside: its input then is what comes after."""
    module = part.module
    if module is None or part.norm is not None or not any(alike(shaped_like(module.given, s), s) for s in streams):
        return part
    first = next(iter(module.children), None)
    if first is None or not flow.is_norm(first) or not any(alike(shaped_like(first.given, s), s) for s in streams):
        return part
    reads = next((call for call in module.children[1:] if alike(call.given, first.made)), None)
    return part if reads is None else dataclasses.replace(part, norm=first, input=reads)


def _with_holder(flow: Flow, part: PartFinding) -> PartFinding:
    """The part with the module that holds it, its norm and nothing else but what adds it to the stream."""
    module = part.module
    if module is None or module.parent is None or module.parent is flow.layer or part.norm is None:
        return part
    others = [call for call in module.parent.children if call is not module and not flow.changes_nothing(call)]
    if others != [part.norm] or part.norm.parent is not module.parent:
        return part
    return dataclasses.replace(part, module=module.parent, contribution=None)


def _layout(flow: Flow, parts: list[PartFinding]) -> str:
    """Whether the MLP reads what the layer was given."""
    mlp = next((part for part in parts if part.kind == "mlp"), None)
    mixer = next((part for part in parts if part.kind not in ("mlp", "also_added")), None)
    if mlp is None or mixer is None or mlp.input.given is None:
        return "sequential"
    before = flow.producer(mlp.input.given, mlp.input.begin)
    read = before.given if before and flow.is_norm(before) else mlp.input.given
    start = mixer.added.before.made if mixer.added and mixer.added.before else flow.given
    same = alike(mlp.input.given, mixer.input.given)
    return "parallel" if same or alike(shaped_like(read, flow.given), start) else "sequential"


def _router(mlp: Call) -> Call | None:
    """The module that chooses experts: the one that picks the best of its scores, or gives them to one that does."""
    for call in [mlp, *mlp.inside()]:
        for experts in call.routes:
            if call is not mlp and _matrices(call):
                return call
            scores = [each for each in call.inside() if each.made is not None and each.made.shape[-1] == experts]
            if scores:
                return scores[0]
    experts_counts = {parameter.shape[0] for parameter in mlp.module.parameters() if parameter.ndim == 3}
    maps = [call for call in mlp.inside() if _matrices(call) == 1 and call.made is not None]
    return next((call for call in maps if {p.shape[0] for p in call.module.parameters()} == experts_counts), None)
