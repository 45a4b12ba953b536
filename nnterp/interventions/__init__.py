"""Methods that read a model's inner states or change them, one method a file."""

from nnterp.interventions.ablation import ablation
from nnterp.interventions.activation_patching import PatchingResult, activation_patching
from nnterp.interventions.attention_patterns import AttentionPatterns, attention_patterns
from nnterp.interventions.attribution_patching import attribution_patching
from nnterp.interventions.head_scores import Head, find_heads, head_scores
from nnterp.interventions.logit_attribution import LogitAttribution, logit_attribution
from nnterp.interventions.logit_lens import LensResult, TopTokens, lens_tokens, logit_lens, logit_lens_topk
from nnterp.interventions.metrics import Metric, kl_divergence, logit_difference, loss, probability
from nnterp.interventions.patchscope import patch_object_attn_lens, patchscope_generate, patchscope_lens
from nnterp.interventions.path_patching import path_patching
from nnterp.interventions.steering import SteeringVector
from nnterp.interventions.sweep import SweepResult
from nnterp.interventions.target_prompts import (
    TargetPrompt,
    TargetPromptBatch,
    TargetPromptError,
    it_repeat_prompt,
    repeat_prompt,
)
from nnterp.interventions.token_attribution import gradient_x_input, integrated_gradients

__all__ = [
    "ablation",
    "activation_patching",
    "attention_patterns",
    "AttentionPatterns",
    "attribution_patching",
    "find_heads",
    "gradient_x_input",
    "Head",
    "head_scores",
    "integrated_gradients",
    "it_repeat_prompt",
    "kl_divergence",
    "lens_tokens",
    "LensResult",
    "logit_attribution",
    "logit_difference",
    "logit_lens",
    "logit_lens_topk",
    "LogitAttribution",
    "loss",
    "Metric",
    "patch_object_attn_lens",
    "PatchingResult",
    "patchscope_generate",
    "patchscope_lens",
    "path_patching",
    "probability",
    "repeat_prompt",
    "SteeringVector",
    "SweepResult",
    "TargetPrompt",
    "TargetPromptBatch",
    "TargetPromptError",
    "TopTokens",
]
