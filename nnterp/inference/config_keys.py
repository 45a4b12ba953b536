"""Which key of a config holds a number that was seen: by value, and of several keys the one whose name fits best.

    keys = ConfigKeys(model.config)
    keys.holding(12, ("head",))            # 'num_attention_heads'
    keys.product(0.22)                     # 'residual_multiplier'

Configs are read without knowing their class: an object with attributes, a mapping, or either inside of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nnterp.conditions import config_value

__all__ = ["ConfigKeys"]

#: Stands for a value that a config has and does not give.
UNREADABLE = object()
#: Names that say that a number is about something else than the text model's own size.
ELSEWHERE = ("vision", "audio", "image", "encoder", "mtp", "nextn", "draft", "window", "dense", "shared", "linear")


class ConfigKeys:
    """The numbers of a config by their keys; dots lead into nested configs.

    Args:
        config: the model's config, or None.
        near: a path of the model. Keys that share a word with it win, `decoder_layers` for `model.decoder.layers`.
    """

    def __init__(self, config: Any, near: str = "") -> None:
        self.config = config
        self._words = [word for part in near.split(".") for word in part.lower().split("_")]
        self._numbers = dict(_numbers(config, ""))

    def value(self, key: str) -> Any:
        """What the config says when it is asked for a key; `UNREADABLE` where it refuses to answer."""
        if self.config is None:
            return None
        try:
            return config_value(self.config, key)
        except Exception:  # noqa: BLE001 - configs have properties, which may raise anything at all
            return UNREADABLE

    def holding(self, number: int, words: tuple[str, ...], without: tuple[str, ...] = ()) -> str | None:
        """The key with this value whose name has one of `words` in it, best first; None where there is none."""
        found = []
        for key, value in self._numbers.items():
            name = key.lower()
            named = [index for index, word in enumerate(words) if word in name]
            fits = value == number and type(value) is int and not any(word in name for word in without)
            if fits and named and self.value(key) == number:
                found.append(
                    (self._is_elsewhere(name), not self._is_near(name), named[0], key.count("."), len(key), key)
                )
        return min(found)[-1] if found else None

    def _is_near(self, name: str) -> bool:
        return any(word in name.split("_") for word in ("decoder",) if word in self._words)

    def _is_elsewhere(self, name: str) -> bool:
        return any(word in name for word in ELSEWHERE if word not in self._words)

    def product(self, factor: float, words: tuple[str, ...]) -> str | None:
        """A key, or a short product of keys, that gives a factor: `logit_scale`, `1 / logits_scaling`, ...; the number
        itself where no key does."""
        if math.isclose(factor, 1, rel_tol=1e-4):
            return None
        numbers = {key: float(value) for key, value in self._numbers.items() if value and not isinstance(value, bool)}
        numbers = {key: value for key, value in numbers.items() if value > 0 and math.isfinite(value)}
        likely = [key for key in numbers if any(word in key for word in words)]
        likely.sort(key=lambda key: (min(i for i, word in enumerate(words) if word in key), key.count("."), len(key)))
        fits: list[tuple[str, float]] = []
        for key in likely:
            fits += [(key, numbers[key]), (f"1 / {key}", 1 / numbers[key])]
        for key in likely:
            fits += [(f"sqrt({key})", math.sqrt(numbers[key])), (f"1 / sqrt({key})", 1 / math.sqrt(numbers[key]))]
        for key in likely:
            for other in SIZES:
                size = numbers.get(other)
                if size is not None:
                    fits += [(f"{key} / {other}", numbers[key] / size)]
                    fits += [(f"{key} / sqrt({other})", numbers[key] / math.sqrt(size))]
        return next((text for text, value in fits if math.isclose(value, factor, rel_tol=1e-4)), f"{factor:.6g}")

    def caps(self) -> list[tuple[str, float]]:
        """The keys that could hold a cap, those that say so first."""
        floats = [(key, float(value)) for key, value in self._numbers.items() if type(value) in (int, float)]
        positive = [(key, value) for key, value in floats if 0 < value < 1e4]
        return sorted(positive, key=lambda pair: ("cap" not in pair[0], "logit" not in pair[0], len(pair[0])))


#: What a key's value is divided by in the products that models make.
SIZES = ("num_hidden_layers", "num_layers", "n_layer", "hidden_size", "d_model", "n_embd")


def _numbers(config: Any, start: str) -> Iterator[tuple[str, Any]]:
    """Every number in a config, by its key."""
    values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in values.items():
        key = f"{start}.{name}" if start else str(name)
        if str(name).startswith("_"):
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value
        elif start.count(".") < 2 and str(name).endswith("config") and value is not None:
            yield from _numbers(value, key)
