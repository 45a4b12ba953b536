"""One forward pass over a model that nobody has described: which module ran when, on what, and what it gave.

    probe = run_probe(model)
    [call.path for call in probe.calls if call.parent is probe.root]      # what the model itself calls, in order

Two prompts of a few tokens are enough: what is looked for holds for any numbers. The pass is watched from outside, by
hooks and by a mode that sees torch's functions, so that a model needs neither a config nor a class that is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nnsight_core.hooks import observing
from nnsight_core.values import NoTensorError, first_tensor, map_tensors
from nnterp.accessors import logits_of
from nnterp.calling import call_model, evaluating, some_tokens
from nnterp.inference.errors import ProbeError

__all__ = ["Attending", "Call", "Probe", "run_probe"]

#: A prime, so that a size of the model's own is hardly ever taken for the number of positions.
BATCH, POSITIONS = 2, 11
#: Functions of torch's that do a whole attention, and take the number of heads as their fifth argument.
WHOLE_ATTENTIONS = ("multi_head_attention_forward", "_native_multi_head_attention")


@dataclasses.dataclass(frozen=True)
class Attending:
    """One attention pattern that was computed: how many heads, and how wide they are where that could be seen."""

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None


@dataclasses.dataclass(eq=False)
class Call:
    """One call of one module.

    `begin` and `end` number everything that begins or ends in the pass. `given` and `made` are the first tensors of
    what it took and gave, as copies.
    """

    path: str
    module: torch.nn.Module
    begin: int
    parent: Call | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: torch.Tensor | None
    made: torch.Tensor | None = None
    end: int = -1
    children: list[Call] = dataclasses.field(default_factory=list)
    #: The attention patterns that torch computed while this call was the innermost one.
    attends: list[Attending] = dataclasses.field(default_factory=list)
    #: Of how many the best were picked while this call was the innermost one, as a router of experts does.
    routes: list[int] = dataclasses.field(default_factory=list)

    #: Whether the model wrote into what the call gave, later on.
    is_overwritten: bool = False

    def __repr__(self) -> str:
        return f"Call({self.path!r}, {self.begin}-{self.end})"

    def inside(self) -> Iterator[Call]:
        """Every call that was made in this one, in order of beginning."""
        for child in self.children:
            yield child
            yield from child.inside()

    def holds(self, other: Call) -> bool:
        """Whether `other` is this call or was made inside it."""
        return self.begin <= other.begin and other.end <= self.end

    @property
    def patterns(self) -> list[Attending]:
        """The attention patterns computed in this call, at any depth."""
        return [*self.attends, *(each for call in self.inside() for each in call.attends)]


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was seen in one pass."""

    model: torch.nn.Module
    root: Call
    calls: tuple[Call, ...]
    ids: torch.Tensor
    #: (batch, position, vocab), as the model gives them; None where what it gave is nothing of the kind.
    logits: torch.Tensor | None

    def of(self, module: torch.nn.Module | None) -> Call | None:
        """The first call of a module, if it was called."""
        return next((call for call in self.calls if call.module is module), None)


class _Functions(TorchFunctionMode):
    """Sees the functions in which attention patterns are made."""

    def __init__(self, here: Callable[[], Call | None], positions: int) -> None:
        super().__init__()
        self._here = here
        self._positions = positions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        call = self._here()
        if call is not None and name == "scaled_dot_product_attention":
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            call.attends.append(Attending(query.shape[1], key.shape[1], result.shape[-1]))
        elif call is not None and name in WHOLE_ATTENTIONS:
            call.attends.append(Attending(args[4]))
        elif call is not None and name == "softmax" and self._is_pattern(result):
            # Some put batch and heads on one axis.
            call.attends.append(Attending(result.shape[1] if result.ndim == 4 else result.shape[0] // BATCH))
        elif call is not None and name == "topk":
            call.routes.append((args[0] if args else kwargs["input"]).shape[-1])
        return result

    def _is_pattern(self, weights: torch.Tensor) -> bool:
        """Routers have a softmax too, over experts: a pattern is over positions, and does not look ahead."""
        if weights.ndim < 3 or not self._positions <= weights.shape[-2] <= weights.shape[-1]:
            return False
        # The model may put positions of its own before, or a sink after, those of the tokens.
        rows = weights.shape[-2]
        ahead = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
        ahead[:, rows:] = False
        return weights.shape[-1] == rows or not bool(weights[..., ahead].any())


def run_probe(model: torch.nn.Module) -> Probe:
    """Run the model once, in eval mode and without gradients, and write down what happens.

    Raises `ProbeError` where it cannot be run.
    """
    ids = some_tokens(model, BATCH, POSITIONS)
    calls: list[Call] = []
    stack: list[Call] = []
    gave: list[tuple[Call, torch.Tensor | None]] = []
    clock = iter(range(1 << 62))
    paths = {module: path for path, module in model.named_modules()}
    copies: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        # What one module gives the next one takes: one copy serves both, as long as nobody writes into it.
        known = copies.get(id(tensor))
        if known is None or known[1] != tensor._version:
            known = copies[id(tensor)] = (tensor, tensor._version, tensor.detach().clone())
        return known[2]

    def note(module: torch.nn.Module, kind: str, value: Any) -> None:
        if kind == "input":
            args, kwargs = map_tensors(copied, value[0]), {k: map_tensors(copied, v) for k, v in value[1].items()}
            parent = stack[-1] if stack else None
            call = Call(paths[module], module, next(clock), parent, args, kwargs, _tensor((args, kwargs)))
            if parent:
                parent.children.append(call)
            calls.append(call)
            stack.append(call)
        else:
            # A call that failed, and whose failure the model caught, has no end.
            call = stack.pop()
            while call.module is not module:
                call = stack.pop()
            call.made, call.end = _tensor(map_tensors(copied, value)), next(clock)
            gave.append((call, _tensor(value)))

    functions = _Functions(lambda: stack[-1] if stack else None, POSITIONS)
    try:
        with evaluating(model), torch.no_grad(), functions, observing(paths, note):
            output = call_model(model, ids)
    except Exception as error:
        # A model may raise anything at all; what it was stays in the traceback.
        raise ProbeError(type(model).__name__, f"{type(error).__name__}: {str(error).strip():.300}") from error
    for call, tensor in gave:
        changed = tensor is not None and call.made is not None and not torch.equal(tensor, call.made)
        call.is_overwritten = changed and not bool(tensor.isnan().any())  # type: ignore[union-attr]
    root = calls[0]
    try:
        logits = logits_of(output)
    except NoTensorError:
        logits = None
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.ndim != 3:
        logits = None
    return Probe(model, root, tuple(calls), ids, logits)


def _tensor(value: Any) -> torch.Tensor | None:
    try:
        return first_tensor(value)
    except NoTensorError:
        return None
