"""What a layer without attention knows of all positions so far: the state of its recurrence after the last of them.

Models keep it in the cache that the mixer is called with, give it beside their output, or hold it themselves; where, a
family's specification says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.arguments import is_same_value, pending_tape
from nnsight_core.sites import user_site
from nnterp.accessors import Layers, fitted
from nnterp.errors import MissingPartError, UsageError

if TYPE_CHECKING:
    from nnsight_core.envoy import Envoy
    from nnsight_core.rows import Rows
    from nnsight_core.scope import Scope
    from nnsight_core.values import Pair
    from nnterp.kept_path import KeptPath
    from nnterp.rename_plan import LayerPlan
    from nnterp.spec import ArchitectureSpec

__all__ = ["NoStateError", "StateAccess"]

NAME = "mixers_state"

#: What releases of transformers call the cache among the arguments of a mixer.
_CACHES = ("cache", "cache_params", "past_key_values")


class NoStateError(UsageError):
    """A state that the model does not keep in this pass."""

    def __init__(self, asked: str, path: str, origin: str) -> None:
        super().__init__(
            f"{asked} was asked for, but the model keeps no state in this pass: there is nothing at {path}, where "
            f"{origin} says that it is.\n"
            "Models keep states for the next token alone: trace it with use_cache=True, in eval mode, or generate."
        )


@dataclass(frozen=True)
class StatePlace:
    """Where the state of one layer is kept: its mixer, the layer's index, a path for each tensor, and who says so."""

    module: str
    layer: int
    paths: tuple[KeptPath, ...]
    origin: str


class StateAccess(Layers):
    """``mixers_state[i]``: the state of layer ``i``'s mixer after the last position of the pass, read and set.

    Its axes are those of the mixer's recurrence:

    - Mamba, Jamba, Falcon Mamba: (batch, channel, state)
    - Mamba 2, Bamba, Zamba, Falcon H1, Granite, Nemotron-H: (batch, head, head_dim, state)
    - linear attention, with or without the delta rule (Qwen 3 Next, Kimi, OLMo Hybrid, MiniMax):
      (batch, head, key_dim, value_dim)
    - RG-LRU (Recurrent Gemma): (batch, channel)
    - RWKV: numerator, denominator and largest exponent, each (batch, channel). Numerator and denominator are divided by
      e to the power of the exponent.
    - mLSTM (xLSTM): memory (batch, head, key_dim, value_dim), normaliser (batch, head, key_dim) and exponent
      (batch, head, 1), by which the first two are divided likewise
    - short convolutions (LFM2): their last inputs, (batch, channel, kernel), the newest last

    It is there when ``mixers_output[i]`` is. In a generation, it is the state after each step. What is set is what the
    next step goes on from; nothing in the same pass depends on it. The window of the short convolution that most such
    mixers have before their recurrence is no part of it.

    >>> import torch
    >>> from nnterp import StandardizedTransformer
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> module = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4))
    >>> model = StandardizedTransformer(module.eval())
    >>> with model.trace(torch.tensor([[3, 1, 4, 1, 5]])):
    ...     state = model.mixers_state[1].save()
    >>> state.shape
    torch.Size([1, 32, 4])

    Raises:
        MissingPartError: the layer keeps no such state, as one with attention does not.
        NoStateError: the model does not keep it in this pass.
        ShapeError: what is set has another shape.
        OutOfOrderError: the pass has gone by the mixer.
    """

    def __init__(self, root: Envoy, layers: tuple[LayerPlan, ...], spec: ArchitectureSpec) -> None:
        super().__init__(NAME, len(layers))
        self._root = root
        self._places = tuple(_place(index, layer, spec) for index, layer in enumerate(layers))
        self._spec = spec

    def has(self, layer: int) -> bool:
        """Whether the layer keeps a state."""
        return self._places[self.position(layer)] is not None

    def place(self, layer: int) -> StatePlace:
        """Where layer ``layer``'s state is kept.

        Raises:
            LayerIndexError: the model has no such layer.
            MissingPartError: the layer keeps none.
        """
        index = self.position(layer)
        place = self._places[index]
        if place is None:
            keeps = any(part.state for part in self._spec.layer.mixers().values())
            why = "its mixer keeps none; what attention has are the keys and values of each position."
            raise MissingPartError(f"{NAME}[{index}]", why if keeps else f"{self._spec.source} names none.")
        self._spec.refuse(NAME, f"{NAME}[{index}]")
        return place

    def __getitem__(self, layer: int) -> Any:
        return self._read(self.place(layer), setting=False)

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        place = self.place(layer)
        current = self._read(place, setting=True)
        # After `mixers_state[i] *= x` Python assigns the very proxy that was read and changed in place.
        if not is_same_value(current, value):
            current.update_value(_fitted, f"{NAME}[{place.layer}]", value)

    def _read(self, place: StatePlace, setting: bool) -> Any:
        mixer, label, site = self._root.get(place.module), f"{NAME}[{place.layer}]", user_site()
        output = mixer.read("output", label, setting, site)
        given = (output, mixer._trace(label).running(mixer._module), place)
        tape = pending_tape(output)
        return _kept(*given) if tape is None else tape.record(_kept, *given)


