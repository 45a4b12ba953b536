"""Numbers that a model multiplies by, written as a product: `1 / logits_scaling`, `layer.input_residual`.

# for scale_depth / sqrt(num_hidden_layers)
read_multiplier(place).value({"scale_depth": 1.4, "num_hidden_layers": 4})      # 0.7
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from nnterp.conditions import config_value
from nnterp.errors import RenamingError, listed, nearest
from nnterp.spec_reader import Place, read_path

__all__ = ["LayerTensor", "LayerValueError", "Multiplier", "number", "read_layer_tensor", "read_multiplier", "times"]

#: What a name begins with that is no config key, but something that each layer holds.
LAYER = "layer."


class LayerValueError(RenamingError):
    """A tensor or number that a specification says a layer holds, and that it does not."""

    def __init__(self, origin: str, name: str, holder: Any) -> None:
        held = [*getattr(holder, "_parameters", ()), *getattr(holder, "_buffers", ())]
        held += [each for each, value in vars(holder).items() if type(value) in (int, float)]
        super().__init__(
            f"{origin}: the layer has no tensor or number '{name}'.\n"
            f"  {type(holder).__name__} holds: {listed(held, nearest(name.rpartition('.')[2], held))}\n"
            "Mend that line; a name is that of an attribute of the layer, or of a module in it, joined by dots."
        )


@dataclasses.dataclass(frozen=True)
class LayerTensor:
    """A tensor or number that each layer holds, by its dotted name."""

    name: str
    #: File and line that name it.
    origin: str = dataclasses.field(default="", compare=False)

    def value(self, layer: Any) -> Any:
        """What ``layer`` holds there; None where it says that it has none.

        Raises:
            LayerValueError: there is no such thing.
        """
        found = layer
        for step in self.name.split("."):
            if not hasattr(found, step):
                raise LayerValueError(self.origin, self.name, found)
            found = getattr(found, step)
        return found


def number(name: str, config: Mapping[str, Any] | Any) -> float | None:
    """A number, or the value of a config key; None where the config has none."""
    try:
        return float(name)
    except ValueError:
        found = config_value(config, name)
        return float(found) if isinstance(found, (int, float)) else None


_FACTOR = re.compile(r"(sqrt)\(([\w.]+)(?:\s*-\s*(\d+))?\)|([\w.]+)")


@dataclasses.dataclass(frozen=True)
class Factor:
    """A number, a config key or something of the layer's, perhaps less a number and under a root, or below the line."""

    name: str
    is_root: bool
    is_divisor: bool
    less: int = 0
    origin: str = dataclasses.field(default="", compare=False)

    def value(self, config: Mapping[str, Any] | Any, layer: Any = None) -> Any:
        """The factor's value; None where the config has none.

        Raises:
            LayerValueError: the layer holds no such thing.
        """
        if self.name.startswith(LAYER):
            found = LayerTensor(self.name.removeprefix(LAYER), self.origin).value(layer)
        else:
            found = number(self.name, config)
        if found is None:
            return None
        found = (found - self.less) ** 0.5 if self.is_root else found
        return 1 / found if self.is_divisor else found


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A product of numbers, config keys and what a layer holds; ``text`` is how the file writes it."""

    text: str
    factors: tuple[Factor, ...]

    def value(self, config: Mapping[str, Any] | Any, layer: Any = None) -> Any:
        """The product, a number or a tensor (hidden); 1 where the config does not have one of its keys.

        Args:
            config: the model's.
            layer: the module whose tensors are meant; needed where the product names some.

        Raises:
            LayerValueError: the layer does not hold what the product names.
        """
        values = [factor.value(config, layer) for factor in self.factors]
        return 1.0 if any(each is None for each in values) else math.prod(values)


def times(multiplier: Multiplier | None, value: Any, config: Mapping[str, Any] | Any, layer: Any = None) -> Any:
    """``value`` multiplied; itself where there is no multiplier."""
    return value if multiplier is None else value * multiplier.value(config, layer)


def read_layer_tensor(place: Place) -> LayerTensor:
    """A dotted name below the layer."""
    return LayerTensor(read_path(place), f"{place.source}:{place.line}")


def read_multiplier(place: Place) -> Multiplier:
    """A product such as `scale_depth / sqrt(num_hidden_layers)`: names and numbers joined by * and /."""
    text = str(place.scalar())
    factors = []
    is_divisor = False
    for index, piece in enumerate(re.split(r"\s*([*/])\s*", text.strip())):
        if index % 2:
            is_divisor = piece == "/"
            continue
        match = _FACTOR.fullmatch(piece)
        if match is None:
            raise place.error(
                f"`{place.path}` is no product.",
                found=text,
                expected="config keys and numbers joined by * and /, such as 'scale / sqrt(num_hidden_layers)'",
                mend="architectures/README.md shows what each key takes.",
            )
        root, below_root, less, plain = match.groups()
        origin = f"{place.source}:{place.line}"
        factors.append(Factor(below_root or plain, bool(root), is_divisor, int(less or 0), origin))
    return Multiplier(text, tuple(factors))
