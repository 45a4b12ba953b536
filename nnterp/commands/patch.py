"""``nnterp patch``: which values of a clean run bring back what a corrupted run has lost."""

from __future__ import annotations

import argparse
import math
from typing import Any

from nnterp.commands.terminal import encoding, model_name, write, write_json
from nnterp.interventions.activation_patching import PatchingResult, activation_patching
from nnterp.interventions.attribution_patching import attribution_patching
from nnterp.interventions.metrics import logit_difference
from nnterp.lens_table import cells, visible
from nnterp.pictures import check_figure_file, plot_patching, save_figure
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out."""
    if arguments.html is not None:
        check_figure_file(arguments.html)
    model = StandardizedTransformer(arguments.model)
    metric = logit_difference(model, *arguments.answers)
    prompts = arguments.clean, arguments.corrupted
    if arguments.estimate is None:
        result = activation_patching(model, *prompts, metric, arguments.sites)
    else:
        result = attribution_patching(model, *prompts, metric, arguments.sites, steps=arguments.estimate)
    if arguments.html is not None:
        save_figure(plot_patching(result), arguments.html)
    if arguments.json:
        write_json(_as_json(result, arguments))
        return
    write(f"{model_name(arguments.model)}: corrupted {result.corrupted.item():.2f}, clean {result.clean.item():.2f}\n")
    for kind in result.values:
        write(f"\n{kind}: part recovered, by layer\n{_table(result, kind)}")
    if arguments.html is not None:
        write(f"\nmaps: {arguments.html}\n")


def _as_json(result: PatchingResult, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": model_name(arguments.model),
        "tokens": {"clean": result.clean_tokens, "corrupted": result.tokens},
        "answers": arguments.answers,
        "metric": {"clean": result.clean.item(), "corrupted": result.corrupted.item()},
        "estimated": arguments.estimate is not None,
        "layers": result.layers,
        "axes": dict(result.axes),
        "recovered": {kind: result.recovered(kind).tolist() for kind in result.values},
    }


def _table(result: PatchingResult, kind: str) -> str:
    """One line for each position or head, one column for each layer: prompts are longer than models are deep."""
    values = result.recovered(kind)
    by_position = result.axes[kind][-1] == "position"
    names = [_token(result, each) for each in result.positions] if by_position else map(str, range(values.shape[1]))
    labels = list(names)
    widest = max(map(cells, labels))
    head = " " * widest + "".join(f"{layer:>7}" for layer in result.layers)
    lines = [
        label + " " * (widest - cells(label)) + "".join(f"{_number(each):>7}" for each in column)
        for label, column in zip(labels, values.T.tolist(), strict=True)
    ]
    return "\n".join([head, *lines]) + "\n"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def _token(result: PatchingResult, position: int) -> str:
    here, there = (visible(each[position], encoding()) for each in (result.tokens, result.clean_tokens))
    return here if here == there else f"{here} ({there})"
