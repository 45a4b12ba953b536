"""Patchscopes: a hidden state of one prompt, put into another prompt that makes the model say what it stands for.

patchscope_lens(model, "The Eiffel Tower is in the city of")                 # probabilities, (prompt, layer, vocab)
patchscope_generate(model, prompts, repeat_prompt(), max_length=5)           # what the model writes, by layer
patch_object_attn_lens(model, "Paris", "Rome is lovely", attn_idx_patch=0)   # attention reads another prompt's token

From Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language
Models" (https://arxiv.org/abs/2401.06102). Targets are made in :mod:`nnterp.interventions.target_prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from nnsight_core.errors import RemoteError
from nnterp.errors import PositionError, UsageError
from nnterp.interventions.batching import as_prompts, in_batches
from nnterp.interventions.target_prompts import (
    TargetPrompt,
    TargetPromptBatch,
    TargetPromptError,
    repeat_prompt,
)
from nnterp.nnsight_utils import collect_token_activations_batched

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["patch_object_attn_lens", "patchscope_generate", "patchscope_lens"]

BATCH_SIZE = 32


class _Patch(NamedTuple):
    """One row of a batch: a target prompt in which one layer's output is another one at one token."""

    layer: int
    latent: torch.Tensor
    target: TargetPrompt


def patchscope_lens(
    nn_model: StandardizedTransformer,
    source_prompts: Sequence[str] | str | None = None,
    target_patch_prompts: TargetPromptBatch | Sequence[TargetPrompt] | TargetPrompt | None = None,
    layers: int | Sequence[int] | None = None,
    latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
    remote: bool = False,
    *,
    target_layers: int | Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> torch.Tensor:
    """What comes next in a target prompt when one of its tokens has a source prompt's hidden state after a layer.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> target = TargetPrompt("The capital of Japan is", -1)
    >>> probs = patchscope_lens(model, ["The capital of France is", "The capital of Italy is"], target)
    >>> probs.shape == (2, model.num_layers, model.vocab_size)
    True
    >>> [model.token_text(token) for token in probs[:, -1].argmax(-1)]    # the last layer alone decides what is said
    [' Paris', ' Rome']

    For each layer, the hidden state after it at the last token of each source prompt takes the place of the target
    prompt's, after the same layer or after one of ``target_layers``. Layers and prompts are rows of a batch, with a
    progress bar on stderr if that takes a while. No gradients are kept.

    Args:
        nn_model: the model.
        source_prompts: whose last tokens' hidden states are put.
        target_patch_prompts: the prompts that they are put into: one for all sources, or one for each;
            :func:`~nnterp.interventions.repeat_prompt` if None.
        layers: after which layers, in the order of the result; all if None.
        latents: the hidden states themselves, instead of ``source_prompts``: (layer, source, hidden), one for each of
            ``layers``, or one for each layer of the model, of which those of ``layers`` are taken.
        remote: not available.
        target_layers: after which layers of the target prompts they are put, one for each of ``layers`` or one for all;
            ``layers`` if None.
        batch_size: how many rows go through the model at once.

    Returns:
        probabilities of shape (source, layer, vocab), float32 on the CPU.

    Raises:
        RemoteError: ``remote`` is set.
        TargetPromptError: sources and targets are not as many, or it is not clear what is to be put.
        PositionError: a target prompt has no such token.
        LayerIndexError: the model has no such layer.
    """
    if remote:
        raise RemoteError()
    wanted = _layers(nn_model, layers)
    values = _sources(nn_model, source_prompts, latents, wanted, batch_size)
    into = _layers(nn_model, layers if target_layers is None else target_layers)
    patches = _patches(values, into, repeat_prompt() if target_patch_prompts is None else target_patch_prompts)
    found = []
    for batch in in_batches(patches, batch_size, "patchscope"):
        with torch.no_grad(), nn_model.trace([each.target.prompt for each in batch]):
            _put(nn_model, batch)
            found.append(_next_probs(nn_model))
    return _by_prompt(found, len(wanted))


def patchscope_generate(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str] | str,
    target_patch_prompt: TargetPrompt,
    max_length: int = 50,
    layers: int | Sequence[int] | None = None,
    remote: bool = False,
    max_batch_size: int = BATCH_SIZE,
    **generation: Any,
) -> dict[int, torch.Tensor]:
    """What the model writes after a target prompt when one token of it has a source prompt's hidden state.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> target = TargetPrompt("The capital of Japan is", -1)
    >>> written = patchscope_generate(model, "The capital of France is", target, max_length=1, layers=[-1])
    >>> model.tokenizer.decode(written[model.num_layers - 1][0])
    'The capital of Japan is Paris'

    The hidden state is put while the target prompt is read; what is written follows from it.

    Args:
        nn_model: the model.
        prompts: whose last tokens' hidden states are put.
        target_patch_prompt: the prompt that they are put into, and where.
        max_length: how many tokens are written at most.
        layers: after which layers; all if None. Negative ones count from the last.
        remote: not available.
        max_batch_size: how many texts are written at once.
        generation: how to write, as for ``model.generate``: ``do_sample=False``, ...

    Returns:
        for each layer, counted from 0, token ids of shape (prompt, position) on the CPU: the target prompt and what was
        written, filled up with the padding token where a text ended sooner than the longest of its layer.

    Raises:
        RemoteError: ``remote`` is set.
        PositionError: the target prompt has no such token.
        LayerIndexError: the model has no such layer.
        CannotError: the family cannot generate.
        UsageError: ``generation`` asks for something else than one text for each prompt.
    """
    if remote:
        raise RemoteError()
    options = {"max_new_tokens": max_length, **generation}
    wanted = list(dict.fromkeys(_layers(nn_model, layers)))
    values = _sources(nn_model, prompts, None, wanted, max_batch_size)
    sources = values.shape[1]
    patches = _patches(values, wanted, target_patch_prompt)
    rows: list[torch.Tensor] = []
    for batch in in_batches(patches, max_batch_size, "patchscope"):
        with torch.no_grad(), nn_model.generate([each.target.prompt for each in batch], **options):
            _put(nn_model, batch)
            written = nn_model.generator.output.save()
        rows.extend(_rows(written.value, len(batch)))
    filler = _filler(nn_model, generation)
    texts = zip(*[iter(rows)] * sources, strict=True)
    return {layer: pad_sequence(list(each), True, filler) for layer, each in zip(wanted, texts, strict=True)}


