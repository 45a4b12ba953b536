"""Options of a trace: those of older scripts are accepted, and what nobody knows is refused and not dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from nnsight_core.errors import OptionError, RemoteError

#: They looked at shapes before the model ran. Here values are there at once, with their shapes.
_CHECKS = ("scan", "validate")


def without_old_options(options: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """``options`` without those of older scripts that change nothing here; what ``function`` itself takes stays.

    Raises:
        RemoteError: the trace was to run on another machine.
        OptionError: the trace was to run in inference mode.
    """
    left = dict(options)
    if not left.keys() & {"remote", "inference", *_CHECKS}:
        return left
    for name in {"remote", "inference", *_CHECKS} - parameters_of(function):
        wanted = left.pop(name, False)
        if name == "remote" and wanted:
            raise RemoteError()
        if name == "inference" and wanted:
            mend = "Open it yourself: with torch.inference_mode(), model.trace(...):"
            raise OptionError("inference=True", "a trace runs in the mode that it is opened in.", mend=mend)
    return left


def invoker_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``invoker_args`` says about turning an input into arguments.

    Raises:
        OptionError: it is no dict.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        mend = "Write invoker_args={'truncation': True}."
        raise OptionError("invoker_args", f"it is a {type(options).__name__}, not a dict of options.", mend=mend)
    return {name: value for name, value in options.items() if name not in _CHECKS}


def refuse_options(options: Iterable[str], why: str) -> None:
    """Raises:
    OptionError: there are options, which would do nothing.
    """
    names = ", ".join(options)
    if names:
        raise OptionError(f"invoker_args ({names})", f"they say how to read text, but {why}.", mend="Leave them out.")


def refuse_unknown(options: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raises:
    OptionError: there are options; says which of ``known`` may have been meant.
    """
    for name in options:
        mend = ""
        if name == "envoys":
            mend = "For other names, write rename={'mlp': 'feed_forward'}; for more methods, functions of a module."
        raise OptionError(name, "a model is wrapped without such an option.", known, mend)


def parameters_of(function: Callable[..., Any]) -> set[str]:
    """The names of what ``function`` takes; none where that is not told, as of what is written in C or scripted."""
    try:
        return {*inspect.signature(function).parameters} - {"self", "args", "kwargs"}
    except (TypeError, ValueError):
        return set()


def parameters_inside(root: torch.nn.Module) -> set[str]:
    """The names of all arguments that a module of ``root`` takes: what a model may hand down as ``**kwargs``."""
    kinds = {type(module) for module in root.modules()}
    return {name for kind in kinds for name in parameters_of(kind.forward)}
