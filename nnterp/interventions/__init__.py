"""Methods that read a model's inner states or change them, one method a file."""

from nnterp.interventions.logit_lens import LensResult, lens_tokens, logit_lens
from nnterp.interventions.steering import SteeringVector

__all__ = ["LensResult", "lens_tokens", "logit_lens", "SteeringVector"]
