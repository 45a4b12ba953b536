"""Steer a model from one answer to another, and see at which layers that works.

    python examples/steering.py                 # the model that comes along
    python examples/steering.py gpt2            # any other: a name or a folder

A direction from prompts about France to prompts about Japan is added after one layer at a time, at the last token of
"The capital of France is".
"""

import sys

import torch
from tqdm import tqdm

from nnterp import StandardizedTransformer
from nnterp.interventions import SteeringVector

PROMPT = "The capital of {} is"
FACTORS = (0, 0.5, 1, 2)


def main() -> None:
    model = StandardizedTransformer(sys.argv[1] if len(sys.argv) > 1 else "demo-gpt2")
    vector = SteeringVector.train(model, [PROMPT.format("Japan")], [PROMPT.format("France")])
    tokyo, paris = (model.tokenizer.encode(city, add_special_tokens=False)[0] for city in (" Tokyo", " Paris"))

    found = torch.empty(model.num_layers, len(FACTORS), 2)
    for layer in tqdm(range(model.num_layers), desc="layers", leave=False):
        with torch.no_grad(), model.trace() as tracer:
            for column, factor in enumerate(FACTORS):
                with tracer.invoke(PROMPT.format("France")):  # all factors in one forward pass
                    vector.apply(model, factor, layers=layer, token_positions=-1)
                    found[layer, column] = model.next_token_probs[0, [tokyo, paris]].cpu()

    print("probability of ' Tokyo' / ' Paris', steered after one layer with a factor of ...")
    print("layer   " + "".join(f"{factor:>14}" for factor in FACTORS))
    for layer, row in enumerate(found.tolist()):
        print(f"{layer:5}   " + "".join(f"{f'{japan:.2f} / {france:.2f}':>14}" for japan, france in row))


if __name__ == "__main__":
    main()
