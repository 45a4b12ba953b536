"""``nnterp spec``: what a model is made of, as the YAML of its specification, or the same as JSON."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from nnsight_core.language_model import LanguageModel
from nnterp.architectures import load_specs
from nnterp.calling import config_of
from nnterp.commands.terminal import add_output, add_remote_code, write, write_json
from nnterp.demo_models import demo_model_path
from nnterp.inference import infer_yaml

__all__ = ["add_spec"]

EXAMPLES = """\
examples:
  nnterp spec gpt2                             the file that serves it
  nnterp spec gpt2 --inferred                  what its structure alone would say
  nnterp spec gpt2 --json | jq .modules
  nnterp spec ./my-model > my_model.yaml       a file to read, mend and keep; then
  nnterp check ./my-model --spec my_model.yaml"""


def add_spec(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "spec",
        help="what a model is made of, as YAML",
        description="Print a model's specification: the file that serves its type or, where none does, what one small\n"
        "forward pass shows of its structure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a model's folder or its name on the Hugging Face hub")
    parser.add_argument("--inferred", action="store_true", help="find the structure also where a file serves the type")
    add_output(parser, "with the same keys instead of YAML")
    add_remote_code(parser)
    parser.set_defaults(run=_spec)


def _spec(arguments: argparse.Namespace) -> None:
    place = demo_model_path(arguments.model) or arguments.model
    module = LanguageModel(place, trust_remote_code=arguments.trust_remote_code)._module
    served = load_specs().get(getattr(config_of(module), "model_type", ""))
    text = infer_yaml(module) if arguments.inferred or served is None else served.text
    if arguments.json:
        write_json(yaml.safe_load(text))
    else:
        write(text)
