"""Functions over a model with standard names, and the same places of a plain PyTorch model.

    with model.trace(prompts):
        hidden = get_layer_output(model, 3)

    activations = get_token_activations(model, prompts)     # (layer, prompt, hidden)
    ModuleAccessor(hf_model).get_attention(3)               # the plain module, by the same names

What the functions do is in :class:`~nnterp.StandardizedTransformer`; scripts that were written against functions of
these names find them here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.arguments import apply
from nnsight_core.envoy import Envoy
from nnsight_core.errors import RemoteError
from nnterp.errors import MissingPartError, PositionError, UsageError
from nnterp.naming import name_modules
from nnterp.rename_plan import LayerPlan, RenameConfig
from nnterp.residual_stream import chosen
from nnterp.standardized_transformer import StandardizedTransformer

if TYPE_CHECKING:
    from nnsight_core.scope import Scope

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
    layers: int | Sequence[int] | None = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
    tracer: Any = None,
) -> torch.Tensor:
    """The activations at one token of each prompt: (layer, prompt, hidden).

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> get_token_activations(model, ["Paris", "The capital of Japan is"], layers=[2, 0]).shape[:2]
    torch.Size([2, 2])

    No gradients are kept, and the model runs no further than it has to; a trace of one's own is left as it is.

    Args:
        nn_model: the model.
        prompts: what to trace; None inside a trace that is open.
        layers: which layers, in the order in which they are wanted; all if None. Negative ones count from the last.
        get_activations: what to read of each layer, (batch, position, hidden); its output if None.
        remote: not available.
        idx: which token of each prompt, by its own tokens, whatever the padding; the last one if None.
        tracer: the open trace, where ``prompts`` is None.

    Returns:
        (layer, prompt, hidden), on the CPU; in a trace of one's own a proxy of it, on the device of the first layer.

    Raises:
        LayerIndexError: the model has no such layer.
        PositionError: a prompt has no such token.
        UsageError: no layer was asked for, neither prompts nor a trace were given, or both, or ``get_activations`` gave
            something else than (batch, position, hidden).
        RemoteError: ``remote`` is set.
    """
    _refuse_remote(remote)
    if (prompts is None) == (tracer is None):
        raise UsageError("get_token_activations() takes prompts, or the tracer of a trace that is open.")
    wanted = _wanted(nn_model, layers)
    if tracer is not None:
        return torch.stack(_read(nn_model, wanted, get_activations, idx))
    with torch.no_grad(), nn_model.trace(prompts) as own:
        found = [value.save() for value in _read(nn_model, wanted, get_activations, idx)]
        own.stop()
    return torch.stack([value.value for value in found]).cpu()


def _wanted(model: StandardizedTransformer, layers: int | Sequence[int] | None) -> list[int]:
    asked = range(model.num_layers) if layers is None else [layers] if isinstance(layers, int) else layers
    found = [model.layers_output.position(int(layer)) for layer in asked]
    if not found:
        raise UsageError(f"No layer was asked for: give some of 0 to {model.num_layers - 1}, or layers=None for all.")
    return found


def _read(
    model: StandardizedTransformer, layers: Sequence[int], get: GetModuleOutput | None, idx: int | None
) -> list[Any]:
    """One value for each layer, in the order of ``layers``; read in the order in which the model makes them."""
    scope = model.open_scope("get_token_activations")
    token = -1 if idx is None else operator.index(idx)
    values: dict[int, Any] = {}
    for layer in sorted(set(layers)):
        value = (get or get_layer_output)(model, layer)
        values[layer] = apply(_at_token, value, scope, token, get in (None, get_layer_output))
    # Layers of one model may be on several devices.
    first = values[min(values)]
    return [apply(_beside, values[layer], first) for layer in layers]


def _at_token(value: torch.Tensor, scope: Scope, token: int, is_stream: bool) -> torch.Tensor:
    # Some families keep several residual streams; of anything else a further axis might stand before the positions.
    if not is_stream and value.ndim != 3:
        raise UsageError(
            f"get_activations gave a value of shape {tuple(value.shape)}: it has to be (batch, position, hidden)."
        )
    rows, columns = chosen(value, scope, None, token, None)
    return value[rows, columns][:, 0]


def _beside(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return value.to(other.device)


def collect_token_activations_batched(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str],
    batch_size: int,
    layers: int | Sequence[int] | None = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
    tqdm: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    use_session: bool = True,
) -> torch.Tensor:
    """The same for many prompts, ``batch_size`` at a time: (layer, prompt, hidden), on the CPU.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> collect_token_activations_batched(model, ["Paris", "Rome", "The capital of Japan is"], 2).shape[:2]
    torch.Size([6, 3])

    ``tqdm`` is put around the batches to show how far it is. ``use_session`` is for scripts that set it: batches run
    one after the other in any case. The other arguments are those of :func:`get_token_activations`.

    Raises:
        UsageError: there is no prompt, or the batch size is below 1.
    """
    _refuse_remote(remote)
    if batch_size < 1 or not prompts:
        raise UsageError(
            f"{len(prompts)} prompts in batches of {batch_size}: give at least one prompt and a size of 1 or more."
        )
    starts: Iterable[int] = range(0, len(prompts), batch_size)
    found = []
    for start in tqdm(starts) if tqdm is not None else starts:
        try:
            found.append(
                get_token_activations(nn_model, prompts[start : start + batch_size], layers, get_activations, idx=idx)
            )
        except PositionError as error:
            raise PositionError(f"Of the prompts from number {start} on, counting them from there: {error}") from error
    return torch.cat(found, dim=1)


def collect_last_token_activations_session(
    nn_model: StandardizedTransformer,
    prompts: Sequence[str],
    batch_size: int,
    layers: int | Sequence[int] | None = None,
    get_activations: GetModuleOutput | None = None,
    remote: bool = False,
    idx: int | None = None,
) -> torch.Tensor:
    """:func:`collect_token_activations_batched` by its older name."""
    _refuse_remote(remote)
    return collect_token_activations_batched(nn_model, prompts, batch_size, layers, get_activations, idx=idx)


def compute_next_token_probs(
    nn_model: StandardizedTransformer, prompt: str | list[str], remote: bool = False
) -> torch.Tensor:
    """The probabilities of the token after each prompt, (batch, vocab), each row sums to 1, on the CPU.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> compute_next_token_probs(model, ["Paris", "The capital of Japan is"]).shape == (2, model.vocab_size)
    True
    """
    _refuse_remote(remote)
    with torch.no_grad(), nn_model.trace(prompt):
        probs = nn_model.next_token_probs.save()
    found: torch.Tensor = probs.value
    return found.cpu()


def _refuse_remote(remote: bool) -> None:
    if remote:
        raise RemoteError()
