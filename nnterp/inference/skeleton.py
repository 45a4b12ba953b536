"""The parts that a model has once, found in a probe: embeddings, the list of layers, and the way to the logits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from nnterp.calling import declared
from nnterp.inference.errors import LayersNotFoundError
from nnterp.inference.numbers import alike, is_norm, shaped_like
from nnterp.inference.probe import BATCH, POSITIONS, Call, Probe
from nnterp.inference.scales import scale_between

#: What the module that makes the logits is called everywhere.
HEAD = "lm_head"

__all__ = ["find_embedding", "find_layers", "find_unembedding", "LayerList", "Unembedding"]


@dataclasses.dataclass(frozen=True)
class LayerList:
    """The list of layers: its path, and the first call of each."""

    path: str
    calls: tuple[Call, ...]


@dataclasses.dataclass(frozen=True)
class Unembedding:
    """The modules between the last layer and the logits, in turn."""

    #: The whole way, with the final norm and the head; empty where it could not be followed.
    chain: tuple[Call, ...]
    norm: Call | None
    head: Call | None
    #: What the stream is multiplied by on its way to the head.
    factor: float = 1.0


def find_layers(probe: Probe, names: Sequence[str] = ()) -> LayerList:
    """The list whose members ran in order and handed one stream on: of several the one with the most parameters.

    With `names` it is the first list that is called so, by its path or the end of it. Raises `LayersNotFoundError`,
    which says what was seen, where there is none.
    """
    lists: dict[str, list[Call]] = {}
    for call in probe.calls:
        parent, _, name = call.path.rpartition(".")
        if name.isdigit():
            lists.setdefault(parent, []).append(call)
    for name in names:
        named = [path for path in lists if f".{path}".endswith(f".{name.strip('.')}")]
        lists = {path: lists[path] for path in named} or lists
        if named:
            break
    seen = {parent: _as_layers(probe, parent, calls, bool(names)) for parent, calls in lists.items()}
    found = [each for each in seen.values() if isinstance(each, LayerList)]
    if not found or (names and not named):
        why = {path: each for path, each in seen.items() if isinstance(each, str)}
        raise LayersNotFoundError(type(probe.model).__name__, why, names[0] if names else None)

    def likely(each: LayerList) -> tuple[bool, int, int, int]:
        # A model may have a second stack, to cut its text into patches say, from which no way leads to the logits.
        leads = len(found) > 1 and bool(find_unembedding(probe, each).chain)
        return leads, _parameters(each), len(each.calls), each.calls[-1].end

    return max(found, key=likely)


def _as_layers(probe: Probe, path: str, calls: list[Call], is_said: bool) -> LayerList | str:
    """The calls as those of layers, or why they are none."""
    count = len(list(probe.model.get_submodule(path).children()))
    ran = len({call.path for call in calls})
    # A config may say that fewer layers run than there are.
    indices = [int(call.path.rpartition(".")[2]) for call in calls]
    if len(calls) % ran or indices != list(range(ran)) * (len(calls) // ran):
        return f"{ran} of {count} members ran, not in turn"
    first = calls[:ran]
    if any(call.made is None or call.given is None or not _keeps_shape(call) for call in first):
        return "what its members give is of another shape than what they take"
    handed = sum(alike(one.made, other.given) for one, other in itertools.pairwise(first))
    if handed * 2 < ran - 1 and not is_said:
        return "its members do not take what the one before gave"
    return LayerList(path, tuple(first))


def _keeps_shape(call: Call) -> bool:
    given, made = call.given, call.made
    assert given is not None and made is not None
    return made.is_floating_point() and given.shape == made.shape and given.numel() >= BATCH * POSITIONS


def _parameters(layers: LayerList) -> int:
    return sum(parameter.numel() for call in layers.calls for parameter in call.module.parameters())


def find_embedding(probe: Probe, layers: LayerList) -> tuple[Call, ...]:
    """The modules that make vectors of the token ids, as wide as the stream, in turn; empty where there are none."""
    first = layers.calls[0]

    before = [call for call in probe.calls if call.end < first.begin and call.made is not None]
    vectors = [call for call in before if call.made is not None and call.made.is_floating_point()]
    tables = [call for call in vectors if _takes_ids(call, probe.ids)]
    tables = [call for call in tables if not any(other is not call and call.holds(other) for other in tables)]
    if not tables:
        return ()
    own = probe.of(declared(probe.model, "get_input_embeddings"))
    table = own if own in tables else tables[0]
    assert table is not None and table.made is not None and first.given is not None
    if table.made.shape[-1] == first.given.shape[-1]:
        return (table,)
    for call in before:
        # Embeddings that are narrower than the stream are widened by a module of their own, perhaps after a norm.
        narrow = call.given is not None and call.given.shape[-1] == table.made.shape[-1] and call.begin > table.end
        if narrow and call.made is not None and call.made.shape == (*table.made.shape[:-1], first.given.shape[-1]):
            return (table, call)
    return (table,)


def _takes_ids(call: Call, ids: torch.Tensor) -> bool:
    """Whether the call is given the tokens: (batch, position), the other way round, or after others of its own."""
    given = call.given
    if given is None or given.is_floating_point() or given.ndim != 2:
        return False
    if given.shape[0] == BATCH and given.shape[1] > POSITIONS:
        given = given[:, -POSITIONS:]
    return any(given.shape == each.shape and bool((given == each).all()) for each in (ids, ids.T))


def find_unembedding(probe: Probe, layers: LayerList) -> Unembedding:
    """The way from the last layer's output to the logits, as far as modules go it."""
    last = layers.calls[-1]
    assert last.made is not None
    after = [call for call in probe.calls if call.begin > last.end and call.made is not None]
    head = probe.of(declared(probe.model, "get_output_embeddings"))
    if head is None or head not in after:
        head = _widest(probe, after)
    # The standard name must mean the standard part: a whole head that is called so is the head.
    called_so = next((call for call in after if call.path == HEAD), None)
    if head is not None and called_so is not None and called_so.holds(head):
        head = called_so
    if head is None:
        return Unembedding((), None, None)
    chain: list[Call] = []
    value, here, factor = last.made, last.end, 1.0
    while not chain or not chain[-1].holds(head):
        step = _step(after, value, here, head)
        if step is None:
            step, scale = _scaled_step(value, here, head)
            factor *= scale
        if step is None or step.made is None:
            return Unembedding((), _norm(probe, after, head), head)
        chain.append(step)
        value, here = step.made, step.end
    steps = [call for call in chain if not alike(call.given, call.made)]
    return Unembedding(tuple(steps), _norm(probe, steps, head), called_so if called_so in steps else head, factor)


