"""The life of the values of one trace, and the two kinds of proxy that they come as."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nnsight_core.arguments import NEVER_CAME, PENDING, RELEASED
from nnsight_core.dry_run import Place
from nnsight_core.errors import WrittenOverError
from nnsight_core.events import Event, Origin
from nnsight_core.input_proxy import InputProxy
from nnsight_core.proxy import Proxy
from nnsight_core.rows import Rows
from nnsight_core.saveable import as_plain_result
from nnsight_core.sites import Site, user_site
from nnsight_core.values import first_argument, map_tensors

_set = object.__setattr__
_EMPTY = torch.empty(0)
_NO_INPUTS: Mapping[str, Any] = {}


class TensorProxy(Proxy, torch.Tensor):  # type: ignore[misc]  # the proxy's operations are meant to hide the tensor's
    """Stands in for a tensor, and is one: an alias of the value.

    C code that takes whatever calls itself a tensor, without asking for ``__torch_function__``, finds the value's
    memory and its place in the autograd graph.
    """

    # Most proxies never have others, and what a class has need not be set on each of them.
    _saved = False
    _tape: Any = None
    _live: Any = None
    #: How often the value had been written into when it came from the model; -1 if that is not known.
    _version = -1

    @property
    def values(self) -> Any:
        """Of a pair of values and indices, as ``topk`` gives it, the values."""
        return self.__getattr__("values")

    @property
    def indices(self) -> Any:
        """Of a pair of values and indices, as ``topk`` gives it, the indices."""
        return self.__getattr__("indices")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's, but the caller's and the model's own tensors stay as they are."""
        value = None if self._is_pending else self._plain()
        if not requires_grad or value is None or value.requires_grad or self._place() is None:
            return self._call_method("requires_grad_", requires_grad)
        # A leaf in the same memory: the tensor itself may be the script's input, or a frozen parameter.
        self._put(value.detach().requires_grad_())
        return self

    def _adopt(self, value: Any) -> None:
        _set(self, "_value", value)
        inner = self._plain()
        _set(self, "_version", _version_of(inner))
        _take_over(self, _alias(torch.Tensor, inner) if isinstance(inner, torch.Tensor) else _EMPTY.detach())


class ObjectProxy(Proxy):
    """Stands in for anything else: a tuple, a dataclass, a number."""

    __slots__ = ("__weakref__", "_live", "_origin", "_saved", "_scope", "_site", "_tape", "_value")


class TensorInputProxy(InputProxy, TensorProxy):  # type: ignore[misc]
    """A module's call whose first argument is a tensor."""


class ObjectInputProxy(InputProxy, ObjectProxy):
    """A module's call whose first argument is no tensor."""

    __slots__ = ()


def _version_of(value: Any) -> int:
    if torch._C._len_torch_function_stack():
        # Modes of the script's are for its own operations.
        with torch._C.DisableTorchFunction():
            return _counted(value)
    return _counted(value)


def _counted(value: Any) -> int:
    return -1 if not isinstance(value, torch.Tensor) or value.is_inference() else value._version


def _alias(kind: type[Any], value: Any) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        try:
            return value.as_subclass(kind)
        except (RuntimeError, NotImplementedError):
            # Some layouts have no aliases; C code then finds an empty tensor.
            return _empty(kind)
    return _empty(kind)


def _empty(kind: type[Any]) -> Any:
    if not torch._C._len_torch_dispatch_stack():
        return torch.Tensor._make_subclass(kind, _EMPTY)
    with _disable_current_modes():
        return torch.Tensor._make_subclass(kind, _EMPTY)


def _no_tensor(kind: type[ObjectProxy]) -> ObjectProxy:
    made = kind.__new__(kind)
    _set(made, "_saved", False)
    _set(made, "_tape", None)
    _set(made, "_live", None)
    return made


