"""Model type -> tiny random model, and what plain hooks have shown of it.

    case = Case("llama")
    case.module                 # the untouched Hugging Face model, random, in evaluation mode
    case.model                  # the same under standard names

``configs.json`` holds a configuration for each model type that `AutoModelForCausalLM` knows and that runs on a CPU,
``modules.json`` what is what in the model that it makes: the embedding, the list of layers, and for each layer the
modules that take and give what attention, mixer and MLP do. It was written down from models watched with hooks and from
their source files, without a look at the specifications.
"""

from __future__ import annotations

import copy
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnterp import StandardizedTransformer
from nnterp.experts import NAMES
from tests.matrix import hooks

HERE = Path(__file__).parent
#: For each accessor the entry of ``modules.json`` that says where its values stand.
ACCESSORS = {"attentions": "attn", "mixers": "mixer", "mlps": "mlp"}


@lru_cache
def read_json(name: str) -> dict[str, Any]:
    """One of the data files beside this one."""
    found: dict[str, Any] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


#: What is otherwise in transformers 4: configurations, modules, what cannot hold there, and what is left out.
OLDER: dict[str, dict[str, Any]] = read_json("older.json") if transformers.__version__.startswith("4.") else {}
#: The types of the matrix that this transformers knows.
MODEL_TYPES = tuple(
    name
    for name in read_json("configs.json")
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "left_out" not in OLDER.get(name, {})
)


def _older(model_type: str, what: str) -> dict[str, Any]:
    found: dict[str, Any] = OLDER.get(model_type, {}).get(what, {})
    return found


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration; ``overrides`` replace single values."""
    values = copy.deepcopy(read_json("configs.json")[model_type] | _older(model_type, "config")) | overrides
    config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    return config


def tiny_model(model_type: str, attention: str | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny model in eval mode and float32 whose weights depend on nothing but its configuration.

    ``attention`` is what it is to run its attention with, as transformers calls it; None for the family's own choice.
    """
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config(model_type, **overrides)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
        # Fresh norms scale by one, and fresh biases and some maps are zero, so that much would go unnoticed.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and (parameter.ndim == 1 or not parameter.any()):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.add_(0.2)
                if name.endswith("tid2eid"):
                    # A table of experts for each token, all of them the first one.
                    drawn = torch.rand(buffer.shape[0], model.config.num_local_experts)
                    buffer.copy_(drawn.argsort(-1)[:, : buffer.shape[1]])
    model.eval()
    return model


class Case:
    """One model of the matrix, what is known of it, and what it gives when nobody interferes."""

    def __init__(self, model_type: str, attention: str | None = None, **overrides: Any) -> None:
        self.model_type = model_type
        self.module = tiny_model(model_type, attention, **overrides)
        facts: dict[str, Any] = read_json("modules.json")[model_type] | _older(model_type, "modules")
        self.facts = copy.deepcopy(facts)
        #: What the model's own code does not let hold, in this transformers alone.
        self.cannot = _older(model_type, "cannot")
        #: What holds in this transformers alone.
        self.holds = _older(model_type, "holds")
        generator = torch.Generator().manual_seed(1)
        #: Token ids of shape (batch, position); none is a special one.
        self.ids = torch.randint(5, 320, (2, 12), generator=generator)
        self.state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.model = StandardizedTransformer(self.module)
        #: What no layer has, in this transformers alone: its experts are called one by one.
        self.absent = NAMES if OLDER and "router" in self.spec.absent else ()

    @property
    def spec(self) -> Any:
        """The specification of the model."""
        return self.model._spec

    @cached_property
    def logits(self) -> torch.Tensor:
        """The plain model's logits."""
        return hooks.logits(self.module, self.ids)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.facts["parts"])

    def layer(self, index: int, kind: str = "output") -> hooks.Place:
        """Where a layer's input or output stands."""
        if self.facts["layers"] is None:
            return self.facts["ends"][0 if kind == "input" else 1].format(index), kind
        return f"{self.facts['layers']}.{index}", kind

    def place(self, accessor: str, index: int, kind: str) -> hooks.Place | None:
        """Where in the plain model the accessor's value stands; None where the layer has no such part."""
        if accessor == "layers":
            return self.layer(index, kind)
        ends = self.facts["parts"][index][ACCESSORS[accessor]]
        if ends is None:
            return None
        path = ends[0 if kind == "input" else 1]
        return (path if self.facts["layers"] is None else f"{self.facts['layers']}.{index}.{path}"), kind
