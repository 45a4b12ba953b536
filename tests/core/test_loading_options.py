"""Options of loading: those of transformers pass, and a mistyped one is an error before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from nnsight_core import LanguageModel, OptionError
from nnsight_core.loading import Checkpoint
from tests.families import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_model("gpt2").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("dtyp", "dtype"),
        ("torch_dtyp", "torch_dtype"),
        ("device_mapp", "device_map"),
        ("atn_implementation", "attn_implementation"),
        ("low_cpu_mem_usge", ""),
        ("n_layr", "n_layer"),
        ("xyzzy", ""),
    ],
)
@pytest.mark.parametrize("more", [{}, {"automodel": "GPT2LMHeadModel"}, {"dtype": torch.float32, "n_layer": 2}])
def test_a_mistyped_option_is_an_error_at_once(
    folder: Path, option: str, meant: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda self: pytest.fail("it was loaded"))
    with pytest.raises(OptionError, match=f"^{option}: neither the loading of GPT2LMHeadModel") as caught:
        LanguageModel(folder, **{option: "1"}, **more)
    assert not meant or f"'{meant}'" in str(caught.value)


def test_a_mistyped_option_beside_a_config_of_ones_own(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(OptionError, match=r"^n_layer: "):
        # transformers hands it on to the model, which does not take it.
        LanguageModel(folder, config=config, n_layer=2)
    assert len(LanguageModel(folder, config=config).transformer.h) == config.n_layer


GOOD: list[dict[str, Any]] = [
    {"dtype": "float64"},
    {"torch_dtype": torch.bfloat16},
    {"dtype": "auto", "device_map": "cpu"},
    {"attn_implementation": "eager", "use_safetensors": True, "trust_remote_code": False, "revision": "main"},
    {"resid_pdrop": 0.0, "output_hidden_states": True, "use_cache": False},
    {"low_cpu_mem_usage": True, "local_files_only": True, "token": None, "cache_dir": None, "force_download": False},
    {"key_mapping": None, "max_memory": None, "offload_folder": None, "ignore_mismatched_sizes": True},
    {"variant": None, "subfolder": "", "proxies": None, "output_attentions": False, "weights_only": True},
]


@pytest.mark.parametrize("options", GOOD, ids=lambda each: " ".join(each))
@pytest.mark.parametrize("automodel", [None, "GPT2LMHeadModel"])
def test_what_transformers_takes_passes(folder: Path, options: dict[str, Any], automodel: str | None) -> None:
    model = LanguageModel(folder, automodel=automodel, dispatch=True, **options)
    assert not any(each.is_meta for each in model._module.parameters())


def test_a_class_that_takes_anything_is_given_it(folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    class Taking(GPT2LMHeadModel):  # type: ignore[misc]
        def __init__(self, config: Any, **more: Any) -> None:
            super().__init__(config)
            self.more = more

    assert LanguageModel(folder, automodel=Taking, anything=3, dispatch=True)._module.more == {"anything": 3}

    class TakingOne(GPT2LMHeadModel):  # type: ignore[misc]
        def __init__(self, config: Any, anything: int = 0) -> None:
            super().__init__(config)
            self.anything_given = anything

    assert LanguageModel(folder, automodel=TakingOne, anything=3, dispatch=True)._module.anything_given == 3
    with pytest.raises(OptionError, match="Did you mean 'anything'"):
        LanguageModel(folder, automodel=TakingOne, anythin=3)
