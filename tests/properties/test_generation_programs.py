"""Random programs over the steps of a generation, in one body or several: each prompt gets what hooks give it alone."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_core import LanguageModel
from nnsight_core.calls import OneCall
from nnsight_core.counting import CallCounter
from nnsight_core.events import Event
from nnsight_core.rows import Rows, StrictRows
from tests import leaks, oracle

WIDTH, HEADS, VOCABULARY, LENGTH, STEPS = 6, 3, 11, 3, 3


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.tanh(self.up(x)))


class Gives(nn.Module):
    """Gives a tuple with the heads before the batch in its second place."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 1.5, x.unflatten(-1, (HEADS, 2)).permute(2, 0, 1, 3)


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Gives()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, heads = self.inner(x)
        return hidden + heads.permute(1, 2, 0, 3).flatten(-2)


class Attention(nn.Module):
    """Works on (head, batch, position, width) and keeps what it has seen, likewise; ``watch`` sees the weights."""

    watch: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, past: dict[Any, torch.Tensor], name: str) -> torch.Tensor:
        each = self.mix(x).unflatten(-1, (HEADS, 2)).permute(2, 0, 1, 3)
        # The batch comes first in what is kept, as rows of it are.
        kept = each.transpose(0, 1)
        kept = past[name] = torch.cat([past[name], kept], dim=2) if name in past else kept
        seen = kept.transpose(0, 1)
        queries, keys = each.shape[2], seen.shape[2]
        later = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).logical_not()
        weights = torch.softmax((each @ seen.transpose(-1, -2)).masked_fill(later, float("-inf")), dim=-1)
        if self.watch is not None:
            weights = self.watch(weights)
        return (weights @ seen).permute(1, 2, 0, 3).flatten(-2)


