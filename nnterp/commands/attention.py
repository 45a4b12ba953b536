"""``nnterp attention``: what each head looks at in a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from nnterp.commands.terminal import (
    DEFAULT_MODEL,
    add_model,
    add_output,
    count,
    encoding,
    model_name,
    prompt_text,
    write,
    write_json,
)
from nnterp.errors import PositionError
from nnterp.interventions.attention_patterns import AttentionPatterns, attention_patterns
from nnterp.lens_table import cells, marks_legend, visible
from nnterp.pictures import check_figure_file, plot_attention, save_figure
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["add_attention"]

EXAMPLES = f"""\
examples:
  nnterp attention "The Eiffel Tower is in the city of" --layer 2
  nnterp attention "John and Mary went to the store. John handed the milk to" --layer 4 5 --html attention.html
  nnterp attention "The Eiffel Tower is in the city of" --layer -1 --position 2 --top 3
  nnterp attention PROMPT --layer 0 --json | jq '.layers[0].probabilities[3]'

Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package: nothing is downloaded."""


def add_attention(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "attention",
        help="what each head looks at in a prompt",
        description="Attention: what does each head look at?\n"
        "Shows, for one token of the prompt, the tokens that each head looks at most, with the probabilities.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", type=prompt_text, help="a text")
    parser.add_argument(
        "--layer",
        metavar="N",
        type=int,
        nargs="+",
        help="which layers; negative ones count from the last (default: all)",
    )
    parser.add_argument(
        "--position", metavar="N", type=int, default=-1, help="the token that looks, counted from 0 (default: the last)"
    )
    parser.add_argument("--top", metavar="K", type=count, default=5, help="how many tokens for each head (default: 5)")
    add_output(parser, "with all probabilities instead of tables", "a map for each head")
    add_model(parser)
    parser.set_defaults(run=_attention)


def _attention(arguments: argparse.Namespace) -> None:
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
