"""One logit lens for any models: at which depth does each of them know the answer?

    python examples/cross_model_lens.py                     # the models that come along
    python examples/cross_model_lens.py gpt2 ./my-llama     # any others: names or folders

No line of it is about a model family.
"""

import sys

from nnterp import StandardizedTransformer
from nnterp.interventions import logit_lens

PROMPT, ANSWER = "The Eiffel Tower is in the city of", " Paris"
WIDTH = 40


def main() -> None:
    print(f"{PROMPT!r}: probability of {ANSWER!r} after each layer")
    for name in sys.argv[1:] or ["demo-gpt2", "demo-llama"]:
        model = StandardizedTransformer(name)
        answer = model.tokenizer.encode(ANSWER, add_special_tokens=False)[0]
        probabilities = logit_lens(model, PROMPT)[0, :, answer]  # (layer)
        print(f"\n{name}: {model.num_layers} layers, {model.num_heads} heads, {model.hidden_size} wide")
        for layer, probability in enumerate(probabilities.tolist()):
            print(f"  layer {layer:2} {probability:6.3f} {'#' * round(WIDTH * probability)}")


if __name__ == "__main__":
    main()
