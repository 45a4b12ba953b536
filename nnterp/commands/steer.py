"""``nnterp steer``: how a text goes on when the model is steered from some prompts toward others."""

from __future__ import annotations

import argparse

import torch

from nnterp.commands.terminal import (
    model_name,
    write,
    write_json,
)
from nnterp.interventions.steering import SteeringVector, check_vector_file
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out."""
    if arguments.save:
        check_vector_file(arguments.save)
    loaded = SteeringVector.load(arguments.load) if arguments.load else None
    model = StandardizedTransformer(arguments.model)
    vector = loaded or _trained(arguments, model)
    layers = arguments.layers if arguments.load else None
    plain = _written(model, arguments.prompt, arguments.tokens)
    steered = _written(model, arguments.prompt, arguments.tokens, vector, arguments.factor, layers)
    if arguments.save:
        vector.save(arguments.save)
    if arguments.json:
        name, used = model_name(arguments.model), list(layers or vector.layers)
        about = {"model": name, "prompt": arguments.prompt, "layers": used, "factor": arguments.factor}
        write_json({**about, "plain": plain, "steered": steered})
        return
    write(f"plain     {arguments.prompt}|{plain}\nsteered   {arguments.prompt}|{steered}\n")


def _trained(arguments: argparse.Namespace, model: StandardizedTransformer) -> SteeringVector:
    layers = arguments.layers or [model.num_layers // 2]
    return SteeringVector.train(model, arguments.toward, arguments.away, layers, arguments.method)


def _written(
    model: StandardizedTransformer,
    prompt: str,
    tokens: int,
    vector: SteeringVector | None = None,
    factor: float = 1,
    layers: list[int] | None = None,
) -> str:
    """What the model writes after the prompt, always the most probable token."""
    with torch.no_grad(), model.generate(prompt, max_new_tokens=tokens, do_sample=False) as tracer:
        prompt_length = model.input_ids.shape[1]
        if vector is not None:
            for _ in tracer.iter[:]:
                vector.apply(model, factor, layers)
        ids = model.generator.output.save()
    assert model.tokenizer is not None, "a model without one has refused the prompt"
    return str(model.tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True))