class Scope:
    """The life of the values of one trace: all its proxies are made here and let go here."""

    __slots__ = (
        "_gradients",
        "_inputs",
        "_limit",
        "_made",
        "_originals",
        "_rows",
        "_rows_of",
        "gradient_tape",
        "is_cut",
        "open",
        "padding",
        "prompt_length",
        "rows",
        "run",
        "run_hooked",
        "tape",
    )

    def __init__(self) -> None:
        self.open = True
        self._made: list[weakref.ref[Proxy]] = []
        self._limit = 4096
        #: Makes what records gradients; they are recorded by something that itself knows scopes.
        self.gradient_tape: Callable[[Scope], Any] | None = None
        self._gradients: Any = None
        #: The tensors of the model that copies were made of, by the id of the copy, with the copy.
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._inputs: Mapping[str, Any] = _NO_INPUTS
        self._rows: Rows | None = None
        #: Which rows of the batch belong here; None if all do.
        self.rows: Rows | None = None
        self._rows_of: Place | None = None
        #: How many padding tokens stand left of each prompt; how long the padded prompts are.
        self.padding: Sequence[int] | None = None
        self.prompt_length = 0
        #: Values are rows of a larger batch.
        self.is_cut = False
        #: Until the batch is put together, what is asked of the input is recorded here.
        self.tape: Any = None
        #: The run of the model, counted from 0, for what is done once in each.
        self.run = 0
        #: Runs a module so that its values are handed over as the model's are; None outside a pass.
        self.run_hooked: Callable[[torch.nn.Module, Any, Any], Any] | None = None

    def give_inputs(self, inputs: Mapping[str, Any], rows: Rows | None = None, place: Place | None = None) -> None:
        """Say what the model is called with, and which rows of it belong here; ``place`` is where they come from."""
        self._inputs, self._rows, self._rows_of = inputs, rows, place
        self.rows = rows

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The model's arguments by name."""
        if self._rows is not None:
            self._inputs, self._rows = self._rows.take(self._inputs, self._rows_of), None
        return self._inputs

    def given(self, name: str, otherwise: Callable[[Scope], Any] | None = None) -> Any:
        """An argument of the model's; pending until the batch is put together."""
        return _given(self, name, otherwise) if self.tape is None else self.tape.record(_given, self, name, otherwise)

    def proxy(
        self, value: Any, origin: Origin | Event | None = None, is_call: bool = False, site: Site | None = None
    ) -> Proxy:
        """A proxy of ``value``, or of the call of a module, that lives in this scope; ``site`` is the user's line."""
        if not is_call:
            made = _alias(TensorProxy, value) if isinstance(value, torch.Tensor) else _no_tensor(ObjectProxy)
        else:
            args, kwargs = value
            first = first_argument(value) if args or kwargs else None
            is_tensor = isinstance(first, torch.Tensor)
            made = _alias(TensorInputProxy, first) if is_tensor else _no_tensor(ObjectInputProxy)
        return self._enter(made, value, origin, site)

    def pending(self, tape: Any, is_call: bool = False, site: Site | None = None) -> Proxy:
        """A proxy of a value that has yet to arrive; what is done with it is recorded on ``tape``."""
        made = _empty(TensorInputProxy if is_call else TensorProxy)
        _set(made, "_tape", tape)
        return self._enter(made, PENDING, None, site)

    def _enter(self, made: Any, value: Any, origin: Origin | Event | None, site: Site | None = None) -> Proxy:
        _set(made, "_value", value)
        _set(made, "_scope", self)
        _set(made, "_origin", origin)
        _set(made, "_site", site or user_site())
        if origin is not None and isinstance(value, torch.Tensor):
            _set(made, "_version", _version_of(value))
        return self._keep(made)

    def _keep(self, made: Any) -> Proxy:
        self._made.append(weakref.ref(made))
        if len(self._made) > self._limit:
            self._made = [each for each in self._made if each() is not None]
            self._limit = max(4096, 2 * len(self._made))
        return made  # type: ignore[no-any-return]

    def copied(self, value: Any) -> Any:
        """``value`` with copies of its tensors, which the model cannot change. Their gradients are the originals'."""
        originals = self._originals = self._originals or {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, torch.nn.Parameter):
                return tensor
            made = tensor.clone()
            if tensor.requires_grad:
                originals[id(made)] = tensor, made
            return made

        return map_tensors(copy, value)

    def original(self, tensor: torch.Tensor) -> torch.Tensor:
        """The model's own tensor, if ``tensor`` is a copy that was made of it."""
        return tensor if self._originals is None else self._originals.get(id(tensor), (tensor,))[0]

    @property
    def gradients(self) -> Any:
        """What records gradients in this scope."""
        if self._gradients is None:
            assert self.gradient_tape is not None
            self._gradients = self.gradient_tape(self)
        return self._gradients

    def check_gradients(self) -> None:
        """Raises:
        GradientError: a gradient was asked for that has not come.
        """
        if self._gradients is not None:
            self._gradients.give_up()

    def check_saved(self) -> None:
        """Raises:
        WrittenOverError: the model has written into a value that was saved, after it was read.
        """
        for proxy in self._proxies():
            if proxy._saved and proxy._origin is not None and issubclass(type(proxy), TensorProxy):
                value = proxy._value
                if isinstance(value, torch.Tensor) and proxy._version not in (-1, _version_of(value)):
                    raise WrittenOverError(proxy._origin.event.label, proxy._site)

    def wrap(self, value: Any, origin: Origin | Event | None = None, site: Site | None = None) -> Any:
        """``value`` as a proxy, unless it is one of the kinds that are handed out plainly."""
        if type(value) is torch.Tensor:
            made = _alias(TensorProxy, value)
            # As _enter does it, at half the price.
            fields = made.__dict__
            fields["_value"], fields["_scope"], fields["_origin"] = value, self, origin
            fields["_site"] = site or user_site()
            if origin is not None:
                fields["_version"] = _version_of(value)
            return self._keep(made)
        if issubclass(type(value), Proxy) or callable(value):
            return value
        as_plain = as_plain_result(value)
        return self.proxy(value, origin, site=site) if as_plain is NotImplemented else as_plain

    def close(self, keep: bool = False) -> None:
        """End the scope: proxies that were not saved lose their values, unless they are to be kept for a session."""
        self.open = False
        self._inputs, self._rows, self._rows_of, self.rows = _NO_INPUTS, None, None, None
        self.tape = self.run_hooked = None
        self._originals = None
        if self._gradients is not None:
            self._gradients.drop()
            self._gradients = None
        for proxy in self._proxies():
            _set(proxy, "_origin", None)
            if proxy._tape is not None:
                # A tape and the proxies of its steps hold one another.
                _set(proxy, "_tape", None)
                _set(proxy, "_live", None)
            is_kept = proxy._saved or keep
            if self.is_cut and is_kept:
                _trim(proxy)
            if not is_kept or proxy._value is PENDING:
                _set(proxy, "_value", NEVER_CAME if is_kept else RELEASED)
                _let_go(proxy)
        if not keep:
            self._made.clear()

    def release(self) -> None:
        """Let go of what was kept for a session and not saved."""
        for proxy in self._proxies():
            if not proxy._saved and proxy._value is not NEVER_CAME:
                _set(proxy, "_value", RELEASED)
                _let_go(proxy)
        self._made.clear()

    def has_values(self) -> bool:
        """Whether anybody still has a value that lives here."""
        return any(True for _ in self._proxies())

    def _proxies(self) -> Iterator[Any]:
        for reference in self._made:
            proxy = reference()
            if proxy is not None:
                yield proxy


