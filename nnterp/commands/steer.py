"""``nnterp steer``: how a text goes on when the model is steered from some prompts toward others."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nnterp.commands.terminal import (
    DEFAULT_MODEL,
    add_model,
    add_output,
    count,
    finite,
    model_name,
    prompt_text,
    write,
    write_json,
)
from nnterp.interventions.steering import METHODS, SteeringVector, check_vector_file
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["add_steer"]

EXAMPLES = f"""\
examples:
  nnterp steer "The capital of France is" --toward "The capital of Japan is" --away "The capital of France is"
  nnterp steer "I think that" --toward "I love it" "Wonderful" --away "I hate it" "Awful" --layers 2 3 --factor 3
  nnterp steer "I think that" --toward "I love it" --away "I hate it" --save praise.safetensors
  nnterp steer "I think that" --load praise.safetensors --factor -2 --json

The direction leads from the activations of the prompts after --away to those after --toward, at their last
token, after each of the layers. Without --model it steers {DEFAULT_MODEL}: nothing is downloaded."""


def add_steer(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "steer",
        help="how a text goes on when the model is steered",
        description="Find a direction from contrasting prompts, add it at every step of a generation, and show what\n"
        "the model writes with and without it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", type=prompt_text, help="a text for the model to go on with")
    parser.add_argument(
        "--toward", metavar="PROMPT", type=prompt_text, nargs="+", default=[], help="prompts with what is wanted"
    )
    parser.add_argument("--away", metavar="PROMPT", type=prompt_text, nargs="+", default=[], help="prompts without it")
    parser.add_argument("--load", metavar="FILE", help="a steering vector that was saved, instead of prompts")
    parser.add_argument("--save", metavar="FILE", help="where to keep the steering vector (safetensors)")
    parser.add_argument(
        "--layers", metavar="I", nargs="+", type=int, help="after which layers (default: the middle one)"
    )
    parser.add_argument(
        "--factor", metavar="X", type=finite, default=1.0, help="how much of the direction (default: 1)"
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")
    parser.add_argument("--tokens", metavar="N", type=count, default=12, help="how many tokens to write (default: 12)")
    add_output(parser, "instead of text")
    add_model(parser)
    parser.set_defaults(run=_steer, error=parser.error)


def _steer(arguments: argparse.Namespace) -> None:
    if bool(arguments.load) == bool(arguments.toward and arguments.away):
        arguments.error("give prompts after --toward and --away, or a saved vector with --load, and not both")
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
