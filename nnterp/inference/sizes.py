"""A model's sizes as they were seen, and where its config says them."""

from __future__ import annotations

from collections.abc import Sequence

from nnterp.inference.config_keys import ConfigKeys
from nnterp.inference.layer import LayerFinding
from nnterp.inference.probe import Attending, Probe
from nnterp.inference.skeleton import LayerList
from nnterp.inference.stream import hidden_size
from nnterp.spec import DimensionKeys

__all__ = ["find_sizes"]

#: For each dimension the words of which one is in the name of a key that holds it, the likeliest first, and words that
#: say that a key holds something else.
WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "num_layers": (("hidden_layers", "layers", "n_layer", "layer", "depth", "blocks"), ("head", "attn", "norm")),
    "num_heads": (("attention_heads", "heads", "n_head", "head"), ("kv", "key_value", "dim", "size", "ssm", "mamba")),
    "num_kv_heads": (("key_value_heads", "kv_heads", "kv_n_heads", "kv", "groups"), ("dim", "size", "rank", "lora")),
    "head_dim": (("head_dim", "head_size", "kv_channels", "d_head", "d_kv", "dim"), ("rope", "rotary", "index")),
    "hidden_size": (
        ("hidden_size", "d_model", "n_embd", "model_dim", "embed", "width", "dim"),
        ("head", "ffn", "inter"),
    ),
    "vocab_size": (("vocab_size", "vocab", "tokens"), ()),
}


def find_sizes(probe: Probe, layers: LayerList, findings: Sequence[LayerFinding], keys: ConfigKeys) -> dict[str, str]:
    """For each dimension the key of the config that holds it, or the number; those that the usual keys hold are left
    out."""
    seen = _seen(probe, layers, findings)
    found: dict[str, str] = {}
    for dimension, number in seen.items():
        if number is None:
            continue
        usual = next(
            (value for key in getattr(DimensionKeys(), dimension) if (value := keys.value(key)) is not None), None
        )
        key = keys.holding(number, *WORDS[dimension])
        # A decoder's config may have the usual names stand for its encoder's sizes.
        nearer = key is not None and "decoder" in key and "decoder" in layers.path
        if usual == number and not nearer:
            continue
        if usual is None and _follows(dimension, number, seen):
            continue
        found[dimension] = key or str(number)
    return found


def _follows(dimension: str, number: int, seen: dict[str, int | None]) -> bool:
    """Whether a dimension that no key holds comes out right all the same."""
    if dimension == "num_kv_heads":
        return number == seen["num_heads"]
    heads, hidden = seen["num_heads"], seen["hidden_size"]
    return dimension == "head_dim" and bool(heads) and bool(hidden) and number == hidden // heads  # type: ignore[operator]


def _seen(probe: Probe, layers: LayerList, findings: Sequence[LayerFinding]) -> dict[str, int | None]:
    part = next((part for finding in findings if (part := finding.part("attention")) is not None), None)
    patterns = part.module.patterns if part and part.module else []
    return {
        "num_layers": len(layers.calls),
        "num_heads": _heads(patterns),
        "num_kv_heads": next((each.kv_heads for each in patterns if each.kv_heads not in (None, each.heads)), None),
        "head_dim": next((each.head_dim for each in patterns if each.head_dim), None),
        "hidden_size": hidden_size(layers, findings),
        "vocab_size": None if probe.logits is None else probe.logits.shape[-1],
    }


def _heads(patterns: Sequence[Attending]) -> int | None:
    """How many heads there are: some models have a module for each."""
    if not patterns:
        return None
    return len(patterns) if all(each.heads == 1 for each in patterns) else max(each.heads for each in patterns)