def hooked_call(scope: Scope, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run ``module`` so that its values can be asked for, as a step that can be recorded."""
    return module(*args, **kwargs) if scope.run_hooked is None else scope.run_hooked(module, args, kwargs)


def _given(scope: Scope, name: str, otherwise: Callable[[Scope], Any] | None) -> Any:
    value = scope.inputs.get(name)
    return otherwise(scope) if value is None and otherwise is not None else value


def _trim(proxy: Proxy) -> None:
    """Do not hold the whole batch for the sake of a few rows; what autograd follows has to stay as it is."""
    value = proxy._value
    if isinstance(value, torch.Tensor) and not value.requires_grad and value._is_view():
        proxy._adopt(value.clone())


def _let_go(proxy: Proxy) -> None:
    """Give up the memory of a proxy that is itself a tensor."""
    if issubclass(type(proxy), torch.Tensor):
        _take_over(proxy, _EMPTY.detach())


def _take_over(proxy: Any, tensor: torch.Tensor) -> None:
    """Let ``proxy`` be the tensor that ``tensor`` is."""
    try:
        torch._C._swap_tensor_impl(proxy, tensor)
    except RuntimeError:
        # C code has made the proxy part of an autograd graph, which now needs it as it is.
        return


class Arrives:
    """A pending proxy as an argument that is not to be replaced by its value."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy


def arrive(proxy: Proxy | Arrives, live: Any) -> None:
    """Let a pending proxy have its value: ``live`` is what the same step gives in a live trace."""
    target: Any = proxy.proxy if type(proxy) is Arrives else proxy
    is_proxy = issubclass(type(live), Proxy)
    if is_proxy and live._value is PENDING:
        # A gradient, which comes later still: the step that gives it has been taken all the same.
        _set(target, "_live", live)
        live._tape.record(arrive, Arrives(target), live)
        return
    _set(target, "_origin", live._origin if is_proxy else None)
    _set(target, "_live", live)
    target._adopt(live._get() if is_proxy else live)
