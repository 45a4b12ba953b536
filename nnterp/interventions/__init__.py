"""Methods that read a model's inner states or change them, one method a file."""

from nnterp.interventions.ablation import ablation
from nnterp.interventions.activation_patching import PatchingResult, activation_patching
from nnterp.interventions.attribution_patching import attribution_patching
from nnterp.interventions.logit_attribution import LogitAttribution, logit_attribution
from nnterp.interventions.logit_lens import LensResult, TopTokens, lens_tokens, logit_lens, logit_lens_topk
from nnterp.interventions.metrics import Metric, kl_divergence, logit_difference, loss, probability
from nnterp.interventions.path_patching import path_patching
from nnterp.interventions.steering import SteeringVector
from nnterp.interventions.sweep import SweepResult
from nnterp.interventions.token_attribution import gradient_x_input, integrated_gradients

__all__ = [
    "ablation",
    "activation_patching",
    "attribution_patching",
    "gradient_x_input",
    "integrated_gradients",
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
    "PatchingResult",
    "path_patching",
    "probability",
    "SteeringVector",
    "SweepResult",
    "TopTokens",
]
