"""A value of a trace: what ``module.output`` returns.

In a live trace a proxy holds its value at once. It stands in for that value everywhere: operations on it run
immediately and give proxies, ``isinstance`` sees the value's class, and torch, numpy and pickle accept it. When the
trace ends, a proxy that was saved becomes as good as its plain value, and one that was not lets go of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nnsight_core.errors import ReleasedValueError
from nnsight_core.events import Origin
from nnsight_core.operators import Operators, changes_in_place
from nnsight_core.saveable import as_plain_result
from nnsight_core.sites import Site, user_site
from nnsight_core.token_index import TokenIndex
from nnsight_core.values import first_argument, with_attribute, with_first_argument, with_item

_RELEASED: Any = type("Released", (), {"__repr__": lambda self: "<released>"})()
_set = object.__setattr__


class Scope:
    """The life of the values of one trace: all its proxies are made here and let go here."""

    __slots__ = ("_limit", "_made", "inputs", "open", "padding", "prompt_length")

    def __init__(self) -> None:
        self.open = True
        self._made: list[weakref.ref[Proxy]] = []
        self._limit = 4096
        #: The model's arguments; how many padding tokens stand left of each prompt; how long the padded prompts are.
        self.inputs: Mapping[str, Any] = {}
        self.padding: Sequence[int] | None = None
        self.prompt_length = 0

    def proxy(self, value: Any, origin: Origin | None = None, kind: type[Proxy] | None = None) -> Proxy:
        """A proxy of ``value`` that lives in this scope."""
        made = Proxy.__new__(kind or Proxy)
        _set(made, "_value", value)
        _set(made, "_scope", self)
        _set(made, "_origin", origin)
        _set(made, "_site", user_site())
        _set(made, "_saved", False)
        self._made.append(weakref.ref(made))
        if len(self._made) > self._limit:
            self._made = [each for each in self._made if each() is not None]
            self._limit = max(4096, 2 * len(self._made))
        return made

    def wrap(self, value: Any, origin: Origin | None = None) -> Any:
        """``value`` as a proxy, unless it is one of the kinds that are handed out plainly."""
        if isinstance(value, Proxy) or callable(value):
            return value
        as_plain = as_plain_result(value)
        return self.proxy(value, origin) if as_plain is NotImplemented else as_plain

    def close(self) -> None:
        """End the scope: proxies that were not saved lose their values."""
        self.open = False
        for reference in self._made:
            proxy = reference()
            if proxy is None:
                continue
            _set(proxy, "_origin", None)
            if not proxy._saved:
                _set(proxy, "_value", _RELEASED)
        self._made.clear()


def plain(value: Any) -> Any:
    """The value of a proxy; anything else as it is.

    Raises:
        ReleasedValueError: the proxy was not saved and its trace is over.
    """
    return value._get() if isinstance(value, Proxy) else value


def unwrap(value: Any, scopes: list[Scope] | None = None) -> Any:
    """``value`` with every proxy inside tuples, lists, dicts and slices replaced by its value.

    The scopes of the proxies that were met are added to ``scopes``.
    """
    kind = type(value)
    if kind is Proxy or kind is InputProxy:
        if scopes is not None and value._scope.open:
            scopes.append(value._scope)
        return value._plain()
    if kind is tuple:
        return tuple([unwrap(entry, scopes) for entry in value])
    if kind is list:
        return [unwrap(entry, scopes) for entry in value]
    if kind is dict:
        return {key: unwrap(entry, scopes) for key, entry in value.items()}
    if kind is slice:
        return slice(*(unwrap(entry, scopes) for entry in (value.start, value.stop, value.step)))
    return value


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` on the values of proxies, wherever they stand in the arguments.

    Inside a trace the result is a proxy again; once all proxies are finished it is the plain result.
    """
    scopes: list[Scope] = []
    result = function(*unwrap(args, scopes), **(unwrap(kwargs, scopes) if kwargs else kwargs))
    return scopes[0].wrap(result) if scopes else result


