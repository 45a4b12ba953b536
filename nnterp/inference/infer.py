"""From a model to the text of its specification: one probe, and each part of the text from what the probe saw."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch

from nnsight_core.devices import has_numbers
from nnterp.calling import config_of, evaluating
from nnterp.inference.config_keys import ConfigKeys
from nnterp.inference.errors import ProbeError
from nnterp.inference.layer import LayerFinding, examine_layer
from nnterp.inference.layers import LayersDescription, PartDescription, describe_layers
from nnterp.inference.numbers import alike
from nnterp.inference.probe import Probe, run_probe
from nnterp.inference.scales import find_scale, scale_between
from nnterp.inference.sizes import find_sizes
from nnterp.inference.skeleton import LayerList, Unembedding, find_embedding, find_layers, find_unembedding
from nnterp.inference.stand_in import with_numbers
from nnterp.inference.stream import find_axes
from nnterp.inference.writing import Findings, write_yaml
from nnterp.rename_plan import RenameConfig, as_list
from nnterp.spec import ArchitectureSpec, parse_spec

__all__ = ["infer_spec", "infer_yaml"]

#: What keys that hold such a number are called.
RESIDUAL = ("residual", "scale", "mult", "alpha", "beta")
EMBEDDING = ("emb", "scale", "mult", "hidden_size", "d_model")
LOGITS = ("logit", "lm_head", "scale", "mult", "dim")


def infer_spec(model: torch.nn.Module, user: RenameConfig | None = None) -> ArchitectureSpec:
    """The specification of a model, by its structure alone.

        infer_spec(model).layer.attention.module        # ('self_attn',)

    Raises `LayersNotFoundError` where the layers cannot be told from other modules.
    """
    return parse_spec(infer_yaml(model, user), f"<inferred from {type(model).__name__}>")


def infer_yaml(model: torch.nn.Module, user: RenameConfig | None = None) -> str:
    """The same as text: a whole YAML file."""
    return write_yaml(_findings(model, user or RenameConfig()))


def _findings(model: torch.nn.Module, user: RenameConfig) -> Findings:
    probe = _probed(model)
    layers = find_layers(probe, as_list(user.layers_name))
    with evaluating(probe.model):
        parts = [examine_layer(call) for call in layers.calls]
        description = describe_layers(parts)
        embedding = find_embedding(probe, layers)
        unembedding = find_unembedding(probe, layers)
    keys = ConfigKeys(config_of(model), near=layers.path)
    paths = {
        "embed_tokens": embedding[0].path if embedding else None,
        "layers": layers.path,
        "ln_final": unembedding.norm.path if unembedding.norm else None,
        "lm_head": unembedding.head.path if unembedding.head else None,
    }
    roles = {path: role for role, path in paths.items() if path}
    numbers, logits_fit = _numbers(probe, layers, embedding, unembedding, keys)
    return Findings(
        model_type=model_type(model),
        modules=paths,
        layers=description,
        embed=tuple(roles.get(call.path, call.path) for call in embedding),
        unembed=tuple(roles.get(call.path, call.path) for call in unembedding.chain),
        numbers=numbers,
        multipliers={kind: _multipliers(part, keys) for kind, part in description.parts.items()},
        stream=find_axes(layers, parts, embedding, keys),
        dimensions=find_sizes(probe, layers, parts, keys),
        positions_follow=_positions_follow(probe, model),
        written_over=_written_over(probe, layers, parts),
        absent=_absent(paths, description),
        cannot=_cannot(layers, description, unembedding, logits_fit),
    )


def _probed(model: torch.nn.Module) -> Probe:
    stand_in = with_numbers(model)
    try:
        return run_probe(stand_in)
    except ProbeError:
        if stand_in is model or not has_numbers(model):
            raise
        # Some models ask their config for the type of their numbers, and run in that one alone.
        return run_probe(model)


def _multipliers(part: PartDescription, keys: ConfigKeys) -> dict[str, str]:
    products = {
        "multiplier": keys.product(part.factor, RESIDUAL),
        "stream_multiplier": keys.product(part.stream_factor, RESIDUAL),
    }
    return {name: product for name, product in products.items() if product is not None}


def model_type(model: torch.nn.Module) -> str:
    """What a specification calls the model: its config's `model_type`, or its class in the same spelling."""
    named = getattr(config_of(model), "model_type", None)
    return str(named) if named else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(model).__name__).lower()


