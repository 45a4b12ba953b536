"""The parts of all layers in one description: layers of several kinds share it, as each names what it has.

    kinds = describe_layers(findings)
    kinds.parts["attention"].module       # ('self_attn',)

Where layers differ, a place names several paths, and the first that a layer has is meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from nnterp.inference.layer import LayerFinding, PartFinding
from nnterp.inference.probe import Call

__all__ = ["describe_layers", "LayersDescription", "PartDescription"]


@dataclasses.dataclass(frozen=True)
class PartDescription:
    """One part as a specification has it: for each place the paths from the layer, the first that is there first."""

    module: tuple[str, ...] = ()
    input: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    contribution: tuple[str, ...] = ()
    sum_norm: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()
    #: What tells this kind of part from others of the same path.
    has: tuple[str, ...] = ()
    #: The number that what is added is multiplied by.
    factor: float = 1.0
    stream_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayersDescription:
    """What all layers have, by kind of part."""

    parts: dict[str, PartDescription]
    layout: str
    router: tuple[str, ...]
    #: The kinds that some layers lack.
    missing: frozenset[str]
    adds_up: bool


def describe_layers(findings: Sequence[LayerFinding]) -> LayersDescription:
    """One description of all the layers' parts."""
    kinds = list(dict.fromkeys(part.kind for finding in findings for part in finding.parts))
    parts = {kind: _describe(findings, kind) for kind in kinds}
    parts = {kind: dataclasses.replace(part, has=_has(findings, kind, parts)) for kind, part in parts.items()}
    consistent = all(len(_factors(findings, kind)) <= 1 for kind in kinds)
    layouts = [finding.layout for finding in findings if finding.part("mlp")]
    return LayersDescription(
        parts=parts,
        layout=max(set(layouts), key=layouts.count, default="sequential"),
        router=_choice(findings, [finding.router for finding in findings]),
        missing=frozenset(kind for kind in kinds if not all(finding.part(kind) for finding in findings)),
        adds_up=consistent and all(finding.adds_up for finding in findings),
    )


def _factors(findings: Sequence[LayerFinding], kind: str) -> set[tuple[float, float]]:
    """What a kind's contributions, and the stream that they are added to, are multiplied by."""
    parts = [part for finding in findings if (part := finding.part(kind)) is not None]
    return {(part.added.factor, part.added.stream_factor) for part in parts if part.added}


def _describe(findings: Sequence[LayerFinding], kind: str) -> PartDescription:
    parts = [finding.part(kind) for finding in findings]

    def choice(calls: Iterable[Call | None]) -> tuple[str, ...]:
        return _choice(findings, list(calls))

    def of(get: Callable[[PartFinding], Call | None]) -> tuple[str, ...]:
        return choice(None if part is None else get(part) for part in parts)

    def norm(name: str) -> tuple[str, ...]:
        return of(lambda part: getattr(part.added, name) if part.added else None)

    factors = next(iter(_factors(findings, kind)), (1.0, 1.0))
    return PartDescription(
        module=of(lambda part: part.module),
        input=of(lambda part: None if part.input is part.module else part.input),
        output=of(lambda part: None if part.output is part.module else part.output),
        norm=_unless_ambiguous(findings, kind, of(lambda part: part.norm)),
        contribution=_or_itself(of(lambda part: part.contribution), of(lambda part: part.output), parts),
        sum_norm=norm("after"),
        stream=norm("before"),
        factor=factors[0],
        stream_factor=factors[1],
    )


def _unless_ambiguous(findings: Sequence[LayerFinding], kind: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    """The paths of the norm, unless a layer has a module of such a path that is something else."""
    for finding in findings:
        part = finding.part(kind)
        meant = finding.flow.relative(part.norm) if part and part.norm else None
        if part is not None and next((path for path in paths if _has_module(finding, path)), None) != meant:
            return ()
    return paths


def _or_itself(
    paths: tuple[str, ...], outputs: tuple[str, ...], parts: Sequence[PartFinding | None]
) -> tuple[str, ...]:
    """The same where some layers add what the part itself gives: that stands last, and is there everywhere."""
    plain = any(part is not None and part.contribution is None for part in parts)
    return (*paths, *outputs) if paths and plain else paths


def _choice(findings: Sequence[LayerFinding], calls: Sequence[Call | None]) -> tuple[str, ...]:
    """The paths of `calls`, one a layer, in an order in which the first that a layer has is its own."""
    said = [
        (finding, finding.flow.relative(call))
        for finding, call in zip(findings, calls, strict=True)
        if call is not None
    ]
    paths = list(dict.fromkeys(path for _, path in said))

    def goes_before(one: str, other: str) -> bool:
        return any(path == one and _has_module(finding, other) for finding, path in said)

    # What a layer takes although it has another stands before that other.
    return tuple(sorted(paths, key=lambda path: sum(goes_before(other, path) for other in paths if other != path)))


def _has_module(finding: LayerFinding, path: str) -> bool:
    return path in {name for name, _ in finding.flow.layer.module.named_modules()}


def _has(findings: Sequence[LayerFinding], kind: str, parts: dict[str, PartDescription]) -> tuple[str, ...]:
    """Modules that this kind's has and no other's, where another kind has the same path: the fewest that will do."""
    shared = [other for other in parts if other != kind and set(parts[other].module) & set(parts[kind].module)]
    own, others = _children(findings, (kind,)), set[str]().union(*_children(findings, shared))
    if not shared or not all(each - others for each in own):
        return ()
    chosen: list[str] = []
    left = [each - others for each in own]
    while left:
        names = sorted(set[str]().union(*left), key=lambda name: (name.count("."), len(name), name))
        best = max(names, key=lambda name: (sum(name in each for each in left), -name.count(".")))
        chosen.append(best)
        left = [each for each in left if best not in each]
    return tuple(chosen)


def _children(findings: Sequence[LayerFinding], kinds: Iterable[str]) -> list[set[str]]:
    modules = [part.module for finding in findings for part in finding.parts if part.kind in kinds and part.module]
    return [{name for name, _ in call.module.named_modules() if name} for call in modules]
