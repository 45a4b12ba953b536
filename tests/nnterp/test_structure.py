"""Models of nobody's making: modules without a config, folders with code of their own, models without numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnsight_core.input_errors import InputError
from nnterp import RenameConfig, StandardizedTransformer
from nnterp.errors import CannotError, ModulePathError, UnknownArchitectureError
from nnterp.inference import infer_spec, infer_yaml
from nnterp.inference.config_keys import ConfigKeys
from nnterp.inference.errors import LayersNotFoundError, ProbeError
from nnterp.inference.numbers import alike, factors, is_norm, sums_to
from nnterp.inference.scales import find_scale
from nnterp.naming import name_modules
from nnterp.spec import parse_spec
from tests import oracle
from tests.nnterp.handmade import Handmade, handmade

IDS = torch.tensor([[5, 7, 9, 11], [6, 8, 10, 12]])


def test_a_handmade_module_has_the_standard_names() -> None:
    model = StandardizedTransformer(module := handmade())
    sizes = (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim, model.hidden_size, model.vocab_size)
    assert sizes == (3, 3, 3, 8, 24, 101)
    spots = [
        ("stages.1.looking", "output"),
        ("stages.1.thinking", "output"),
        ("stages.2", "output"),
        ("words", "output"),
    ]
    with torch.no_grad():
        seen = oracle.read(module, spots, IDS)
        expected = oracle.write(module, {("stages.2", "output"): lambda value: value * 2}, IDS)[0]
        with model.trace(IDS):
            ids, embeddings = model.input_ids, model.token_embeddings.save()
            attention, mlp = model.attentions_output[1].save(), model.mlps_output[1].save()
            hidden = model.layers_output[2].save()
            model.layers_output[2] = hidden * 2
            logits = model.logits.save()
    values = (attention, mlp, hidden, embeddings)
    assert all(torch.equal(value, seen[spot]) for value, spot in zip(values, spots, strict=True))
    assert torch.equal(logits, expected) and torch.equal(ids, IDS)


def test_invokes_of_a_handmade_module() -> None:
    model = StandardizedTransformer(module := handmade())
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS[0]):
            first = model.layers_output[0].save()
            assert torch.equal(model.input_ids, IDS[:1])
        with tracer.invoke(IDS[1].tolist()):
            model.layers_output[1] += first
            logits = model.logits.save()
    with torch.no_grad():
        expected = oracle.write(module, {("stages.1", "output"): lambda value: value + first}, IDS[1:])[0]
    torch.testing.assert_close(logits, expected)


def test_what_a_handmade_module_cannot_do_is_said() -> None:
    model = StandardizedTransformer(handmade())
    with pytest.raises(InputError, match=r"no method `generate`"), model.generate(IDS, max_new_tokens=2):
        pass
    with pytest.raises(InputError, match=r"no attention_mask.*same length"), model.trace([[5, 6, 7], [8]]):
        pass


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"parallel": True}, "layout: parallel"),
        ({"factor": 0.25}, "attention: {module: looking, norm: one, multiplier: 0.25}"),
        ({"cap": 2.5}, "softcap: 2.5"),
        ({"stages": 1}, "num_layers: 1"),
        ({"width": 20, "heads": 5}, "num_heads: 5"),
    ],
)
def test_the_yaml_says_what_the_numbers_show(options: dict[str, Any], line: str) -> None:
    model = handmade(**options)
    assert line in infer_yaml(model)
    # The promises are held against the model by numbers.
    StandardizedTransformer(model)


def test_the_yaml_is_a_file_like_any_other(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(infer_yaml(model := handmade(cap=3.0)), encoding="utf-8")
    assert parse_spec(own.read_text(encoding="utf-8"), "mine.yaml") == infer_spec(model)
    opened = StandardizedTransformer(model, spec=own)
    assert opened.attentions[0].path == "stages.0.looking"


def test_sizes_are_found_in_a_config_of_ones_own() -> None:
    model = handmade()
    model.config = SimpleNamespace(depth=3, head_count=3, width=24, words=101, vocab=101)
    text = infer_yaml(model)
    assert "num_layers: depth" in text and "num_heads: head_count" in text and "vocab_size: vocab" in text
    assert StandardizedTransformer(model).hidden_size == 24


def test_a_model_without_numbers_has_the_same_structure() -> None:
    with torch.device("meta"):
        empty = Handmade(parallel=True)
    assert infer_yaml(empty) == infer_yaml(handmade(parallel=True))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = handmade().train()
    model.stages[0].eval()
    infer_spec(model)
    assert model.training and not model.stages[0].training and model.stages[1].training


class Trap(torch.nn.Module):
    def forward(self, tokens):
        raise RuntimeError("the fuse has blown")


def test_a_model_that_cannot_be_run() -> None:
    with pytest.raises(ProbeError, match=r"(?s)Trap.*RuntimeError: the fuse has blown.*spec='my_model\.yaml'"):
        StandardizedTransformer(Trap())


def test_a_model_without_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 100))
    with pytest.raises(LayersNotFoundError, match=r"(?s)its layers cannot be told.*lists seen.*layers_name"):
        StandardizedTransformer(model)
    assert issubclass(LayersNotFoundError, UnknownArchitectureError)


def test_the_users_names_win_over_the_structure() -> None:
    model = handmade()
    config = RenameConfig(layers_name="stages", attn_name="thinking", mlp_name="looking", attn_head_config_key=6)
    opened = StandardizedTransformer(model, rename_config=config, check_renaming=False)
    assert opened.attentions[1].path == "stages.1.thinking" and opened.mlps[1].path == "stages.1.looking"
    assert opened.num_heads == 6
    extra = StandardizedTransformer(model, rename={"looking": "eyes"})
    assert extra.get("stages.0.eyes").path == "stages.0.looking"


def test_users_names_that_are_not_there() -> None:
    with pytest.raises(LayersNotFoundError, match="the list 'steps'"):
        StandardizedTransformer(handmade(), rename_config=RenameConfig(layers_name="steps"))
    with pytest.raises(ModulePathError, match=r"(?s)lookin.*nearest.*looking"):
        StandardizedTransformer(handmade(), rename_config=RenameConfig(attn_name="lookin"))


class Mute(Handmade):
    """Takes numbers where others take tokens."""

    def forward(self, tokens):
        x = torch.nn.functional.one_hot(tokens, 24 * 5)[..., :24].float() + self.places.weight[: tokens.shape[1]]
        for stage in self.stages:
            x = stage(x)
        return self.speak(self.last(x))


def test_what_was_not_found_is_null_with_its_reason() -> None:
    model = StandardizedTransformer(Mute())
    text = infer_yaml(Mute())
    assert "embed_tokens: null" in text and 'embed_tokens: "No module takes the token ids' in text
    with pytest.raises(CannotError, match="token_embeddings cannot be had"), model.trace(IDS):
        _ = model.token_embeddings


CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class OddConfig(PretrainedConfig):
    model_type = "odd"
    def __init__(self, breadth=16, rounds=2, **kwargs):
        self.breadth, self.rounds, self.num_hidden_layers = breadth, rounds, rounds
        super().__init__(**kwargs)

class Step(nn.Module):
    def __init__(self, breadth):
        super().__init__()
        self.pool = nn.MultiheadAttention(breadth, 2, batch_first=True)
        self.calm = nn.LayerNorm(breadth)
        self.work = nn.Sequential(nn.Linear(breadth, 32), nn.ReLU(), nn.Linear(32, breadth))
        self.rest = nn.LayerNorm(breadth)
    def forward(self, x):
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        calm = self.calm(x)
        x = x + self.pool(calm, calm, calm, attn_mask=ahead, need_weights=False)[0]
        return x + self.work(self.rest(x))

class OddModel(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    _supports_sdpa = True
    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(320, config.breadth)
        self.steps = nn.ModuleList(Step(config.breadth) for _ in range(config.rounds))
        self.end, self.voice = nn.LayerNorm(config.breadth), nn.Linear(config.breadth, 320, bias=False)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        x = self.table(input_ids)
        for step in self.steps:
            x = step(x)
        return CausalLMOutput(logits=self.voice(self.end(x)))
"""


