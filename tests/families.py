"""Specification -> tiny random model: the rows on which everything family-specific is tested. Nothing is downloaded.

    model = tiny_model("gpt2")                              # three layers, 64 wide, the same weights every time
    model = tiny_model("opt", do_layer_norm_before=False)

    @pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)

A new family gets a configuration in tiny_configs.yaml, and then has its rows here.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

__all__ = ["FAMILY_VARIANTS", "FamilyVariant", "IDS", "MODEL_TYPES", "tiny_config", "tiny_inputs", "tiny_model"]


@lru_cache(maxsize=1)
def _configs() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("tiny_configs.yaml").read_text(encoding="utf-8")
    configs: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return configs


MODEL_TYPES = tuple(_configs())


class FamilyVariant(NamedTuple):
    """One row: a name for the test report, and the model to build."""

    id: str
    model_type: str
    overrides: dict[str, Any]


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration; `overrides` replace single values."""
    values = copy.deepcopy(_configs()[model_type]) | overrides
    config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    return config


def tiny_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model in eval mode and float32 whose weights depend on nothing but its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tiny_config(model_type, **overrides), dtype=torch.float32
        )
        # Fresh norms scale by one and fresh biases are zero, so that one norm taken for another would go unnoticed.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.eval()
    return model


def tiny_inputs(batch: int = 2, positions: int = 11, vocab: int = 320) -> torch.Tensor:
    """Token ids of shape (batch, position), the same every time; no id below 3, which are special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab, (batch, positions), generator=generator)


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi")

#: How each of these is told in the config.
WIDTH_AND_DEPTH: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_head": 6, "n_layer": 2},
    "opt": {"hidden_size": 48, "word_embed_proj_dim": 48, "num_attention_heads": 6, "num_hidden_layers": 2},
}
DEFAULT_WIDTH_AND_DEPTH = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}


def _rows() -> list[FamilyVariant]:
    rows = []
    for model_type in MODEL_TYPES:
        if model_type in GROUPED:
            for name, kv_heads in (("full", 4), ("gqa", 2), ("mqa", 1)):
                rows.append(FamilyVariant(f"{model_type}-{name}", model_type, {"num_key_value_heads": kv_heads}))
        else:
            rows.append(FamilyVariant(f"{model_type}-full", model_type, {}))
        shape = WIDTH_AND_DEPTH.get(model_type, DEFAULT_WIDTH_AND_DEPTH)
        rows.append(FamilyVariant(f"{model_type}-narrow", model_type, shape))
        for tied in (True, False):
            name = "tied" if tied else "untied"
            rows.append(FamilyVariant(f"{model_type}-{name}", model_type, {"tie_word_embeddings": tied}))
    return rows


FAMILY_VARIANTS: list[FamilyVariant] = [
    *_rows(),
    FamilyVariant("gpt2-cross-attention", "gpt2", {"add_cross_attention": True}),
    FamilyVariant("gpt_neox-sequential", "gpt_neox", {"use_parallel_residual": False}),
    FamilyVariant("llama-wide-heads", "llama", {"head_dim": 32}),
    FamilyVariant("qwen3-wide-heads", "qwen3", {"head_dim": 32}),
    FamilyVariant("gemma2-wide-heads", "gemma2", {"head_dim": 32}),
    FamilyVariant("gemma2-uncapped", "gemma2", {"final_logit_softcapping": None}),
    FamilyVariant("gemma2-hard-cap", "gemma2", {"final_logit_softcapping": 0.5}),
    FamilyVariant("phi-qk-norm", "phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
    FamilyVariant("opt-post-norm", "opt", {"do_layer_norm_before": False}),
    FamilyVariant("opt-no-final-norm", "opt", {"_remove_final_layer_norm": True}),
    FamilyVariant("opt-projected", "opt", {"word_embed_proj_dim": 32}),
    FamilyVariant("opt-350m", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
]
IDS = [row.id for row in FAMILY_VARIANTS]
