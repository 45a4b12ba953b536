"""Attention that does not run torch's fast kernel, or not by way of transformers: its values are those of the torch
operations that it calls.

Which ones is told by what flows into what in dry runs of a copy: without padding and with it, with a cache and from it.
A value has a place where all of these agree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from nnsight_core.carried import MARK, Carried
from nnsight_core.envoy import Envoy
from nnsight_core.errors import CopyError
from nnsight_core.flow import Flow, Step, Watch
from nnsight_core.values import first_tensor, with_first_tensor
from nnterp.accessors import Place
from nnterp.attention_flow import LARGEST, Found, Product, Slot, UnknownAttentionError, find, kernels, scores_form
from nnterp.attention_forms import BATCH, Form, UnexpectedShapeError
from nnterp.attention_kernel import places_in_kernel
from nnterp.attention_places import Attention, AttentionPlaces
from nnterp.calling import call_model, some_tokens
from nnterp.rename_plan import join

#: How many tokens a dry run has.
_POSITIONS = 7


@dataclass(frozen=True)
class _Spot:
    """Where a value stands: an argument of an operation, or what it gives.

    Args:
        path: the module whose operation it is.
        operation: its name.
        slot: the argument; None for what it gives.
        form: the axes.
    """

    path: str
    operation: str
    slot: Slot | None
    form: Form

    def place(self, carried: Carried | None = None) -> Place:
        """The value's place, with the call of ``carried``."""
        if self.slot is None:
            get, put = partial(_given, self.form), partial(_giving, self.form)
            return Place(self.path, f"source.{self.operation}.output", "", get, put)
        kind = f"source.{self.operation}.input" if carried is None else carried.kind
        get, put = partial(_argument, self.slot, self.form), partial(_with_argument, self.slot, self.form)
        return Place(self.path, kind, "", get, put)


def _given(form: Form, value: Any) -> torch.Tensor:
    return form.view(first_tensor(value))


def _giving(form: Form, value: Any, new: torch.Tensor) -> Any:
    return with_first_tensor(value, form.put(first_tensor(value), new))


def _argument(slot: Slot, form: Form, call: Any) -> torch.Tensor:
    return form.view(_at(call, slot, form))


def _at(call: Any, slot: Slot, form: Form) -> torch.Tensor:
    side, at = slot
    found = call[side][at]
    if not isinstance(found, torch.Tensor):
        # A tensor that was made before anybody asked for it.
        raise UnexpectedShapeError(torch.Size(()), form.expected)
    return found


def _with_argument(slot: Slot, form: Form, call: Any, new: torch.Tensor) -> Any:
    args, kwargs = call
    at: Any = slot[1]
    changed = form.put(_at(call, slot, form), new)
    if slot[0]:
        return args, {**kwargs, at: changed}
    entries = list(args)
    entries[at] = changed
    return tuple(entries), kwargs


@dataclass(frozen=True)
class _Seen:
    """Where values stood in one dry run, the best place of each first."""

    queries: tuple[_Spot, ...]
    keys: tuple[_Spot, ...]
    values: tuple[_Spot, ...]
    scores: tuple[_Spot, ...]
    probabilities: tuple[_Spot, ...]
    heads_output: tuple[_Spot, ...]
    #: The operations that made the values before queries were multiplied by keys, and the form of what they made; and
    #: every operation until then, with what is to be told of it.
    makers: tuple[tuple[str, int | None], ...]
    made: Form | None
    before: tuple[tuple[str, int | None, bool], ...]


