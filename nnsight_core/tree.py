"""What all envoys of one model share."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch

from nnsight_core.edits import Edits
from nnsight_core.values import Pair

#: Extra names of modules, and what each stands for.
Names = Mapping[str, str]
NO_NAMES: Names = {}


def _no_example(root: torch.nn.Module) -> None:
    return None


class Unloaded(Protocol):
    """The weights of a model that has its modules, and nothing in them yet."""

    def load(self) -> None:
        """Put modules with weights in the place of those without."""

    def alters(self, name: str, value: Any) -> bool:
        """Whether the attribute ``name`` of a module, which is ``value`` now, may be another one with weights."""


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
        #: Some modules work in place, as ``ReLU(inplace=True)``: any value that is read may be written over.
        self.works_in_place = False
        #: Gives arguments to run a root with where nothing is traced, and keyword arguments; None if unknown.
        self.example: Callable[[torch.nn.Module], Pair | None] = _no_example
        #: What is to be loaded before the model can run; None once it is.
        self.unloaded: Unloaded | None = None
        #: The device that weights which are not loaded will come to; None where nobody knows.
        self.home: torch.device | None = None
        #: Held while modules are exchanged, and by whoever is to be told of it.
        self.lock = threading.RLock()
        #: The envoys that there are of a model that is not loaded, and the open parts of its edits and dry runs.
        self.envoys: WeakSet[Any] = WeakSet()
        self.open_parts: WeakSet[Any] = WeakSet()
        #: All trees of these modules: edited models have their own.
        self._trees: WeakSet[Tree] = WeakSet([self])
        #: What has taken the place of modules without weights.
        self._loaded: WeakKeyDictionary[torch.nn.Module, torch.nn.Module] = WeakKeyDictionary()
        self._parents: dict[torch.nn.Module, list[torch.nn.Module]] = {}
        self._ancestors: dict[torch.nn.Module, tuple[torch.nn.Module, ...]] = {}

    def load(self) -> None:
        """Make sure that the model has its weights."""
        if self.unloaded is not None:
            self.unloaded.load()

    def adopt(self, root: torch.nn.Module) -> None:
        """Let all envoys, those that the user holds too, speak of the modules of ``root`` at their paths."""
        loaded = dict(root.named_modules(remove_duplicate=False))
        with self.lock:
            self._exchange(root, loaded)

    def _exchange(self, root: torch.nn.Module, loaded: dict[str, torch.nn.Module]) -> None:
        for path, module in self.root.named_modules(remove_duplicate=False):
            if loaded.get(path, module) is not module:
                self._loaded[module] = loaded[path]
        # First of all, for other threads may be in the middle of a dry run, and ask by way of either module.
        for part in list(self.open_parts):
            part.follow(root)
        for envoy in list(self.envoys):
            # A module that is not there does not run any more, which whoever asks for its values will be told.
            envoy._module = loaded.get(envoy._path, envoy._module)
        for tree in list(self._trees):
            tree.root = root
            tree.written_over = frozenset(self.now(each) for each in tree.written_over)
            tree.forget()
            for edit in tree.edits:
                edit.root = root

    def add(self, envoy: Any) -> None:
        """Note an envoy of a model that is not loaded, which may be being loaded now."""
        with self.lock:
            self.envoys.add(envoy)
            envoy._module = self.now(envoy._module)

    def all_loaded(self) -> None:
        """The weights are there, for edited models too."""
        for tree in list(self._trees):
            tree.unloaded = None
        self.envoys.clear()

    def rename(self, aliases: Mapping[str, Names]) -> None:
        """Let the modules have these extra names, in the place of those that they have."""
        self.aliases = dict(aliases)
        for envoy in list(self.envoys):
            envoy._names = self.aliases.get(envoy._path, NO_NAMES)

    def now(self, module: torch.nn.Module) -> torch.nn.Module:
        """What ``module``, which may have been without weights, has become."""
        return self._loaded.get(module, module)

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
        twin = object.__new__(Tree)
        twin.__dict__.update(self.__dict__, aliases=dict(self.aliases))
        self._trees.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # A copy has weights, so that nobody has to be found again, and is a model of its own.
        return {name: value for name, value in self.__dict__.items() if name not in self._of_its_own()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, **self._of_its_own())

    def _of_its_own(self) -> dict[str, Any]:
        weak = {"envoys": WeakSet(), "open_parts": WeakSet(), "_trees": WeakSet([self]), "_loaded": WeakKeyDictionary()}
        return {**weak, "lock": threading.RLock()}

    def forget(self) -> None:
        """The tree has changed: work out anew who calls whom."""
        self._parents.clear()
        self._ancestors.clear()

    def _index(self) -> None:
        self._parents.clear()
        self.works_in_place = any(getattr(each, "inplace", False) is True for each in self.root.modules())
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


def annotations_of(kind: type) -> set[str]:
    """The attributes that a class and its bases declare."""
    return {name for each in kind.__mro__ for name in inspect.get_annotations(each)}
