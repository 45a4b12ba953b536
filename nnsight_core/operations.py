"""The torch operations that a module's own forward calls: how they are named, and how they are met while it runs.

Operations in functions that the forward calls are its own too; those of its children are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from nnsight_core.compiled import Eager
from nnsight_core.flex import FLEX, as_called, runs_flex
from nnsight_core.kernels import INNER, Shut, run_open, why_shut
from nnsight_core.operators import changes_in_place
from nnsight_core.sites import Site, is_library
from nnsight_core.values import map_tensors, share_storage

#: Whose memory a value is: its own, what others hold as well, or what they hold and an operation has just changed.
Memory = Literal["own", "shared", "in place"]

#: Called with the place, ``source.softmax_0.input`` or ``.output`` or that of a value inside, the value, and whose
#: memory it is;
#: gives its replacement in a one-tuple, or None for no change.
Visit = Callable[[str, Any, Memory], "tuple[Any] | None"]

#: What stands before the name of an operation in the kind of a value.
PREFIX = "source."

#: Functions that come by and make no tensor. Private ones, and those that begin with ``is_``, are none either.
_NO_OPERATIONS = frozenset(
    """
    size stride dim ndimension numel nelement element_size storage_offset data_ptr get_device dim_order item tolist
    numpy storage untyped_storage equal allclose result_type promote_types can_cast has_names backward register_hook
    register_post_accumulate_grad_hook retain_grad requires_grad_ share_memory_ __set__ __delete__ __len__ __bool__
    __int__ __float__ __complex__ __index__ __format__ __repr__ __str__ __hash__ __contains__ __reduce__ __reduce_ex__
    __array__ __array_wrap__ __dlpack__ __dlpack_device__ __dir__ __setstate__
    """.split()
)
#: Attributes of a tensor that are tensors.
_TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})

#: The code of every call of a module.
MODULE_CALL = torch.nn.Module._call_impl.__code__


def is_operation(kind: str) -> bool:
    """Whether a value of this kind is that of an operation inside a module, and not of the module's own call."""
    return kind.startswith(PREFIX)


def is_call(kind: str) -> bool:
    """Whether a value of this kind is what something is called with, and not what it gives.

    >>> is_call("input"), is_call("source.matmul_0.input&cat_1"), is_call("source.matmul_0.output")
    (True, True, False)
    """
    return kind.rpartition(".")[2].partition("&")[0] in ("input", "skip")


def operation_of(kind: str) -> str:
    """The name of the operation whose value is of this kind.

    >>> operation_of("source.softmax_0.output")
    'softmax_0'
    """
    return kind.removeprefix(PREFIX).rpartition(".")[0]


@lru_cache(maxsize=1)
def torch_names() -> frozenset[str]:
    """The plain names of all that torch can do with tensors, near enough to tell a slip of the pen from a name."""
    known = (dir(torch), dir(torch.nn.functional), dir(torch.Tensor), dir(torch.special), dir(torch.linalg))
    return frozenset(_plain_name(name) for names in known for name in names) | INNER.keys()


def _plain_name(name: str) -> str:
    # Overloads of operators are called by dotted names.
    name = name.partition(".")[0]
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def base_name(function: Any, count: int) -> str | None:
    """The plain name of a torch function called with ``count`` arguments; None if it makes no tensor.

    >>> base_name(torch.Tensor.__rsub__, 2), base_name(torch.Tensor.masked_fill_, 3), base_name(torch.Tensor.size, 1)
    ('rsub', 'masked_fill_', None)
    """
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        attribute: str = getattr(getattr(function, "__self__", None), "__name__", "")
        return attribute if attribute in _TENSOR_ATTRIBUTES else None
    if isinstance(function, type) or name in _NO_OPERATIONS or name.startswith("is_") or (name == "type" and count < 2):
        return None
    plain = _plain_name(name)
    return plain if plain and not plain.startswith("_") else None


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


