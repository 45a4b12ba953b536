"""What scripts of other eras ask for that is not there, and what is written instead."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import NoReturn

import torch

#: Asked of a module, of the trace or of a session.
ELSEWHERE = {
    "all": "A block runs once. For every generation step, write: for step in tracer.all(): ...",
    "cond": "A condition is plain Python here. Write: if value: ...",
    "dict": "A dict is plain Python here. Write: kept = save({})",
    "iter": "A block runs once. For some generation steps, write: for step in tracer.iter[1:3]: ...",
    "list": "A list is plain Python here. Write: kept = save([])",
}
#: Asked of the package.
OF_THE_PACKAGE = {
    "CONFIG": "Nothing needs to be set up: traces run in this process, and no key is needed. Leave the line out.",
    "cond": ELSEWHERE["cond"],
    "dict": ELSEWHERE["dict"],
    "list": ELSEWHERE["list"],
    "local": "All of a body runs here. Leave it out.",
    "stop": "The trace is stopped by its tracer. Write: tracer.stop()",
    "trace": "A trace is opened by a model. Write: with model.trace(prompt) as tracer: ...",
}
_OF_A_VALUE = {
    "fake_value": "For the shape alone, write: value.shape; for a run on shapes alone: with model.scan(prompt): ...",
    "node": "There is no graph behind a value, which is there as soon as it is asked for. Use it as it is.",
    "save": "This is a plain tensor of the script's own, which stays as it is: leave .save() out.",
    "stop": "The trace is stopped by its tracer, after the last value that you need. Write: tracer.stop()",
    "update": "A value is set by assigning it. Write: module.output = new, or for a part: module.output[:, -1] = new",
}
_PLAIN = (list, dict, tuple, set, int, float, bool, str, type(None))
_NOT_A_VALUE = "This is plain Python and no value of the model's. To keep it with all values in it, write: save(it)"
_SESSION = "There is no session but the one that is opened around traces: with model.session():. Loop in plain Python."


def explain(error: BaseException | None, where: str = "") -> None:
    """Let an ``AttributeError`` say what to write instead, if it is about a spelling of another era.

    Args:
        error: what ended a block; anything else is left as it is.
        where: the user's line, for an error that is not raised at it.
    """
    if not isinstance(error, AttributeError) or len(error.args) != 1:
        return
    owner, name, hint = error.obj, error.name or "", ""
    if isinstance(owner, torch.Tensor):
        hint = _OF_A_VALUE.get(name, "")
    elif isinstance(owner, _PLAIN):
        hint = _NOT_A_VALUE if name == "save" else ""
    elif isinstance(owner, (FunctionType, MethodType)) and owner.__name__ == "session":
        hint = _SESSION
    if hint and hint not in str(error):
        error.args = ("\n".join(line for line in (str(error), where, hint) if line),)


def of_the_package(name: str) -> NoReturn:
    """Say that the package has no such name.

    Raises:
        ImportError: other packages of this kind have it; says what is written instead.
        AttributeError: for all other names.
    """
    what = f"nnsight_core has no {name!r}."
    # From `from nnsight_core import CONFIG` Python would take the text of an AttributeError away.
    raise ImportError(f"{what}\n{OF_THE_PACKAGE[name]}") if name in OF_THE_PACKAGE else AttributeError(what)
