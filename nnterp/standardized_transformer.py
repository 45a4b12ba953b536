"""One interface over every causal language model: the same names, whatever the family calls its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nnsight_core.devices import has_numbers
from nnsight_core.envoy import Envoy
from nnsight_core.errors import ModelNotFoundError
from nnsight_core.language_model import LanguageModel
from nnsight_core.loading import Checkpoint
from nnsight_core.scope import Scope
from nnterp.accessors import ModuleAccess, Place, ValueAccess, logits_of, read, with_logits, write
from nnterp.architectures import spec_for, spec_from_file
from nnterp.demo_models import DEMO_MODELS, demo_model_path
from nnterp.errors import RemoteNotAvailableError
from nnterp.rename import RenameConfig, dimensions, plan
from nnterp.residual_stream import ResidualStream
from nnterp.validation import validate
from nnterp.vocabulary import Vocabulary


class StandardizedTransformer(LanguageModel, ResidualStream, Vocabulary):
    """Any causal language model under standard names.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower is in the city of"):
    ...     attention = model.attentions_output[2]          # forward order
    ...     model.layers_output[3] += 0.1 * attention       # read, compute, set
    ...     probabilities = model.next_token_probs.save()   # (batch, vocab)
    >>> probabilities.shape == (1, model.vocab_size)
    True

    Modules: ``embed_tokens``, ``layers[i]``, ``layers[i].self_attn``, ``layers[i].mlp``, ``ln_final``, ``lm_head``.
    Values, read and set, of shape (batch, position, hidden) unless said: ``token_embeddings``,
    ``layers_input[i]``, ``layers_output[i]``, ``attentions_input[i]``, ``attentions_output[i]``, ``mlps_input[i]``,
    ``mlps_output[i]``, ``logits`` (batch, position, vocab).
    Dimensions: ``num_layers``, ``num_heads``, ``num_kv_heads``, ``head_dim``, ``hidden_size``, ``vocab_size``.

    Args:
        model: a folder, a name on the hub, the name of a model that comes with the package (``demo-gpt2``,
            ``demo-llama``), or a model object.
        trust_remote_code: let a checkpoint bring its own code, as in transformers.
        check_renaming: check the names by numbers, with one small forward pass, once the weights are loaded.
        remote: not available.
        allow_dispatch: load the weights at once. ``False`` loads and checks them when they are needed first.
        rename_config: which modules play which part, where the specification does not fit the model.
        rename: extra names for modules, ``{"transformer.h": "blocks"}``.
        spec: a specification of one's own, as a path to a YAML file.
        tokenizer: the tokenizer; needed for text when ``model`` is an object.
        dispatch: another name for ``allow_dispatch``, which it overrides.
        enable_attention_probs, check_attn_probs_with_trace, allow_multimodal: accepted for scripts that set them;
            nothing has to be enabled or allowed.
        kwargs: as for :class:`~nnsight_core.LanguageModel`: ``device_map``, ``dtype``, ``revision``, ...

    Raises:
        ModelNotFoundError: ``model`` names nothing that can be loaded.
        UnknownArchitectureError: no specification serves the model's type.
        RenamingError: a name or path does not fit the model.
        ValidationError: the specification's promises do not hold on this model.
        RemoteNotAvailableError: ``remote`` is set.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    attentions: ModuleAccess
    mlps: ModuleAccess
    layers_input: ValueAccess
    layers_output: ValueAccess
    attentions_input: ValueAccess
    attentions_output: ValueAccess
    mlps_input: ValueAccess
    mlps_output: ValueAccess

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        trust_remote_code: bool = False,
        check_renaming: bool = True,
        remote: bool = False,
        allow_dispatch: bool = True,
        enable_attention_probs: bool = False,
        check_attn_probs_with_trace: bool = True,
        allow_multimodal: bool = False,
        rename_config: RenameConfig | None = None,
        *,
        rename: Mapping[str, str | list[str]] | None = None,
        spec: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dispatch: bool | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if remote:
            raise RemoteNotAvailableError("StandardizedTransformer")
        source: Checkpoint | torch.nn.Module
        if isinstance(model, torch.nn.Module):
            source, module = model, model
        else:
            source = _checkpoint(model, trust_remote_code=trust_remote_code, **kwargs)
            module, kwargs = source.module, {}
        config: Any = module.config
        family = spec_from_file(spec) if spec else spec_for(config.model_type)
        self._spec = family.for_config(config)
        self._sizes = dimensions(self._spec, config, rename_config)
        names = [name for name, _ in module.named_modules()]
        self._plan = plan(self._spec, names, self._sizes.num_layers, rename_config, rename)
        super().__init__(source, tokenizer, self._plan.aliases, tokenizer_kwargs=tokenizer_kwargs, **kwargs)
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"):
            setattr(self, name, getattr(self._sizes, name))
        self._logits_place = Place("", "output", "logits", logits_of, with_logits)
        self._embeddings_place = Place(self._plan.embed[-1], "output", "token_embeddings")
        self._add_accessors()
        self._is_checked = not check_renaming
        if self.dispatched:
            self._check_loaded()
        elif allow_dispatch if dispatch is None else dispatch:
            self.dispatch()

    def _check_loaded(self) -> None:
        if not self._is_checked and has_numbers(self._module):
            validate(self._module, self._plan, self._spec, self._sizes, self.project_on_vocab)
            self._is_checked = True

    def _twin(self) -> StandardizedTransformer:
        twin = super()._twin()
        assert isinstance(twin, StandardizedTransformer)
        twin._add_accessors()
        return twin

    def _add_accessors(self) -> None:
        layers = self._plan.layers
        # Were they to hold the model itself, which holds them, only the garbage collector could free it.
        root = Envoy(self._module, "", self._tree)

        def values(name: str, kind: str, paths: Sequence[str | None], why_not: str) -> ValueAccess:
            places = [
                Place(path, kind, f"{name}_{kind}[{index}]") if path else None for index, path in enumerate(paths)
            ]
            return ValueAccess(root, f"{name}_{kind}", tuple(places), why_not)

        for name, role, starts, ends in (
            ("layers", "layers", [each.path for each in layers], [each.path for each in layers]),
            ("attentions", "attention", [each.attention for each in layers], [each.attention for each in layers]),
            ("mlps", "mlp", [each.mlp_input for each in layers], [each.mlp_output for each in layers]),
        ):
            why_not = str(self._spec.absent.get(role, f"{self._spec.source} names none."))
            setattr(self, f"{name}_input", values(name, "input", starts, why_not))
            setattr(self, f"{name}_output", values(name, "output", ends, why_not))
            if name != "layers":
                modules = tuple(getattr(each, role) for each in layers)
                setattr(self, name, ModuleAccess(root, name, modules, why_not))

    @property
    def input_ids(self) -> Any:
        """The token ids of the open trace, (batch, position), padding included."""
        return self.open_scope("input_ids").given("input_ids")

    @property
    def input_size(self) -> Any:
        """The shape of :attr:`input_ids`: (batch, position)."""
        return self.input_ids.shape

    @property
    def attention_mask(self) -> Any:
        """1 for the tokens of the open trace and 0 for padding, (batch, position)."""
        return self.open_scope("attention_mask").given("attention_mask", _no_padding)

    @property
    def token_embeddings(self) -> Any:
        """What the embedding gives for each token, before anything is added: (batch, position, hidden)."""
        return read(self, self._embeddings_place)

    @token_embeddings.setter
    def token_embeddings(self, value: Any) -> None:
        write(self, self._embeddings_place, value)

    @property
    def logits(self) -> Any:
        """The model's logits, scaled and capped as the model does it: (batch, position, vocab)."""
        return read(self, self._logits_place)

    @logits.setter
    def logits(self, value: Any) -> None:
        write(self, self._logits_place, value)

    @property
    def next_token_probs(self) -> Any:
        """The probabilities of the token after each prompt: (batch, vocab), each row sums to 1."""
        return self.logits[:, -1].softmax(-1)


def _no_padding(scope: Scope) -> torch.Tensor:
    return torch.ones_like(scope.inputs["input_ids"])


def _checkpoint(name: str | Path, **options: Any) -> Checkpoint:
    # A folder of one's own wins over a model that comes along under the same name.
    place: str | Path = name
    if isinstance(name, str) and not Path(name).is_dir():
        place = demo_model_path(name) or name
        if place == name and name.startswith("demo-"):
            # These names are the package's own, so the hub need not be asked for one that is mistyped.
            raise ModelNotFoundError(name, "no model of this name comes with the package.", DEMO_MODELS)
    return Checkpoint(place, known=DEMO_MODELS, **options)
