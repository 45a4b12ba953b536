"""What each command of the command line takes. Nothing here loads a model's code, so that help comes at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from nnterp.choices import DEFAULT_SITES, HEADS, KINDS, METHODS, STREAMS
from nnterp.commands.terminal import (
    DEFAULT_MODEL,
    add_model,
    add_output,
    add_remote_code,
    count,
    finite,
    plain_text,
    prompt_text,
)

__all__ = ["COMMANDS"]

SITES = (*STREAMS, *HEADS)

LENS_EXAMPLES = f"""\
examples:
  nnterp lens "The Eiffel Tower is in the city of"
  nnterp lens "The Eiffel Tower is in the city of" --html lens.html
  nnterp lens "Two and two is" "Two and three is" --model gpt2 --top 3
  nnterp lens "The Eiffel Tower is in the city of" --json | jq '.prompts[0].top_tokens[-1][-1]'
  nnterp lens --model ./my-model -- "- a prompt that begins with a dash"

Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package:
nothing is downloaded."""

PATCH_EXAMPLES = f"""\
examples:
  nnterp patch "John and Mary went to the store. John handed the milk to" \\
               "John and Mary went to the store. Mary handed the milk to" --answers " Mary" " John"
  nnterp patch "The Eiffel Tower is in the city of" "The Big Tower is in the city of" --answers " Paris" " London"
  nnterp patch CLEAN CORRUPTED --answers A B --sites attentions_output mlps_output --html patching.html
  nnterp patch CLEAN CORRUPTED --answers A B --estimate 8 --json | jq .recovered

The metric is the logit of the first answer minus that of the second, each one token, spaces included. Both prompts
need the same number of tokens. Without --model it reads {DEFAULT_MODEL}: nothing is downloaded."""

ATTENTION_EXAMPLES = f"""\
examples:
  nnterp attention "The Eiffel Tower is in the city of" --layer 2
  nnterp attention "John and Mary went to the store. John handed the milk to" --layer 4 5 --html attention.html
  nnterp attention "The Eiffel Tower is in the city of" --layer -1 --position 2 --top 3
  nnterp attention PROMPT --layer 0 --json | jq '.layers[0].probabilities[3]'

Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package: nothing is downloaded."""

HEADS_EXAMPLES = f"""\
examples:
  nnterp heads
  nnterp heads --model gpt2 --length 50 --html heads.html
  nnterp heads --model ./my-model --kind induction --top 10
  nnterp heads --json | jq .scores.induction

A score is the mean attention, from 0 to 1, that a head gives to the token in question in random tokens that are given
twice over. A head that looks at all tokens alike scores about 0.7 / length for induction and for duplicates.
Without --model it reads {DEFAULT_MODEL}, a small model that comes with the package: nothing is downloaded."""

STEER_EXAMPLES = f"""\
examples:
  nnterp steer "The capital of France is" --toward "The capital of Japan is" --away "The capital of France is"
  nnterp steer "I think that" --toward "I love it" "Wonderful" --away "I hate it" "Awful" --layers 2 3 --factor 3
  nnterp steer "I think that" --toward "I love it" --away "I hate it" --save praise.safetensors
  nnterp steer "I think that" --load praise.safetensors --factor -2 --json

The direction leads from the activations of the prompts after --away to those after --toward, at their last
token, after each of the layers. Without --model it steers {DEFAULT_MODEL}: nothing is downloaded."""

SPEC_EXAMPLES = """\
examples:
  nnterp spec gpt2                             the file that serves it
  nnterp spec gpt2 --inferred                  what its structure alone would say
  nnterp spec gpt2 --json | jq .modules
  nnterp spec ./my-model > my_model.yaml       a file to read, mend and keep; then
  nnterp check ./my-model --spec my_model.yaml"""

CHECK_EXAMPLES = """\
examples:
  nnterp check demo-llama
  nnterp check ./my-model                      a model that no file serves, by its structure
  nnterp check ./my-model --spec my_model.yaml
  nnterp check ./my-model --json               for scripts

ok      what hooks on the plain model see is what the interface gives
not     it is something else, and why
cannot  the specification, or the model, says why the promise makes no sense here

