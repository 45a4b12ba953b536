"""One interface over every causal language model: the same names, whatever the family calls its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nnsight_core.call import Call
from nnsight_core.devices import has_numbers
from nnsight_core.envoy import Envoy
from nnsight_core.errors import RemoteError
from nnsight_core.input_errors import ModelNotFoundError
from nnsight_core.language_model import LanguageModel
from nnsight_core.loading import Checkpoint
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope
from nnsight_core.tree import NO_NAMES
from nnterp.accessors import (
    ModuleAccess,
    Place,
    StreamShape,
    ValueAccess,
    logits_of,
    read,
    shown,
    with_logits,
    write,
)
from nnterp.additions import Addition
from nnterp.attention import Heads
from nnterp.attention_sources import AttentionProbabilitiesAccessor
from nnterp.calling import config_of
from nnterp.conditions import config_value
from nnterp.demo_models import DEMO_MODELS, demo_model_path
from nnterp.errors import CannotError
from nnterp.experts import Experts
from nnterp.head_contributions import HeadContributions
from nnterp.mixer_states import StateAccess
from nnterp.naming import name_modules, serving_spec
from nnterp.norms import Norms
from nnterp.rename import PartPlan, RenameConfig
from nnterp.residual_stream import ResidualStream
from nnterp.rotary import Rotary
from nnterp.spec_layer import KINDS
from nnterp.validation import Row, promised, validate
from nnterp.vocabulary import Vocabulary


class StandardizedTransformer(
    LanguageModel, ResidualStream, Heads, HeadContributions, Rotary, Experts, Norms, Vocabulary
):
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
    ``mlps_output[i]``, ``logits`` (batch, position, vocab). ``mixers_input[i]`` and ``mixers_output[i]`` are there for
    every layer: its attention, or what it has instead, such as a state-space mixer, whose state after the last position
    is ``mixers_state[i]``, see :class:`~nnterp.mixer_states.StateAccess`. ``ln_final_scale``,
    ``mixers_norm_scale[i]``, ``attentions_norm_scale[i]`` and ``mlps_norm_scale[i]``, (batch, position, 1), are what
    norms divide by. Where a layer routes: ``router_logits[i]``, ``expert_indices[i]``, ``expert_weights[i]`` and
    ``experts_output[i]``, see :class:`~nnterp.experts.Experts`.
    ``queries[i]``, ``keys[i]``, ``values[i]`` and ``heads_output[i]`` are (batch, head, position, head_dim),
    ``attention_scores[i]`` and ``attention_probabilities[i]`` (batch, head, query, key), ``heads_contribution[i]``
    (batch, head, position, hidden). ``queries_pre_rope[i]`` and ``keys_pre_rope[i]`` are queries and keys before they
    are rotated; ``keys.repeated[i]`` and ``values.repeated[i]`` have a head for each head of queries.
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
        spec: a specification of one's own, as a path to a YAML file. Without one, a model whose type no file serves is
            opened by its structure, which one forward pass shows (`nnterp spec MODEL` prints what was found).
        tokenizer: the tokenizer; needed for text when ``model`` is an object.
        dispatch: another name for ``allow_dispatch``, which it overrides.
        enable_attention_probs: accepted for scripts that set it; nothing has to be enabled.
        check_attn_probs_with_trace: likewise.
        allow_multimodal: accepted for scripts that set it; nothing has to be allowed.
        kwargs: as for :class:`~nnsight_core.LanguageModel`: ``device_map``, ``dtype``, ``revision``, ...

    Raises:
        ModelNotFoundError: ``model`` names nothing that can be loaded.
        UnknownArchitectureError: no specification serves the model's type, and its structure cannot be found.
        RenamingError: a name or path does not fit the model.
        ValidationError: the specification's promises do not hold on this model.
        RemoteError: ``remote`` is set.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    attention_probabilities: AttentionProbabilitiesAccessor
    attentions: ModuleAccess
    mixers: ModuleAccess
    mlps: ModuleAccess
    layers_input: ValueAccess
    layers_output: ValueAccess
    attentions_input: ValueAccess
    attentions_output: ValueAccess
    attentions_contribution: ValueAccess
    mixers_input: ValueAccess
    mixers_output: ValueAccess
    mixers_contribution: ValueAccess
    mixers_state: StateAccess
    mlps_input: ValueAccess
    mlps_output: ValueAccess
    mlps_contribution: ValueAccess

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
            raise RemoteError()
        source: Checkpoint | torch.nn.Module
        if isinstance(model, torch.nn.Module):
            source, module = model, model
        else:
            source = _checkpoint(model, trust_remote_code=trust_remote_code, **kwargs)
            module, kwargs = source.module, {}
        super().__init__(source, tokenizer, tokenizer_kwargs=tokenizer_kwargs, **kwargs)
        self._how_named: tuple[Any, ...] | None = (spec, rename_config, rename)
        self._attn_prob_source = getattr(rename_config, "attn_prob_source", None)
        self._is_checked = not check_renaming
        self._doubtful_projections: dict[str, str] = {}
        # What no specification serves shows its structure only when it runs.
        if self.dispatched or serving_spec(module, spec) is not None:
            self._name()
        if self.dispatched:
            self._check_loaded()
        elif allow_dispatch if dispatch is None else dispatch:
            self.dispatch()

    def _name(self) -> None:
        """Give the modules their names, unless they have them."""
        if self._how_named is None:
            return
        module = self._module
        named = name_modules(module, *self._how_named)
        self._spec, self._plan, self._sizes = named.spec, named.plan, named.sizes
        self._how_named = None
        self._tree.rename(self._planned(module, None, self._plan.aliases))
        self._names = self._tree.aliases.get("", NO_NAMES)
        self._tree.written_over = frozenset(module.get_submodule(path) for path in self._plan.written_over)
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"):
            setattr(self, name, getattr(self._sizes, name))
        self._logits_place = Place("", "output", "logits", logits_of, with_logits)
        self._add_accessors()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("_how_named") is None:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            # It may be a name that this model gets when its structure is known.
            self.dispatch()
            if self._how_named is not None:
                raise
        return getattr(self, name)

    def _check_loaded(self) -> None:
        self._name()
        if not self._is_checked and has_numbers(self._module):
            doubtful = validate(self._module, self._plan, self._spec, self._sizes, self.project_on_vocab)
            self._doubtful_projections.update(doubtful)
            self._is_checked = True

    def _twin(self) -> StandardizedTransformer:
        if self._how_named is not None:
            self.dispatch()
        twin = super()._twin()
        assert isinstance(twin, StandardizedTransformer)
        twin._add_accessors()
        return twin

    def _add_accessors(self) -> None:
        layers = self._plan.layers
        own = tuple(PartPlan("layer", each.path, each.input, each.output, each.output) for each in layers)
        self._add_accessor("layers", own, self._shape("layers"))
        shape = self._shape("parts")
        self._add_accessor("attentions", tuple(each.part("attention") for each in layers), shape)
        self._add_accessor("mixers", tuple(each.mixer for each in layers), shape)
        self._add_accessor("mlps", tuple(each.part("mlp") for each in layers), shape)
        root = Envoy(self._module, "", self._tree)
        self._add_norms(root, shape)
        self._add_experts(root)
        self._add_heads(root)
        self.attention_probabilities = AttentionProbabilitiesAccessor.of(self, self._attn_prob_source)
        self.mixers_state = StateAccess(root, layers, self._spec)
        self._add_head_contributions(root)
        self._add_rotary(root)

    def _shape(self, what: str) -> StreamShape:
        return StreamShape.of(what, self._spec, config_of(self._module), self.hidden_size)

    def _add_accessor(self, name: str, parts: tuple[PartPlan | None, ...], shape: StreamShape) -> None:
        # Were they to hold the model itself, which holds them, only the garbage collector could free it.
        root = Envoy(self._module, "", self._tree)
        reasons = tuple(self._why_not(name, index) for index in range(len(parts)))
        if name in self._spec.cannot:
            parts = (None,) * len(parts)
        for kind in ("input", "output"):
            places = tuple(
                Place(getattr(part, kind), kind, f"{name}_{kind}[{index}]", shape=shape) if part else None
                for index, part in enumerate(parts)
            )
            setattr(self, f"{name}_{kind}", ValueAccess(root, f"{name}_{kind}", places, reasons, shape))
        if name != "layers":
            self._add_contributions(root, name, parts, shape)
            modules = tuple(part.module if part else None for part in parts)
            setattr(self, name, ModuleAccess(root, name, modules, reasons))

    def _add_contributions(
        self, root: Envoy, name: str, parts: tuple[PartPlan | None, ...], shape: StreamShape
    ) -> None:
        """What each part adds to the residual stream, which need not be what it gives: it may be normed or scaled."""
        reasons = tuple(self._why_not(name, index) for index in range(len(parts)))
        if "contributions" in self._spec.cannot:
            parts, reasons = (None,) * len(parts), (self._spec.cannot["contributions"],) * len(parts)
        kind = f"{name}_contribution"
        places = tuple(
            self._contribution_place(root, index, part, f"{kind}[{index}]") if part else None
            for index, part in enumerate(parts)
        )
        setattr(self, kind, ValueAccess(root, kind, places, reasons, shape))

    def _contribution_place(self, root: Envoy, index: int, part: PartPlan, label: str) -> Place:
        place = Place(part.contribution, "output", label, shape=self._shape("parts"))
        if part.multiplier is None and part.bias is None:
            return place
        path, config = self._plan.layers[index].path, config_of(self._module)

        def addition() -> Addition:
            # What the layer holds may be loaded later.
            return Addition(part, config, root.get(path)._module)

        return shown(place, lambda value: addition().contribution(value), lambda value: addition().given(value))

    def _why_not(self, name: str, index: int) -> str:
        """Why a layer has no such part, or none that can be read."""
        spec, mixer = self._spec, self._plan.layers[index].mixer
        if name in spec.cannot:
            return spec.cannot[name]
        reason = spec.absent.get({"attentions": "attention", "mlps": "mlp"}.get(name, ""), "")
        if name == "attentions" and mixer and mixer.kind in KINDS and mixer.kind != "attention":
            what = f"It has {KINDS[mixer.kind]} instead, which mixers_output[{index}] reads."
            return f"{reason} {what}".strip()
        return reason or f"{spec.source} names none."

    def _positions(self, mask: torch.Tensor) -> torch.Tensor:
        first = config_value(self.config, self._spec.positions_follow) if self._spec.positions_follow else None
        return super()._positions(mask) + (0 if first is None else first + 1)

    def _batch_call(self, batch: dict[str, Any], kwargs: dict[str, Any]) -> Call:
        mask = batch.get("attention_mask")
        if mask is not None and mask.ndim == 2 and bool(mask[:, -1].all()) and not bool(mask.all()):
            self._spec.refuse("padding", "A batch of prompts of several lengths")
        return super()._batch_call(batch, kwargs)

    def _combine(self, calls: list[Call]) -> tuple[Call, list[int]]:
        if len(calls) > 1:
            self._spec.refuse("invokes", "Several invokes in one pass")
        return super()._combine(calls)

    def generate(
        self, *inputs: Any, trace: bool = True, invoker_args: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Open a trace of a generation, as :meth:`LanguageModel.generate` does.

        Raises:
            CannotError: the family cannot generate.
        """
        self._spec.refuse("generate", "generate(...)")
        return super().generate(*inputs, trace=trace, invoker_args=invoker_args, **kwargs)

    @property
    def input_ids(self) -> Any:
        """The token ids of the open trace, (batch, position), padding included; kept beyond its end, saved or not."""
        return _kept(self.open_scope("input_ids"), "input_ids")

    @property
    def input_size(self) -> Any:
        """The shape of :attr:`input_ids`: (batch, position)."""
        return self.input_ids.shape

    @property
    def attention_mask(self) -> Any:
        """1 for the tokens of the open trace and 0 for padding, (batch, position); kept beyond its end."""
        return _kept(self.open_scope("attention_mask"), "attention_mask", _no_padding)

    @property
    def token_embeddings(self) -> Any:
        """What the embedding gives for each token, before anything is added: (batch, position, hidden)."""
        return read(self, self._embeddings_place())

    @token_embeddings.setter
    def token_embeddings(self, value: Any) -> None:
        write(self, self._embeddings_place(), value)

    def _promised(self) -> Iterator[Row]:
        """What the specification promises, each row with what the model gave."""
        return promised(self._module, self._plan, self._spec, self._sizes, self.project_on_vocab)

    def _embeddings_place(self) -> Place:
        if not self._plan.embed:
            origin = self._spec.where("modules.embed_tokens")
            raise CannotError("token_embeddings", self._spec.absent["embed_tokens"], origin)
        return Place(self._plan.embed[-1], "output", "token_embeddings", shape=self._shape("embeddings"))

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


def _kept(scope: Scope, name: str, otherwise: Callable[[Scope], Any] | None = None) -> Any:
    """An argument of the model's as what answers to ``.save()``, in a live trace and in an invoke alike."""
    found = scope.given(name, otherwise)
    return scope.proxy(found).save() if isinstance(found, torch.Tensor) and not isinstance(found, Proxy) else found


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
