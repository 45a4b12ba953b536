"""A model's sizes, from a config that is a mapping or an object: no model, no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nnterp.architectures import spec_for
from nnterp.errors import DimensionError
from nnterp.rename import RenameConfig, dimensions
from nnterp.spec import ArchitectureSpec

CONFIG = {"n_layer": 12, "n_head": 8, "n_embd": 64, "vocab_size": 100}


def test_dimensions() -> None:
    sizes = dimensions(spec_for("gpt2"), CONFIG)
    assert dataclasses.astuple(sizes) == (12, 8, 8, 8, 64, 100)
    llama = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64, "vocab_size": 100}
    assert dimensions(spec_for("llama"), llama | {"num_key_value_heads": None}).num_kv_heads == 8
    sizes = dimensions(spec_for("llama"), llama | {"num_key_value_heads": 2, "head_dim": 32})
    assert (sizes.num_kv_heads, sizes.head_dim) == (2, 32)


def test_the_users_keys_win() -> None:
    user = RenameConfig(
        attn_head_config_key=["no_such", "heads"], hidden_size_config_key=32, vocab_size_config_key="t.v"
    )
    sizes = dimensions(spec_for("gpt2"), CONFIG | {"heads": 4, "t": {"v": 7}}, user)
    assert (sizes.num_heads, sizes.hidden_size, sizes.vocab_size) == (4, 32, 7)
    assert (sizes.num_kv_heads, sizes.head_dim) == (4, 8)


def size_failure(spec: ArchitectureSpec, config: Any, user: RenameConfig | None, *pieces: str) -> None:
    with pytest.raises(DimensionError) as caught:
        dimensions(spec, config, user)
    for piece in pieces:
        assert piece in str(caught.value), str(caught.value)


def test_missing_dimensions() -> None:
    spec = spec_for("gpt2")
    config = {"n_layers": 12, **{key: value for key, value in CONFIG.items() if key != "n_layer"}}
    size_failure(spec, config, None, spec.where("dimensions.num_layers"), "'n_layer'", "config has n_layers", "Mend")
    user = RenameConfig(attn_head_config_key="n_heads")
    size_failure(spec, CONFIG, user, "RenameConfig(attn_head_config_key='n_heads')", "config has n_head")

    class Config:
        attribute_map = {"num_hidden_layers": "n_layer"}  # noqa: RUF012 - as transformers has it

        def __init__(self) -> None:
            self.n_layer, self._private = 2, 3

    size_failure(spec, Config(), None, spec.where("dimensions.num_heads"), "n_layer, num_hidden_layers")


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True, [8]])
def test_a_dimension_is_a_positive_whole_number(value: Any) -> None:
    size_failure(spec_for("gpt2"), CONFIG | {"n_head": value}, None, f"n_head is {value!r}", "cannot be num_heads")
