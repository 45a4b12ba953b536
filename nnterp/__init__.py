"""One interface over every Hugging Face causal language model."""

from nnsight_core.sites import hide_package as _hide_package
from nnterp.rename import RenameConfig
from nnterp.standardized_transformer import StandardizedTransformer

_hide_package("nnterp")

__all__ = ["RenameConfig", "StandardizedTransformer"]
