"""A proxy stands in for its value: in Python, torch, numpy, einops, pickle; during the trace and after it."""

from __future__ import annotations

import copy
import io
import math
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnsight_core
from nnsight_core import NNsight, Proxy, ReleasedValueError

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)


def plainly(value: Any) -> Any:
    """Proxies replaced by what they hold, for comparing."""
    if isinstance(value, Proxy):
        value = value.value
    if isinstance(value, (tuple, list)):
        return [plainly(each) for each in value]
    return value


def check_same(found: Any, expected: Any) -> None:
    """Equal, bit for bit where they are tensors."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_same(one, other)
    else:
        assert found == expected


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "+": lambda p: p + 1,
    "reflected -": lambda p: 1 - p,
    "plain + proxy": lambda p: X + p,
    "proxy * proxy": lambda p: p * p,
    "@": lambda p: p @ p.T,
    "plain @": lambda p: X.T @ p,
    "**": lambda p: p**2,
    "2 **": lambda p: 2**p,
    "//": lambda p: p // 0.3,
    "%": lambda p: p % 0.3,
    "-p": operator.neg,
    "abs": abs,
    "~": lambda p: ~(p > 0),
    "&": lambda p: (p > 0) & (p < 1),
    "|": lambda p: (p > 0) | (p < -1),
    "==": lambda p: p == p,
    "!=": lambda p: p != X,
    "<=": lambda p: p <= X,
    "index": lambda p: p[0],
    "slice": lambda p: p[:, 1:],
    "ellipsis": lambda p: p[..., None],
    "mask": lambda p: p[p > 0],
    "index by a value": lambda p: p[:, p[0].argmax()],
    "plain by a value": lambda p: X[:, p[0].argmax()],
    "list by a value": lambda p: [10, 20, 30][p[0].argmax()],
    "slice by a value": lambda p: X[:, : p[0].argmax() + 1],
    "range": lambda p: list(range(p[0].argmax())),
    "method": lambda p: p.softmax(-1),
    "method with keyword": lambda p: p.sum(dim=0, keepdim=True),
    "namedtuple field": lambda p: p.max(-1).values,
    "topk": lambda p: p.topk(2).indices,
    "svd": lambda p: torch.linalg.svd(p).S,
    "shape": lambda p: p.shape,
    "dtype": lambda p: p.dtype == torch.float32,
    "size": lambda p: p.size(-1) * 2,
    "len": len,
    "iter": lambda p: list(p),
    "unpacking": lambda p: [part * 2 for part in (lambda a, b: (b, a))(*p)],
    "sum of rows": sum,
    "sorted": lambda p: sorted(p[0]),
    "in": lambda p: p[0, 0] in p,
    "bool": lambda p: bool(p.sum() > 0),
    "not": lambda p: not p.any(),
    "int": lambda p: int(p.sum() * 10),
    "float": lambda p: float(p[0, 0]),
    "item": lambda p: p[0, 0].item() + 1,
    "tolist": lambda p: p.tolist(),
    "math": lambda p: math.floor(p.sum()),
    "round": lambda p: round(p.sum().item(), 3),
    "f-string": lambda p: f"{p[0, 0]:.3f} {p.shape}",
    "str": str,
    "repr": repr,
    "torch.sum": lambda p: torch.sum(p, dim=1),
    "torch by keyword": lambda p: torch.sum(input=p, dim=1),
    "torch.stack": lambda p: torch.stack([p, X]),
    "torch.cat": lambda p: torch.cat((X, p)),
    "torch.einsum": lambda p: torch.einsum("ab,cb->ac", p, p),
    "torch.where": lambda p: torch.where(p > 0, p, X),
    "torch.equal": lambda p: torch.equal(p, p),
    "torch.allclose": lambda p: torch.allclose(p, X),
    "torch.zeros_like": torch.zeros_like,
    "F.linear": lambda p: F.linear(p, p),
    "F.cross_entropy": lambda p: F.cross_entropy(p, torch.tensor([0, 1])),
    "F.attention": lambda p: F.scaled_dot_product_attention(p[None], p[None], p[None]),
    "into a plain tensor": lambda p: torch.zeros(2, 3).index_copy_(0, torch.tensor([1]), p[:1]),
    "plain.copy_": lambda p: torch.zeros(2, 3).copy_(p),
    "isinstance": lambda p: isinstance(p, torch.Tensor) and not isinstance(p, tuple),
    "is_tensor": torch.is_tensor,
    "class": lambda p: p.__class__ is torch.Tensor,
    "numpy": lambda p: p.numpy(),
    "asarray": np.asarray,
    "np.stack": lambda p: np.stack([p, p]),
    "np dtype": lambda p: np.asarray(p, dtype=np.float64),
    "einops.rearrange": lambda p: einops.rearrange(p, "a b -> b a"),
    "einops.reduce": lambda p: einops.reduce(p, "a b -> a", "mean"),
    "einops.repeat": lambda p: einops.repeat(p, "a b -> a b c", c=2),
    "einops of a list": lambda p: einops.rearrange([p, p], "k a b -> a b k"),
    "einops.einsum": lambda p: einops.einsum(p, p, "a b, c b -> a c"),
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "pickle in a dict": lambda p: pickle.loads(pickle.dumps({"a": [p]}))["a"],
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "detach cpu clone": lambda p: p.detach().cpu().clone(),
    "to": lambda p: p.to(torch.float64),
    "collate": lambda p: torch.utils.data.default_collate([p, p]),
    "pad_sequence": lambda p: nn.utils.rnn.pad_sequence([p, p]),
    "hash": lambda p: isinstance(hash(p), int),
    "key of a dict": lambda p: {p: 1}[p],
    "getattr": lambda p: getattr(p, "ndim", None),
    "hasattr": lambda p: hasattr(p, "shape") and not hasattr(p, "nonsense"),
    "dir": lambda p: "softmax" in dir(p),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_gives_what_it_gives_on_the_value(operation: Callable[[Any], Any]) -> None:
    net = network()
    expected = plainly(operation(net[0](X)))
    model = NNsight(net)
    with model.trace(X):
        hidden = model[0].output.save()
        during = plainly(operation(hidden))
    check_same(during, expected)
    finished = operation(hidden)
    # After the trace an operation gives the plain result.
    assert type(finished) is not Proxy
    check_same(plainly(finished), expected)


# C code that asks `isinstance(p, torch.Tensor)` and believes the answer. In a process of its own: it may crash.
CONVERSIONS = {
    "torch.tensor": "torch.tensor(p.detach())",
    "torch.tensor of parts": "torch.tensor([p[0, 0], p[0, 1]])",
    "as_tensor": "torch.as_tensor(p) + 0",
    "asarray": "torch.asarray(p) + 0",
    "FloatTensor": "torch.FloatTensor(p)",
    "where with a number": "torch.where(p > 0, p, 0)",
    "full": "torch.full((2,), p[0, 0])",
    "alpha": "torch.add(x, x, alpha=p[0, 0])",
    "new_tensor": "x.new_tensor(p)",
    "set_": "x.clone().set_(p)",
    "Function.apply": "Square.apply(p)",
    "data": "setattr(x.clone(), 'data', p)",
    "grad": "setattr(x.clone().requires_grad_(), 'grad', p)",
    "vmap": "torch.vmap(lambda row: row * 2)(p)",
    "func.grad": "torch.func.grad(lambda a: (a * p).sum())(x)",
    "script": "scripted(p)",
    "reentrant checkpoint": "torch.utils.checkpoint.checkpoint(lambda a: a + 1, p, use_reentrant=True)",
    "dlpack": "torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(p))",
    "Parameter": "torch.nn.Parameter(p)",
}
SCRIPT = """
import os, resource, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.utils.checkpoint, torch.utils.dlpack
from nnsight_core import NNsight
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * value
    @staticmethod
    def backward(ctx, grad):
        return grad
