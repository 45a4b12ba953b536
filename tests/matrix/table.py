"""docs/families.md: what each family is made of and what it promises, from the specifications and the matrix.

    python -m tests.matrix.table          # run the whole matrix, write results.json and docs/families.md

The tests hold that ``results.json`` is what the matrix sees, and that the document is what these two make.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from nnterp.architectures import load_specs
from nnterp.spec import ArchitectureSpec
from nnterp.spec_layer import KINDS
from tests.matrix import attention, experts, heads, norms, rotations, states
from tests.matrix.models import HERE, MODEL_TYPES, Case, read_json
from tests.matrix.promises import PROMISES, restored

DOCUMENT = HERE.parent.parent / "docs" / "families.md"
#: Other sizes: the model type, and what is said otherwise than in ``configs.json``.
SIZES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 1, "num_attention_heads": 8, "hidden_size": 96, "head_dim": 12}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "num_hidden_layers": 3, "head_dim": 32}),
    ("mistral", {"num_key_value_heads": 1, "hidden_size": 48, "head_dim": 8, "intermediate_size": 80}),
    ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
    ("gemma2", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "final_logit_softcapping": 2.0}),
    ("gpt2", {"n_embd": 48, "n_head": 6, "tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", {"_remove_final_layer_norm": True, "hidden_size": 48, "word_embed_proj_dim": 48, "num_attention_heads": 6}),
    ("phi", {"num_key_value_heads": 1, "qk_layernorm": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    ("afmoe", {"mup_enabled": False}),
    ("gpt_bigcode", {"multi_query": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("stablelm", {"use_parallel_residual": True}),
    ("mixtral", {"num_key_value_heads": 4, "num_local_experts": 3}),
    ("granite", {"residual_multiplier": 0.22, "logits_scaling": 8.0, "tie_word_embeddings": True}),
    ("cohere", {"logit_scale": 0.5, "tie_word_embeddings": False}),
    ("jamba", {"num_key_value_heads": 1, "hidden_size": 32}),
    ("bart", {"d_model": 48, "decoder_attention_heads": 6, "encoder_attention_heads": 2}),
    ("electra", {"embedding_size": 32}),
    ("bert", {"hidden_size": 96, "num_attention_heads": 6}),
    ("mamba", {"hidden_size": 48}),
    ("mpt", {"d_model": 96, "n_heads": 6}),
    ("hyperclovax", {"use_post_norm": False}),
    ("granitemoehybrid", {"num_local_experts": 0}),
]
#: What ``modules.json`` would have to say of these.
FACTS: dict[str, dict[str, Any]] = {
    "opt-False-32": {"embedding": "model.decoder.project_in"},
    "electra-32": {"embedding": "electra.embeddings_project"},
    "granitemoehybrid-0": {"mlp": ["shared_mlp", "shared_mlp"]},
}


def size_id(row: tuple[str, dict[str, Any]]) -> str:
    """What a row of `SIZES` is called."""
    return "-".join(map(str, (row[0], *row[1].values())))


def results() -> dict[str, dict[str, str]]:
    """For each model type and promise ``holds``, ``cannot``, or ``absent`` where no layer has the part."""
    return read_json("results.json")


def outcome(case: Case) -> tuple[dict[str, str], list[str]]:
    """What comes of every promise on one model, and a line for each that is broken.

    A promise that cannot hold is tried all the same: a reason that has become untrue is to go.
    """
    found: dict[str, str] = {}
    broken: list[str] = []
    for name, promise in PROMISES.items():
        cannot = name in case.spec.cannot or name in case.cannot
        try:
            promise(case)
        except Exception as error:  # noqa: BLE001 - whatever a broken promise raises belongs into the table
            found[name] = "cannot"
            if not cannot:
                broken.append(f"{name}: {type(error).__name__}: {error}")
        else:
            found[name] = "holds" if _has(case, name) else "absent"
            if cannot:
                broken.append(f"{name}: holds, though {_said(case, name)} says that it cannot")
    try:
        restored(case)
    except AssertionError as error:
        broken.append(f"restored: {error}")
    return found, broken


def _said(case: Case, promise: str) -> str:
    return "older.json" if promise in case.cannot else case.spec.where(f"cannot.{promise}")


def _has(case: Case, name: str) -> bool:
    kinds = (norms, heads, rotations, experts, states, attention)
    present = {name: has for kind in kinds for name, has in kind.PRESENT.items()}
    if name in present:
        return present[name](case)
    part = {"attentions": "attn", "mlps": "mlp"}.get(name)
    return part is None or any(each[part] for each in case.facts["parts"])


def _run(model_type: str) -> tuple[str, dict[str, str], list[str]]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found, broken = outcome(Case(model_type))
    return model_type, found, broken


HEADINGS = {
    "layers": "layers",
    "attentions": "attn",
    "mlps": "mlp",
    "mixers": "mixer",
    "token_embeddings": "embed",
    "logits": "logits",
    "chain": "chain",
    "contributions": "sum",
    "project_on_vocab": "lens",
    "steer": "steer",
    "skip": "skip",
    "generate": "gen",
    "cache": "cache",
    "gradients": "grad",
    "padding": "pad",
    "invokes": "batch",
    "final_norm": "final norm",
    "norm_scales": "scales",
    "unembedding_directions": "directions",
    "heads_contribution": "head sums",
    "queries_pre_rope": "q pre rope",
    "keys_pre_rope": "k pre rope",
    "router_logits": "router",
    "expert_indices": "indices",
    "expert_weights": "weights",
    "experts_output": "experts",
    "mixers_state": "state",
    "queries": "queries",
    "keys": "keys",
    "values": "values",
    "attention_scores": "attn scores",
    "attention_probabilities": "attn probs",
    "heads_output": "heads",
}
SIGNS = {"holds": "+", "absent": ".", "cannot": "no"}

HEAD = """\
# Families

