"""The accessors and checks that scripts import from `nnterp.rename_utils`, held against plain hooks."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import UnknownNameError, UsageError, ValidationError
from nnterp.rename_utils import (
    IOType,
    LayerAccessor,
    check_io,
    check_model_renaming,
    default_attn_head_config_keys,
    default_hidden_size_config_keys,
    default_vocab_size_config_keys,
)
from tests.families import tiny_inputs, tiny_model
from tests.matrix import hooks

#: For each name of a module in a layer what the model itself calls it.
PATHS = {
    "gpt2": {None: "", "self_attn": ".attn", "mlp": ".mlp", "mlp.c_proj": ".mlp.c_proj"},
    "llama": {None: "", "self_attn": ".self_attn", "mlp": ".mlp", "mlp.down_proj": ".mlp.down_proj"},
}
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}


@torch.no_grad()
@pytest.mark.parametrize("kind", IOType)
@pytest.mark.parametrize("model_type", PATHS)
def test_values_are_read_and_set_as_by_hooks(model_type: str, kind: IOType) -> None:
    module, ids = tiny_model(model_type), tiny_inputs()
    model = StandardizedTransformer(module)
    for name, path in PATHS[model_type].items():
        access = LayerAccessor(model, name, kind)
        place = (f"{LAYERS[model_type]}.1{path}", kind.value)
        given: list[object] = []
        with hooks.hooked(module, place, lambda value, given=given: given.append(type(value))):
            hooks.logits(module, ids)
        assert access.returns_tuple is None
        with model.trace(ids):
            seen = access[-2].save()
            called = access(1).save()
        assert torch.equal(seen, hooks.read(module, [place], ids)[place]) and torch.equal(seen, called)
        assert access.returns_tuple is (None if kind is IOType.INPUT else given[0] is tuple)
        with model.trace(ids):
            access[1] = access[1] * 2 + 0.1
            logits = model.logits.save()
        expected = hooks.changed_logits(module, place, lambda value: value * 2 + 0.1, ids)
        assert torch.equal(logits, expected) and not torch.equal(logits, hooks.logits(module, ids))


def test_without_a_side_it_gives_modules() -> None:
    module = tiny_model("gpt2")
    model = StandardizedTransformer(module)
    modules = LayerAccessor(model, "self_attn", None)
    assert modules[2]._module is modules.get_module(2)._module is module.transformer.h[2].attn
    with pytest.raises(TypeError, match=r"IOType\.INPUT"):
        modules[2] = torch.zeros(1)
    with pytest.raises(UnknownNameError, match="self_att"):
        LayerAccessor(model, "self_att", None).get_module(0)


def test_what_modules_take_and_give_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model("llama")
    model = StandardizedTransformer(module)
    check_io(model, "mine")
    handle = module.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output[:, :1])
    try:
        with pytest.raises(ValidationError, match=r"mlps_output\[1\]") as wrong:
            check_io(model, "mine")
        assert "'mine'" in str(wrong.value)
        check_io(model, "mine", ["mlp"])
        with pytest.raises(ValidationError, match=r"mlps_output\[1\]"):
            check_model_renaming(model, "mine", [], allow_dispatch=True)
    finally:
        handle.remove()


def test_all_promises_are_checked() -> None:
    module = tiny_model("llama")
    model = StandardizedTransformer(module)
    check_model_renaming(model, "mine", [], allow_dispatch=True)
    handle = module.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    try:
        check_io(model, "mine")
        with pytest.raises(ValidationError, match=r"layers_output\[0\] is layers_input\[1\]"):
            check_model_renaming(model, "mine", ["attention"], allow_dispatch=True)
    finally:
        handle.remove()
    with pytest.raises(UsageError, match=r"no part 'norm', but \['attention', 'mlp'\]"):
        check_io(model, "mine", ["norm"])


def test_config_keys_are_those_of_the_specifications() -> None:
    assert default_attn_head_config_keys()[0] == "num_attention_heads" and "n_head" in default_attn_head_config_keys()
    assert default_hidden_size_config_keys()[0] == "hidden_size" and "n_embd" in default_hidden_size_config_keys()
    assert default_vocab_size_config_keys()[0] == "vocab_size"
    keys = default_hidden_size_config_keys()
    assert len(keys) == len(set(keys)) and not any(key.isdecimal() for key in keys)