def patch_object_attn_lens(
    nn_model: StandardizedTransformer,
    source_prompts: Sequence[str] | str,
    target_prompts: Sequence[str] | str,
    attn_idx_patch: int,
    num_patches: int = 5,
    *,
    batch_size: int = BATCH_SIZE,
) -> torch.Tensor:
    """What comes next in target prompts when attention finds a source prompt's last token at one of their tokens.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> probs = patch_object_attn_lens(model, "The capital of France", "The capital of Japan is", attn_idx_patch=3)
    >>> probs.shape == (1, model.num_layers, model.vocab_size)
    True

    In a window of ``num_patches`` layers, what attention reads at one token of the target is what it reads at the last
    token of the source, so that its keys and values there are those of the source's hidden state. One window begins at
    each layer; those at the end are cut off by the last layer. Where a layer in the window has no attention, nothing is
    put in it.

    Args:
        nn_model: the model.
        source_prompts: whose last tokens are read: one for all targets, or one for each.
        target_prompts: which go on.
        attn_idx_patch: the token of each target prompt, by its own tokens, whatever the padding; those that the
            tokenizer adds at the start count. Negative ones count from the end.
        num_patches: how many layers a window has.
        batch_size: how many rows go through the model at once.

    Returns:
        probabilities of shape (target, first layer of the window, vocab), float32 on the CPU.

    Raises:
        TargetPromptError: sources and targets are not as many.
        PositionError: a target prompt has no such token.
        MissingPartError: no layer of the model has attention.
        UsageError: a window of no layer.
    """
    if num_patches < 1:
        raise UsageError(f"num_patches={num_patches} leaves no layer to put anything in: give 1 or more.")
    sources, targets = as_prompts(source_prompts, "source"), as_prompts(target_prompts, "target")
    if len(sources) not in (1, len(targets)):
        raise TargetPromptError(
            f"There are {len(sources)} source and {len(targets)} target prompts: give as many, or a single source."
        )
    layers, values = _attention_inputs(nn_model, sources, len(targets), batch_size)
    rows = [(start, number) for start in range(nn_model.num_layers) for number in range(len(targets))]
    found = []
    for batch in in_batches(rows, batch_size, "attention lens"):
        batch_targets = [TargetPrompt(targets[number], attn_idx_patch) for _, number in batch]
        with torch.no_grad(), nn_model.trace([each.prompt for each in batch_targets]):
            columns = _columns(nn_model, batch_targets)
            for index, layer in enumerate(layers):
                inside = [row for row, (start, _) in enumerate(batch) if start <= layer < start + num_patches]
                latents = [values[index, batch[row][1]] for row in inside]
                _write(nn_model, "attentions_input", layer, inside, columns, latents)
            found.append(_next_probs(nn_model))
    return _by_prompt(found, nn_model.num_layers)


