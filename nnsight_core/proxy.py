"""A value of a trace: what ``module.output`` returns.

In a live trace a proxy holds its value at once. It stands in for that value everywhere: operations on it run
immediately and give proxies, ``isinstance`` sees the value's class, and torch, numpy and pickle accept it. When the
trace ends, a proxy that was saved becomes as good as its plain value, and one that was not lets go of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from nnsight_core.appearance import Appearance
from nnsight_core.arguments import (
    NEVER_CAME,
    PENDING,
    RELEASED,
    Met,
    apply,
    call,
    call_method,
    pending_tape,
    unwrap,
)
from nnsight_core.errors import RecordingError, ReleasedValueError
from nnsight_core.events import Event, Origin
from nnsight_core.operators import CONTAINER_CHANGES, LOOKS, Operators, changes_in_place
from nnsight_core.shapes import refuse_numbers
from nnsight_core.sites import inside_autograd_function, user_site
from nnsight_core.token_index import TokenIndex
from nnsight_core.values import own_copy, share_storage, with_attribute, with_entry

_set = object.__setattr__

#: What a value is like rather than what it is; handed out plainly, so it has to be there.
_DESCRIPTIONS = frozenset("shape dtype device layout ndim requires_grad is_leaf is_cuda itemsize nbytes".split())


class Proxy(Operators, Appearance):
    """A value that has arrived from the model; stands in for it everywhere.

    >>> from nnsight_core import NNsight
    >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 2)))
    >>> with model.trace(torch.zeros(1, 4)):
    ...     hidden = model[0].output.save()
    >>> hidden.shape
    torch.Size([1, 2])
    """

    __slots__ = ()
    _origin: Origin | Event | None
    _saved: bool
    _live: Any

    def __init__(self) -> None:
        raise TypeError("Proxies come from a trace (module.output and so on); they are not made by hand.")

    def _get(self) -> Any:
        value = self._value
        if value is PENDING:
            value = self._tape.look_at(self)
        if value is RELEASED or value is PENDING or value is NEVER_CAME:
            raise ReleasedValueError(self._site, never_came=value is not RELEASED)
        return value

    _plain = _get

    @property
    def value(self) -> Any:
        """The plain object.

        Raises:
            ReleasedValueError: it was not saved and the trace is over.
        """
        return self._get()

    @property
    def _is_pending(self) -> bool:
        """Whether the value has yet to arrive; what is done with it until then is recorded."""
        return self._value is PENDING

    def _defer(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(self, *args)`` when the pending value has arrived; gives the pending result."""
        return self._tape.record(function, self, *args)

    def save(self) -> Any:
        """Keep the value beyond the end of the trace; returns the proxy itself."""
        if self._value is PENDING:
            return self._tape.save(self)
        if self._value is RELEASED or self._value is NEVER_CAME:
            self._get()
        _set(self, "_saved", True)
        return self

    @property
    def t(self) -> TokenIndex:
        """``.t[i]``: the i-th token of one's own prompt, whatever the padding. ``.t()`` is still the transpose."""
        return TokenIndex(self, self._token_axis)

    # Places: what is written into a part of a value reaches the model through the whole.

    def as_part(self, get: Callable[[Any, Any], Any], put: Callable[[Any, Any], Any]) -> Any:
        """The part of the value that ``get`` finds, as a proxy.

        Args:
            get: finds the part in the whole, given the scope of the trace that it runs in: ``get(whole, scope)``.
            put: gives the whole with another part in it: ``put(whole, part)``.
        """
        if self._value is PENDING:
            return self._tape.record(Proxy.as_part, self, get, put)
        scope = self._scope
        return self._part(get(self._get(), scope), lambda whole: get(whole, scope), put)

    def _part(self, part: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> Any:
        if not self._scope.open:
            return part
        origin = self._origin
        if origin is None:
            return self._scope.wrap(part)
        read = origin.read
        # By way of the whole, whose own variable is to show the change as well.
        write = partial(self._write_part, put)
        return self._scope.wrap(part, Origin(origin.event, lambda: get(read()), write))

    def _write_part(self, put: Callable[[Any, Any], Any], part: Any) -> None:
        place = self._place()
        assert place is not None
        whole = put(place.read(), part)
        self._adopt(whole)
        place.write(whole)

    def _adopt(self, value: Any) -> None:
        """Stand in for another value from now on."""
        _set(self, "_value", value)

    def _place(self) -> Origin | Event | None:
        """Where a change has to be written, if this is a value of the model's and not one of the script's own.

        Raises:
            OutOfOrderError: the forward pass has gone by it.
        """
        if not self._scope.open or self._origin is None:
            return None
        self._origin.event.check_writable()
        return self._origin

    def set_value(self, value: Any) -> None:
        """Let the model go on with ``value`` in the place of this one.

        Raises:
            OutOfOrderError: the forward pass has gone by it.
        """
        tape = pending_tape((self, value))
        if tape is not None:
            tape.record(Proxy.set_value, self, value)
        else:
            self._put(unwrap(value))

    def update_value(self, change: Callable[..., Any], *args: Any) -> None:
        """Let the model go on with ``change(value, *args)``; proxies among ``args`` come as their values.

        Raises:
            OutOfOrderError: the forward pass has gone by it.
        """
        tape = pending_tape((self, args))
        if tape is not None:
            tape.record(Proxy.update_value, self, change, *args)
        else:
            self._put(change(self._plain(), *unwrap(args)))

    def _put(self, value: Any) -> None:
        place = self._place()
        self._adopt(value)
        if place is not None:
            place.write(value)

    def _change(self, change: Callable[[Any], Any]) -> Any:
        """Let ``change`` work in place on the value; gives what it gave, or this proxy where that is the value.

        A value of the model's is changed as a copy, which then takes its place: other tensors may lie in the same
        memory (the input of a parallel MLP in that of the attention, what was saved before in what comes after), and a
        change at one place is to change that place alone.
        """
        place = self._place()
        if place is None:
            value = self._plain()
            result = change(value)
        else:
            value = own_copy(self._first(place.read()))
            result = change(value)
            self._put(value)
        if result is value:
            return self
        return self._scope.wrap(result) if self._scope.open else result

    def _first(self, whole: Any) -> Any:
        """What the operations on this proxy see of ``whole``: all of it, but for a module's input."""
        return whole

    # Reading and writing parts.

    def __getattr__(self, name: str) -> Any:
        if self._value is PENDING and name not in _DESCRIPTIONS:
            if name.startswith("__"):
                raise AttributeError(name)
            return self._tape.record(getattr, self, name)
        owner = self._plain()
        if name == "grad" and isinstance(owner, torch.Tensor) and self._scope.open:
            return self._gradient(owner)
        found = getattr(owner, name)
        if isinstance(found, torch.Tensor) and share_storage(found, owner):
            return self._result(found, lambda value: getattr(value, name))
        if not callable(found) or isinstance(found, torch.Tensor):
            return self._seen(found, lambda value: getattr(value, name), lambda v, part: with_attribute(v, name, part))
        return partial(self._call_method, name) if self._scope.open else found

    def _can_wait(self, tape: Any, changes: bool) -> bool:
        """Whether a change of this value may be recorded. Of a value of another body, or one that is there, it may not:
        what others do with the value, before or after, is not on this tape.
        """
        return not changes or self._origin is not None or self._tape is tape.current

    def _gradient(self, owner: torch.Tensor) -> Any:
        gradients = self._scope.gradients
        # Where torch keeps gradients itself, and has one of a backward pass of this trace, that is it.
        kept = owner.grad if owner.is_leaf or owner.retains_grad else None
        return gradients.gradient(owner) if kept is None or gradients.is_still_to_come else self._scope.wrap(kept)

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "backward" and self._scope.open:
            return self._scope.gradients.backward(self, args, kwargs)
        tape = pending_tape((self, args, kwargs))
        if tape is not None and name not in LOOKS and self._can_wait(tape, changes_in_place(name, kwargs)):
            return tape.record(call_method, self, name, *args, **kwargs)
        owner = self._plain()
        if name == "numpy":
            refuse_numbers(owner, name)
        if isinstance(owner, Mapping) and self._scope.open:
            if name == "get":
                return self[args[0]] if args[0] in owner else (args[1:] or (None,))[0]
            if name in ("values", "items"):
                return [self[key] if name == "values" else (key, self[key]) for key in owner]
        met = Met()
        args, kwargs = unwrap(args, met), unwrap(kwargs, met)
        if not self._scope.open:
            result = getattr(owner, name)(*args, **kwargs)
            return met.scope.wrap(result) if met.scope else result
        changes = changes_in_place(name, kwargs) or (isinstance(owner, (list, Mapping)) and name in CONTAINER_CHANGES)
        return self._done(lambda value: getattr(value, name)(*args, **kwargs), changes, met)

    def _done(self, operation: Callable[[Any], Any], changes: bool, met: Met) -> Any:
        if changes:
            return self._change(operation)
        owner = self._plain()
        met.add(self, owner)
        result = operation(owner)
        met.check_changes()
        return self._result(result, operation)

    def _seen(self, part: Any, get: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> Any:
        """A part of what the operations see, which for a module's input is the first argument."""
        return self._part(part, get, put)

    def _result(self, result: Any, operation: Callable[[Any], Any]) -> Any:
        """What an operation on this proxy gives; a view of the value stays a part of it, to be written through."""
        if not self._scope.open:
            return result
        owner = self._plain()
        if result is owner:
            return self
        entries = result if isinstance(result, (tuple, list)) else (result,)
        if self._origin is None or not any(share_storage(entry, owner) for entry in entries):
            return self._scope.wrap(result)

        def put(whole: Any, part: Any) -> Any:
            changed = own_copy(whole)
            views = operation(changed)
            pairs = zip(views, part, strict=True) if isinstance(views, (tuple, list)) else [(views, part)]
            for view, new in pairs:
                view.copy_(new)
            return changed

        return self._seen(result, operation, put)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "grad" and self._value is not PENDING and self._scope.open:
            self._scope.gradients.gradient(self._plain()).set_value(value)
            return
        tape = pending_tape((self, value))
        if tape is not None:
            tape.record(setattr, self, name, value)
            return
        value = unwrap(value)
        if name == "requires_grad":
            self.requires_grad_(value)
            return
        place = self._place()
        if place is None:
            setattr(self._plain(), name, value)
        else:
            self._put(with_attribute(self._first(place.read()), name, value))

    def __getitem__(self, key: Any) -> Any:
        tape = pending_tape((self, key))
        if tape is not None:
            return tape.record(operator.getitem, self, key)
        key = unwrap(key)
        owner = self._plain()
        part = owner[key]
        if isinstance(owner, torch.Tensor) and not share_storage(part, owner):
            # As in torch, what is picked out by a list of indices is a copy, and the script's own.
            return self._scope.wrap(part) if self._scope.open else part
        return self._seen(part, lambda value: value[key], lambda value, new: with_entry(value, key, new))

    def __setitem__(self, key: Any, value: Any) -> None:
        tape = pending_tape((self, key, value))
        if tape is not None and self._can_wait(tape, True):
            tape.record(operator.setitem, self, key, value)
            return
        key, value = unwrap(key), unwrap(value)
        place = self._place()
        if place is not None:
            self._put(with_entry(self._first(place.read()), key, value))
        elif isinstance(self._plain(), tuple):
            self._put(with_entry(self._plain(), key, value))
        else:
            self._plain()[key] = value

    def __delitem__(self, key: Any) -> None:
        tape = pending_tape((self, key))
        if tape is not None:
            tape.record(operator.delitem, self, key)
            return
        key = unwrap(key)
        self._change(lambda value: value.__delitem__(key))

    def __iter__(self) -> Iterator[Any]:
        owner = self._plain()
        if isinstance(owner, (tuple, list, torch.Tensor)):
            return iter([self[index] for index in range(len(owner))])
        return iter([self._scope.wrap(entry) if self._scope.open else entry for entry in owner])

    def _operate(self, function: Callable[..., Any], *args: Any) -> Any:
        return apply(function, *args)

    def _operate_in_place(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        tape = self._tape if self._value is PENDING else pending_tape(other)
        if tape is not None and self._can_wait(tape, True):
            return tape.record(function, self, other)
        other = unwrap(other)
        if not isinstance(self._plain(), (torch.Tensor, list, dict)):
            return self._operate(function, self, other)
        return self._change(lambda value: function(value, other))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first: Any = args[0] if args else None
        if not torch.is_grad_enabled() and inside_autograd_function():
            # What its forward gives is what torch gives a gradient, so it has to be the plain thing.
            if pending_tape((args, kwargs)) is not None:
                raise RecordingError("A custom autograd function was given a pending value.", user_site())
            return func(*unwrap(args), **unwrap(kwargs))
        if issubclass(type(first), Proxy):
            if name == "__get__":
                return first.__getattr__(func.__self__.__name__)  # type: ignore[attr-defined]
            if getattr(torch.Tensor, name, None) is func:
                return first._call_method(name, *args[1:], **kwargs)
        tape = pending_tape((args, kwargs))
        changed = kwargs.get("out", first if changes_in_place(name, kwargs) else None)
        if tape is not None and (changed is None or issubclass(type(changed), Proxy)):
            return tape.record(func, *args, **kwargs)
        if tape is not None:
            # What is written into a tensor of the script's own is seen by the script, so it cannot wait.
            return func(*unwrap(args), **unwrap(kwargs))
        out: Any = kwargs.get("out")
        if issubclass(type(out), Proxy):
            rest = {key: value for key, value in kwargs.items() if key != "out"}
            return out._change(lambda value: func(*unwrap(args), out=value, **unwrap(rest)))
        if "input" in kwargs and not args:
            first = kwargs["input"]
        if not issubclass(type(first), Proxy) or not first._scope.open:
            return apply(func, *args, **kwargs)
        met = Met()
        rest_args, rest = unwrap(args[1:], met), unwrap({k: v for k, v in kwargs.items() if v is not first}, met)
        return first._done(lambda value: func(value, *rest_args, **rest), changes_in_place(name, rest), met)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape = pending_tape((self, args, kwargs))
        if tape is not None:
            return tape.record(call, self, *args, **kwargs)
        result = self._plain()(*unwrap(args), **unwrap(kwargs))
        return self._scope.wrap(result) if self._scope.open else result
