"""Numbers that a model multiplies by, written as a product of config keys: `1 / logits_scaling`.

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
from nnterp.spec_reader import Place

__all__ = ["Multiplier", "number", "read_multiplier", "times"]


def number(name: str, config: Mapping[str, Any] | Any) -> float | None:
    """A number, or the value of a config key; None where the config has none."""
    try:
        return float(name)
    except ValueError:
        found = config_value(config, name)
        return float(found) if isinstance(found, (int, float)) else None


_FACTOR = re.compile(r"(sqrt)\(([\w.]+)\)|([\w.]+)")


@dataclasses.dataclass(frozen=True)
class Factor:
    """A number or a config key, perhaps under a root, perhaps below the line."""

    name: str
    is_root: bool
    is_divisor: bool

    def value(self, config: Mapping[str, Any] | Any) -> float | None:
        """The factor's value; None where the config has none."""
        found = number(self.name, config)
        if found is None:
            return None
        found = math.sqrt(found) if self.is_root else found
        return 1 / found if self.is_divisor else found


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A product of numbers and config keys; ``text`` is how the file writes it."""

    text: str
    factors: tuple[Factor, ...]

    def value(self, config: Mapping[str, Any] | Any) -> float:
        """The product; 1 where the config does not have one of its keys."""
        values = [factor.value(config) for factor in self.factors]
        return math.prod(each for each in values if each is not None) if None not in values else 1.0


def times(multiplier: Multiplier | None, value: Any, config: Mapping[str, Any] | Any) -> Any:
    """``value`` multiplied; itself where there is no multiplier."""
    return value if multiplier is None else value * multiplier.value(config)


def read_multiplier(place: Place) -> Multiplier:
    """A product such as `scale_depth / sqrt(num_hidden_layers)`: config keys and numbers joined by * and /."""
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
        root, below_root, plain = match.groups()
        factors.append(Factor(below_root or plain, bool(root), is_divisor))
    return Multiplier(text, tuple(factors))