class _Look:
    """Looks at one call of an attention."""

    def __init__(self, flow: Flow, paths: dict[torch.nn.Module, str], groups: int) -> None:
        self._found: Found = find(flow)
        self._flow = flow
        self._paths = paths
        self._groups = groups

    def seen(self) -> _Seen:
        """Where the values stand.

        Raises:
            UnknownAttentionError: the axes of the product of probabilities and values cannot be told.
        """
        found = self._found
        before, after = found.before, found.after
        form = after.form(0)
        if form is None:
            raise UnknownAttentionError("the axis of the heads cannot be told.")
        probabilities = form.view(after.operands[0])
        scores = scores_form(found, probabilities)
        values = self._repeated(after, 1, after.form(2))
        makers = self._makers() if before.step.module is after.step.module else []
        return _Seen(
            queries=tuple(self._operand(before, 0, before.form(0))),
            keys=tuple(self._operand(before, 1, self._repeated(before, 1, before.form(1)))),
            values=(*self._operand(after, 1, values), *self._made_alone(after.operands[1], after.step, values)),
            scores=tuple(self._before_softmax(scores)),
            probabilities=(*self._operand(after, 0, form), *self._made_alone(found.softmax.result, after.step, scores)),
            heads_output=tuple(self._spots(after.step, None, after.form(3))),
            makers=tuple(makers),
            made=values,
            before=tuple(self._until(before.step)) if makers else (),
        )

    def _spots(self, step: Step, slot: Slot | None, form: Form | None) -> Iterator[_Spot]:
        """The place, where an accessor can reach it: in a module of the model's that runs once."""
        module = step.module
        if form is None or module is None or module not in self._paths:
            return
        if not any(each.module is module and each.call for each in self._flow.steps):
            yield _Spot(self._paths[module], step.name, slot, form)

    def _operand(self, product: Product, which: int, form: Form | None) -> Iterator[_Spot]:
        return self._spots(product.step, product.slots[which], form)

    def _repeated(self, product: Product, which: int, form: Form | None) -> Form | None:
        groups = getattr(product.step.module, "num_key_value_groups", None) or self._groups
        return None if form is None else form.repeated(product.operands[which], groups)

    def _takers(self, tensor: torch.Tensor) -> list[Step]:
        """Who makes something of the tensor: neither who gives it back as it is, nor who looks at its form alone."""
        return [
            step
            for step in self._flow.takers(tensor)
            if not any(each is tensor for each in step.made)
            and (not step.function.endswith("_as") or step.args[0] is tensor)
        ]

    def _maker(self, tensor: torch.Tensor, before: Step) -> Step | None:
        """Who made the tensor what it is: not who gave back what it took, as dropout does in evaluation."""
        makers = [
            step
            for step in self._flow.makers(tensor, before)
            if any(each is tensor for each in step.made)
            and (step.is_in_place or not any(each is tensor for each in step.taken))
        ]
        return makers[-1] if makers else None

    def _before_softmax(self, form: Form | None) -> Iterator[_Spot]:
        found = self._found
        takers = self._takers(found.scores)
        taker = found.shift or found.softmax
        # Who finds each row's largest, to subtract it, need not know of a change: it changes nothing.
        if all(each is taker or (found.shift and each.function in LARGEST) for each in takers):
            yield from self._spots(taker, (0, 0) if taker.args else (1, "input"), form)
            if taker.module is not None:
                return
        # What several take is set for all of them where it is made.
        maker = self._maker(found.scores, found.softmax)
        if maker is not None and maker.result is found.scores:
            yield from self._spots(maker, None, form)

    def _made_alone(self, tensor: torch.Tensor, before: Step, form: Form | None) -> Iterator[_Spot]:
        """Where the tensor is made, if nobody else takes it."""
        maker = self._maker(tensor, before)
        if maker is not None and maker.result is tensor and len(self._takers(tensor)) == 1:
            yield from self._spots(maker, None, form)

    def _makers(self) -> list[tuple[str, int | None]]:
        values, before = self._found.after.operands[1], self._found.before.step
        found = []
        for step in self._flow.makers(values, before):
            entry = _entry(step, values)
            if step.module is before.module and entry is not False:
                found.append((step.name, entry))
        return found

    def _until(self, step: Step) -> Iterator[tuple[str, int | None, bool]]:
        """Every tensor that the module's own operations make before ``step``: who, which entry, and if it is values."""
        values = self._found.after.operands[1]
        for each in self._flow.steps[: self._flow.steps.index(step)]:
            if each.module is step.module:
                entries = enumerate(each.result) if isinstance(each.result, (tuple, list)) else [(None, each.result)]
                for entry, made in entries:
                    is_values = made is values or (each.is_in_place and each.args[0] is values)
                    yield each.name, entry, is_values


def _entry(step: Step, tensor: torch.Tensor) -> int | bool | None:
    """Which entry of the step's result the tensor is: None for the whole, False for none."""
    if step.result is tensor or (step.is_in_place and step.args[0] is tensor):
        return None
    if isinstance(step.result, (tuple, list)):
        return next((number for number, each in enumerate(step.result) if each is tensor), False)
    return False


def _agreed(all_seen: Sequence[_Seen]) -> AttentionPlaces:
    """The places on which all dry runs agree."""
    spots: dict[str, _Spot | None] = {}
    for field in fields(AttentionPlaces):
        first, *others = (getattr(each, field.name) for each in all_seen)
        spots[field.name] = next((spot for spot in first if all(spot in other for other in others)), None)
    places: dict[str, Place | str] = {
        name: "which operation gives it depends on what the model is called with." if spot is None else spot.place()
        for name, spot in spots.items()
    }
    queries, keys = spots["queries"], spots["keys"]
    carried = _carried(all_seen)
    if carried is not None and queries is not None and keys is not None:
        form = all_seen[0].made
        assert form is not None
        places["queries"], places["keys"] = queries.place(carried), keys.place(carried)
        places["values"] = replace(queries, slot=(1, MARK), form=form).place(carried)
    return AttentionPlaces(**places)