Every model type that `AutoModelForCausalLM` of transformers knows and that runs on a CPU, what it is made of and what
is promised of it. This file is made by `python -m tests.matrix.table` from the specifications in `architectures/` and
from what `tests/matrix/` sees when it runs a tiny random model of each type; do not edit it.

`+` the promise holds, `.` the family has no such part, `no` it cannot hold: the reason is below the table, and what is
asked for raises an error that gives it.

| | promise |
|---|---|
| layers, attn, mlp, mixer | `layers_input/_output` and their kin read what plain hooks read, bit for bit |
| | what is written gives the logits that hooks give; writing back what was read changes nothing |
| embed, logits | the same for `token_embeddings` and `logits` |
| chain | each layer's output is the next one's input |
| sum | a layer's input and what its parts contribute make its output |
| lens | `project_on_vocab` of the last layer's output gives the logits |
| steer, skip | `steer` and `skip_layer` give the logits that hooks give |
| gen | a generation that is steered at each step gives the tokens that hooks give |
| cache | `tracer.cache` finds a layer under its own name and the standard ones |
| grad | the gradient of a layer's output is the one that plain autograd gives |
| pad | prompts of several lengths in one batch give what each gives alone |
| batch | of several invokes in one pass each reads and changes what is its own |
| final norm | `apply_ln_to_stack` of parts adds up to what the norm gives, and is its derivative where scales rest |
| scales | `mlps_norm_scale` and its kin are what norms divide by; what is set gives the logits that hooks give |
| directions | what the final norm gives, times `unembedding_directions`, makes the logits |
| head sums | `heads_contribution` is what hooks on the output projection give head by head, and adds up to it; |
| | a head that is set to 0 is gone from the logits and from no other head |
| q, k pre rope | `queries_pre_rope` and `keys_pre_rope` are what the model's own function is given to rotate, |
| | and it rotates what is set; a layer that rotates nothing says so |
| router, indices, | `router_logits`, `expert_indices`, `expert_weights` and `experts_output` read what hooks on both |
| weights, experts | modules read, each input its own rows; what is set gives the logits that hooks give |
| state | `mixers_state` is what the model itself keeps for the next token, after each step of a generation |
| queries, keys, | `queries`, `keys`, `values` and `heads_output` are what attention that is written out by hand has; |
| values, heads | what is set gives its logits, and leaves other heads as they are to the bit |
| attn scores, | the same for `attention_scores` and `attention_probabilities`; these add up to 1, are 0 where masked, |
| attn probs | weigh `values` to `heads_output`, and are the family's eager weights |
| | and for each input of a batch; the next step goes on from what is set |