@pytest.fixture
def folder_with_code(tmp_path: Path) -> Any:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "modeling_odd.py").write_text(CODE, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "modeling_odd"}
    before = set(sys.modules)
    exec(compile(CODE, "modeling_odd.py", "exec"), names)
    torch.manual_seed(0)
    names["OddModel"](names["OddConfig"]()).save_pretrained(folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    auto = '"auto_map": {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"},'
    (folder / "config.json").write_text(config.replace("{", "{" + auto, 1), encoding="utf-8")
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def test_a_folder_with_code_of_its_own(folder_with_code: Path) -> None:
    model = StandardizedTransformer(folder_with_code, trust_remote_code=True)
    assert model.attentions[1].path == "steps.1.pool" and model.mlps[0].path == "steps.0.work"
    assert (model.num_layers, model.num_heads, model.hidden_size) == (2, 2, 16)
    with torch.no_grad(), model.trace(IDS):
        hidden = model.layers_output[-1].save()
        logits = model.logits.save()
    torch.testing.assert_close(model.project_on_vocab(hidden), logits)


def test_numbers_are_told_apart_from_chance() -> None:
    one, two = torch.randn(2, 11, 16), torch.randn(2, 11, 16)
    assert alike(one.reshape(22, 16), one) and alike(one.transpose(0, 1), one) and not alike(one, two)
    assert not alike(one, one + 1e-3 * two)
    assert sums_to(one + two, one, two) and not sums_to(one + 1.001 * two, one, two)
    assert factors(one + 0.3 * two, one, two) == pytest.approx((1.0, 0.3), rel=1e-5)
    assert factors(torch.randn(2, 11, 16), one, two) is None
    half = (one.bfloat16() + two.bfloat16()), one.bfloat16(), two.bfloat16()
    assert sums_to(*half) and not sums_to(half[0], half[1])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (torch.nn.LayerNorm(16), True),
        (torch.nn.RMSNorm(16), True),
        (torch.nn.Linear(16, 16), False),
        (torch.nn.ReLU(), False),
        (torch.nn.Dropout(), False),
        (torch.nn.Sigmoid(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_are_told_by_what_they_do(module: torch.nn.Module, expected: bool) -> None:
    given = torch.randn(2, 11, 16)
    assert is_norm(module.eval(), given, (given,), {}) is expected


def test_scales_and_caps_of_logits() -> None:
    before, keys = torch.randn(2, 11, 50) * 5, ConfigKeys(SimpleNamespace(final_cap=30.0, logit_scale=0.0625))
    found = find_scale(before, 30 * torch.tanh(before / 30), keys)
    assert found is not None and (found.factor, found.cap_key) == (1.0, "final_cap")
    found = find_scale(before, before * 0.0625, keys)
    assert found is not None and keys.product(found.factor, ("logit",)) == "logit_scale"
    found = find_scale(before, 7 * torch.tanh(before / 7), ConfigKeys(None))
    assert found is not None and found.cap == pytest.approx(7, rel=1e-3) and found.cap_key is None
    assert find_scale(before, before.relu(), keys) is None


def test_keys_are_found_by_value_and_then_by_name() -> None:
    nested = SimpleNamespace(num_hidden_layers=4, decoder_layers=4, text_config=SimpleNamespace(n_head=4, n_embd=12))
    keys = ConfigKeys(nested, near="model.decoder.layers")
    assert keys.holding(4, ("layers",)) == "decoder_layers"
    assert keys.holding(4, ("head",)) == "text_config.n_head"
    assert keys.holding(5, ("head",)) is None
    assert keys.product(1.0, ("scale",)) is None and keys.product(0.3, ("scale",)) == "0.3"
    assert ConfigKeys(SimpleNamespace(scale=1.4, num_hidden_layers=4)).product(0.7, ("scale",)) == (
        "scale / sqrt(num_hidden_layers)"
    )


def test_structure_is_asked_only_where_no_file_serves(demo_gpt2: StandardizedTransformer) -> None:
    assert not name_modules(demo_gpt2._module).spec.source.startswith("<inferred")
