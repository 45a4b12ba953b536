"""Some model types in more detail than the matrix: their variants, sizes and tied embeddings, as rows of tests.

model = tiny_model("gpt2")                              # three layers, 64 wide, the same weights every time
model = tiny_model("opt", do_layer_norm_before=False)

@pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.matrix.models import tiny_config, tiny_model

__all__ = ["FAMILY_VARIANTS", "FamilyVariant", "IDS", "MODEL_TYPES", "tiny_config", "tiny_inputs", "tiny_model"]

MODEL_TYPES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "opt", "phi")


class FamilyVariant(NamedTuple):
    """One row: a name for the test report, and the model to build."""

    id: str
    model_type: str
    overrides: dict[str, Any]


def tiny_inputs(batch: int = 2, positions: int = 11, vocab: int = 320) -> torch.Tensor:
    """Token ids of shape (batch, position), the same every time; no id below 3, which are special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab, (batch, positions), generator=generator)


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi")

#: How each of these is told in the config.
WIDTH_AND_DEPTH: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_head": 6, "n_layer": 4},
    "opt": {"hidden_size": 48, "word_embed_proj_dim": 48, "num_attention_heads": 6, "num_hidden_layers": 4},
}
DEFAULT_WIDTH_AND_DEPTH = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 4}
for _name in ("qwen2", "qwen3", "gemma2"):
    # The tiny configurations say what each of three layers is.
    WIDTH_AND_DEPTH[_name] = {**DEFAULT_WIDTH_AND_DEPTH, "layer_types": None}


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
