"""Queries and keys before they are rotated by their positions, by layer, read and set."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.errors import CopyError
from nnsight_core.flow import Flow, Watch
from nnsight_core.values import with_entry
from nnterp.accessors import Place, ValueAccess
from nnterp.attention import ClosedAttentionError
from nnterp.attention_flow import UnknownAttentionError
from nnterp.calling import call_model, some_tokens
from nnterp.errors import MissingPartError
from nnterp.operation_access import OperationAccess, running
from nnterp.rotation_flow import Absent, Made, before_rotation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_core.envoy import Envoy
    from nnterp.rename_plan import RenamePlan
    from nnterp.spec import ArchitectureSpec

__all__ = ["Rotary", "RotaryAccess"]

NAMES = ("queries_pre_rope", "keys_pre_rope")
#: Prompts and tokens of two dry runs: an axis that differs between them is known by that.
_SIZES = ((2, 7), (3, 5))


@dataclass(frozen=True)
class _Spot:
    """Where a tensor is made.

    Args:
        path: the module whose operation makes it.
        operation: its name.
        entry: which entry of its result the tensor is; None for the whole.
        order: which of its axes are batch, head, position and head_dim.
    """

    path: str
    operation: str
    entry: int | None
    order: tuple[int, int, int, int]

    def place(self, label: str) -> Place:
        """The tensor's place."""
        return Place(self.path, f"source.{self.operation}.output", label, self.get, self.put, positions=2)

    def get(self, value: Any) -> torch.Tensor:
        """(batch, head, position, head_dim), of what the operation gives."""
        tensor: torch.Tensor = value if self.entry is None else value[self.entry]
        return tensor.permute(self.order)

    def put(self, value: Any, new: torch.Tensor) -> Any:
        """What the operation is to give instead."""
        tensor = new.permute([self.order.index(axis) for axis in range(4)])
        return tensor if self.entry is None else with_entry(value, self.entry, tensor)


#: Of each attention: where its queries and keys stand, that it has none, or why they stand nowhere.
_Found = tuple["_Spot | Absent | str", "_Spot | Absent | str"]
#: For each model, by what its attention depends on, what was found in each attention by its path.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, dict[str, _Found]]] = weakref.WeakKeyDictionary()


def _found(root: torch.nn.Module, paths: Iterable[str], path: str) -> _Found:
    if any(each.is_meta for each in (*root.parameters(), *root.buffers())):
        why = "its weights are not loaded, and its operations are found by running a copy."
        return why, why
    dtype = next((each.dtype for each in root.parameters()), None)
    key = (getattr(getattr(root.get_submodule(path), "config", None), "_attn_implementation", None), dtype)
    known = _known.setdefault(root, {})
    if key not in known:
        known[key] = _looked_up(root, {root.get_submodule(each): each for each in paths})
    why = "it did not run in a dry run of the model."
    return known[key].get(path, (why, why))


def _looked_up(root: torch.nn.Module, attentions: dict[torch.nn.Module, str]) -> dict[str, _Found]:
    try:
        runs = _dry_runs(root, attentions)
    except (CopyError, UnknownAttentionError) as error:
        return dict.fromkeys(attentions.values(), (str(error), str(error)))
    paths = {module: path for path, module in root.named_modules()}
    found: dict[str, _Found] = {}
    for module, path in attentions.items():
        flows = [run[module] for run in runs if module in run]
        if len(flows) < len(_SIZES):
            continue
        try:
            # A module that runs several times in a pass does the same in each.
            seen = [before_rotation(flow) for flow, *_ in flows[: len(_SIZES)]]
        except UnknownAttentionError as error:
            found[path] = str(error), str(error)
            continue
        both = [_spot([each[which] for each in seen], [flow for flow, *_ in flows], paths) for which in (0, 1)]
        found[path] = both[0], both[1]
    return found


