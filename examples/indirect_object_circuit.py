"""The indirect-object circuit: where does a model keep who gets the milk, and what moves it to the end?

    python examples/indirect_object_circuit.py                 # the model that comes along
    python examples/indirect_object_circuit.py gpt2            # any other: a name or a folder

Activation patching finds the sites, path patching what speaks to the logits straight. The maps are written to
indirect_object_circuit.html.
"""

import sys

import torch

from nnterp import StandardizedTransformer
from nnterp.interventions import activation_patching, logit_difference, path_patching
from nnterp.pictures import plot_patching

# Corrupted, the other one acts, so the other name is the answer; both orders, so that the place tells nothing.
CLEAN = [
    "John and Mary went to the store. John handed the milk to",
    "Mary and John went to the store. John handed the milk to",
]
CORRUPTED = [text.replace(". John", ". Mary") for text in CLEAN]


def show(title: str, recovered: torch.Tensor, tokens: tuple[str, ...], count: int = 4) -> None:
    print(f"\n{title}")
    for place in recovered.flatten().argsort(descending=True)[:count].tolist():
        layer, position = divmod(place, recovered.shape[1])
        print(f"  layer {layer:2}, position {position:2} {tokens[position]!r:10} {recovered[layer, position]:6.2f}")


def main() -> None:
    model = StandardizedTransformer(sys.argv[1] if len(sys.argv) > 1 else "demo-gpt2")
    metric = logit_difference(model, " Mary", " John")
    result = activation_patching(model, CLEAN, CORRUPTED, metric)
    print(f"logit difference: clean {result.clean.mean():.2f}, corrupted {result.corrupted.mean():.2f}")

    stream = result.recovered("layers_output")
    print("\nafter each layer, the position whose patch recovers most:")
    for layer, row in enumerate(stream):
        position = int(row.argmax())
        print(f"  layer {layer:2}, position {position:2} {result.tokens[position]!r:10} {row[position]:6.2f}")
    show("the attention outputs that recover most:", result.recovered("attentions_output"), result.tokens)

    paths = path_patching(model, CLEAN, CORRUPTED, metric, positions=[-1])
    print("\nstraight to the logits, from the last position:")
    for name in ("attentions_output", "mlps_output"):
        row = paths.recovered(name)[:, 0].tolist()
        print(f"  {name:18}" + "".join(f"{each:7.2f}" for each in row))
    plot_patching(result).write_html("indirect_object_circuit.html")


if __name__ == "__main__":
    main()
