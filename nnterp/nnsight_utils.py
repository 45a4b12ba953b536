"""Functions over a model with standard names, and the same places of a plain PyTorch model.

    with model.trace(prompts):
        hidden = get_layer_output(model, 3)

    activations = get_token_activations(model, prompts)     # (layer, prompt, hidden)
    ModuleAccessor(hf_model).get_attention(3)               # the plain module, by the same names

What the functions do is in :class:`~nnterp.StandardizedTransformer`; scripts that were written against functions of
these names find them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.errors import RemoteError
from nnterp.errors import MissingPartError
from nnterp.naming import name_modules
from nnterp.rename_plan import LayerPlan, RenameConfig
from nnterp.standardized_transformer import StandardizedTransformer

__all__ = [
    "collect_last_token_activations_session",
    "collect_token_activations_batched",
    "compute_next_token_probs",
    "get_attention",
    "get_attention_output",
    "get_embed_tokens",
    "get_layer",
    "get_layer_input",
    "get_layer_output",
    "get_layers",
    "get_logits",
    "get_mlp",
    "get_mlp_output",
    "get_next_token_probs",
    "get_num_layers",
    "get_token_activations",
    "get_unembed",
    "get_unembed_norm",
    "GetModuleOutput",
    "ModuleAccessor",
    "project_on_vocab",
    "set_layer_output",
]

#: From a model and a layer's index to a value of shape (batch, position, hidden).
GetModuleOutput = Callable[[StandardizedTransformer, int], Any]


def get_embed_tokens(model: StandardizedTransformer) -> Envoy:
    """The input embedding."""
    return model.get("embed_tokens")


def get_layers(model: StandardizedTransformer) -> list[Envoy]:
    """Every layer, in order."""
    return [get_layer(model, index) for index in range(model.num_layers)]


def get_num_layers(nn_model: StandardizedTransformer) -> int:
    """How many layers there are."""
    return nn_model.num_layers


def get_layer(nn_model: StandardizedTransformer, layer: int) -> Envoy:
    """One layer."""
    return nn_model.layers_output.get_module(layer)


def get_layer_input(nn_model: StandardizedTransformer, layer: int) -> Any:
    """What a layer takes, (batch, position, hidden)."""
    return nn_model.layers_input[layer]


def get_layer_output(nn_model: StandardizedTransformer, layer: int) -> Any:
    """What a layer gives, (batch, position, hidden)."""
    return nn_model.layers_output[layer]


def set_layer_output(nn_model: StandardizedTransformer, layer: int, tensor: Any) -> None:
    """Let the model go on with ``tensor``, (batch, position, hidden), as what a layer gave."""
    nn_model.layers_output[layer] = tensor


def get_attention(nn_model: StandardizedTransformer, layer: int) -> Envoy:
    """A layer's attention; raises `MissingPartError` where it has none."""
    return nn_model.attentions[layer]


def get_attention_output(nn_model: StandardizedTransformer, layer: int) -> Any:
    """What a layer's attention gives, (batch, position, hidden)."""
    return nn_model.attentions_output[layer]


def get_mlp(nn_model: StandardizedTransformer, layer: int) -> Envoy:
    """A layer's MLP; raises `MissingPartError` where it has none, or none that is a module."""
    return nn_model.mlps[layer]


def get_mlp_output(nn_model: StandardizedTransformer, layer: int) -> Any:
    """What a layer's MLP gives, (batch, position, hidden)."""
    return nn_model.mlps_output[layer]


def get_logits(nn_model: StandardizedTransformer) -> Any:
    """The model's logits, (batch, position, vocab)."""
    return nn_model.logits


def get_unembed_norm(nn_model: StandardizedTransformer) -> Envoy:
    """The norm after the last layer."""
    return nn_model.get("ln_final")


def get_unembed(nn_model: StandardizedTransformer) -> Envoy:
    """The module that makes the logits."""
    return nn_model.get("lm_head")


def project_on_vocab(nn_model: StandardizedTransformer, h: Any) -> Any:
    """The logits that a hidden state, (..., hidden), would give if it were the last layer's output."""
    return nn_model.project_on_vocab(h)


def get_next_token_probs(nn_model: StandardizedTransformer) -> Any:
    """The probabilities of the token after each prompt, (batch, vocab)."""
    return nn_model.next_token_probs


