"""Attention probabilities by the names of scripts that look for them themselves: a source of one's own, and a check.

`model.attention_probabilities[layer]` reads and sets them without any of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from nnsight_core.envoy import Envoy
from nnterp.accessors import Place, ValueAccess, read, write
from nnterp.attention import AttentionAccess, open_place
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


class OwnProbabilities(AttentionAccess):
    """``model.attention_probabilities`` where the user says what makes them: that wins over what is found.

    Args:
        found: the accessor whose place this one takes.
        source: from a layer's attention module to the operation whose ``.output`` are the probabilities.
    """

    def __init__(self, found: AttentionAccess, source: Callable[[Envoy], Any]) -> None:
        self.__dict__.update(vars(found))
        self._source = source

    def _operation(self, layer: int) -> Any:
        return self._source(self._root.get(ValueAccess.place(self, layer).path))

    def is_open(self, layer: int) -> bool:
        """Whether the layer has attention: what is in it the user has said."""
        return self.has(layer)

    def __getitem__(self, layer: int) -> Any:
        return self._operation(layer).output

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        self._operation(layer).output = value


class AttentionProbabilitiesAccessor:
    """Attention probabilities by layer, (batch, head, query, key), from a source of one's own where there is one.

        own = AttentionProbabilitiesAccessor(model, RenameConfig(attn_prob_source=Mine()))
        own.check_source()
        with model.trace("The Eiffel Tower"):
            own[3][:, 2] = 0

    Without a source it is ``model.attention_probabilities``.

    Args:
        model: a `StandardizedTransformer`.
        rename_config: its ``attn_prob_source`` is called with a layer's attention module, and gives the operation whose
            ``.output`` are the probabilities. Given to `StandardizedTransformer`, it is that of
            ``model.attention_probabilities``, too.
        initialized_with_enable: accepted for scripts that set it; nothing has to be enabled.
    """

    def __init__(self, model: Any, rename_config: Any = None, initialized_with_enable: bool = False) -> None:
        self.model = model
        self.enabled = True
        self._source = getattr(rename_config, "attn_prob_source", None)

    def disable(self) -> None:
        """Refuse to read and to set from now on."""
        self.enabled = False

    def _operation(self, layer: int) -> Any:
        """The operation that the source of one's own names; None without one."""
        if not self.enabled:
            raise UsageError(f"The attention probabilities of layer {layer} were asked for after disable().")
        return None if self._source is None else self._source(self.model.attentions[layer])

    def __getitem__(self, layer: int) -> Any:
        """The probabilities of a layer, (batch, head, query, key), in a trace."""
        operation = self._operation(layer)
        return self.model.attention_probabilities[layer] if operation is None else operation.output

    def __setitem__(self, layer: int, value: Any) -> None:
        """Lets the model go on with other probabilities."""
        operation = self._operation(layer)
        if operation is None:
            self.model.attention_probabilities[layer] = value
        else:
            operation.output = value

    def check_source(self, layer: int = 0, allow_dispatch: bool = True, use_trace: bool = True) -> None:
        """Checks by numbers, with two small passes, that these are the probabilities that the model goes on with.

        >>> from nnterp import StandardizedTransformer
        >>> AttentionProbabilitiesAccessor(StandardizedTransformer("demo-gpt2")).check_source(layer=2)

        Args:
            layer: which layer.
            allow_dispatch: load the weights for it, if they are not there yet; without them nothing is checked.
            use_trace: accepted for scripts that set it; only a pass can tell.

        Raises:
            RenamingError: they are no probabilities, of another shape, or the model does not go on with them.
        """
        if not (self.model.dispatched or allow_dispatch):
            return
        ids = torch.arange(CHECKED)[None] % self.model.vocab_size
        with torch.no_grad():
            with self.model.trace(ids):
                found = self[layer].save()
                before = self.model.logits.save()
            wanted = (1, self.model.num_heads, CHECKED, CHECKED)
            values = found.value.float()
            if tuple(values.shape) != wanted:
                raise self._wrong(layer, f"of shape {tuple(values.shape)} and not (batch, head, query, key) = {wanted}")
            off = float((values.sum(-1) - 1).abs().max())
            if off > 1e-2 or float(values.min()) < 0:
                raise self._wrong(layer, f"no probabilities: for some query they add up to 1 only within {off:.3g}")
            with self.model.trace(ids):
                self[layer] = self[layer].flip(-1)
                after = self.model.logits.save()
        if torch.equal(before.value, after.value):
            raise self._wrong(layer, "nothing that the model goes on with: its logits are the same when they change")

    def _wrong(self, layer: int, what: str) -> RenamingError:
        name = "model.attention_probabilities" if self._source is None else f"attn_prob_source {self._source!r}"
        return RenamingError(
            f"What {name} gives for layer {layer} is {what}.\n"
            f"Choose another operation of model.attentions[{layer}].source, or give no source of your own."
        )

    def print_source(self, layer: int = 0, allow_dispatch: bool = True) -> None:
        """Writes to the terminal which operations a layer's attention runs, line by line."""
        if self.model.dispatched or allow_dispatch:
            sys.stdout.write(f"{self.model.attentions[layer].source}\n")
