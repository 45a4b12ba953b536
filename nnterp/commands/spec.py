"""``nnterp spec``: what a model is made of, as the YAML of its specification, or the same as JSON."""

from __future__ import annotations

import argparse

import yaml

from nnsight_core.language_model import LanguageModel
from nnterp.architectures import load_specs
from nnterp.calling import config_of
from nnterp.commands.terminal import write, write_json
from nnterp.demo_models import demo_model_path
from nnterp.inference import infer_yaml

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Carries the command out."""
    place = demo_model_path(arguments.model) or arguments.model
    module = LanguageModel(place, trust_remote_code=arguments.trust_remote_code)._module
    served = load_specs().get(getattr(config_of(module), "model_type", ""))
    text = infer_yaml(module) if arguments.inferred or served is None else served.text
    if arguments.json:
        write_json(yaml.safe_load(text))
    else:
        write(text)