class ModuleAccessor:
    """The standard places of a plain PyTorch model, which stays what it is.

    >>> from nnterp import StandardizedTransformer
    >>> plain = StandardizedTransformer("demo-gpt2")._module
    >>> ModuleAccessor(plain).get_attention(0) is plain.transformer.h[0].attn
    True

    Args:
        model: the model, of any class that `StandardizedTransformer` takes.
        rename_config: which modules play which part, where specification and structure do not say it right.
        rename: extra names; each has to fit a module.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rename_config: RenameConfig | None = None,
        rename: Mapping[str, str | list[str]] | None = None,
    ) -> None:
        self.model = model
        self._named = name_modules(model, None, rename_config, rename)

    def _role(self, role: str) -> torch.nn.Module:
        path = self._named.plan.modules[role]
        if path is None:
            raise MissingPartError(role, self._named.spec.absent.get(role, "The specification names none."))
        return self.model.get_submodule(path)

    def _layer(self, layer: int) -> LayerPlan:
        return self._named.plan.layers[layer]

    def _part(self, part: str, layer: int) -> torch.nn.Module:
        path = getattr(self._layer(layer), part)
        if path is None:
            raise MissingPartError(f"{part} of layer {layer}", self._named.spec.absent.get(part, "It is no module."))
        return self.model.get_submodule(path)

    def get_embed_tokens(self) -> torch.nn.Module:
        """The input embedding."""
        return self._role("embed_tokens")

    def get_layers(self) -> torch.nn.ModuleList:
        """The list of layers."""
        return self._role("layers")  # type: ignore[return-value]

    def get_layer(self, layer: int) -> torch.nn.Module:
        """One layer."""
        return self.model.get_submodule(self._layer(layer).path)

    def get_attention(self, layer: int) -> torch.nn.Module:
        """A layer's attention; raises `MissingPartError` where it has none."""
        return self._part("attention", layer)

    def get_mlp(self, layer: int) -> torch.nn.Module:
        """A layer's MLP; raises `MissingPartError` where it has none, or none that is a module."""
        return self._part("mlp", layer)

    def get_unembed_norm(self) -> torch.nn.Module:
        """The norm after the last layer."""
        return self._role("ln_final")

    def get_unembed(self) -> torch.nn.Module:
        """The module that makes the logits."""
        return self._role("lm_head")


def get_token_activations(
    nn_model: StandardizedTransformer,
    prompts: Any = None,
    layers: Sequence[int] | None = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
    tracer: Any = None,
) -> torch.Tensor:
    """The activations at one token of each prompt: (layer, prompt, hidden).

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> get_token_activations(model, ["Paris", "The capital of Japan is"], layers=[0, 2]).shape[:2]
    torch.Size([2, 2])

    Args:
        nn_model: the model.
        prompts: what to trace; None inside a trace that is open.
        layers: which layers, in forward order; all if None.
        get_activations: what to read of each layer; its output if None.
        remote: not available.
        idx: which token of each prompt, by its own tokens, whatever the padding; the last one if None.
        tracer: the open trace, where ``prompts`` is None.
    """
    _refuse_remote(remote)
    if (prompts is None) == (tracer is None):
        raise TypeError("get_token_activations() takes prompts, or the tracer of a trace that is open.")
    if tracer is not None:
        return torch.stack(_read(nn_model, layers, get_activations, idx))
    with nn_model.trace(prompts) as own:
        found = [value.save() for value in _read(nn_model, layers, get_activations, idx)]
        own.stop()
    return torch.stack([value.value for value in found])


def _read(
    model: StandardizedTransformer, layers: Sequence[int] | None, get: GetModuleOutput | None, idx: int | None
) -> list[Any]:
    wanted = range(model.num_layers) if layers is None else layers
    return [(get or get_layer_output)(model, layer).t[-1 if idx is None else idx] for layer in wanted]


def collect_token_activations_batched(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str],
    batch_size: int,
    layers: Sequence[int] | None = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
    tqdm: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    use_session: bool = True,
) -> torch.Tensor:
    """The same for many prompts, ``batch_size`` at a time: (layer, prompt, hidden), on the CPU.

    ``tqdm`` is put around the batches to show how far it is. ``use_session`` is for scripts that set it: batches run
    one after the other in any case.
    """
    _refuse_remote(remote)
    batches: Iterable[Sequence[str]] = list(_batches(prompts, batch_size))
    found = []
    with torch.no_grad():
        for batch in tqdm(batches) if tqdm is not None else batches:
            found.append(get_token_activations(nn_model, batch, layers, get_activations, idx=idx).cpu())
    return torch.cat(found, dim=1)


def collect_last_token_activations_session(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str],
    batch_size: int,
    layers: Sequence[int] | None = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
) -> torch.Tensor:
    """:func:`collect_token_activations_batched` by its older name."""
    _refuse_remote(remote)
    return collect_token_activations_batched(nn_model, prompts, batch_size, layers, get_activations, idx=idx)


def _batches(prompts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    if size < 1 or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts in batches of {size}: give at least one prompt and a size of 1 or more."
        )
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def compute_next_token_probs(
    nn_model: StandardizedTransformer, prompt: str | list[str], remote: bool = False
) -> torch.Tensor:
    """The probabilities of the token after each prompt, (batch, vocab), each row sums to 1."""
    _refuse_remote(remote)
    with torch.no_grad(), nn_model.trace(prompt):
        probs = nn_model.next_token_probs.save()
    found: torch.Tensor = probs.value
    return found


def _refuse_remote(remote: bool) -> None:
    if remote:
        raise RemoteError()
