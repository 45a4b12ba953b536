"""Attention probabilities from wherever they are made: found, or from a source of the user's, and checked by numbers.

model.attention_probabilities[3]                      # in a trace, read and set
model.attention_probabilities.check_source(layer=3)   # are they what the model goes on with?
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.source import Operation
from nnterp.accessors import Place, ValueAccess, read, write
from nnterp.attention import AttentionAccess, open_place, told
from nnterp.attention_places import Attention
from nnterp.errors import RenamingError, UsageError

__all__ = [
    "AttentionProbabilitiesAccessor",
    "bloom_attention_prob_source",
    "default_attention_prob_source",
    "gpt2_attention_prob_source",
    "gptj_attention_prob_source",
]

#: So many tokens tell a wrong axis from a right one.
CHECKED = 5


class ProbabilitySource:
    """Where one attention module makes its probabilities; ``.output`` is read and set in a trace.

    Args:
        attention_module: the module, such as ``model.attentions[3]``.

    Raises:
        ClosedAttentionError: its attention cannot be opened.
    """

    def __init__(self, attention_module: Envoy) -> None:
        self._envoy = attention_module
        label = f"The attention probabilities of {attention_module.path}"
        self._place: Place
        self._place, places = open_place(Attention(attention_module, "", 1, 0), "probabilities", label)
        for path in places.counted:
            _ = attention_module.get(path).source

    @property
    def output(self) -> Any:
        """The probabilities, (batch, head, query, key); for each query they add up to 1."""
        return read(self._envoy, self._place)

    @output.setter
    def output(self, value: Any) -> None:
        write(self._envoy, self._place, value)


def default_attention_prob_source(attention_module: Envoy, return_module_source: bool = False) -> Any:
    """What makes the probabilities in an attention module of any family; its ``.output`` is read and set in a trace.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> with model.trace("The Eiffel Tower"):
    ...     probabilities = default_attention_prob_source(model.attentions[1]).output.save()
    >>> probabilities.shape == (1, model.num_heads, 3, 3)
    True

    Args:
        attention_module: the module, such as ``model.attentions[3]``.
        return_module_source: give all operations of the module instead, ``attention_module.source``.

    Raises:
        ClosedAttentionError: the attention cannot be opened.
    """
    return attention_module.source if return_module_source else ProbabilitySource(attention_module)


def bloom_attention_prob_source(attention_module: Envoy, return_module_source: bool = False) -> Any:
    """The same as :func:`default_attention_prob_source`, which serves every family."""
    return default_attention_prob_source(attention_module, return_module_source)


def gpt2_attention_prob_source(attention_module: Envoy, return_module_source: bool = False) -> Any:
    """The same as :func:`default_attention_prob_source`, which serves every family."""
    return default_attention_prob_source(attention_module, return_module_source)


def gptj_attention_prob_source(attention_module: Envoy, return_module_source: bool = False) -> Any:
    """The same as :func:`default_attention_prob_source`, which serves every family."""
    return default_attention_prob_source(attention_module, return_module_source)


class AttentionProbabilitiesAccessor(AttentionAccess):
    """``model.attention_probabilities``: by layer (batch, head, query, key), read and set; for each query they add up
    to 1.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower"):
    ...     model.attention_probabilities[3][:, 2] = 0      # head 2 of layer 3 looks at nothing
    ...     logits = model.logits.save()

    They are found in the layer's attention, see :class:`~nnterp.attention.AttentionAccess`, unless the user says what
    makes them, by ``attn_prob_source`` of a `RenameConfig`. A script may make accessors of its own.

    Args:
        model: a `StandardizedTransformer`.
        rename_config: its ``attn_prob_source`` is called with a layer's attention module, and gives the operation whose
            ``.output`` are the probabilities.
        initialized_with_enable: accepted for scripts that set it; nothing has to be enabled.

    Raises:
        ClosedAttentionError: a layer's attention cannot be opened, and there is no source of the user's.
        UsageError: they are asked for after :meth:`disable`.
    """

    def __init__(self, model: Any, rename_config: Any = None, initialized_with_enable: bool = False) -> None:
        self.__dict__.update(vars(model.attention_probabilities))
        said = getattr(rename_config, "attn_prob_source", None)
        self._source: Callable[[Envoy], Any] | None = said or self.__dict__.get("_source")
        self._model: Callable[[], Any] = partial(_itself, model)
        self.enabled = True

    @classmethod
    def of(cls, model: Any, source: Callable[[Envoy], Any] | None) -> AttentionProbabilitiesAccessor:
        """A model's own: the model holds it, so that it does not hold the model."""
        made = cls(model)
        made._source, made._model = source, weakref.ref(model)
        return made

    def disable(self) -> None:
        """Refuse to read and to set from now on."""
        self.enabled = False

    def is_open(self, layer: int) -> bool:
        """Whether they can be had of a layer as the model runs now."""
        return self.enabled and (self.has(layer) if self._source is not None else super().is_open(layer))

    def _module(self, layer: int) -> Envoy:
        return self._root.get(ValueAccess.place(self, layer).path)

    def _operation(self, layer: int) -> Any:
        """The operation that the user's source names; None without one."""
        if not self.enabled:
            raise UsageError(f"The attention probabilities of layer {layer} were asked for after disable().")
        return None if self._source is None else self._source(self._module(layer))

    def __getitem__(self, layer: int) -> Any:
        operation = self._operation(layer)
        return super().__getitem__(layer) if operation is None else operation.output

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        operation = self._operation(layer)
        if operation is None:
            super().__setitem__(layer, value)
        else:
            operation.output = value

    def check_source(self, layer: int = 0, allow_dispatch: bool = True, use_trace: bool = True) -> None:
        """Checks by numbers, with two small passes, that these are the probabilities that the model goes on with.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> model.attention_probabilities.check_source(layer=2)

        Args:
            layer: which layer.
            allow_dispatch: load the weights for it, if they are not there yet; without them nothing is checked.
            use_trace: accepted for scripts that set it; only a pass can tell.

        Raises:
            RenamingError: they are no probabilities, of another shape, or the model does not go on with them.
        """
        model = self._model()
        if not (model.dispatched or allow_dispatch):
            return
        ids = torch.arange(CHECKED)[None] % model.vocab_size
        with torch.no_grad():
            with model.trace(ids):
                found = self[layer].save()
                before = model.logits.save()
            wanted = (1, model.num_heads, CHECKED, CHECKED)
            values = found.value.float()
            if tuple(values.shape) != wanted:
                raise self._wrong(layer, f"of shape {tuple(values.shape)} and not (batch, head, query, key) = {wanted}")
            off = float((values.sum(-1) - 1).abs().max())
            if off > 1e-2 or float(values.min()) < 0:
                raise self._wrong(layer, f"no probabilities: for some query they add up to 1 only within {off:.3g}")
            with model.trace(ids):
                self[layer] = self[layer].flip(-1)
                after = model.logits.save()
        if torch.equal(before.value, after.value):
            raise self._wrong(layer, "nothing that the model goes on with: its logits are the same when they change")

    def _wrong(self, layer: int, what: str) -> RenamingError:
        name = "model.attention_probabilities" if self._source is None else f"attn_prob_source {self._source!r}"
        return RenamingError(
            f"What {name} gives for layer {layer} is {what}.\n"
            f"Choose another operation of model.attentions[{layer}].source, or give no source of your own."
        )

    def source_of(self, layer: int) -> str:
        """Which operation the value is taken from, and the file and line that call it.

        Raises:
            MissingPartError: the layer has no attention.
            ClosedAttentionError: its attention cannot be opened.
        """
        operation = self._operation(layer)
        if operation is None or isinstance(operation, ProbabilitySource):
            return super().source_of(layer)
        label, path = f"{self.name}[{self.position(layer)}]", self._module(layer).path
        if isinstance(operation, Operation):
            return told(label, "output", operation, path)
        return f"{label}: output of {operation!r}, which attn_prob_source gives for {path}"


def _itself(value: Any) -> Any:
    return value
