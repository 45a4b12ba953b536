"""Where a value inside one layer comes from: followed backwards through the calls that made it, by numbers."""

from __future__ import annotations

import torch

from nnterp.inference.numbers import alike, distance, is_norm, shaped_like
from nnterp.inference.probe import POSITIONS, Call

__all__ = ["Flow"]

#: How deep below a layer its parts are looked for.
DEPTH = 3
#: By how much of its size a number has changed if something else than rounding changed it.
NOTICED = 1e-4


class Flow:
    """The calls of one layer, and questions about them.

    Args:
        layer: the call of the layer.
    """

    def __init__(self, layer: Call) -> None:
        assert layer.given is not None and layer.made is not None
        self.layer = layer
        self.given: torch.Tensor = layer.given
        self.made: torch.Tensor = layer.made
        self._names: dict[torch.nn.Module, str] = {module: name for name, module in layer.module.named_modules()}
        self.calls = [call for call in layer.inside() if self.relative(call).count(".") < DEPTH]
        self._norms: dict[Call, bool] = {}
        self._kinds: dict[Call, str | None] = {}

    def relative(self, call: Call) -> str:
        """The call's path from the layer: a module that serves several layers has a name in each of them."""
        return self._names.get(call.module, call.path)

    def steps(self) -> list[Call]:
        """What gives something of the stream's shape that is neither the layer's input nor its output: of equal values
        the one that ends last, as it alone gives them also where dropout is on."""
        found: list[Call] = []
        runs = {call.module: sum(other.module is call.module for other in self.layer.inside()) for call in self.calls}
        for call in sorted(self.calls, key=lambda each: each.end, reverse=True):
            value = shaped_like(call.made, self.given)
            # A module that runs twice does not say by its name which of its values is meant.
            if value is None or runs[call.module] > 1 or not bool((value != 0).any()):
                continue
            known = [self.given, self.made, *(each.made for each in found)]
            if not any(alike(value, other) for other in known):
                found.append(call)
        return sorted(found, key=lambda each: each.begin)

    def is_norm(self, call: Call) -> bool:
        """Whether the call is one of a norm."""
        if call not in self._norms:
            same_shape = call.given is not None and call.made is not None and call.given.shape == call.made.shape
            self._norms[call] = bool(
                same_shape
                and not call.attends
                and call.given is not None
                and call.given.is_floating_point()
                and is_norm(call.module, call.given, call.args, call.kwargs)
            )
        return self._norms[call]

    def changes_nothing(self, call: Call) -> bool:
        """Whether the call gives what it took, as a dropout does."""
        return call.given is not None and alike(call.made, call.given)

    def norms(self) -> list[Call]:
        """The norms that run over values of the stream's shape, in order."""
        return [call for call in self.calls if shaped_like(call.made, self.given) is not None and self.is_norm(call)]

    def producer(self, value: torch.Tensor | None, before: int) -> Call | None:
        """What gave this value: of several calls the one that ended last before `before`."""
        if value is None:
            return None
        fits = [call for call in self.calls if call.end < before and not self.changes_nothing(call)]
        fits = [call for call in fits if call.made is not None and alike(call.made, value)]
        return max(fits, key=lambda call: call.end, default=None)

    def origin(self, call: Call) -> Call:
        """The call in which a value is worked out that only goes through norms and dropouts afterwards."""
        while self.is_norm(call) or self.changes_nothing(call):
            before = self.producer(call.given, call.begin)
            if before is None:
                return call
            call = before
        return call

    def mixer_kind(self, call: Call) -> str | None:
        """How the call lets one position see others; None where it does not, as an MLP."""
        if call not in self._kinds:
            self._kinds[call] = "attention" if call.patterns else _mixer_kind(call)
        return self._kinds[call]


#: What the classes of mixers are called: the last resort, where numbers do not tell.
WORDS = {
    "state_space": ("mamba", "ssm", "ssd"),
    "recurrent": ("recurrent", "lstm", "rwkv", "gru", "rnn"),
    "convolution": ("conv",),
    "linear_attention": ("linear", "delta", "lightning", "retention", "attn", "attention", "mixer"),
}


def _mixer_kind(call: Call) -> str | None:
    """The call is done again with one position changed: does another position notice, and how far away?"""
    name = f"{type(call.module).__name__} {call.path.rpartition('.')[2]}".lower()
    named = next((kind for kind, words in WORDS.items() if any(word in name for word in words)), None)
    given, made = call.given, call.made
    if given is None or made is None or not given.is_floating_point():
        return None
    if given.ndim != 3 or made.shape[:2] != given.shape[:2] or given.shape[1] != POSITIONS:
        return None
    where = 1
    changed = given.clone()
    changed[:, where] = given[:, where].flip(-1) * 1.5 + 0.5 * given[:, where - 1]
    new = _again(call, changed)
    if new is None or new.shape != made.shape:
        return named
    least = NOTICED / torch.finfo(made.dtype).eps
    apart = [distance(new[:, each], made[:, each]) > least for each in range(POSITIONS)]
    if not any(apart[:where] + apart[where + 1 :]):
        return None
    # A convolution forgets what is more than its width ago; what else there is, no number tells apart.
    return named or ("linear_attention" if any(apart[-3:]) else "convolution")


def _again(call: Call, changed: torch.Tensor) -> torch.Tensor | None:
    """What the call gives for another first tensor; None where it cannot be made on its own."""

    def swap(value: object) -> object:
        return changed if value is call.given else value.clone() if isinstance(value, torch.Tensor) else value

    try:
        with torch.no_grad():
            again = call.module(*[swap(each) for each in call.args], **{k: swap(v) for k, v in call.kwargs.items()})
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError):
        return None
    return again if isinstance(again, torch.Tensor) else next((v for v in again if isinstance(v, torch.Tensor)), None)
