"""A model's sizes, read from its config by the keys that the specification or the user names.

dimensions(spec, config).hidden_size                                            # 768
dimensions(spec, config, RenameConfig(attn_head_config_key="heads")).num_heads  # the user's key wins
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nnterp.conditions import config_value
from nnterp.errors import DimensionError, nearest
from nnterp.rename_plan import RenameConfig, as_list
from nnterp.spec import ArchitectureSpec

__all__ = ["Dimensions", "dimensions"]

USER_KEYS = {
    "num_heads": "attn_head_config_key",
    "hidden_size": "hidden_size_config_key",
    "vocab_size": "vocab_size_config_key",
}


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """How large a model is; the numbers about heads are 0 in a model without attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int


def dimensions(spec: ArchitectureSpec, config: Mapping[str, Any] | Any, user: RenameConfig | None = None) -> Dimensions:
    """Reads every dimension from a config, given as a mapping or as an object with attributes.

        dimensions(spec_for("gpt2"), {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}).head_dim  # 64

    The user's keys win; a number given as a key is the value itself. Where the config has none of the keys,
    `num_kv_heads` is `num_heads` and `head_dim` is `hidden_size // num_heads`. Raises `DimensionError`, which names the
    line of the YAML file or the user's argument and the config's nearest keys, where another one is not there, or where
    a value is no positive whole number.
    """
    user = user or RenameConfig()

    def read(dimension: str) -> int | None:
        return _read(dimension, spec, config, user)

    def needed(dimension: str) -> int:
        value = read(dimension)
        if value is None:
            keys = getattr(spec.dimensions, dimension)
            raise _error(
                spec.where(f"dimensions.{dimension}"), dimension, f"the config does not say {dimension}.", keys, config
            )
        return value

    # Without attention there are no heads to count.
    heads = needed("num_heads") if spec.layer.attention else 0
    hidden = needed("hidden_size")
    return Dimensions(
        num_layers=needed("num_layers"),
        num_heads=heads,
        num_kv_heads=(read("num_kv_heads") or heads) if heads else 0,
        head_dim=(read("head_dim") or hidden // heads) if heads else 0,
        hidden_size=hidden,
        vocab_size=needed("vocab_size"),
    )


def _read(dimension: str, spec: ArchitectureSpec, config: Mapping[str, Any] | Any, user: RenameConfig) -> int | None:
    field = USER_KEYS.get(dimension)
    said = getattr(user, field) if field else None
    origin = spec.where(f"dimensions.{dimension}") if said is None else f"RenameConfig({field}={said!r})"
    if isinstance(said, int):
        return _positive(said, str(said), dimension, origin, config)
    keys = as_list(said) or getattr(spec.dimensions, dimension)
    for key in keys:
        value = int(key) if key.isdecimal() else config_value(config, key)
        if value is not None:
            return _positive(value, key, dimension, origin, config)
    if said is not None:
        raise _error(origin, dimension, f"the config does not say {dimension}.", keys, config)
    return None


def _positive(value: Any, key: str, dimension: str, origin: str, config: Mapping[str, Any] | Any) -> int:
    # A truth value is an int in Python, and True heads are no heads.
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _error(origin, dimension, f"{key} is {value!r}, which cannot be {dimension}.", [key], config)
    return value


def _error(
    origin: str, dimension: str, fact: str, keys: tuple[str, ...] | list[str], config: Mapping[str, Any] | Any
) -> DimensionError:
    there = _keys(config)
    near = [name for key in keys for name in nearest(key, there)] or sorted(there)
    user_key = USER_KEYS.get(dimension)
    mend = f"Mend that line, or say it yourself: RenameConfig({user_key}=...), a key or the number." if user_key else ""
    asked = f"{dimension}, a positive whole number, under {' or '.join(repr(key) for key in keys) or 'no key'}"
    return DimensionError(origin, dimension, fact, asked, near, mend or "Mend that line so that it names the key.")


def _keys(config: Mapping[str, Any] | Any) -> set[str]:
    if isinstance(config, Mapping):
        return {str(key) for key in config}
    # transformers' configs answer to more names than they hold; `attribute_map` lists them.
    names = {*getattr(config, "__dict__", {}), *getattr(config, "attribute_map", {})}
    return {name for name in names if not name.startswith("_")}