def _widest(probe: Probe, after: list[Call]) -> Call | None:
    """The innermost last module that gives something of the logits' shape."""
    logits = probe.logits
    if logits is None:
        return None
    fits = [call for call in after if call.made is not None and call.made.shape[-1] == logits.shape[-1]]
    return max(fits, key=lambda call: (call.end, call.begin)) if fits else None


def _scaled_step(value: torch.Tensor, here: int, head: Call) -> tuple[Call | None, float]:
    """The head, and the number that its input was multiplied by on the way; a head with a bias would not let that
    number through to the logits."""
    given = shaped_like(head.given, value)
    scale = None if given is None or head.begin < here else scale_between(value, given)
    if scale is None or getattr(head.module, "bias", None) is not None:
        return None, 1.0
    return head, scale


def _step(after: list[Call], value: torch.Tensor, here: int, head: Call) -> Call | None:
    """The next module that took `value`: the outermost that does not hold the head, or else one that does."""
    fits = [call for call in after if call.begin > here and call.begin <= head.begin]
    fits = [call for call in fits if alike(shaped_like(call.given, value), value)]
    around = [call for call in fits if call is not head and call.holds(head)]
    # Between modules inside the head there may be functions, and then only the whole of it can be called.
    return next((call for call in fits if call not in around), None) or next(iter(around), None)


def _norm(probe: Probe, calls: list[Call], head: Call) -> Call | None:
    """The last norm before the head that is no part of it."""
    around = [call for call in probe.calls if call is not probe.root and call is not head and call.holds(head)]
    found = None
    for call in calls:
        if call.given is None or call.end > head.begin or any(outer.holds(call) for outer in around):
            continue
        if is_norm(call.module, call.given, call.args, call.kwargs):
            found = call
    return found
