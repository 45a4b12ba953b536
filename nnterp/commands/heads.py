"""``nnterp heads``: which heads look at the previous token, at what followed an earlier copy, or at the copy itself."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nnterp.commands.terminal import DEFAULT_MODEL, add_model, add_output, count, model_name, write, write_json
from nnterp.interventions.head_scores import KINDS, head_scores
from nnterp.pictures import check_figure_file, plot_head_scores, save_figure
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["add_heads"]

EXAMPLES = f"""\
examples:
  nnterp heads
  nnterp heads --model gpt2 --length 50 --html heads.html
  nnterp heads --model ./my-model --kind induction --top 10
  nnterp heads --json | jq .scores.induction

A score is the mean attention, from 0 to 1, that a head gives to the token in question in random tokens that are given
twice over. A head that looks at all tokens alike scores about 0.7 / length for induction and for duplicates.
Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package: nothing is downloaded."""


def add_heads(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "heads",
        help="which heads look at the previous token, or at earlier copies",
        description="Scores of every attention head on random tokens that are given twice over: how much it looks at\n"
        "the previous token, at the token after an earlier copy (induction), and at the earlier copy (duplicate).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS, help="which kinds (default: all)")
    parser.add_argument("--top", metavar="K", type=count, default=5, help="how many heads of each kind (default: 5)")
    parser.add_argument("--length", metavar="N", type=count, default=24, help="tokens in each copy (default: 24)")
    parser.add_argument("--sequences", metavar="N", type=count, default=8, help="how many sequences (default: 8)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="which random tokens (default: 0)")
    add_output(parser, "with the scores of all heads", "the scores of all heads")
    add_model(parser)
    parser.set_defaults(run=_heads)


def _heads(arguments: argparse.Namespace) -> None:
    if arguments.html is not None:
        check_figure_file(arguments.html)
    model = StandardizedTransformer(arguments.model)
    every = head_scores(model, arguments.length, arguments.sequences, arguments.seed)
    scores = {kind: every[kind] for kind in dict.fromkeys(arguments.kind)}
    if arguments.html is not None:
        save_figure(plot_head_scores(scores), arguments.html)
    name = model_name(arguments.model)
    if arguments.json:
        values = {kind: found.tolist() for kind, found in scores.items()}
        about = {"length": arguments.length, "sequences": arguments.sequences, "seed": arguments.seed}
        write_json({"model": name, **about, "axes": ["layer", "head"], "scores": values})
        return
    write(f"{name}: the heads with the highest scores\n")
    for kind, found in scores.items():
        write(f"\n{kind}\n" + "".join(f"  {line}\n" for line in _best(found, arguments.top)))
    if arguments.html is not None:
        write(f"\nmap: {arguments.html}\n")


def _best(scores: torch.Tensor, top: int) -> list[str]:
    flat = scores.nan_to_num(nan=-1.0).flatten()
    best = flat.argsort(descending=True, stable=True)[:top].tolist()
    places = [divmod(place, scores.shape[1]) for place in best if flat[place] >= 0]
    return [f"layer {layer:>2}  head {head:>2}  {float(scores[layer, head]):.2f}" for layer, head in places]
