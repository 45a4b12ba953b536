"""``nnterp attention``: what each head looks at in a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from nnterp.commands.terminal import encoding, model_name, write, write_json
from nnterp.errors import PositionError
from nnterp.interventions.attention_patterns import AttentionPatterns, attention_patterns
from nnterp.lens_table import cells, marks_legend, visible
from nnterp.pictures import check_figure_file, plot_attention, save_figure
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out."""
    if arguments.html is not None:
        check_figure_file(arguments.html)
    model = StandardizedTransformer(arguments.model)
    found = attention_patterns(model, arguments.prompt, arguments.layer)
    length, position = len(found.tokens), arguments.position
    if not -length <= position < length:
        raise PositionError(f"Position {position} is not there: the prompt has {length} tokens, counted from 0.")
    if arguments.html is not None:
        save_figure(plot_attention(found), arguments.html)
    name = model_name(arguments.model)
    if arguments.json:
        write_json(_as_json(found, name))
        return
    position %= length
    write(f"{name}: what {visible(found.tokens[position], encoding())} (position {position}) looks at\n")
    for layer in found.layers:
        write(f"\nlayer {layer}\n{_table(found, layer, position, arguments.top)}")
    write(f"{marks_legend(found.tokens, encoding())}.\n")
    if arguments.html is not None:
        write(f"maps: {arguments.html}\n")


def _as_json(found: AttentionPatterns, name: str) -> dict[str, Any]:
    layers = [{"layer": layer, "probabilities": each.tolist()} for layer, each in found.probabilities.items()]
    return {"model": name, "tokens": found.tokens, "axes": ["head", "query", "key"], "layers": layers}


def _table(found: AttentionPatterns, layer: int, position: int, top: int) -> str:
    """One line for each head: the tokens that are looked at most."""
    rows = found.probabilities[layer][:, position]
    values, keys = rows[:, : position + 1].topk(min(top, position + 1), dim=-1)
    texts = [[f"{visible(found.tokens[key], encoding())} ({key})" for key in row] for row in keys.tolist()]
    wide = [max(map(cells, column)) for column in zip(*texts, strict=True)]
    lines = []
    for head, (labels, shares) in enumerate(zip(texts, values.tolist(), strict=True)):
        entries = [
            f"{label}{' ' * (room - cells(label))} {share:.2f}"
            for label, room, share in zip(labels, wide, shares, strict=True)
        ]
        lines.append(" | ".join([f"head {head:<2}", *entries]))
    return "\n".join(lines) + "\n"