def _carried(all_seen: Sequence[_Seen]) -> Carried | None:
    """The call of the product of queries and keys with the values, if these are made before it."""
    spots = {spot for each in all_seen for spot in each.queries}
    if len(spots) != 1 or not all(each.makers for each in all_seen) or len({each.made for each in all_seen}) != 1:
        return None
    makers = tuple(dict.fromkeys(maker for each in all_seen for maker in each.makers))
    for each in all_seen:
        last = [is_values for name, entry, is_values in each.before if (name, entry) in makers]
        if not last or not last[-1]:
            return None
    return Carried(spots.pop().operation, makers)


#: For each model, by what its attention depends on, the places in each attention module by its path; their own paths
#: begin at that module.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, dict[str, AttentionPlaces]]] = weakref.WeakKeyDictionary()


def operation_places(attention: Attention) -> AttentionPlaces:
    """The values of attention that computes them with operations of torch's own."""
    root: torch.nn.Module = attention.envoy._tree.root
    module = attention.envoy._module
    if any(each.is_meta for each in (*root.parameters(), *root.buffers())):
        return AttentionPlaces.closed("its weights are not loaded, and its operations are found by running a copy.")
    dtype = next((each.dtype for each in root.parameters()), None)
    how = getattr(getattr(module, "config", None), "_attn_implementation", None)
    key = (type(module), how, dtype, attention.groups, attention.heads)
    known = _known.setdefault(root, {})
    if key not in known:
        known[key] = _looked_up(root, attention)
    found = known[key].get(attention.envoy.path)
    if found is None:
        return AttentionPlaces.closed("it did not run in a dry run of the model.")
    return found.below(attention.path)


def _looked_up(root: torch.nn.Module, attention: Attention) -> dict[str, AttentionPlaces]:
    """The places in all attention modules of this kind."""
    kind = type(attention.envoy._module)
    paths = {module: path for path, module in root.named_modules()}
    alike = [module for module in paths if type(module) is kind]
    try:
        runs = _dry_runs(root, alike)
    except (CopyError, UnknownAttentionError) as error:
        return {paths[module]: AttentionPlaces.closed(str(error)) for module in alike}
    found = {}
    for module in alike:
        flows = [run[module][0] for run in runs if run.get(module)]
        if flows:
            envoy = Envoy(module, paths[module], attention.envoy._tree)
            found[paths[module]] = _places(replace(attention, envoy=envoy), flows)
    return found


def _places(attention: Attention, flows: list[Flow]) -> AttentionPlaces:
    paths = {module: path for path, module in attention.envoy._module.named_modules()}
    try:
        calls = [kernels(flow) for flow in flows]
        if any(calls):
            return _in_kernel(attention, calls, paths)
        return _agreed([_Look(flow, paths, attention.groups).seen() for flow in flows])
    except UnknownAttentionError as error:
        return AttentionPlaces.closed(f"in {type(attention.envoy._module).__name__} {error}")


def _in_kernel(attention: Attention, calls: list[list[Step]], paths: dict[torch.nn.Module, str]) -> AttentionPlaces:
    """The values of attention that calls torch's kernel once, in whichever module."""
    modules = {step.module for each in calls for step in each}
    names = {step.function for each in calls for step in each}
    module = modules.pop()
    if modules or module is None or module not in paths or any(len(each) != 1 or each[0].call for each in calls):
        raise UnknownAttentionError("the attention function is called several times, and no one call has all heads.")
    envoy = Envoy(module, join(attention.envoy.path, paths[module]), attention.envoy._tree)
    return places_in_kernel(replace(attention, envoy=envoy, path=paths[module]), names.pop())


def _dry_runs(root: torch.nn.Module, modules: list[torch.nn.Module]) -> list[dict[torch.nn.Module, list[Flow]]]:
    """The flow in each module: without a cache, with padding, with a cache, and from it on.

    Raises:
        UnknownAttentionError: the model does not run.
    """
    watch = Watch(root, modules)
    # Rows that are alike show which axis is the batch.
    ids = some_tokens(root, 1, _POSITIONS).expand(BATCH, -1).contiguous()
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    runs: list[dict[torch.nn.Module, list[Flow]]] = []
    try:
        runs.append(watch.run(lambda model: call_model(model, ids))[1])
    except Exception as error:
        raise UnknownAttentionError(f"nothing is seen: a dry run of the model stopped with {error!r:.200}.") from error
    _try(runs, watch, lambda model: model(input_ids=ids, attention_mask=mask, use_cache=False))
    result = _try(runs, watch, lambda model: model(input_ids=ids, use_cache=True))
    cache = getattr(result, "past_key_values", None)
    if cache is not None:
        one = ids[:, :1]
        _try(runs, watch, lambda model: model(input_ids=one, past_key_values=cache, use_cache=True))
    return runs


def _try(runs: list[dict[torch.nn.Module, list[Flow]]], watch: Watch, call: Callable[[torch.nn.Module], Any]) -> Any:
    """A run that not every model can make."""
    try:
        result, flows = watch.run(call)
    except Exception:  # noqa: BLE001 - a model may raise anything at all, and then nobody else runs it so either
        return None
    runs.append(flows)
    return result
