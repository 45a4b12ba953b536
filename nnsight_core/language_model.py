"""A language model: text comes in, is tokenised and padded on the left, and goes through the model as one batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nnsight_core.arguments import unwrap
from nnsight_core.batching import joined
from nnsight_core.devices import input_device
from nnsight_core.envoy import Envoy, Names
from nnsight_core.errors import EmptyPromptError, InputError, MissingInputError, PromptTooLongError
from nnsight_core.loading import Checkpoint, LazyWeights, refuse_loading_options
from nnsight_core.model import NNsight
from nnsight_core.passes import Call
from nnsight_core.tracer import Tracer

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
        aliases: extra names for modules, as for :class:`NNsight`.
        dispatch: load the weights at once.
        automodel: the class that loads the model, or its name in transformers; ``AutoModelForCausalLM`` if None.
        tokenizer_kwargs: handed on to ``AutoTokenizer.from_pretrained``.
        kwargs: handed on to the ``from_pretrained`` of ``automodel``: ``device_map``, ``dtype``, ``revision``, ...

    Raises:
        ModelNotFoundError: ``model`` names nothing that can be loaded.
        MissingWeightsError: some of the weights are not there; said when they are loaded.
    """

    tokenizer: PreTrainedTokenizerBase | None
    _longest_fit = 0

    def __init__(
        self,
        model: str | Path | torch.nn.Module | Checkpoint,
        tokenizer: PreTrainedTokenizerBase | None = None,
        aliases: Mapping[str, Names] | None = None,
        *,
        dispatch: bool = False,
        automodel: str | type[Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, torch.nn.Module):
            given = {"automodel": automodel, "tokenizer_kwargs": tokenizer_kwargs}
            refuse_loading_options({**{name: each for name, each in given.items() if each is not None}, **kwargs})
            super().__init__(model, aliases)
            self.tokenizer = tokenizer
            return
        if not isinstance(model, Checkpoint):
            model = Checkpoint(model, automodel or "AutoModelForCausalLM", **kwargs)
        super().__init__(model.module, aliases)
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

    def _prepare(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Call:
        if not inputs:
            if not kwargs:
                raise MissingInputError()
            return Call(self._module, (), kwargs)
        if len(inputs) > 1:
            raise InputError(
                f"trace() was given {len(inputs)} inputs by position. Give several prompts as one list:\n"
                "    with model.trace([first_prompt, second_prompt]): ..."
            )
        given = inputs[0]
        if isinstance(given, torch.Tensor):
            ids = given if given.ndim > 1 else given[None]
            if not ids.numel():
                raise EmptyPromptError(0, len(ids))
            return self._batch_call({"input_ids": ids}, kwargs)
        if isinstance(given, Mapping):
            return self._batch_call({**given}, kwargs)
        rows = self._token_rows(given, options)
        return self._batch_call(self._padded(rows), kwargs)

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
            trace: ``False`` generates at once, without a block, and gives the plain tokens.
            invoker_args: options for the tokenizer.
            kwargs: any arguments of transformers' ``generate``.
        """
        prepare = partial(self._prepare_generation, options=dict(invoker_args or {}), generation=unwrap(kwargs))
        if not trace:
            return self._run(partial(prepare, *inputs))
        if not inputs:
            return Tracer(self, prepare, self._combine, self._result, has_input=False)
        return Tracer(self, partial(prepare, *inputs), self._combine, self._result, has_input=True)

    def _prepare_generation(self, *inputs: Any, options: dict[str, Any], generation: dict[str, Any]) -> Call:
        call = self._prepare(unwrap(inputs), {}, options)
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
            accepted = inspect.signature(self._module.forward).parameters
            if "position_ids" in accepted and "position_ids" not in kwargs:
                # Models that learn a vector for each position would otherwise count the padding.
                batch.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
        return Call(self._module, (), {**batch, **kwargs}, padding, ids.shape[-1])

    def _combine(self, calls: list[Call]) -> tuple[Call, list[int]]:
        tokens = [{k: v for k, v in call.kwargs.items() if k in _TOKEN_INPUTS} for call in calls]
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
                each.setdefault("position_ids", (each["attention_mask"].cumsum(-1) - 1).clamp(min=0))
            if length < longest:
                for name, value in each.items():
                    filler = self._filler() if name == "input_ids" else 0
                    each[name] = torch.nn.functional.pad(value, (longest - length, 0), value=filler)
        others = [{k: v for k, v in call.kwargs.items() if k not in _TOKEN_INPUTS} for call in calls]
        first, sizes = calls[0], [len(each["input_ids"]) for each in tokens]
        call = self._batch_call(joined(tokens), joined(others))
        if first.runs_repeatedly:
            call.kwargs.pop("position_ids", None)
        return replace(call, function=first.function, runs_repeatedly=first.runs_repeatedly), sizes

    def _filler(self) -> int:
        # The tokens under the mask are never seen, so a tokenizer without a padding token needs none.
        known = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((each for each in known if each is not None), 0)

    def _token_rows(self, given: Any, options: dict[str, Any]) -> list[list[int]]:
        """Every prompt as a list of token ids."""
        if isinstance(given, str):
            return self._tokenised([given], options)
        if isinstance(given, torch.Tensor):
            rows: list[list[int]] = given.tolist() if given.ndim == 2 else [given.tolist()]
            return rows
        if not isinstance(given, Sequence):
            raise InputError(
                f"A prompt is text, token ids or a dict of tensors, not a {type(given).__name__}: {given!r:.80}"
            )
        if not given:
            raise EmptyPromptError(0, 0)
        if all(isinstance(each, str) for each in given):
            return self._tokenised(list(given), options)
        if all(isinstance(each, int) for each in given):
            return [list(given)]
        return [row for each in given for row in (self._token_rows(each, options) if len(each) else [[]])]

    def _tokenised(self, texts: list[str], options: dict[str, Any]) -> list[list[int]]:
        if self.tokenizer is None:
            raise InputError(
                "This model was wrapped without a tokenizer, so it cannot read text.\n"
                "Give it one, LanguageModel(model, tokenizer=...), or give token ids instead of text."
            )
        rows: list[list[int]] = self.tokenizer(texts, **options)["input_ids"]
        return rows

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        for index, row in enumerate(rows):
            if not row:
                raise EmptyPromptError(index, len(rows))
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self._filler())
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

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


def _left_padding(mask: torch.Tensor) -> tuple[int, ...]:
    """How many padded positions stand before the first token of each row of ``mask``, (batch, position)."""
    return tuple(int(left) for left in (mask != 0).int().argmax(dim=-1))