def _numbers(
    probe: Probe, layers: LayerList, embedding: Sequence[Any], unembedding: Unembedding, keys: ConfigKeys
) -> tuple[dict[str, str], bool]:
    """The products that stand outside of modules, and whether the logits are what the last module gave, by them."""
    numbers: dict[str, str | None] = {}
    start = layers.calls[0].given
    if embedding and start is not None:
        factor = scale_between(embedding[-1].made, start)
        numbers["embedding_multiplier"] = None if factor is None else keys.product(factor, EMBEDDING)
    last = unembedding.chain[-1] if unembedding.chain else unembedding.head
    if last is None or last.made is None or probe.logits is None:
        return {key: value for key, value in numbers.items() if value}, False
    scale = find_scale(last.made, probe.logits, keys)
    if scale is not None:
        numbers["logits.multiplier"] = keys.product(scale.factor * unembedding.factor, LOGITS)
        numbers["logits.softcap"] = scale.cap_key or (f"{scale.cap:.6g}" if scale.cap else None)
    return {key: value for key, value in numbers.items() if value}, scale is not None


def _written_over(probe: Probe, layers: LayerList, parts: Sequence[LayerFinding]) -> tuple[str, ...]:
    """The modules into whose output the model writes later on: in layers by their path from there."""
    inside: dict[str, None] = {}
    for finding in parts:
        below = [call for call in finding.flow.layer.inside() if call.is_overwritten]
        inside |= dict.fromkeys(finding.flow.relative(call) for call in below)
    outside = [call for call in probe.calls if call.is_overwritten]
    paths = {call.path for call in outside if not call.path.startswith(f"{layers.path}.")}
    return (*inside, *sorted(paths))


def _positions_follow(probe: Probe, model: torch.nn.Module) -> str | None:
    """The config key after whose value the model numbers positions, where it can be told the numbers."""
    pad = getattr(config_of(model), "pad_token_id", None)
    if not isinstance(pad, int) or "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    expected = torch.arange(pad + 1, pad + 1 + probe.ids.shape[1], device=probe.ids.device)
    for call in probe.calls:
        given = call.given
        is_table = given is not None and not given.is_floating_point() and isinstance(call.module, torch.nn.Embedding)
        if is_table and given is not None and given.shape[-1] == len(expected) and bool((given == expected).all()):
            return "pad_token_id"
    return None


def _absent(paths: dict[str, str | None], layers: LayersDescription) -> dict[str, str]:
    """Why what was not found was not found."""
    reasons = {
        "embed_tokens": "No module takes the token ids and gives vectors for them.",
        "ln_final": "Between the last layer and the head no norm runs.",
        "lm_head": "No module gives numbers for each word of the vocabulary.",
    }
    absent = {role: reason for role, reason in reasons.items() if paths[role] is None}
    if "attention" not in layers.parts:
        absent["attention"] = "No module of a layer makes an attention pattern."
    elif "attention" in layers.missing:
        absent["attention"] = "Some layers have another way of moving things between positions."
    if "mlp" not in layers.parts:
        absent["mlp"] = "No module of a layer works on each position alone and adds to the stream."
    elif "mlp" in layers.missing:
        absent["mlp"] = "Some layers have none."
    return absent


def _cannot(
    layers: LayerList, description: LayersDescription, unembedding: Unembedding, logits_fit: bool
) -> dict[str, str]:
    """Which promises do not hold, and what was seen instead."""
    cannot = {}
    handed = [alike(one.made, other.given) for one, other in zip(layers.calls, layers.calls[1:], strict=False)]
    if not all(handed):
        cannot["chain"] = f"Something happens to the stream between layer {handed.index(False)} and the next one."
    if not description.adds_up:
        cannot["contributions"] = "What the modules of a layer give does not add up to what the layer changes."
    if not unembedding.chain or not logits_fit:
        cannot["project_on_vocab"] = "The logits are made of more than modules give that take the last layer's output."
    return cannot
