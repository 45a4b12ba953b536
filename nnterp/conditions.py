"""When a variant of a specification applies: conditions on a config's values, read from YAML.

when: {do_layer_norm_before: false}                        # this value
when: {model_kind: [small, medium]}                        # one of these values
when: {word_embed_proj_dim: {differs_from: hidden_size}}   # two values of the config, both set, differ
when: {transformers: 4}                                    # the first number of the installed transformers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import yaml

from nnterp.spec_reader import Place, key, read_name, section

__all__ = ["Condition", "config_value", "major_version", "read_conditions"]

#: What a condition says instead of a config key where the installed transformers decides.
VERSION = "transformers"


def config_value(config: Mapping[str, Any] | Any, key: str) -> Any:
    """A config's value, or None where it has none; dots lead into nested configs and lists.

    >>> config_value({"text_config": {"n_embd": 64}}, "text_config.n_embd")
    64
    """
    value: Any = config
    for part in key.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif part.isdigit():
            value = value[int(part)] if isinstance(value, Sequence) and int(part) < len(value) else None
        else:
            value = getattr(value, part, None)
    return value


@lru_cache
def major_version() -> int:
    """The first number of the installed transformers' version: what a family's code does may change with it."""
    return int(version("transformers").partition(".")[0])


@dataclasses.dataclass(frozen=True)
class Condition:
    """One entry of a variant's `when`: a config key, or `transformers`, and what has to be so about its value."""

    key: str
    one_of: tuple[Any, ...] = ()
    differs_from: str | None = None

    def holds(self, config: Mapping[str, Any] | Any) -> bool:
        """Whether the config is as the condition says; a missing key counts as null."""
        value = major_version() if self.key == VERSION else config_value(config, self.key)
        if self.differs_from is not None:
            other = config_value(config, self.differs_from)
            return value is not None and other is not None and bool(value != other)
        # 0 == False in Python, and a config that says 0 does not say false.
        return any(type(value) is type(allowed) and value == allowed for allowed in self.one_of)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    differs_from: str = key(read_name, "another config key")


def _condition(name: str, place: Place) -> Condition:
    if isinstance(place.node, yaml.MappingNode):
        return Condition(name, differs_from=section(_Comparison)(place).differs_from)
    if isinstance(place.node, yaml.SequenceNode):
        return Condition(name, one_of=tuple(item.scalar() for item in place.items("a list of values")))
    return Condition(name, one_of=(place.scalar(),))


def read_conditions(place: Place) -> tuple[Condition, ...]:
    """The `when` of a variant: all of its conditions must hold."""
    conditions = tuple(_condition(name, entry) for name, entry in place.entries().items())
    if not conditions:
        raise place.error(
            f"`{place.path}` is empty.",
            found="{}",
            expected="at least one config key with its value",
            mend="Say when the variant applies; what always applies belongs outside `variants`.",
        )
    return conditions
