"""``nnterp heads``: which heads look at the previous token, at what followed an earlier copy, or at the copy itself."""

from __future__ import annotations

import argparse

import torch

from nnterp.commands.terminal import model_name, write, write_json
from nnterp.interventions.head_scores import head_scores
from nnterp.pictures import check_figure_file, plot_head_scores, save_figure
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out."""
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