class Writer(nn.Module):
    """A language model that writes by itself, and into the logits that it has got, too."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def forward(self, input_ids: torch.Tensor, past: dict[Any, torch.Tensor]) -> torch.Tensor:
        x = self.embedding(input_ids)
        for number, part in enumerate(self.parts):
            x = x + (part(x, past, str(number)) if isinstance(part, Attention) else part(x))
        return self.head(x)

    def generate(self, input_ids: torch.Tensor, attention_mask: Any = None, spread: int = 1) -> torch.Tensor:
        tokens = input_ids.repeat_interleave(spread, 0)
        given, past = tokens, dict[Any, torch.Tensor]()
        for _ in range(STEPS):
            logits = self(input_ids=given, past=past)[:, -1]
            # Rows of one prompt go different ways.
            logits[:, 0] -= 100
            best = logits.topk(spread, dim=-1).indices
            given = best.gather(1, (torch.arange(len(tokens)) % spread)[:, None])
            tokens = torch.cat([tokens, given], dim=1)
        return tokens


@dataclasses.dataclass(frozen=True)
class Visit:
    """What is done at one value of one step: ``path`` leads to the tensor in it; ``call`` is the number of the module's
    call in the step, None for the next that comes.
    """

    place: oracle.Place
    path: oracle.Path
    kind: str
    number: float
    call: int | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """For each body, for each step, the visits in the order in which the values come."""

    bodies: tuple[tuple[tuple[Visit, ...], ...], ...]
    spread: int


KINDS = ("save", "replace", "slice", "add", "combine")


@st.composite
def _visits(draw: st.DrawFn, order: list[tuple[oracle.Place, list[oracle.Path]]], is_alone: bool) -> tuple[Visit, ...]:
    """What is done in one step, of which ``order`` has the values."""
    visits: list[Visit] = []
    # In a batch the calls inside a skipped one are made, for the others; alone they are not, and are not counted.
    made, until = list(range(len(order))), -1
    # Alone, a skipped attention keeps nothing for later steps; in a batch it does, for the others.
    keeping = {path for (path, kind), _ in order if kind == "softmax"}
    for index in sorted(draw(st.sets(st.sampled_from(range(len(order))), max_size=4))):
        place, paths = order[index]
        if index <= until:
            continue
        kinds = KINDS
        if place[1] == "input" and place[0].count(".") == 1 and place[0] not in keeping:
            kinds = (*KINDS, "skip", "skip")
        kind, path = draw(st.sampled_from(kinds)), draw(st.sampled_from(paths))
        call = [i for i in made if order[i][0] == place].index(index)
        # The place where the model stands is given again, unless another call is meant.
        has_number = place[1] != "softmax" and (draw(st.booleans()) or (visits and visits[-1].place == place))
        if not has_number and visits and visits[-1].place == place:
            continue
        if kind == "skip":
            until = next(i for i, (each, _) in enumerate(order) if i > index and each == (place[0], "output"))
            made = [i for i in made if not (is_alone and index < i < until)]
            has_number = True
        visits.append(Visit(place, path, kind, draw(st.sampled_from([0.5, -2.0])), call if has_number else None))
    return tuple(visits)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Writer, Program]:
    torch.manual_seed(draw(st.integers(0, 5)))
    parts = [part() for part in draw(st.lists(st.sampled_from([Attention, Mlp, Takes]), min_size=1, max_size=2))]
    # Some stand at several places.
    model = Writer([*parts, *draw(st.lists(st.sampled_from(parts), max_size=2))]).eval()
    bodies = draw(st.integers(1, 3))
    order = Hooked(model, (), True).order()
    made = [tuple(draw(_visits(order, bodies == 1)) for _ in range(STEPS)) for _ in range(bodies)]
    return model, Program(tuple(made), draw(st.sampled_from([1, 1, 2])))


def prompts(program: Program) -> list[torch.Tensor]:
    # As many as there are heads, at most, and as long.
    return list(torch.arange(1, 1 + LENGTH * len(program.bodies)).view(-1, 1, LENGTH))


class Hooked:
    """One body as plain hooks would run it on its own prompt; ``is_alone`` if it has no others beside it."""

    def __init__(self, model: Writer, steps: tuple[tuple[Visit, ...], ...], is_alone: bool) -> None:
        self.model, self.steps, self.is_alone = model, steps, is_alone
        self.saved: list[torch.Tensor] = []
        self.pool: Any = 0.25
        self._left: list[Visit] = []
        self._step = -1
        self._counts: dict[oracle.Place, int] = {}
        #: The module that is being skipped, and what it gives.
        self._skipped: tuple[str, Any] | None = None
        self._seen: list[tuple[oracle.Place, list[oracle.Path]]] = []

    def order(self) -> list[tuple[oracle.Place, list[oracle.Path]]]:
        """The values of the first step."""
        with torch.no_grad():
            self.run(torch.ones(1, LENGTH, dtype=torch.long), 1)
        first = [place for place, _ in self._seen].index(("", "output"))
        return [(place, paths) for place, paths in self._seen[: first + 1] if paths and place[0] != ""]

    def visit(self, place: oracle.Place, value: Any) -> tuple[Any] | None:
        if place == ("", "input"):
            self._step += 1
            self._left = list(self.steps[self._step]) if self.steps else []
            self._counts.clear()
        floats = [path for path in oracle.tensor_paths(value) if oracle.get(value, path).is_floating_point()]
        # What is kept of the steps before is no value of a step.
        self._seen.append((place, [path for path in floats if path[:2] != (0, 1)]))
        skipped = self._skipped
        if skipped is None or place == (skipped[0], "output") or not self.is_alone:
            self._counts[place] = self._counts.get(place, -1) + 1
        if skipped is not None:
            if place != (skipped[0], "output"):
                return None
            value, self._skipped = skipped[1], None
        visit = self._left[0] if self._left else None
        if visit is None or visit.place != place or visit.call not in (None, self._counts[place]):
            return None if skipped is None else (value,)
        self._left.pop(0)
        new = done(visit, oracle.get(value, visit.path), self)
        if visit.kind == "skip":
            self._skipped, new = (place[0], new), None
        return (value if new is None else oracle.put(value, visit.path, new),)

    def run(self, prompt: torch.Tensor, spread: int) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, Attention):
                module.watch = lambda weights, name=name: (self.visit((name, "softmax"), weights) or (weights,))[0]
        try:
            with oracle.visiting(self.model, self.visit):
                self.saved.append(self.model.generate(prompt, spread=spread))
        finally:
            for module in self.model.modules():
                module.__dict__.pop("watch", None)


def done(visit: Visit, value: Any, body: Any) -> Any:
    """Do what ``visit`` says to a tensor or a proxy of one; what is to stand in its place, or None."""
    if visit.kind == "save":
        body.saved.append(value.clone() if type(body) is Hooked else value)
        return None
    if visit.kind == "combine":
        body.pool = (value * visit.number).mean() + body.pool
        return None
    if visit.kind in ("replace", "skip"):
        return value * visit.number + body.pool
    new = value.clone()
    if visit.kind == "slice":
        new[..., :2] = visit.number
    else:
        new += body.pool
    return new


class Traced:
    """All bodies as a user would write them."""

    def __init__(self, model: Writer, program: Program) -> None:
        self.model, self.program = LanguageModel(model), program
        self.saved: list[Any] = []
        self.pool: Any = 0.25

    def _body(self, steps: tuple[tuple[Visit, ...], ...], tracer: Any) -> None:
        self.pool = 0.25
        # Operations are counted from the start of a call: a later step has no dry run of what has gone by in it.
        for path in {visit.place[0] for visits in steps for visit in visits if visit.place[1] == "softmax"}:
            _ = self.model.get(path).source
        numbered = {visit.place[0] for visits in steps for visit in visits if visit.call is not None}
        self.calls = {path: self.model.get(path).calls for path in numbered}
        for step in tracer.iter[0:STEPS]:
            for visit in steps[step]:
                self._visit(visit)
        self.saved.append(self.model.generator.output)

    def _visit(self, visit: Visit) -> None:
        path, kind = visit.place
        envoy = self.model.get(path)
        owner, name = (envoy, kind) if kind != "softmax" else (envoy.source.softmax_0, "output")
        if visit.call is not None:
            owner = self.calls[path][visit.call]
        value = getattr(owner, name)
        for key in visit.path:
            value = value[key]
        new = done(visit, value, self)
        if new is None:
            return
        if visit.kind == "skip":
            owner.skip(new)
        elif not visit.path:
            setattr(owner, name, new)
        elif kind == "input":
            # The first argument.
            owner.input = new
        else:
            getattr(owner, name)[visit.path[0]] = new

    def run(self) -> None:
        given = prompts(self.program)
        if len(given) == 1:
            with self.model.generate(given[0], spread=self.program.spread) as tracer:
                self._body(self.program.bodies[0], tracer)
                self.saved = [value.save() for value in self.saved]
            return
        with self.model.generate(spread=self.program.spread) as tracer:
            saved: list[Any] = []
            for steps, prompt in zip(self.program.bodies, given, strict=True):
                with tracer.invoke(prompt):
                    self.saved = []
                    self._body(steps, tracer)
                    saved += [value.save() for value in self.saved]
            self.saved = saved
        assert tracer.forward_passes == 1


@torch.no_grad()
def check_program(model: Writer, program: Program) -> None:
    """The same numbers in every step of every body, and nothing left behind."""
    expected = []
    for steps, prompt in zip(program.bodies, prompts(program), strict=True):
        hooked = Hooked(model, steps, len(program.bodies) == 1)
        hooked.run(prompt, program.spread)
        expected += hooked.saved
    with leaks.watching([model]) as watch:
        traced = Traced(model, program)
        traced.run()
        assert len(traced.saved) == len(expected)
        for one, other in zip(traced.saved, expected, strict=True):
            torch.testing.assert_close(one.value, other, rtol=1e-9, atol=1e-11)
        del traced, one
        gc.collect()
    assert not watch.complaints()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_cases())
def test_each_prompt_goes_its_own_way(case: tuple[Writer, Program]) -> None:
    check_program(*case)


def test_a_cache_that_is_an_argument_beside_one_that_is_set_stays_the_models_own() -> None:
    visit = Visit(("parts.0", "input"), (0, 0), "replace", 0.5)
    for seed in range(3):
        torch.manual_seed(seed)
        check_program(Writer([Attention()]).eval(), Program((((), (), ()), ((), (visit,), ())), 2))


# Twins: the harness sees an engine that is wrong.


def _two_writes() -> tuple[Writer, Program]:
    torch.manual_seed(0)
    visits = (
        Visit(("parts.0", "softmax"), (), "save", 1.0),
        Visit(("parts.1", "input"), (0, 0), "skip", 0.5, 1),
        Visit(("parts.1", "output"), (), "save", 1.0, 1),
        Visit(("head", "output"), (), "replace", -2.0),
    )
    twice = Mlp()
    return Writer([Attention(), twice, twice]), Program((((visits,) * STEPS),) * HEADS, 1)


def test_the_harness_passes_a_right_engine() -> None:
    check_program(*_two_writes())


def _by_the_first_axis(self: StrictRows, tensor: torch.Tensor, place: Any = None) -> tuple[slice]:
    return (slice(self.start, self.start + self.size),)


WRONG = {
    "heads that are taken for rows": (StrictRows, "_range", _by_the_first_axis),
    "a write that spills": (Rows, "put", lambda self, value, part, place=None: self.take(part).expand_as(value)),
    "a dropped write": (Event, "write", lambda self, value: None),
    "a dropped skip": (OneCall, "skip", lambda self, value: None),
    "calls that are not counted": (CallCounter, "begins", lambda self: setattr(self, "now", 1)),
}


@pytest.mark.parametrize("owner, name, wrong", WRONG.values(), ids=WRONG)
def test_the_harness_catches(owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_program(*_two_writes())
