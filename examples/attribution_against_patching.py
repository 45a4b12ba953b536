"""Attribution patching against activation patching: how far can one gradient be trusted to stand for every patch?

    python examples/attribution_against_patching.py                 # the model that comes along
    python examples/attribution_against_patching.py gpt2            # any other: a name or a folder

Prints, for each kind of site, how well estimates and patches correlate, and the sites where they differ most: by layer
and position, and by layer and head. The exact patches are drawn in patching_by_position.html and patching_by_head.html.
"""

import sys

import torch

from nnterp import StandardizedTransformer
from nnterp.errors import UsageError
from nnterp.interventions import activation_patching, attribution_patching, logit_difference
from nnterp.pictures import plot_patching

CLEAN = "John and Mary went to the store. John handed the milk to"
CORRUPTED = CLEAN.replace(". John", ". Mary")
BY_POSITION = ("layers_output", "mixers_output", "mlps_output")
BY_HEAD = ("heads_output", "queries", "keys", "values")
#: The gradient of the corrupted run alone, and the mean of eight on the way to the clean one.
STEPS = (None, 8)


def correlation(exact: torch.Tensor, estimate: torch.Tensor) -> float:
    there = ~exact.isnan()
    return float(torch.corrcoef(torch.stack([exact[there], estimate[there]]))[0, 1])


def compare(model: StandardizedTransformer, kinds: tuple[str, ...], page: str) -> None:
    metric = logit_difference(model, " Mary", " John")
    exact = activation_patching(model, CLEAN, CORRUPTED, metric, kinds)
    estimates = [attribution_patching(model, CLEAN, CORRUPTED, metric, kinds, steps=steps) for steps in STEPS]
    for kind in kinds:
        true, *guesses = (result.effect(kind) for result in (exact, *estimates))
        shown = "  ".join(f"{correlation(true, guess):9.3f}" for guess in guesses)
        off = (guesses[-1] - true).abs().nan_to_num()
        worst = divmod(int(off.argmax()), off.shape[1])
        where = " ".join(f"{axis} {index}" for axis, index in zip(exact.axes[kind], worst, strict=True))
        print(f"{kind:15} {shown}   {where}: {true[worst]:+.2f}, estimated {guesses[-1][worst]:+.2f}")
    plot_patching(exact).write_html(page)


def main() -> None:
    model = StandardizedTransformer(sys.argv[1] if len(sys.argv) > 1 else "demo-gpt2")
    print("correlation with patching, by layer and position\n                 gradient    8 steps   furthest off")
    compare(model, BY_POSITION, "patching_by_position.html")
    print("\nby layer and head")
    try:
        compare(model, BY_HEAD, "patching_by_head.html")
    except UsageError as error:  # not every family's attention shows its heads
        print(error)


if __name__ == "__main__":
    main()
