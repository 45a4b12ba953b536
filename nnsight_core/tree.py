"""What all envoys of one model share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch

from nnsight_core.edits import Edits
from nnsight_core.values import Pair

#: Extra names of modules, and what each stands for.
Names = Mapping[str, str]
NO_NAMES: Names = {}


def _no_example(root: torch.nn.Module) -> None:
    return None


class Tree:
    """What all envoys of one model share: the root, the extra names, and who calls whom.

    Args:
        root: the wrapped module.
        aliases: for each parent path (``""`` is the root) the extra names that it answers to, and the full path
            that each stands for.
    """

    def __init__(self, root: torch.nn.Module, aliases: Mapping[str, Names] | None = None) -> None:
        self.root = root
        self.aliases = dict(aliases or {})
        #: What is done in every trace, in this order.
        self.edits = Edits()
        #: Modules into whose output the model writes after they have given it.
        self.written_over: frozenset[torch.nn.Module] = frozenset()
        self._parents: dict[torch.nn.Module, list[torch.nn.Module]] = {}
        self._ancestors: dict[torch.nn.Module, tuple[torch.nn.Module, ...]] = {}
        #: Gives arguments to run a root with where nothing is traced, and keyword arguments; None if unknown.
        self.example: Callable[[torch.nn.Module], Pair | None] = _no_example

    def ancestors(self, module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
        """Every module inside whose call ``module`` may be called, the root among them.

        A module that hangs in the tree at several places has the ancestors of all of them.
        """
        found = self._ancestors.get(module)
        if found is None:
            self._index()
            found = self._ancestors[module] = self._collect(module)
        return found

    def twin(self) -> Tree:
        """The same modules under the same names, with edits of their own from here on."""
        twin = copy.copy(self)
        twin.aliases = dict(self.aliases)
        return twin

    def forget(self) -> None:
        """The tree has changed: work out anew who calls whom."""
        self._parents.clear()
        self._ancestors.clear()

    def _index(self) -> None:
        self._parents.clear()
        for parent in self.root.modules():
            for child in parent.children():
                self._parents.setdefault(child, []).append(parent)

    def _collect(self, module: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
        found: dict[torch.nn.Module, None] = {}
        waiting = [module]
        while waiting:
            for parent in self._parents.get(waiting.pop(), ()):
                if parent not in found:
                    found[parent] = None
                    waiting.append(parent)
        found.setdefault(self.root, None)
        found.pop(module, None)
        return tuple(found)