def _place(index: int, layer: LayerPlan, spec: ArchitectureSpec) -> StatePlace | None:
    part = next((each for each in layer.parts if each.state), None)
    if part is None or part.module is None:
        return None
    return StatePlace(part.module, index, part.state, spec.where(f"layer.{part.kind}.state"))


def _kept(output: Any, module: torch.nn.Module, place: StatePlace) -> Any:
    """The state as a part of the mixer's output: so it is there when that is, and can be set as long as that can."""
    kept = _Kept(place, module, output._origin.event.call)
    return output.as_part(kept.get, kept.put)


class _Kept:
    """A state in what the mixer was called with, has given, or holds."""

    def __init__(self, place: StatePlace, module: torch.nn.Module, call: Pair | None) -> None:
        self._place = place
        given = call[1] if call else {}
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        self._starts = {"cache": cache, "module": module}
        self._rows: Rows | None = None

    def get(self, output: Any, scope: Scope) -> Any:
        """The tensor, or a tuple of several, of its own: the model goes on to write into what it keeps."""
        self._rows = scope.rows
        found = [self._found(path, output)[self._own(path, output)].clone() for path in self._place.paths]
        return found[0] if len(found) == 1 else tuple(found)

    def put(self, output: Any, state: Any) -> Any:
        """The mixer's output, once ``state`` is kept."""
        for path, each in zip(self._place.paths, state if isinstance(state, tuple) else (state,), strict=True):
            whole = self._found(path, output).clone()
            whole[self._own(path, output)] = each
            start = output if path.root == "output" else self._starts[path.root]
            changed = path.put(start, self._place.layer, whole)
            output = changed if path.root == "output" else output
        return output

    def _found(self, path: KeptPath, output: Any) -> torch.Tensor:
        found = path.get(output if path.root == "output" else self._starts[path.root], self._place.layer)
        if not isinstance(found, torch.Tensor):
            raise NoStateError(f"{NAME}[{self._place.layer}]", path.text, self._place.origin)
        return found

    def _own(self, path: KeptPath, output: Any) -> slice:
        # An output comes cut to the rows of its input already.
        rows = None if path.root == "output" else self._rows
        return slice(None) if rows is None else rows.of_first_axis(len(self._found(path, output)))


def _fitted(old: Any, label: str, new: Any) -> Any:
    if isinstance(old, tuple):
        several = new if isinstance(new, (tuple, list)) and len(new) == len(old) else [new] * len(old)
        return tuple(_fitted(each, label, other) for each, other in zip(old, several, strict=True))
    return fitted(old, label, new)