class Proxy(Operators):
    """A value that has arrived from the model; stands in for it everywhere.

    >>> from nnsight_core import NNsight
    >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 2)))
    >>> with model.trace(torch.zeros(1, 4)):
    ...     hidden = model[0].output.save()
    >>> hidden.shape
    torch.Size([1, 2])
    """

    __slots__ = ("__weakref__", "_origin", "_saved", "_scope", "_site", "_value")
    _value: Any
    _scope: Scope
    _origin: Origin | None
    _site: Site
    _saved: bool

    def __init__(self) -> None:
        raise TypeError("Proxies come from a trace (module.output and so on); they are not made by hand.")

    def _get(self) -> Any:
        if self._value is _RELEASED:
            raise ReleasedValueError(self._site)
        return self._value

    _plain = _get

    @property
    def value(self) -> Any:
        """The plain object.

        Raises:
            ReleasedValueError: it was not saved and the trace is over.
        """
        return self._get()

    def save(self) -> Any:
        """Keep the value beyond the end of the trace; returns the proxy itself."""
        self._get()
        _set(self, "_saved", True)
        return self

    @property
    def t(self) -> TokenIndex:
        """``.t[i]``: the i-th token of one's own prompt, whatever the padding. ``.t()`` is still the transpose."""
        return TokenIndex(self)

    def _part(self, value: Any, write: Callable[[Any], None], copied: bool = False) -> Any:
        """A proxy of a part of this one: what is written into the part reaches the model through this proxy."""
        if not self._scope.open:
            return value
        origin = self._origin
        return self._scope.wrap(value, Origin(origin.event, write, copied or origin.copied) if origin else None)

    def lens(self, get: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> Any:
        """The part of the value that ``get`` finds, as a proxy; ``put(value, part)`` is how it is written."""
        return self._part(get(self._get()), lambda part: self._replace_whole(put(self._get(), part)))

    def _check_writable(self) -> None:
        if self._scope.open and self._origin is not None:
            self._origin.event.check_writable()

    def _changed(self) -> None:
        if self._scope.open and self._origin is not None and self._origin.copied:
            self._origin.write(self._plain())

    def _replace_whole(self, value: Any) -> None:
        """Put ``value`` in the place of this proxy's, in the model as well."""
        self._check_writable()
        _set(self, "_value", value)
        if self._origin is not None:
            self._origin.write(value)

    _replace = _replace_whole

    def replace(self, value: Any) -> None:
        """Let the model go on with ``value`` in the place of this one.

        Raises:
            OutOfOrderError: the forward pass has gone by it.
        """
        self._replace(unwrap(value))

    # Reading and writing parts.

    def __getattr__(self, name: str) -> Any:
        owner = self._plain()
        found = getattr(owner, name)
        if not callable(found) or isinstance(found, torch.Tensor):
            return self._part(found, lambda part: self._replace(with_attribute(self._plain(), name, part)))
        if not self._scope.open:
            return found

        def method(*args: Any, **kwargs: Any) -> Any:
            writes = changes_in_place(name)
            if writes:
                self._check_writable()
            result = apply_in(self._scope, found, *args, **kwargs)
            if writes:
                self._changed()
            return self if plain(result) is owner else self._keeping_origin(result)

        return method

    def _keeping_origin(self, result: Any) -> Any:
        # A view shares its storage with the value, so writing into a stale view is as wrong as into the value.
        inner = plain(result)
        if isinstance(result, Proxy) and isinstance(inner, torch.Tensor) and inner._is_view():
            _set(result, "_origin", self._origin)
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self._plain()
        self._check_writable()
        changed = with_attribute(owner, name, unwrap(value))
        if changed is not owner:
            self._replace(changed)

    def __getitem__(self, key: Any) -> Any:
        owner = self._plain()
        key = unwrap(key)
        return self._part(owner[key], lambda part: self._set_item(key, part))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._set_item(unwrap(key), unwrap(value))

    def _set_item(self, key: Any, value: Any) -> None:
        owner = self._plain()
        self._check_writable()
        if isinstance(owner, tuple):
            self._replace(with_item(owner, key, value))
        else:
            owner[key] = value
            self._changed()

    def __delitem__(self, key: Any) -> None:
        self._check_writable()
        del self._plain()[unwrap(key)]

    def __iter__(self) -> Iterator[Any]:
        owner = self._plain()
        if isinstance(owner, (tuple, list, torch.Tensor)):
            return iter([self[index] for index in range(len(owner))])
        return iter([self._scope.wrap(entry) if self._scope.open else entry for entry in owner])

    # Standing in for the value.

    def _operate(self, function: Callable[..., Any], *args: Any) -> Any:
        return apply(function, *args)

    def _operate_in_place(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        self._check_writable()
        owner = self._plain()
        result = function(owner, unwrap(other))
        # A tensor has changed where it stands; a number or tuple has been replaced by a new one.
        if result is not owner:
            return self._scope.wrap(result) if self._scope.open else result
        self._changed()
        return self

    def __contains__(self, item: Any) -> bool:
        return unwrap(item) in self._plain()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() and the like see the value's class
        return type(self) if self._value is _RELEASED else type(self._plain())

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Proxy) and changes_in_place(getattr(func, "__name__", "")):
            first._check_writable()
        result = apply(func, *args, **(kwargs or {}))
        if isinstance(first, Proxy):
            return first if plain(result) is first._plain() else first._keeping_origin(result)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self._plain(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return copy.deepcopy(self._plain(), memo)

    def __dir__(self) -> list[str]:
        return sorted({"save", "value", "t", *dir(self._plain())})

    def __repr__(self) -> str:
        if self._value is _RELEASED:
            return f"<value released: {self._site.short} did not save it>"
        return repr(self._value)

    def __str__(self) -> str:
        return repr(self) if self._value is _RELEASED else str(self._value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return apply_in(self._scope, self._plain(), *args, **kwargs)


class InputProxy(Proxy):
    """The call of a module, ``(args, kwargs)``.

    An integer index or unpacking sees that pair; everything else sees the first argument, which is what one nearly
    always wants: ``module.input.shape``, ``module.input[:, -1]``, ``args, kwargs = module.input``.
    """

    __slots__ = ()

    def _plain(self) -> Any:
        return first_argument(self._get())

    def _replace(self, value: Any) -> None:
        self._replace_whole(with_first_argument(self._get(), value))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            pair = self._get()
            return self._part(pair[key], lambda part: self._replace_whole(with_item(self._get(), key, part)))
        return Proxy.__getitem__(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, int):
            self._replace_whole(with_item(self._get(), key, unwrap(value)))
        else:
            Proxy.__setitem__(self, key, value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[0], self[1]])


def apply_in(scope: Scope, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Like :func:`apply` for a function that itself came out of ``scope``, so that its result does too."""
    result = function(*unwrap(args), **unwrap(kwargs))
    return scope.wrap(result) if scope.open else result


def save(value: Any) -> Any:
    """Keep every proxy in ``value`` (a proxy, or lists, tuples and dicts of them) beyond the trace.

    Plain Python objects live as long as their variables do and come back as they are.
    """
    if isinstance(value, Proxy):
        return value.save()
    if type(value) in (list, tuple):
        for entry in value:
            save(entry)
    elif type(value) is dict:
        for entry in value.values():
            save(entry)
    return value


def _itself(value: Any) -> Any:
    return value