def _layers(model: StandardizedTransformer, layers: int | Sequence[int] | None) -> list[int]:
    """The layers that are meant, counted from 0, in the order given."""
    given = range(model.num_layers) if layers is None else [layers] if isinstance(layers, int) else layers
    found = [model.layers_output.position(layer) for layer in given]
    if not found:
        raise UsageError("layers=[] leaves no layer to look at.")
    return found


def _sources(
    model: StandardizedTransformer,
    prompts: Sequence[str] | str | None,
    latents: torch.Tensor | Sequence[torch.Tensor] | None,
    layers: list[int],
    batch_size: int,
) -> torch.Tensor:
    """The hidden states to put, (layer, source, hidden)."""
    if (prompts is None) == (latents is None):
        raise TargetPromptError("Give source_prompts or latents, and not both: they are two ways to say what is put.")
    if prompts is not None:
        texts = as_prompts(prompts, "source")
        read = sorted(set(layers))
        found = collect_token_activations_batched(model, texts, batch_size, read, partial(_by_token, "layers_output"))
        return found[[read.index(layer) for layer in layers]]
    assert latents is not None
    values = latents if isinstance(latents, torch.Tensor) else _stacked(latents)
    if values.ndim >= 3 and len(values) == len(layers):
        return values
    if values.ndim >= 3 and len(values) == model.num_layers:
        return values[layers]
    raise TargetPromptError(
        f"The latents are of shape {tuple(values.shape)}, and there are {len(layers)} layers to put them after: "
        f"give (layer, source, hidden), with one for each of these layers or for all {model.num_layers} of the model."
    )


def _attention_inputs(
    model: StandardizedTransformer, prompts: list[str], count: int, batch_size: int
) -> tuple[list[int], torch.Tensor]:
    """The layers that have attention, and what it reads at the last token of ``count`` prompts or of the one there is:
    (layer, prompt, hidden).
    """
    accessor = model.attentions_input
    layers = [layer for layer in range(model.num_layers) if accessor.has(layer)]
    if not layers:
        # Says why not.
        accessor.place(0)
    read = partial(_by_token, "attentions_input")
    values = collect_token_activations_batched(model, prompts, batch_size, layers, read)
    return layers, values.expand(len(layers), count, *values.shape[2:])