def _dry_runs(root: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> list[dict[torch.nn.Module, list[Flow]]]:
    """The flow in each attention: without a cache, with one, and from it on.

    Raises:
        UnknownAttentionError: the model does not run.
    """
    watch = Watch(root, modules)
    runs: list[dict[torch.nn.Module, list[Flow]]] = []
    ids = [some_tokens(root, *sizes) for sizes in _SIZES]
    try:
        runs.append(watch.run(lambda model: call_model(model, ids[0]))[1])
        runs.append(watch.run(lambda model: call_model(model, ids[1]))[1])
    except Exception as error:
        raise UnknownAttentionError(f"nothing is seen: a dry run of the model stopped with {error!r:.200}.") from error
    try:
        result, first = watch.run(lambda model: model(input_ids=ids[1], use_cache=True))
        cache = result.past_key_values
        _, second = watch.run(lambda model: model(input_ids=ids[1][:, :1], past_key_values=cache, use_cache=True))
    except Exception:  # noqa: BLE001 - a model may raise anything at all; then it makes no such run for others either
        return runs
    return runs if cache is None else [*runs, first, second]


def _spot(
    seen: list[Made | Absent | str], flows: list[Flow], paths: dict[torch.nn.Module, str]
) -> _Spot | Absent | str:
    """Where a tensor stands, if that is the same in all runs."""
    one, other = seen
    if not isinstance(one, Made):
        return one
    if not isinstance(other, Made):
        return other
    same = one.step.module is other.step.module and one.step.name == other.step.name and one.entry == other.entry
    module = one.step.module
    if not same or module not in paths:
        return "which operation gives them depends on what the model is called with."
    order = _order(one.tensor, other.tensor)
    if order is None:
        return "batch, heads and positions are not axes of their own before the rotation."
    for flow in flows:
        steps = [step for step in flow.steps if step.module is module and step.name == one.step.name]
        if len(steps) != 1:
            return f"{type(module).__name__} runs several times in one call of the attention."
        tensor = steps[0].result if one.entry is None else steps[0].result[one.entry]
        sizes = [tensor.shape[axis] for axis in order]
        if sizes[1] != one.tensor.shape[order[1]] or sizes[3] != one.tensor.shape[order[3]]:
            return "which operation gives them depends on what the model is called with."
    return _Spot(paths[module], one.step.name, one.entry, order)


def _order(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int, int, int] | None:
    """Which axes are batch, head, position and head_dim, by how they differ between the runs."""
    pairs = list(zip(one.shape, other.shape, strict=True))
    (batch, positions), (others, fewer) = _SIZES
    grown = [
        [axis for axis, pair in enumerate(pairs) if pair == sizes] for sizes in ((batch, others), (positions, fewer))
    ]
    rest = [axis for axis, (size, again) in enumerate(pairs) if size == again]
    if [len(each) for each in grown] != [1, 1] or len(rest) != 2:
        return None
    return grown[0][0], rest[0], grown[1][0], rest[1]


class RotaryAccess(OperationAccess):
    """``queries_pre_rope[i]``, ``keys_pre_rope[i]``: (batch, head, position, head_dim), read and set.

    They are what the layer's queries and keys are before they are rotated by their positions (Su et al. 2021,
    "RoFormer"), after a norm of queries and keys, where the family has one; keys have a head for each of
    ``num_kv_heads``, and are those of the tokens of this pass, without what the cache holds. Where a family rotates a
    part of each head alone, the rest is there, too. What is set is rotated as the model does it, and stays in a cache.

    Where they stand is found by a dry run of a copy of the model, when they are first asked for.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower"):
    ...     before = model.queries_pre_rope[1].save()
    ...     after = model.queries[1].save()
    >>> before.shape == after.shape, torch.allclose(before[:, :, 0], after[:, :, 0])    # position 0 is not turned
    (True, True)

    Raises:
        MissingPartError: the layer has no attention, or rotates nothing.
        ClosedAttentionError: no tensor of the layer's holds them.
        ShapeError: what is set has another shape.
    """

    def _found(self, path: str, label: str) -> tuple[Place, Iterable[str]]:
        attentions = [each.path for each in self._places if each is not None]
        found = _found(self._root._tree.root, attentions, path)[NAMES.index(self.name)]
        if isinstance(found, Absent):
            raise MissingPartError(label, found.why)
        if isinstance(found, str):
            raise ClosedAttentionError(label, found)
        # The attention itself, too, for its own values may be asked for while a module inside it runs.
        return found.place(label), {found.path: None, path: None}


class Rotary:
    """Queries and keys of a :class:`~nnterp.StandardizedTransformer` before rotation; see :class:`RotaryAccess`."""

    queries_pre_rope: RotaryAccess
    keys_pre_rope: RotaryAccess
    attentions_output: ValueAccess
    _plan: RenamePlan
    _spec: ArchitectureSpec

    def _add_rotary(self, root: Envoy) -> None:
        parts = tuple(each.part("attention") for each in self._plan.layers)
        paths = tuple(running(root._module, part) if part else None for part in parts)
        for name in NAMES:
            setattr(self, name, RotaryAccess(root, name, paths, self.attentions_output._why_not, self._spec))
