"""A module tree as text: what torch prints, with the extra names that modules answer to."""

from __future__ import annotations

from textwrap import indent

import torch

from nnsight_core.renames import Aliases


def tree_text(module: torch.nn.Module, path: str, aliases: Aliases) -> str:
    """``repr(module)``, where a child with another name shows as ``(transformer -> model)``.

    A name that stands for something further away has a line of its own: ``(transformer.h -> layers)``.

    Args:
        module: the module.
        path: where it stands in the tree.
        aliases: for each path the extra names of what is below it, with full paths.
    """
    here = aliases.get(path, {})
    below = f"{path}." if path else ""
    if not any(holder == path or holder.startswith(below) for holder in aliases):
        return repr(module)
    entries: list[tuple[str, str]] = []
    for name, child in module._modules.items():
        new = [alias for alias, target in here.items() if target == below + name]
        text = repr(child) if child is None else tree_text(child, below + name, aliases)
        if isinstance(module, torch.nn.ModuleList) and not new and entries and _same(entries[-1], name, text):
            entries[-1] = (f"{entries[-1][0].partition('-')[0]}-{name}", text)
        else:
            entries.append((" -> ".join([name, ", ".join(new)]) if new else name, text))
    lines = [line for line in module.extra_repr().split("\n") if line]
    lines += [_entry(name, text) for name, text in entries]
    children = {below + name for name in module._modules}
    lines += [f"({target.removeprefix(below)} -> {alias})" for alias, target in here.items() if target not in children]
    return f"{module._get_name()}(\n{indent(chr(10).join(lines), '  ')}\n)"


def described(module: torch.nn.Module, path: str) -> str:
    """What errors call a module."""
    name = type(module).__name__
    return f"{path} ({name})" if path else f"The model ({name})"


def place_below(name: str, module: torch.nn.Module, path: str, aliases: Aliases) -> str:
    """The first path below ``module`` that ends in ``name``, as an own name or an extra one; empty if there is none."""
    below = f"{path}." if path else ""
    extra = (f"{holder}.{name}" for holder, names in aliases.items() if name in names and holder.startswith(below))
    own = (below + each for each, _ in module.named_modules() if each.endswith(f".{name}"))
    return next((place for places in (own, extra) for place in places), "")


def _same(entry: tuple[str, str], name: str, text: str) -> bool:
    first, _, last = entry[0].partition("-")
    return entry[1] == text and (last or first).isdigit() and int(last or first) == int(name) - 1


def _entry(name: str, text: str) -> str:
    first, dash, last = name.partition("-")
    if dash and first.isdigit() and last.isdigit():
        return f"({name}): {int(last) - int(first) + 1} x {text}"
    return f"({name}): {text}"