def _stacked(latents: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = {tuple(each.shape) for each in latents}
    if len(shapes) != 1:
        raise TargetPromptError(f"The latents of the layers are of shapes {sorted(shapes)}, which have to be the same.")
    return torch.stack(list(latents))


def _patches(
    values: torch.Tensor, into: list[int], target: TargetPromptBatch | Sequence[TargetPrompt] | TargetPrompt
) -> list[_Patch]:
    """A row for each layer and source, layer by layer."""
    layers, sources = values.shape[:2]
    targets = TargetPromptBatch.auto(target, sources)
    into = into * layers if len(into) == 1 else into
    if len(into) != layers:
        raise TargetPromptError(f"There are {len(into)} target_layers and {layers} layers: give as many, or one.")
    if len(targets) != sources:
        raise TargetPromptError(
            f"There are {sources} sources and {len(targets)} target prompts: give a target for each, or a single one."
        )
    return [
        _Patch(layer, latent, target)
        for layer, row in zip(into, values, strict=True)
        for latent, target in zip(row, targets, strict=True)
    ]


def _put(model: StandardizedTransformer, patches: Sequence[_Patch]) -> None:
    """Inside a trace with a row for each patch."""
    columns = _columns(model, [each.target for each in patches])
    for layer in sorted({each.layer for each in patches}):
        rows = [row for row, each in enumerate(patches) if each.layer == layer]
        _write(model, "layers_output", layer, rows, columns, [patches[row].latent for row in rows])


def _by_token(name: str, model: StandardizedTransformer, layer: int) -> Any:
    """A layer's value, (batch, position, hidden), whose positions are those of the tokens."""
    value, tokens = getattr(model, name)[layer], model.input_ids.shape[1]
    if value.shape[1] != tokens:
        raise UsageError(
            f"{name}[{layer}] has {value.shape[1]} positions for {tokens} tokens in this family of models, so that it "
            "is not clear which of them is a token's: read and set it in a trace of your own."
        )
    return value


def _write(
    model: StandardizedTransformer,
    name: str,
    layer: int,
    rows: list[int],
    columns: list[int],
    latents: list[torch.Tensor],
) -> None:
    if not rows:
        return
    value = _by_token(name, model, layer).value.clone()
    latent = torch.stack(latents)
    if latent.shape[1:] != value.shape[2:]:
        raise TargetPromptError(
            f"A latent is of shape {tuple(latent.shape[1:])}, and at each position of {name}[{layer}] "
            f"stands one of shape {tuple(value.shape[2:])}."
        )
    value[rows, [columns[row] for row in rows]] = latent.to(value)
    getattr(model, name)[layer] = value


def _columns(model: StandardizedTransformer, targets: Sequence[TargetPrompt]) -> list[int]:
    """Where in the padded batch the token of each row stands."""
    width = model.input_ids.shape[1]
    lengths = model.attention_mask.value.sum(-1).tolist()
    found = []
    for length, target in zip(lengths, targets, strict=True):
        index = target.index_to_patch
        if not -length <= index < length:
            raise PositionError(
                f"Token {index} of {target.prompt!r:.80} is not there: it has {length} tokens, counted from 0."
            )
        found.append(int(width - length + index % length))
    return found


def _next_probs(model: StandardizedTransformer) -> torch.Tensor:
    probs: torch.Tensor = model.logits.value[:, -1].float().softmax(-1).cpu()
    return probs


def _by_prompt(found: list[torch.Tensor], layers: int) -> torch.Tensor:
    """Rows of layers and prompts, (layer * prompt, vocab), as (prompt, layer, vocab)."""
    rows = torch.cat(found)
    return rows.reshape(layers, -1, rows.shape[-1]).transpose(0, 1)


def _rows(written: Any, count: int) -> torch.Tensor:
    if not isinstance(written, torch.Tensor) or len(written) != count:
        raise UsageError(
            "patchscope_generate gives one text for each prompt and layer, as token ids: leave out what makes "
            "model.generate give something else (num_return_sequences, return_dict_in_generate)."
        )
    return written.cpu()


def _filler(model: StandardizedTransformer, generation: dict[str, Any]) -> int:
    """The token that transformers' generate writes after the end of a text."""
    config = generation.get("generation_config") or model.generation_config
    for name in ("pad_token_id", "eos_token_id"):
        found = generation.get(name, getattr(config, name))
        if found is not None:
            return int(torch.as_tensor(found).flatten()[0])
    return 0
