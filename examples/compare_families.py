"""One measurement over many model families, as a matrix: how much does each kind of part add to the residual stream?

    python examples/compare_families.py                         # tiny random models of ten families
    python examples/compare_families.py gpt2 ./my-llama         # any models: names or folders

Tiny random models say nothing about language. They are what a test matrix over families runs on: the same lines read
the same places in each of them.
"""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nnterp import StandardizedTransformer

FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "opt", "bloom", "phi", "qwen3", "mistral", "stablelm")
TINY = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320, "pad_token_id": 0}
SIZES = {"intermediate_size": 128, "num_key_value_heads": 2, "word_embed_proj_dim": 64, "ffn_dim": 128}


def models() -> dict[str, StandardizedTransformer]:
    if sys.argv[1:]:
        return {name: StandardizedTransformer(name) for name in sys.argv[1:]}
    torch.manual_seed(0)
    configs = {family: AutoConfig.for_model(family, **TINY, **SIZES) for family in FAMILIES}
    return {family: StandardizedTransformer(AutoModelForCausalLM.from_config(each)) for family, each in configs.items()}


def main() -> None:
    print("norm of what is added, as a part of the stream's norm: attention, MLP; mean over layers and tokens")
    ids = torch.arange(5, 25)[None]
    for name, model in models().items():
        shares = []
        with torch.no_grad(), model.trace(ids):
            for layer in range(model.num_layers):
                stream = model.layers_input[layer].norm(dim=-1)
                parts = [part for part in (model.attentions_output, model.mlps_output) if part.has(layer)]
                shares.append([(part[layer].norm(dim=-1) / stream).mean().item() for part in parts])
        means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
        print(f"{name:<12} " + "  ".join(f"{mean:6.3f}" for mean in means))


if __name__ == "__main__":
    main()
