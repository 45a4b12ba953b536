"""``nnterp lens``: what the model would say next if it stopped after each layer."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from nnterp.commands.terminal import encoding, model_name, write, write_json
from nnterp.interventions.logit_lens import LensResult, lens_tokens
from nnterp.lens_table import cells, fit, lens_table, visible
from nnterp.pictures import check_figure_file, plot_lens, save_figure
from nnterp.pictures.drawing import as_text
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run"]

#: How many tokens the box at a cell of the heat map shows, however few the table does.
HEAT_MAP_TOP = 5
#: How much of a long prompt stands in the title of its heat map: the end, which matters most.
TITLE_LETTERS = 90


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out."""
    pages = _numbered(arguments.html, len(arguments.prompts)) if arguments.html else []
    for page in pages:
        # Said before the model is loaded, which may take minutes.
        check_figure_file(page)
    model = StandardizedTransformer(arguments.model)
    name = model_name(arguments.model)
    found = []
    for index, prompt in enumerate(arguments.prompts):
        lens = _read(model, prompt, arguments)
        # The file comes first: whoever reads the table may stop reading, and the heat map is there all the same.
        if pages:
            save_figure(plot_lens(lens, _title(name, prompt)), pages[index])
        if arguments.json:
            found.append(_as_json(lens, arguments))
            continue
        write(_heading(name, prompt) + lens_table(lens, top=arguments.top))
        if pages:
            write(f"heat map: {pages[index]}\n")
        if index < len(arguments.prompts) - 1:
            write("\n")
    if arguments.json:
        write_json({"model": name, "heat_maps": list(map(str, pages)), "prompts": found})


def _read(model: StandardizedTransformer, prompt: str, arguments: argparse.Namespace) -> LensResult:
    k = max(arguments.top, min(HEAT_MAP_TOP, model.vocab_size)) if arguments.html else arguments.top
    # Tables are of the last position alone, and unembedding the others takes most of the time.
    return lens_tokens(model, prompt, k, None if arguments.html or arguments.all_positions else [-1])


def _as_json(lens: LensResult, arguments: argparse.Namespace) -> dict[str, Any]:
    """``top_ids`` and its kin have the axes layer, position and rank."""
    chosen = slice(None) if arguments.all_positions else slice(-1, None)
    top = arguments.top
    return {
        "prompt": lens.prompt,
        "positions": lens.positions[chosen],
        "tokens": lens.tokens[chosen],
        "ids": lens.ids[chosen].tolist(),
        "top_ids": lens.top_ids[:, chosen, :top].tolist(),
        "top_tokens": [[position[:top] for position in layer[chosen]] for layer in lens.top_tokens],
        "top_probs": lens.top_probs[:, chosen, :top].tolist(),
    }


def _title(name: str, prompt: str) -> str:
    """The heading of a heat map, which plotly takes for HTML."""
    text = visible(prompt, marks={" ": " "})
    text = text if len(text) <= TITLE_LETTERS else f"…{text[-TITLE_LETTERS:]}"
    return as_text(f'Logit lens: the next token in {name} after each layer of "{text}"')


def _heading(name: str, prompt: str) -> str:
    """Which model after which prompt, in one line of the terminal; of a long prompt the end, which matters most."""
    start, text = f'{name} after "', visible(prompt, encoding(), {" ": " "})
    room = shutil.get_terminal_size().columns - cells(start) - 1
    return f'{start}{fit(text[::-1], max(room, 20), encoding())[::-1]}"\n'


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]