class Tap(TorchFunctionMode):
    """Is on while one call of a module runs, and shows the operations of that call as they come.

    Args:
        module: whose call it is.
        visit: sees what each operation is called with, and what it gives.
        listens: whether ``visit`` has a use for the value at a place inside an operation, which costs something to
            tell; without it, for all that can be told.
        ended: called when the call has come to its end.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        visit: Visit,
        listens: Callable[[str], bool] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self._visit = visit
        self._listens = listens
        self._ended = ended
        #: How many operations of each name there have been.
        self.counts: dict[str, int] = {}
        self._opened_in = 0
        self._frame: FrameType | None = None
        self._is_busy = False
        self._shows_flex = False

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``forward`` with the tap on."""
        # The frame stays until the call is over, so its id will do.
        self._opened_in = id(sys._getframe())
        self._begin()
        torch._C._push_on_torch_function_stack(self)
        try:
            result = forward(*args, **kwargs)
            self.end()
            return result
        finally:
            self.close()

    def _begin(self) -> None:
        if runs_flex(self.module):
            self._shows_flex = True
            Eager.begin()

    def end(self) -> None:
        """The call has come to its end."""
        self.close()
        if self._ended is not None:
            self._ended()

    def join(self, call: FrameType, gone: Sequence[str]) -> None:
        """Be the tap of ``call``, which is under way and has ``gone`` by operations of these names."""
        for name in gone:
            base, _, number = name.rpartition("_")
            self.counts[base] = int(number) + 1
        # Held, for another frame might else get its place in memory, should the call end without our knowing.
        self._frame, self._opened_in = call, id(call)
        self._begin()

    def is_of(self, call: FrameType | None) -> bool:
        """Whether it has joined ``call`` and is still on."""
        return call is not None and self._frame is call

    def close(self) -> None:
        """Take the tap off, wherever it stands: a forward that is left half-way may leave modes of its own behind.

        A forward pass that is abandoned is unwound wherever the collector finds it, where other modes may be on.
        """
        self._frame, self._opened_in = None, 0
        if self._shows_flex:
            self._shows_flex = False
            Eager.end()
        above = []
        while torch._C._len_torch_function_stack():
            mode = torch._C._pop_torch_function_stack()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            torch._C._push_on_torch_function_stack(mode)

    def _is_own(self, frame: FrameType | None) -> bool:
        """Whether the call that is tapped is the innermost call of a module around ``frame``."""
        while frame is not None and id(frame) != self._opened_in:
            if frame.f_code is MODULE_CALL:
                return False
            frame = frame.f_back
        return frame is not None

    def site(self) -> Site:
        """The line that calls the operation which is shown: the innermost that is not torch's. In a module of torch's
        own, that of its forward.
        """
        frame: FrameType | None = sys._getframe(1)
        last = frame
        while frame is not None and id(frame) != self._opened_in:
            last = frame
            if not is_library(frame):
                break
            frame = frame.f_back
        assert last is not None
        return Site(last.f_code, last.f_lasti)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let ``func`` run, and show it before and after if it is an operation of the call."""
        if torch.compiler.is_dynamo_compiling():
            # What torch compiles it compiles as if nobody looked on, so that the code gives what it always gives.
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        name = base_name(func, len(args) + len(kwargs))
        if name is None or self._is_busy or not self._is_own(sys._getframe(1)):
            return func(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Under vmap and the like tensors stand for others, and mean nothing outside.
            return func(*args, **kwargs)
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        kind = f"{PREFIX}{name}_{number}"
        own = args
        changed = self._show(f"{kind}.input", (args, kwargs), "shared")
        if changed is not None:
            args, kwargs = _with_call(args, changed[0], kind, changes_in_place(func.__name__, kwargs))
        target = kwargs.get("out", args[0] if args else kwargs.get("input"))
        before = _version(target)
        if name == FLEX:
            func = as_called(func, own, Tap)
        is_open = name in INNER and self._is_to_be_opened(func, name, kind, args, kwargs)
        result = self._run_open(func, kind, args, kwargs) if is_open else func(*args, **kwargs)
        in_place = isinstance(target, torch.Tensor) and (
            changes_in_place(func.__name__.partition(".")[0], kwargs)
            if before is None or func.__name__ == "__setitem__"
            else result is target and _version(target) != before
        )
        value = target if in_place else result
        memory: Memory = "shared" if shares_memory(value, (args, kwargs)) else "own"
        changed = self._show(f"{kind}.output", value, "in place" if in_place else memory)
        if changed is None:
            return result
        if not in_place:
            return changed[0]
        _fill(target, changed[0], kind)
        return result

    def _is_to_be_opened(self, func: Any, name: str, kind: str, args: Any, kwargs: Any) -> bool:
        wanted = [f"{kind}.{each}" for each in INNER[name]]
        if self._listens is not None and not any(map(self._listens, wanted)):
            return False
        why = why_shut(func, args, kwargs)
        if why is None:
            return True
        for each in wanted:
            self._show(each, Shut(why), "own")
        return False

    def _run_open(self, func: Any, kind: str, args: Any, kwargs: Any) -> Any:
        return run_open(func, args, kwargs, lambda name, value: self._show(f"{kind}.{name}", value, "own"))

    def _show(self, kind: str, value: Any, memory: Memory) -> tuple[Any] | None:
        # Whoever looks may use torch for it, and that is no operation of the module's.
        self._is_busy = True
        try:
            return self._visit(kind, value, memory)
        finally:
            self._is_busy = False


def shares_memory(value: Any, given: Any) -> bool:
    """Whether a tensor in ``value`` lies in the memory of one in ``given``."""
    tensors: list[torch.Tensor] = []
    map_tensors(tensors.append, given)
    memory = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout is torch.strided}
    made: list[torch.Tensor] = []
    map_tensors(made.append, value)
    return any(each.layout is torch.strided and each.untyped_storage()._cdata in memory for each in made)


def _with_call(args: Any, call: Any, kind: str, in_place: bool) -> Any:
    """The call to make in the place of one with ``args``."""
    new, kwargs = call
    if in_place and args and new and new[0] is not args[0]:
        # The tensor to be changed stays who it is, for others hold it; but it is this argument alone that is set.
        target = args[0]

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if share_storage(tensor, target) else tensor

        rest, kwargs = map_tensors(own, (new[1:], kwargs))
        _fill(target, new[0], kind)
        new = (target, *rest)
    return new, kwargs


def _fill(target: torch.Tensor, value: Any, kind: str) -> None:
    """Everybody who holds the tensor that an operation has changed in place is to see the change made to it."""
    if not isinstance(value, torch.Tensor) or value.shape != target.shape:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.80}"
        raise ValueError(
            f"{kind.removeprefix(PREFIX)} changes its tensor in place, so the tensor can only be set to one "
            f"of the same shape, {tuple(target.shape)}, and not to {given}."
        )
    target.copy_(value)
