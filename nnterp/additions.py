"""How a part of a layer is added to the residual stream, in the numbers of one model.

    x = (x + stream_bias) * stream_multiplier + (given + bias) * multiplier

`given` being what the part gives, or a norm makes of it; each of the four may be missing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nnterp.multipliers import times

if TYPE_CHECKING:
    from nnterp.multipliers import LayerTensor
    from nnterp.rename_plan import PartPlan

__all__ = ["Addition"]


@dataclasses.dataclass(frozen=True)
class Addition:
    """One part's addition.

    Args:
        part: the part.
        config: the model's.
        layer: the layer's module, which may hold what is multiplied by.
    """

    part: PartPlan
    config: Any
    layer: Any

    def stream(self, stream: Any) -> Any:
        """What the contribution is added to."""
        part = self.part
        return times(part.stream_multiplier, _plus(stream, part.stream_bias, self.layer), self.config, self.layer)

    def contribution(self, given: Any) -> Any:
        """What is added, of what the part gives."""
        return times(self.part.multiplier, _plus(given, self.part.bias, self.layer), self.config, self.layer)

    def given(self, contribution: Any) -> Any:
        """What the part has to give for this to be added."""
        multiplier = self.part.multiplier
        if multiplier is not None:
            contribution = contribution / multiplier.value(self.config, self.layer)
        return _plus(contribution, self.part.bias, self.layer, -1)


def _plus(value: Any, bias: LayerTensor | None, layer: Any, sign: int = 1) -> Any:
    found = None if bias is None else bias.value(layer)
    return value if found is None else value + sign * found