import linecache
linecache.cache["<string>"] = (0, None, sys.argv[1].splitlines(True), "<string>")
@torch.jit.script
def scripted(value):
    return value + 1
x = torch.ones(2, 3)
model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3)).requires_grad_(False))
def check(expression):
    def result(p):
        return eval(expression, {**globals(), "p": p})
    expected = result(model[0]._module(x))
    with model.trace(x):
        try:
            found = result(model[0].output)
        except TypeError:
            return  # A clear refusal is right as well; `.value` is the way then.
        found = getattr(found, "value", found)
    assert expected is None and found is None or torch.equal(found, expected), (found, expected)
for expression in sys.argv[2:]:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            check(expression)
        except BaseException as error:
            print("raised", type(error).__name__, str(error).split(chr(10))[0], flush=True)
        else:
            print("fine", flush=True)
        os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        print("died of signal", status & 127, flush=True)
"""


@pytest.fixture(scope="module")
def conversions() -> dict[str, str]:
    """What came of each conversion: the process in which it runs may die."""
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that can die one by one")
    command = [sys.executable, "-c", SCRIPT, SCRIPT, *CONVERSIONS.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CONVERSIONS, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_c_code_gets_the_value_or_refuses_but_never_reads_garbage(name: str, conversions: dict[str, str]) -> None:
    assert conversions[name] == "fine"


def test_value_is_the_plain_object() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X):
        hidden = model[0].output
        assert issubclass(type(hidden), Proxy)
        assert type(hidden.value) is torch.Tensor
        assert isinstance(nn.Parameter(hidden.value), nn.Parameter)


def test_a_saved_proxy_gives_plain_results_afterwards() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X):
        hidden = model[0].output.save()
    for result in (hidden * 2, 2 * hidden, hidden[0], hidden.sum(), torch.sum(hidden), hidden.T, -hidden, hidden == 1):
        assert type(result) is torch.Tensor
    hidden[:] = 0
    assert hidden.sum() == 0
    assert hidden.save() is hidden


def test_what_was_computed_from_a_saved_value_is_released_unless_it_was_saved() -> None:
    model = NNsight(network())
    with model.trace(X):
        hidden = model[0].output.save()
        lost, kept = hidden * 2, (hidden * 3).save()
    assert torch.equal(kept.value, hidden.value * 3)
    with pytest.raises(ReleasedValueError, match="lost, kept = hidden"):
        assert lost + 1 is None


def test_save_keeps_everything_in_a_container() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X) as tracer:
        kept = nnsight_core.save({"a": [model[0].output], "b": (model[1].output, 3)})
        number = tracer.save([1, "two"])
    assert torch.equal(kept["a"][0].value, net[0](X))
    assert torch.equal(kept["b"][0].value, net(X))
    assert number == [1, "two"]


def test_numbers_and_descriptions_need_no_saving() -> None:
    model = NNsight(network())
    with model.trace(X):
        hidden = model[0].output
        mean, rows, shape = hidden.mean().item(), hidden.size(0), hidden.shape
        saved = hidden.mean().item().save()
    assert isinstance(mean, float)
    assert rows == 2
    assert shape == (2, 3)
    assert saved.value == mean


def test_a_plain_tensor_that_adds_up_values_stays_plain() -> None:
    net = network()
    model = NNsight(net)
    total = torch.zeros(2, 3)
    with model.trace(X):
        total += model[0].output
        total.add_(model[1].output)
    assert type(total) is torch.Tensor
    assert torch.equal(total, net[0](X) + net(X))


def test_a_shallow_copy_is_not_the_value_itself() -> None:
    class GivesDict(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    model = NNsight(nn.Sequential(GivesDict()))
    with model.trace(X):
        given = model[0].output
        mine = copy.copy(given)
        mine["x"] = None
        assert given["x"] is not None


def test_torch_save(tmp_path: Any) -> None:
    model = NNsight(network())
    buffer = io.BytesIO()
    with model.trace(X):
        hidden = model[0].output.save()
        torch.save({"hidden": hidden}, buffer)
        torch.save(hidden, tmp_path / "hidden.pt")
    buffer.seek(0)
    for found in (torch.load(buffer)["hidden"], torch.load(tmp_path / "hidden.pt")):
        assert type(found) is torch.Tensor
        assert torch.equal(found, hidden.value)


def test_proxies_are_not_made_by_hand() -> None:
    with pytest.raises(TypeError, match="come from a trace"):
        Proxy()


def test_values_of_an_earlier_trace_are_used_in_a_later_one() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X):
        hidden = model[0].output.save()
    with model.trace(hidden):
        model[1].input = hidden * 2
        result = model.output.save()
    assert torch.equal(result.value, net[1](net[0](X) * 2))


# The user's own modules and functions, called with proxies.


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        assert type(value) is torch.Tensor
        return value * value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


class Coder(nn.Module):
    """The user's own module, with a custom autograd function inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, hidden: torch.Tensor, extra: dict[str, Any] | None = None, *, depth: int = 0) -> Any:
        assert type(hidden) is torch.Tensor
        assert extra is None or type(extra["x"][0]) is torch.Tensor
        if depth < 0:
            raise ValueError("a negative depth")
        inner = self(self.linear(hidden), depth=depth - 1) if depth else hidden
        assert type(inner) is torch.Tensor
        return Square.apply(inner)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "by position": lambda coder, h: coder(h),
    "by keyword": lambda coder, h: coder(hidden=h),
    "inside a container": lambda coder, h: coder(h, {"x": [h]}),
    "inside a container by keyword": lambda coder, h: coder(hidden=h, extra={"x": (h,)}),
    "recursive": lambda coder, h: coder(h, depth=2),
    "in a sequence": lambda coder, h: nn.Sequential(coder, nn.Tanh())(h),
    "on a part": lambda coder, h: coder(h[:1] * 2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_module_of_the_users_gets_plain_tensors_and_its_result_is_saved(call: Callable[[Any, Any], Any]) -> None:
    net, coder = network(), Coder()
    model = NNsight(net)
    with model.trace(X):
        coded = call(coder, model[0].output)
        assert issubclass(type(coded), Proxy)
        kept = coded.save()
        model[1].output = model[1].output + coded.sum()
    expected = call(coder, net[0](X))
    assert type(kept.value) is torch.Tensor
    assert torch.equal(kept.value, expected)


def test_a_module_of_the_users_called_with_plain_tensors_gives_plain_tensors() -> None:
    coder = Coder()
    model = NNsight(network())
    with model.trace(X):
        hidden = model[0].output
        assert type(coder(X)) is torch.Tensor
        with pytest.raises(ValueError, match="negative"):
            coder(hidden, depth=-1)
        assert type(coder(X)) is torch.Tensor


def test_a_module_of_the_users_called_with_a_dataclass_of_values() -> None:
    class Reads(nn.Module):
        def forward(self, record: Any) -> torch.Tensor:
            assert type(record.hidden) is torch.Tensor
            return Square.apply(record.hidden)

    from tests.core.test_getting_and_setting import Record

    net = network()
    model = NNsight(net)
    with model.trace(X):
        hidden = model[0].output
        kept = nnsight_core.save(Reads()(Record(hidden, hidden)))
    assert torch.equal(kept + 0, net[0](X) ** 2)


def test_a_module_of_the_model_is_called_in_the_body() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X):
        early = model[1](model[0].output).save()
        late = model[1].output.save()
    assert torch.equal(early.value, late.value)


def test_apply_gives_any_function_plain_values() -> None:
    net = network()
    model = NNsight(net)
    with model.trace(X):
        kept = nnsight_core.apply(Square.apply, model[0].output).save()
    assert torch.equal(kept.value, net[0](X) ** 2)
