"""The indirect-object circuit: where does a model keep who gets the milk, and which heads move it to the end?

    python examples/indirect_object_circuit.py                 # the model that comes along
    python examples/indirect_object_circuit.py gpt2            # any other: a name or a folder

Activation patching finds the sites and the heads, path patching what speaks to the logits straight. The maps are
written to indirect_object_circuit.html and indirect_object_heads.html.
"""

import sys

from nnterp import StandardizedTransformer
from nnterp.errors import UsageError
from nnterp.interventions import SweepResult, activation_patching, logit_difference, path_patching
from nnterp.pictures import plot_patching

# Corrupted, the other one acts, so the other name is the answer; both orders, so that the place tells nothing.
CLEAN = [
    "John and Mary went to the store. John handed the milk to",
    "Mary and John went to the store. John handed the milk to",
]
CORRUPTED = [text.replace(". John", ". Mary") for text in CLEAN]


def show(title: str, result: SweepResult, kind: str) -> None:
    print(f"\n{title} by a tenth or more:")
    recovered, axis = result.recovered(kind), result.axes[kind][-1]
    for layer, index in (recovered >= 0.1).nonzero().tolist():
        text = f"{result.tokens[index]!r:10} " if axis == "position" else ""
        print(f"  layer {layer:2}, {axis} {index:2} {text}{recovered[layer, index]:6.2f}")


def main() -> None:
    model = StandardizedTransformer(sys.argv[1] if len(sys.argv) > 1 else "demo-gpt2")
    metric = logit_difference(model, " Mary", " John")
    result = activation_patching(model, CLEAN, CORRUPTED, metric)
    print(f"logit difference: clean {result.clean.mean():.2f}, corrupted {result.corrupted.mean():.2f}")
    show("after a layer, the positions that bring the answer back", result, "layers_output")
    show("the attention outputs that do", result, "attentions_output")
    paths = path_patching(model, CLEAN, CORRUPTED, metric, positions=[-1])
    print("\nstraight to the logits, from the last position:")
    for name in ("attentions_output", "mlps_output"):
        row = paths.recovered(name)[:, 0].tolist()
        print(f"  {name:18}" + "".join(f"{each:7.2f}" for each in row))
    plot_patching(result).write_html("indirect_object_circuit.html")
    try:
        heads = activation_patching(model, CLEAN, CORRUPTED, metric, "heads_output")
        straight = path_patching(model, CLEAN, CORRUPTED, metric, "heads_output", positions=[-1])
    except UsageError as error:  # not every family's attention shows its heads
        print(error)
        return
    show("the heads that do", heads, "heads_output")
    show("the heads that do straight to the logits, from the last position,", straight, "heads_output")
    plot_patching(heads).write_html("indirect_object_heads.html")


if __name__ == "__main__":
    main()