In all of them, the model afterwards is what it was, to the bit, and no hook is left on it.

"""


def layout(spec: ArchitectureSpec) -> str:
    """How the family's layers are put together, in a few words."""
    parts = [part for part in (*spec.layer.mixers().values(), spec.layer.mlp) if part]
    norms = []
    if any(part.sum_norm for part in parts):
        norms.append("post norm")
    elif any(part.stream and not part.norm for part in parts):
        norms.append("normed stream")
    elif any(part.contribution and "norm" in part.contribution[0] for part in parts):
        norms.append("sandwich norm" if any(part.norm for part in parts) else "output norm")
    else:
        norms.append("pre norm")
    kinds = [kind.replace("_", " ") for kind in KINDS if getattr(spec.layer, kind)]
    more = ["experts"] if spec.layer.router else []
    more += ["scaled"] if any(part.multiplier for part in parts) or spec.logits.multiplier else []
    more += ["soft cap"] if spec.logits.softcap else []
    return ", ".join([spec.layout, *norms, " or ".join(kinds), *more])


def render(found: dict[str, dict[str, str]]) -> str:
    """The document."""
    specs = load_specs()
    by_file: dict[str, list[str]] = {}
    for model_type in found:
        by_file.setdefault(specs[model_type].family, []).append(model_type)
    lines = [HEAD + "| family | model types | layout | " + " | ".join(HEADINGS.values()) + " |"]
    lines.append("|---" * (3 + len(HEADINGS)) + "|")
    reasons: dict[str, dict[tuple[str, str], list[str]]] = {}
    for family in sorted(by_file):
        rows: dict[tuple[str, ...], list[str]] = {}
        for model_type in by_file[family]:
            rows.setdefault(tuple(found[model_type][name] for name in HEADINGS), []).append(model_type)
        for signs, model_types in rows.items():
            spec = specs[model_types[0]]
            cells = [SIGNS[each] for each in signs]
            types = ", ".join(f"`{each}`" for each in model_types)
            lines.append(
                f"| [{family}](../architectures/{family}.yaml) | {types} | {layout(spec)} | {' | '.join(cells)} |"
            )
    counts = [sum(row[name] == "holds" for row in found.values()) for name in HEADINGS]
    lines.append(f"| **{len(by_file)} files** | **{len(found)} types** | holds for | {' | '.join(map(str, counts))} |")
    reasons = {}
    for model_type, row in found.items():
        spec = specs[model_type]
        resolved = _resolved(model_type, spec)
        by_reason: dict[str, list[str]] = {}
        for name, sign in row.items():
            if sign == "cannot":
                reason = resolved.cannot[name]
                by_reason.setdefault(reason[0].upper() + reason[1:], []).append(HEADINGS[name])
        for reason, names in by_reason.items():
            reasons.setdefault(spec.family, {}).setdefault((", ".join(names), reason), []).append(model_type)
    lines.append("\n## What cannot hold, and why\n")
    for family in sorted(reasons):
        for (name, reason), model_types in reasons[family].items():
            lines.append(f"- {', '.join(f'`{each}`' for each in model_types)}, {name}: {reason}")
    return "\n".join(lines) + "\n"


def _resolved(model_type: str, spec: ArchitectureSpec) -> ArchitectureSpec:
    return spec.for_config({**read_json("configs.json")[model_type], "model_type": model_type})


def main(model_types: Iterable[str] = MODEL_TYPES) -> int:
    """Run the matrix in as many processes as there are cores, and write what came of it."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(_run, model_types))
    for model_type, _, broken in rows:
        for line in broken:
            sys.stderr.write(f"{model_type}: {line}\n")
    found = {model_type: row for model_type, row, _ in rows}
    lines = [f"{json.dumps(model_type)}: {json.dumps(row)}" for model_type, row in found.items()]
    (HERE / "results.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    DOCUMENT.write_text(render(found), encoding="utf-8")
    return 1 if any(broken for _, _, broken in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
