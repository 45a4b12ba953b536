"""The inside of attention is the same under every implementation that a family takes.

A dozen families, chosen for what is otherwise in them, under each implementation that is not their own choice.
"""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.attention import ClosedAttentionError
from tests.matrix.attention import NAMES
from tests.matrix.implementations import MORE, agrees
from tests.matrix.models import OLDER, tiny_model

#: Families, and what of the inside of their attention they do not have.
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": (),
    "gemma2": (),  # scores that are capped, and sliding windows
    "mistral": (),  # sliding windows
    "cohere2": (),  # layers that rotate and layers that do not
    "deepseek_v3": ("keys_pre_rope",),  # latent attention
    "gpt_neox": (),  # one map for queries, keys and values
    "phi3": (),  # likewise, with shared keys
    "opt": ("queries_pre_rope", "keys_pre_rope"),  # learnt positions
    "whisper": ("queries_pre_rope", "keys_pre_rope"),  # a decoder alone
    "bert": ("queries_pre_rope", "keys_pre_rope"),
    "qwen3_moe": (),  # norms of queries and keys
}
#: Families that take no flex attention, or not on a CPU.
EAGER_ALONE: dict[str, tuple[str, ...]] = {
    "falcon": (),  # one head of keys for all
    "gpt_bigcode": ("queries_pre_rope", "keys_pre_rope"),  # likewise
    "jamba": ("queries_pre_rope", "keys_pre_rope"),  # attention in some layers
    "gpt2": ("queries_pre_rope", "keys_pre_rope"),
}
ROWS = [(each, "flex_attention") for each in FAMILIES] + [(each, "eager") for each in {**FAMILIES, **EAGER_ALONE}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(bool(OLDER), reason="which implementations a family takes is that of transformers 5")
@pytest.mark.parametrize(("model_type", "implementation"), ROWS)
def test_the_inside_of_attention_is_the_same(model_type: str, implementation: str) -> None:
    without = {**FAMILIES, **EAGER_ALONE}[model_type]
    # The compiler would take far longer than all the rest; that it changes nothing is tested with the kernel.
    with torch.compiler.set_stance("force_eager"):
        assert {*agrees(model_type, implementation), *without} == {*NAMES, *MORE}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(bool(OLDER), reason="which implementations a family takes is that of transformers 5")
def test_sinks_that_come_after_the_kernel_are_no_part_of_what_it_shows() -> None:
    # On a CPU transformers refuses to run it, so nothing can be checked at loading.
    model = StandardizedTransformer(tiny_model("gpt_oss", "flex_attention"), check_renaming=False)
    for name in ("attention_scores", "attention_probabilities", "heads_output"):
        with pytest.raises(ClosedAttentionError, match=r"without the sinks .* attn_implementation='eager'"):
            getattr(model, name).place(1)
    assert model.queries.is_open(1) and model.values.is_open(1)
