"""What parts add to the stream makes the layer's output of its input, by sums written down from the models' sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.architectures import specs_folder
from nnterp.multipliers import LayerValueError
from tests.matrix.models import MODEL_TYPES, tiny_model

IDS = torch.arange(5, 27).reshape(2, 11)
Added = tuple[torch.Tensor, torch.Tensor]


def _beam(layer: Any, index: int, stream: torch.Tensor, added: Added) -> torch.Tensor:
    for number, each in zip((2 * index + 2, 2 * index + 3), added, strict=True):
        stream = stream * (1 - 1 / number) ** 0.5 + each
    return stream


def _doge(layer: Any, index: int, stream: torch.Tensor, added: Added) -> torch.Tensor:
    return (stream * layer.input_residual + added[0]) * layer.post_attention_residual + added[1]


def _zaya(layer: Any, index: int, stream: torch.Tensor, added: Added) -> torch.Tensor:
    for scaling, each in zip((layer.post_attention_residual_scale, layer.post_mlp_residual_scale), added, strict=True):
        stream = (stream + scaling.residual_bias) * scaling.residual_scale + each
    return stream


def _gemma4(layer: Any, index: int, stream: torch.Tensor, added: Added) -> torch.Tensor:
    return (stream + added[0] + added[1]) * layer.layer_scalar


def _plain(layer: Any, index: int, stream: torch.Tensor, added: Added) -> torch.Tensor:
    return stream + added[0] + added[1]


SUMS: dict[str, tuple[Callable[[Any, int, torch.Tensor, Added], torch.Tensor], dict[str, Any]]] = {
    "beam": (_beam, {}),
    "doge": (_doge, {}),
    "zaya": (_zaya, {}),
    # Without embeddings of the layer's own, which would be added as well.
    "gemma4_text": (_gemma4, {"hidden_size_per_layer_input": 0}),
    "gpt_neox_japanese": (_plain, {}),
}


@pytest.mark.parametrize("model_type", [name for name in SUMS if name in MODEL_TYPES])
@torch.no_grad()
def test_what_is_added_makes_the_next_stream(model_type: str) -> None:
    whole, options = SUMS[model_type]
    model = StandardizedTransformer(tiny_model(model_type, **options))
    for index in range(model.num_layers):
        with model.trace(IDS):
            stream = model.layers_input[index].save()
            added = model.attentions_contribution[index].save(), model.mlps_contribution[index].save()
            output = model.layers_output[index].save()
        made = whole(model.layers[index]._module, index, stream.value, (added[0].value, added[1].value))
        assert torch.allclose(made, output, rtol=1e-5, atol=1e-5 * float(output.abs().max()))


@pytest.mark.parametrize("model_type", [name for name in ("beam", "zaya", "gpt_neox_japanese") if name in MODEL_TYPES])
@torch.no_grad()
def test_a_contribution_that_is_set_is_what_is_added(model_type: str) -> None:
    model = StandardizedTransformer(tiny_model(model_type))
    last = model.num_layers - 1
    wanted = torch.randn(2, 11, model.hidden_size, generator=torch.Generator().manual_seed(0))
    with model.trace(IDS):
        stream = model.layers_input[last].save()
        model.attentions_contribution[last] = wanted
        back = model.attentions_contribution[last].save()
        model.mlps_contribution[last] = 0
        output = model.layers_output[last].save()
    made = SUMS[model_type][0](model.layers[last]._module, last, stream.value, (wanted, torch.zeros_like(wanted)))
    assert torch.allclose(back, wanted, atol=1e-5) and torch.allclose(made, output, atol=1e-4)


def test_a_scan_knows_a_contribution_that_is_multiplied_by_a_tensor() -> None:
    model = StandardizedTransformer(tiny_model("gpt_neox_japanese"))
    with model.scan(IDS):
        shape = model.attentions_contribution[-1].shape
    assert tuple(shape) == (2, 11, model.hidden_size)


def test_a_tensor_that_no_layer_holds_is_told_by_the_line_that_names_it(tmp_path: Any) -> None:
    text = (specs_folder() / "doge.yaml").read_text(encoding="utf-8")
    assert text.count("layer.input_residual") == 1
    path = tmp_path / "doge.yaml"
    path.write_text(text.replace("layer.input_residual", "layer.input_residuals"), encoding="utf-8")
    with pytest.raises(LayerValueError, match=r"(?s)doge.yaml:11: .*'input_residuals'.*holds: input_residual"):
        StandardizedTransformer(tiny_model("doge"), spec=path)
