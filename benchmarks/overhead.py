"""What a trace costs beside hooks written by hand, for the same values.

Both sides of every case run in turns in one process, so whatever else the machine does meets both alike. Before a case
is timed, both sides must give equal numbers. benchmarks/README.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_core import LanguageModel, NNsight
from nnterp import StandardizedTransformer

SEED = 0
TOKENS = 20
NEW_TOKENS = 20
ACCESSES = (1, 10, 100, 1000)
SIZES = {
    "toy": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 320, "n_positions": 64},
    "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}
TABLES = (*SIZES, "chain")

Side = Callable[[], Any]


class NumbersDifferError(AssertionError):
    """The two sides of a case do not give the same numbers, so their times mean nothing."""


@dataclass(frozen=True)
class Case:
    """One thing done in two ways.

    Args:
        name: what the table calls it.
        hooks: done with PyTorch alone; gives a list of tensors.
        ours: the same with a trace; gives a list of the same values.
        checked: in place of ``ours`` where numbers are compared, if ``ours`` itself gives none.
        close: up to rounding is enough, because the two sides do not make the same call.
        accesses: how many values are read, if the cost of each is to be told.
        plain: the call without anything read, from which the cost of an access is counted.
        gradients: autograd is on.
    """

    name: str
    hooks: Side
    ours: Side
    checked: Side | None = None
    close: bool = False
    accesses: int = 0
    plain: Side | None = None
    gradients: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured of a case: medians over pairs, and of what is made of each pair."""

    case: str
    hooks_ms: float
    ours_ms: float
    ratio: float
    more_us: float
    pairs: int
    values_checked: int
    hooks_us_per_access: float | None = None
    ours_us_per_access: float | None = None


# Hooks, as somebody writes them who knows how.