Exit status: 0 if no answer is `not`, else 1."""


def add_lens(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "lens",
        help="what the model would say next if it stopped after each layer",
        description="The logit lens: what would the model say next if it stopped after this layer?\n"
        "Shows the most probable next tokens after the prompt, one line for each layer.",
        epilog=LENS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompts", metavar="PROMPT", nargs="+", type=prompt_text, help="a text for the model to go on with"
    )
    parser.add_argument("--top", metavar="K", type=count, default=5, help="how many tokens for each layer (default: 5)")
    add_output(
        parser,
        "instead of tables",
        "all positions of each prompt as a heat map (for several prompts the files are numbered: lens-1.html, ...)",
    )
    parser.add_argument(
        "--all-positions", action="store_true", help="with --json: after every token of a prompt, not the last alone"
    )
    add_model(parser)
    parser.set_defaults(command="lens", check=partial(_check_lens, parser))


def _check_lens(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.all_positions and not arguments.json:
        parser.error("--all-positions is for --json: a table has the last position alone, and --html has all of them")


def add_patch(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "patch",
        help="which values of a clean run bring back what a corrupted run has lost",
        description="Activation patching: run the corrupted prompt with one value at a time as in the clean run.\n"
        "Shows how much of the metric each layer and position recovers: 0 as corrupted, 1 as clean.",
        epilog=PATCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("clean", metavar="CLEAN", type=prompt_text, help="the prompt whose values are put in")
    parser.add_argument("corrupted", metavar="CORRUPTED", type=prompt_text, help="the prompt that is run")
    parser.add_argument(
        "--answers",
        metavar="TOKEN",
        type=plain_text,
        nargs=2,
        required=True,
        help="the token for the clean prompt, and the other one",
    )
    parser.add_argument(
        "--sites",
        metavar="NAME",
        nargs="+",
        choices=SITES,
        default=DEFAULT_SITES,
        help=f"of {', '.join(SITES)} (default: {' '.join(DEFAULT_SITES)})",
    )
    parser.add_argument(
        "--estimate", metavar="STEPS", type=count, help="estimate all patches from so many gradients instead"
    )
    add_output(parser, "instead of tables", "the maps")
    add_model(parser)
    parser.set_defaults(command="patch")


def add_attention(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "attention",
        help="what each head looks at in a prompt",
        description="Attention: what does each head look at?\n"
        "Shows, for one token of the prompt, the tokens that each head looks at most, with the probabilities.",
        epilog=ATTENTION_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", type=prompt_text, help="a text")
    parser.add_argument(
        "--layer",
        metavar="N",
        type=int,
        nargs="+",
        help="which layers; negative ones count from the last (default: all)",
    )
    parser.add_argument(
        "--position", metavar="N", type=int, default=-1, help="the token that looks, counted from 0 (default: the last)"
    )
    parser.add_argument("--top", metavar="K", type=count, default=5, help="how many tokens for each head (default: 5)")
    add_output(parser, "with all probabilities instead of tables", "a map for each head")
    add_model(parser)
    parser.set_defaults(command="attention")


def add_heads(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "heads",
        help="which heads look at the previous token, or at earlier copies",
        description="Scores of every attention head on random tokens that are given twice over: how much it looks at\n"
        "the previous token, at the token after an earlier copy (induction), and at the earlier copy (duplicate).",
        epilog=HEADS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS, help="which kinds (default: all)")
    parser.add_argument("--top", metavar="K", type=count, default=5, help="how many heads of each kind (default: 5)")
    parser.add_argument("--length", metavar="N", type=count, default=24, help="tokens in each copy (default: 24)")
    parser.add_argument("--sequences", metavar="N", type=count, default=8, help="how many sequences (default: 8)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="which random tokens (default: 0)")
    add_output(parser, "with the scores of all heads", "the scores of all heads")
    add_model(parser)
    parser.set_defaults(command="heads")


def add_steer(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "steer",
        help="how a text goes on when the model is steered",
        description="Find a direction from contrasting prompts, add it at every step of a generation, and show what\n"
        "the model writes with and without it.",
        epilog=STEER_EXAMPLES,
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
    parser.set_defaults(command="steer", check=partial(_check_steer, parser))


def _check_steer(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if bool(arguments.load) == bool(arguments.toward and arguments.away):
        parser.error("give prompts after --toward and --away, or a saved vector with --load, and not both")


def add_spec(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "spec",
        help="what a model is made of, as YAML",
        description="Print a model's specification: the file that serves its type or, where none does, what one small\n"
        "forward pass shows of its structure.",
        epilog=SPEC_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a model's folder or its name on the Hugging Face hub")
    parser.add_argument("--inferred", action="store_true", help="find the structure also where a file serves the type")
    add_output(parser, "with the same keys instead of YAML")
    add_remote_code(parser)
    parser.set_defaults(command="spec")


def add_check(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "check",
        help="does every promise of the interface hold on a model?",
        description="Open a model and compare what the interface reads and writes with plain PyTorch hooks.",
        epilog=CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a model's folder or its name on the Hugging Face hub")
    parser.add_argument("--spec", metavar="FILE", help="a specification of one's own")
    add_output(parser, "instead of a table")
    add_remote_code(parser)
    parser.set_defaults(command="check")


#: What adds the parser of a command, in the order of the help. The parser's default for `command` is the file in
#: this folder whose `run` carries it out; `check`, where there is one, refuses arguments that do not go together.
COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_lens,
    add_patch,
    add_attention,
    add_heads,
    add_steer,
    add_spec,
    add_check,
)
