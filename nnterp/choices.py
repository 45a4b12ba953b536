"""The words that interventions choose by. The command line reads them too, and does without torch until it runs one."""

from __future__ import annotations

__all__ = ["DEFAULT_SITES", "HEADS", "KINDS", "METHODS", "STREAMS"]

#: Values of shape (batch, position, hidden).
STREAMS = (
    "layers_input",
    "attentions_input",
    "attentions_output",
    "mixers_input",
    "mixers_output",
    "mlps_input",
    "mlps_output",
    "layers_output",
)
#: Values of shape (batch, head, position, head_dim).
HEADS = ("heads_output", "queries", "keys", "values")
#: The values that are patched unless others are asked for.
DEFAULT_SITES = ("layers_output", "attentions_output", "mlps_output")
#: The kinds of heads that are looked for.
KINDS = ("previous", "induction", "duplicate")
#: The ways to find a steering vector.
METHODS = ("mean", "principal")
