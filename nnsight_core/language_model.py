"""A language model: text comes in, is tokenised and padded on the left, and goes through the model as one batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.generic import TransformersKwargs

from nnsight_core.arguments import unwrap
from nnsight_core.batching import joined
from nnsight_core.call import Call
from nnsight_core.devices import input_device
from nnsight_core.envoy import Envoy
from nnsight_core.errors import OptionError
from nnsight_core.input_errors import EmptyPromptError, InputError, MissingInputError, PaddingError, PromptTooLongError
from nnsight_core.loading import Checkpoint, LazyWeights, refuse_loading_options
from nnsight_core.model import NNsight
from nnsight_core.options import invoker_options, parameters_inside, refuse_options, refuse_unknown, without_old_options
from nnsight_core.padding import counted_positions, way_to_pad
from nnsight_core.prompts import is_text, padded, token_rows, tokenizer_options
from nnsight_core.renames import Rename
from nnsight_core.tracer import Tracer
from nnsight_core.tree import Names
from nnsight_core.values import Pair

#: What is made anew when prompts of several inputs are padded to one length.
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")


class LanguageModel(NNsight):
    """Wrap a causal language model together with its tokenizer.

    >>> from nnsight_core import LanguageModel
    >>> from nnterp.demo_models import demo_model_path
    >>> model = LanguageModel(demo_model_path("demo-gpt2"))
    >>> with model.trace("The Eiffel Tower is in the city of"):
    ...     hidden = model.transformer.h[2].mlp.output.save()
    ...     logits = model.lm_head.output[:, -1].save()
    >>> model.tokenizer.decode(logits.argmax(-1))
    ' Paris'

    The modules are there at once, without their weights; those are loaded when they are needed first: at a trace, a
    generation, a call, or the look at a parameter. ``model.dispatch()`` loads them now.

    Args:
        model: a folder, a name on the hub, or a model object.
        tokenizer: the tokenizer; needed for text when ``model`` is an object.
        rename: new names for modules, as for :class:`NNsight`.
        aliases: the same as a plan, as for :class:`NNsight`.
        dispatch: load the weights at once.
        automodel: the class that loads the model, or its name in transformers; ``AutoModelForCausalLM`` if None.
        tokenizer_kwargs: handed on to ``AutoTokenizer.from_pretrained``.
        kwargs: handed on to the ``from_pretrained`` of ``automodel``: ``device_map``, ``dtype``, ``revision``, ...

    Raises:
        ModelNotFoundError: ``model`` names nothing that can be loaded.
        MissingWeightsError: some of the weights are not there; said when they are loaded.
        OptionError: an option that neither the loading nor the model's config knows.
    """

    tokenizer: PreTrainedTokenizerBase | None
    _longest_fit = 0

    def __init__(
        self,
        model: str | Path | torch.nn.Module | Checkpoint,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rename: Rename | None = None,
        aliases: Mapping[str, Names] | None = None,
        *,
        dispatch: bool = False,
        automodel: str | type[Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown({"envoys"} & kwargs.keys())
        if isinstance(model, torch.nn.Module):
            given = {"automodel": automodel, "tokenizer_kwargs": tokenizer_kwargs}
            refuse_loading_options({**{name: each for name, each in given.items() if each is not None}, **kwargs})
            super().__init__(model, rename, aliases)
            self._tree.example = _two_tokens
            self.tokenizer = tokenizer
            return
        if not isinstance(model, Checkpoint):
            model = Checkpoint(model, automodel or "AutoModelForCausalLM", **kwargs)
        super().__init__(model.module, rename, aliases)
        self._tree.example = _two_tokens
        self.tokenizer = tokenizer or model.tokenizer(**(tokenizer_kwargs or {}))
        if not model.is_loaded:
            self._tree.home = model.home()
            self._tree.unloaded = LazyWeights(model, self._tree, self._check_loaded)
            self._tree.envoys.add(self)
        if dispatch:
            self.dispatch()

    def _twin(self) -> LanguageModel:
        twin = super()._twin()
        assert isinstance(twin, LanguageModel)
        if isinstance(twin._tree.unloaded, LazyWeights):
            twin._tree.unloaded.serve(twin._check_loaded)
        return twin

    def dispatch(self) -> None:
        """Load the weights now, if that has not been done.

        Raises:
            ModelNotFoundError: they are not there, or cannot be read.
            MissingWeightsError: some of them are not there.
        """
        self._tree.load()

    @property
    def dispatched(self) -> bool:
        """Whether the weights are loaded."""
        return self._tree.unloaded is None

    def _check_loaded(self) -> None:
        """Called when the weights have been loaded; what it raises, every use of the model raises."""

    def _is_input(self, kwargs: dict[str, Any]) -> bool:
        return any(isinstance(each, (torch.Tensor, list, tuple)) for each in kwargs.values())

    def _prepare(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Call:
        if len(inputs) > 1:
            raise InputError(
                f"trace() was given {len(inputs)} inputs by position. Give several prompts as one list:\n"
                "    with model.trace([first_prompt, second_prompt]): ..."
            )
        given = inputs[0] if inputs else None
        if kwargs or options:
            kwargs, options = self._sorted_options(given, kwargs, options)
        if not inputs:
            if not kwargs:
                raise MissingInputError()
            return Call(self._module, (), kwargs)
        if isinstance(given, torch.Tensor):
            ids = given if given.ndim > 1 else given[None]
            if not ids.numel():
                raise EmptyPromptError(0, len(ids))
            return self._batch_call({"input_ids": ids}, kwargs)
        if isinstance(given, Mapping):
            # Tokenizers make more than some models take.
            made = {*_TOKEN_INPUTS, "token_type_ids", *getattr(self.tokenizer, "model_input_names", ())}
            self._check_arguments(given.keys() - made)
            return self._batch_call({**given}, kwargs)
        rows = token_rows(self.tokenizer, given, options)
        return self._batch_call(padded(rows, self._filler()), kwargs)

    def _sorted_options(
        self, given: Any, kwargs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's arguments, and the tokenizer's options.

        Raises:
            OptionError: something that neither of them takes.
        """
        forward = inspect.signature(self._module.forward).parameters
        if is_text(given):
            # Scripts of some eras give the tokenizer's options beside the prompt.
            own = {name for name in kwargs if name not in forward and name in tokenizer_options(self.tokenizer)}
            options = {**options, **{name: kwargs[name] for name in own}}
            kwargs = {name: value for name, value in kwargs.items() if name not in own}
        else:
            refuse_options(options, "this input is not text")
        self._check_arguments(kwargs)
        return kwargs, options

    def _check_arguments(self, names: Iterable[str]) -> None:
        """transformers' models hand on what they do not know, and in the end nobody looks at it."""
        forward = inspect.signature(self._module.forward).parameters
        unknown = [name for name in names if name not in forward]
        # Whoever wrote a model of his own may look into its **kwargs, so only transformers' models are known so well.
        if not unknown or not type(self._module).__module__.startswith("transformers."):
            return
        known = {*forward, *parameters_inside(self._module), *TransformersKwargs.__annotations__, "return_dict"}
        for name in unknown:
            if name not in known:
                mend = ""
                if hasattr(GenerationConfig(), name):
                    mend = "It belongs to a generation: model.generate(prompt, ...)."
                elif name in tokenizer_options(self.tokenizer):
                    mend = "It is the tokenizer's, but this input is not text."
                what = f"{type(self._module).__name__} takes no such argument, and nobody would look at it."
                raise OptionError(name, what, known - {"args", "kwargs"}, mend)

    def generate(
        self, *inputs: Any, trace: bool = True, invoker_args: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Open a trace of a generation: the model is run once for the prompt and once for each further token.

        >>> from nnsight_core import LanguageModel
        >>> from nnterp.demo_models import demo_model_path
        >>> model = LanguageModel(demo_model_path("demo-gpt2"))
        >>> with model.generate("The Eiffel Tower is in the city of", max_new_tokens=2) as tracer:
        ...     last = [model.lm_head.output[:, -1].argmax(-1).save() for step in tracer.iter[:]]
        ...     tokens = model.generator.output.save()
        >>> [token.item() for token in last] == tokens[0, -2:].tolist()
        True

        Args:
            inputs: the prompts, as for :meth:`trace`; none if they come from invokes.
            trace: ``False`` generates at once, without a block, and gives what transformers' ``generate`` gives.
            invoker_args: options for the tokenizer.
            kwargs: any arguments of transformers' ``generate``.
        """
        module: Any = self._module
        if not hasattr(module, "generate"):
            raise InputError(
                f"{type(module).__name__} has no method `generate`, so it cannot go on with a prompt by itself.\n"
                "Trace it once for each token, or give the class transformers' GenerationMixin."
            )
        options = invoker_options(invoker_args)
        generation = without_old_options(unwrap(kwargs), module.generate)
        prepare = partial(self._prepare_generation, *inputs, options=options, generation=generation)
        if not trace:
            return self._run(prepare)
        keeps_output = not inputs
        return Tracer(
            self, prepare, self._combine, self._result, bool(inputs), in_steps=True, keeps_output=keeps_output
        )

    def _prepare_generation(self, *inputs: Any, generation: dict[str, Any], **given: Any) -> Call:
        call = self._prepare_input(*inputs, defaults={}, **given)
        tokens = {name: value for name, value in call.kwargs.items() if name != "position_ids"}
        if "input_ids" in tokens:
            tokens.setdefault("attention_mask", torch.ones_like(tokens["input_ids"]))
        module: Any = self._module
        run = partial(module.generate, **generation)
        return replace(call, function=run, kwargs=tokens, runs_repeatedly=True)

    @property
    def generator(self) -> Envoy:
        """The end of a generation: ``model.generator.output`` are all tokens, (batch, position), prompts included."""
        return self._result

    def _batch_call(self, batch: dict[str, Any], kwargs: dict[str, Any]) -> Call:
        weight = _first_parameter(self._module)
        if weight is not None:
            # What is on meta comes from elsewhere when it is needed, or is not loaded.
            device = input_device(self._module, self._tree.home) if weight.is_meta else weight.device
            for name, each in batch.items():
                if isinstance(each, torch.Tensor) and each.device != device:
                    batch[name] = each.to(device)
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None:
            return Call(self._module, (), {**batch, **kwargs})
        accepted = _parameters(type(self._module).forward)
        padding = None
        if mask is None or mask.ndim != 2 or bool(mask.all()):
            self._check_lengths((ids.shape[-1],))
        else:
            self._check_lengths(mask.sum(-1).tolist())
            if not bool(mask[:, -1].all()):
                raise InputError(
                    "This batch is padded on the right, where the last position of a short prompt is no token of it.\n"
                    "Pad on the left (tokenizer.padding_side = 'left'), or give the prompts as text."
                )
            padding = _left_padding(mask)
            if "position_ids" not in kwargs and "position_ids" not in batch:
                way = way_to_pad(self._module, ids, mask, self._filler())
                if way == "impossible":
                    raise PaddingError(type(self._module).__name__)
                if way == "counted":
                    # Models that learn a vector for each position would otherwise count the padding.
                    batch["position_ids"] = self._positions(mask)
        if "input_ids" not in accepted and not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
            return self._plain_call(batch, kwargs, padding)
        return Call(self._module, (), {**batch, **kwargs}, padding, ids.shape[-1])

    def _plain_call(self, batch: dict[str, Any], kwargs: dict[str, Any], padding: Sequence[int] | None) -> Call:
        """The call of a module that does not know transformers' names: its first argument are the tokens."""
        if padding is not None and any(padding):
            raise InputError(
                f"{type(self._module).__name__} takes no attention_mask, so prompts of one batch must have the same "
                "length.\nGive prompts of different lengths one at a time."
            )
        ids, name = batch["input_ids"], next(iter(inspect.signature(self._module.forward).parameters), "")
        return Call(self._module, (), {name: ids, **kwargs}, None, ids.shape[-1], names={name: "input_ids"})

    def _combine(self, calls: list[Call]) -> tuple[Call, list[int]]:
        tokens = [{k: v for k, v in call.inputs.items() if k in _TOKEN_INPUTS} for call in calls]
        if any("input_ids" not in each for each in tokens):
            return super()._combine(calls)
        lengths = [each["input_ids"].shape[-1] for each in tokens]
        longest = max(lengths)
        counted = any("position_ids" in each for each in tokens)
        # Prompts of one length that came without a mask need none together either, and the model is faster without.
        masked = counted or min(lengths) < longest or any("attention_mask" in each for each in tokens)
        for each, length in zip(tokens, lengths, strict=True) if masked else ():
            each.setdefault("attention_mask", torch.ones_like(each["input_ids"]))
            if counted:
                each.setdefault("position_ids", self._positions(each["attention_mask"]))
            if length < longest:
                for name, value in each.items():
                    filler = self._filler() if name == "input_ids" else 0
                    each[name] = torch.nn.functional.pad(value, (longest - length, 0), value=filler)
        others = [{k: v for k, v in call.inputs.items() if k not in _TOKEN_INPUTS} for call in calls]
        first, sizes = calls[0], [len(each["input_ids"]) for each in tokens]
        call = self._batch_call(joined(tokens), joined(others))
        if first.runs_repeatedly:
            call.kwargs.pop("position_ids", None)
        return replace(call, function=first.function, runs_repeatedly=first.runs_repeatedly), sizes

    def _positions(self, mask: torch.Tensor) -> torch.Tensor:
        """The number of each position, (batch, position), of those that ``mask`` has."""
        return counted_positions(mask)

    def _filler(self) -> int:
        # The tokens under the mask are never seen, so a tokenizer without a padding token needs none.
        known = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((each for each in known if each is not None), 0)

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        # Reading a configuration takes longer than one would think, and what has fitted once fits again.
        longest = max(lengths)
        if longest <= self._longest_fit:
            return
        limit = getattr(getattr(self._module, "config", None), "max_position_embeddings", None)
        for index, length in enumerate(lengths):
            if isinstance(limit, int) and 0 < limit < length:
                raise PromptTooLongError(index, length, limit, type(self._module).__name__)
        self._longest_fit = longest


def _first_parameter(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """The first of ``module.parameters()``, without going through all modules for it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


@lru_cache(maxsize=64)
def _parameters(forward: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class's forward; asked for at every trace, and slow to find."""
    return inspect.signature(forward).parameters


def _two_tokens(module: torch.nn.Module) -> Pair:
    """The smallest call that shows how the model works on a prompt."""
    ids = torch.tensor([[1, 2]], device=input_device(module))
    return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _left_padding(mask: torch.Tensor) -> tuple[int, ...]:
    """How many padded positions stand before the first token of each row of ``mask``, (batch, position)."""
    return tuple(int(left) for left in (mask != 0).int().argmax(dim=-1))