@contextmanager
def hooked(hooks: Sequence[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks for the length of a block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def captured(modules: Sequence[torch.nn.Module], call: Callable[[], Any]) -> list[Any]:
    """What the modules give while ``call`` runs, as they give it."""
    kept: list[Any] = []
    with hooked([(module, lambda m, args, output: kept.append(output)) for module in modules]):
        call()
    return kept


class EnoughError(Exception):
    """Raised in a hook to leave a forward pass that has given what was wanted."""


# The cases of a language model.


class LanguageModelCases:
    """The cases of one GPT-2, built from its sizes with random weights."""

    def __init__(self, sizes: dict[str, int]) -> None:
        torch.manual_seed(SEED)
        config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        self.module = GPT2LMHeadModel(config).eval().requires_grad_(False)
        self.blocks = list(self.module.transformer.h)
        # One small parameter starts the graph, so a backward pass computes little else than what is asked for.
        self.blocks[0].ln_1.bias.requires_grad_(True)
        self.middle = len(self.blocks) // 2
        self.prompts = list(torch.randint(config.vocab_size, (4, 1, TOKENS)))
        self.ids = self.prompts[0]
        self.vector = torch.randn(config.n_embd)
        self.traced = LanguageModel(self.module)
        self.standard = StandardizedTransformer(self.module)

    def cases(self) -> Iterator[Case]:
        """All of them, in the order of the table."""
        yield self.empty()
        yield self.one_layer()
        yield from self.all_layers()
        yield from self.everything()
        yield from self.steering()
        yield self.gradients()
        yield self.generation()
        yield self.early_stop()
        yield self.invokes()

    def logits(self) -> torch.Tensor:
        """The plain call."""
        found: torch.Tensor = self.module(self.ids).logits
        return found

    def empty(self) -> Case:
        """A trace with nothing in it."""

        def ours() -> list[Any]:
            with self.traced.trace(self.ids):
                pass
            return []

        def checked() -> list[Any]:
            with self.traced.trace(self.ids):
                logits = self.traced.output.logits.save()
            return [logits]

        return Case("empty trace", lambda: [self.logits()], ours, checked)

    def one_layer(self) -> Case:
        """The output of one layer."""

        def ours() -> list[Any]:
            with self.traced.trace(self.ids):
                hidden = self.traced.transformer.h[self.middle].output.save()
            return [hidden]

        return Case("save one layer", lambda: captured([self.blocks[self.middle]], self.logits), ours)

    def all_layers(self) -> Iterator[Case]:
        """The output of each layer, by the model's own names and by the standard ones."""

        def hooks() -> list[Any]:
            return captured(self.blocks, self.logits)

        def ours() -> list[Any]:
            with self.traced.trace(self.ids):
                return [block.output.save() for block in self.traced.transformer.h]

        def standard() -> list[Any]:
            with self.standard.trace(self.ids):
                return [self.standard.layers_output[index].save() for index in range(self.standard.num_layers)]

        yield Case("save all layers", hooks, ours)
        yield Case("save all layers, nnterp", hooks, standard)

    def everything(self) -> Iterator[Case]:
        """The outputs of each layer, its attention and its MLP."""
        modules = [module for block in self.blocks for module in (block.attn, block.mlp, block)]

        def hooks() -> list[Any]:
            kept: list[Any] = []
            first = [(block.attn, lambda m, args, output: kept.append(output[0])) for block in self.blocks]
            whole = [(m, lambda m, args, output: kept.append(output)) for m in modules if m not in attentions]
            with hooked([*first, *whole]):
                self.logits()
            return kept

        def ours() -> list[Any]:
            kept = []
            with self.traced.trace(self.ids):
                for block in self.traced.transformer.h:
                    kept += [block.attn.output[0].save(), block.mlp.output.save(), block.output.save()]
            return kept

        def standard() -> list[Any]:
            model, kept = self.standard, []
            with model.trace(self.ids):
                for index in range(model.num_layers):
                    kept += [model.attentions_output[index].save(), model.mlps_output[index].save()]
                    kept.append(model.layers_output[index].save())
            return kept

        attentions = {block.attn for block in self.blocks}
        yield Case("save layers, attentions, MLPs", hooks, ours)
        yield Case("save layers, attentions, MLPs, nnterp", hooks, standard)

    def steering(self) -> Iterator[Case]:
        """A vector added to the output of one layer; the logits show it."""
        vector, middle = self.vector, self.middle

        def hooks() -> list[Any]:
            with hooked([(self.blocks[middle], lambda m, args, output: output + vector)]):
                return [self.logits()]

        def ours() -> list[Any]:
            with self.traced.trace(self.ids):
                self.traced.transformer.h[middle].output += vector
                logits = self.traced.output.logits.save()
            return [logits]

        def standard() -> list[Any]:
            with self.standard.trace(self.ids):
                self.standard.layers_output[middle] += vector
                logits = self.standard.logits.save()
            return [logits]

        yield Case("steer one layer", hooks, ours)
        yield Case("steer one layer, nnterp", hooks, standard)

    def gradients(self) -> Case:
        """The gradient of the summed logits at the output of each layer, last layer first."""

        def hooks() -> list[Any]:
            kept: list[torch.Tensor] = []

            def watch(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
                output.register_hook(kept.append)

            with hooked([(block, watch) for block in self.blocks]):
                self.logits().sum().backward()
            return kept

        def ours() -> list[Any]:
            with self.traced.trace(self.ids):
                outputs = [block.output for block in self.traced.transformer.h]
                with self.traced.output.logits.sum().backward():
                    gradients = [output.grad.save() for output in reversed(outputs)]
            return gradients

        return Case("gradients at all layers", hooks, ours, gradients=True)

    def generation(self) -> Case:
        """The output of one layer at each step of a generation, and the tokens."""
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        mask = torch.ones_like(self.ids)

        def hooks() -> list[Any]:
            kept: list[Any] = []
            with hooked([(self.blocks[self.middle], lambda m, args, output: kept.append(output))]):
                tokens = self.module.generate(self.ids, attention_mask=mask, **options)
            return [*kept, tokens]

        def ours() -> list[Any]:
            kept = []
            with self.traced.generate(self.ids, **options) as tracer:
                for _ in tracer.iter[:]:
                    kept.append(self.traced.transformer.h[self.middle].output.save())
                tokens = self.traced.generator.output.save()
            return [*kept, tokens]

        return Case(f"generate {NEW_TOKENS} tokens, save one layer at each", hooks, ours)

    def early_stop(self) -> Case:
        """The output of layer 0, and no more of the model."""

        def hooks() -> list[Any]:
            kept: list[Any] = []

            def take(module: torch.nn.Module, args: Any, output: Any) -> None:
                kept.append(output)
                raise EnoughError

            with suppress(EnoughError), hooked([(self.blocks[0], take)]):
                self.logits()
            return kept

        def ours() -> list[Any]:
            with self.traced.trace(self.ids) as tracer:
                hidden = self.traced.transformer.h[0].output.save()
                tracer.stop()
            return [hidden]

        return Case("stop after layer 0", hooks, ours)

    def invokes(self) -> Case:
        """Four prompts in one pass; the output of one layer, of each its own rows."""

        def hooks() -> list[Any]:
            batch = torch.cat(self.prompts)
            (hidden,) = captured([self.blocks[self.middle]], lambda: self.module(batch))
            return list(hidden.split(1))

        def ours() -> list[Any]:
            kept = []
            with self.traced.trace() as tracer:
                for prompt in self.prompts:
                    with tracer.invoke(prompt):
                        kept.append(self.traced.transformer.h[self.middle].output.save())
            return kept

        return Case("four invokes in one pass", hooks, ours, close=True)


# The cases of a chain, in which nothing is computed and only the accesses cost.


def chain_cases() -> Iterator[Case]:
    """A trace of one module with nothing in it, and then chains of modules, each of which is read."""
    yield chain_case(1, empty=True)
    for count in ACCESSES:
        yield chain_case(count)


def chain_case(count: int, empty: bool = False) -> Case:
    """A chain of ``count`` modules, each of which is read, or none if ``empty``."""
    torch.manual_seed(SEED)
    chain = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(count)))
    traced, value = NNsight(chain), torch.randn(1, 4)

    def plain() -> list[Any]:
        return [chain(value)]

    def hooks() -> list[Any]:
        return captured(list(chain), lambda: chain(value))

    def nothing() -> list[Any]:
        with traced.trace(value):
            pass
        return []

    def ours() -> list[Any]:
        with traced.trace(value):
            return [module.output.save() for module in traced]

    if empty:
        return Case("empty trace", plain, nothing, checked=ours)
    name = f"{count} access" if count == 1 else f"{count} accesses"
    return Case(name, hooks, ours, accesses=count, plain=plain)


def cases_of(table: str) -> Iterator[Case]:
    """The cases of one table."""
    return chain_cases() if table == "chain" else LanguageModelCases(SIZES[table]).cases()


# Checking and measuring.


def check(case: Case) -> int:
    """How many values were compared.

    Raises:
        NumbersDifferError: the two sides do not give the same numbers.
    """
    expected = case.hooks()
    found = [getattr(each, "value", each) for each in (case.checked or case.ours)()]
    if not expected or len(expected) != len(found):
        raise NumbersDifferError(f"{case.name}: hooks give {len(expected)} values, the trace {len(found)}.")
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        same_form = one.shape == other.shape and one.dtype == other.dtype
        same = torch.allclose if case.close else torch.equal
        if not same_form or not same(one, other):
            far = float((one - other).abs().max()) if same_form else float("nan")
            shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
            raise NumbersDifferError(f"{case.name}: value {index} differs by up to {far:g} (shapes {shapes}).")
    return len(expected)


def timed(side: Side) -> float:
    """Seconds for one call; what it gives is let go after the clock has stopped."""
    start = perf_counter()
    given = side()
    seconds = perf_counter() - start
    del given
    return seconds


def measure(case: Case, seconds: float, most: int) -> Row:
    """Check a case, then time its sides in turns for about ``seconds``, for ``most`` turns at most."""
    with torch.set_grad_enabled(case.gradients):
        checked = check(case)
        sides = [case.hooks, case.ours, *([case.plain] if case.plain else [])]
        # The first call of anything pays for what is made once.
        one_turn = min(sum(timed(side) for side in sides) for _ in range(2))
        pairs = max(3, min(most, int(seconds / one_turn)))
        times = [[timed(side) for side in sides] for _ in range(pairs)]
    per_access = dict[str, float]()
    if case.plain:
        per_access = {
            name: 1e6 * median(each[side] - each[2] for each in times) / case.accesses
            for side, name in enumerate(("hooks_us_per_access", "ours_us_per_access"))
        }
    return Row(
        case=case.name,
        hooks_ms=1e3 * median(each[0] for each in times),
        ours_ms=1e3 * median(each[1] for each in times),
        ratio=median(each[1] / each[0] for each in times),
        more_us=1e6 * median(each[1] - each[0] for each in times),
        pairs=pairs,
        values_checked=checked,
        **per_access,
    )


def profile(case: Case, seconds: float) -> None:
    """Print where our side of a case spends its time, dearest first."""
    with torch.set_grad_enabled(case.gradients):
        check(case)
        case.ours()
        runs = max(3, min(1000, int(seconds / timed(case.ours))))
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(runs):
                case.ours()
    print(f"{case.name}: {runs} runs; divide by that for the cost of one.")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(40)


# Showing.


def heading(table: str) -> str:
    """The title of a table."""
    if table == "chain":
        return "chain: torch.nn.Identity modules in a row; nothing is computed"
    sizes = SIZES[table]
    what = f"{sizes['n_layer']} layers, width {sizes['n_embd']}, vocabulary {sizes['vocab_size']}, {TOKENS} tokens"
    return f"{table}: GPT-2 with random weights, {what}"


def show(table: str, rows: Sequence[Row]) -> None:
    """Print one table."""
    print(f"\n{heading(table)}\n")
    columns = ["case", "hooks ms", "ours ms", "ratio", "more us", "pairs"]
    lines = [
        [r.case, f"{r.hooks_ms:.3f}", f"{r.ours_ms:.3f}", f"{r.ratio:.3f}", f"{r.more_us:.1f}", str(r.pairs)]
        for r in rows
    ]
    if any(row.ours_us_per_access is not None for row in rows):
        columns += ["hooks us/access", "ours us/access"]
        for line, row in zip(lines, rows, strict=True):
            each = (row.hooks_us_per_access, row.ours_us_per_access)
            line += ["" if value is None else f"{value:.2f}" for value in each]
    widths = [max(len(line[place]) for line in (columns, *lines)) for place in range(len(columns))]
    rule = ["-" * width for width in widths]
    for line in (columns, rule, *lines):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("| " + " | ".join([line[0].ljust(widths[0]), *cells[1:]]) + " |")
    print(f"\n{sum(row.values_checked for row in rows)} values were compared before timing, and are equal.", flush=True)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time traces beside hooks written by hand.")
    parser.add_argument("--model", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="a few repetitions: shows that it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case, about")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to FILE as well")
    parser.add_argument("--profile", metavar="CASE", help="profile our side of one case instead, named as in the table")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if there is no case of the name that was to be profiled."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    tables: dict[str, list[dict[str, Any]]] = {}
    for table in options.model:
        if options.profile is not None:
            found = next((case for case in cases_of(table) if case.name == options.profile), None)
            if found is not None:
                profile(found, options.seconds)
                return 0
            continue
        most = 3 if options.quick else 400
        rows = [measure(case, options.seconds, most) for case in cases_of(table)]
        show(table, rows)
        tables[table] = [{name: value for name, value in vars(row).items() if value is not None} for row in rows]
    if options.profile is not None:
        print(f"There is no case {options.profile!r}; the tables show the names.", file=sys.stderr)
        return 1
    if options.json is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": options.threads}
        options.json.write_text(json.dumps({**versions, "tables": tables}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
