"""The module tree's mirror: each module of the model has an envoy, through which its values are read and set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight_core.arguments import apply, is_same_value
from nnsight_core.asked import Asked, View
from nnsight_core.calls import Calls
from nnsight_core.current import OpenTrace, open_trace
from nnsight_core.errors import NameTakenError, NoSuchEntryError, NoSuchModuleError, NoTraceError
from nnsight_core.scope import Scope, hooked_call
from nnsight_core.sites import Site, user_site
from nnsight_core.source import Source
from nnsight_core.tree import NO_NAMES, Names, Tree, annotations_of
from nnsight_core.tree_text import described, place_below, tree_text
from nnsight_core.values import fitting_copy

#: Attributes of these kinds are those of a module with or without weights.
_ALWAYS_THE_SAME = (bool, int, float, str, type(None))


class Envoy:
    """One module of the model, as it stands in the tree.

    Attribute access goes down the tree by the names that ``print(model)`` shows: ``model.transformer.h[0].attn``.
    Inside a trace ``.output``, ``.input`` and ``.inputs`` are the module's values, read and set.

    Args:
        module: the module.
        path: its dotted path from the root; ``""`` for the root itself.
        tree: what all envoys of the model share.
    """

    _module: torch.nn.Module
    _path: str
    _tree: Tree
    _names: Names
    _children: dict[str, Envoy]
    #: It stands for the result of a whole pass, which belongs to no run of the model in particular.
    _is_result = False

    def __init__(self, module: torch.nn.Module, path: str, tree: Tree) -> None:
        self._module = module
        self._path = path
        self._tree = tree
        self._names = dict(tree.aliases.get(path, NO_NAMES))
        self._children = {}
        if tree.unloaded is not None and not self._is_result:
            tree.add(self)

    # Going down the tree.

    @property
    def path(self) -> str:
        """The dotted path from the root, in the model's own names; ``""`` for the root."""
        return self._path

    def _child(self, name: str, module: torch.nn.Module) -> Envoy:
        envoy = self._children.get(name)
        # Somebody may have put another module in its place since.
        if envoy is None or envoy._module is not module:
            self._tree.forget()
            envoy = self._children[name] = Envoy(module, f"{self._path}.{name}" if self._path else name, self._tree)
        return envoy

    def __getattr__(self, name: str) -> Any:
        if "_children" not in self.__dict__ or name.startswith("__"):
            # A copy asks while it is still empty.
            raise AttributeError(name)
        module = self.__dict__["_module"]
        names = self.__dict__["_names"]
        if names and name in names:
            return self._root_envoy().get(names[name])
        child = module._modules.get(name)
        if child is not None:
            return self._child(name, child)
        try:
            value = getattr(module, name)
        except AttributeError:
            if self._tree.unloaded is not None and self._tree.unloaded.alters(name, None):
                self._tree.load()
                return getattr(self, name)
            raise self._no_such(name) from None
        return value if isinstance(value, _ALWAYS_THE_SAME) else self._attribute(name, value)

    def _attribute(self, name: str, value: Any) -> Any:
        """An attribute of the module, which is ``value`` as the module stands now."""
        trace = open_trace(self._tree.root)
        if trace is not None:
            own = isinstance(value, torch.Tensor) or callable(value)
            return getattr(trace.running(self._module), name) if own else value
        if self._tree.unloaded is not None and self._tree.unloaded.alters(name, value):
            self._tree.load()
            return getattr(self._module, name)
        return value

    def _root_envoy(self) -> Envoy:
        return self if self._path == "" else Envoy(self._tree.root, "", self._tree)

    def get(self, path: str) -> Envoy:
        """The envoy at a dotted path below this one, ``"transformer.h.0.attn"``, by own names or by extra ones.

        Raises:
            NoSuchModuleError: there is none; says the nearest names.
        """
        envoy = self
        for name in path.split(".") if path else ():
            child = envoy._module._modules.get(name)
            known = envoy._children.get(name)
            if known is not None and known._module is child and name not in envoy._names:
                envoy = known
            elif name in envoy._names:
                envoy = envoy._root_envoy().get(envoy._names[name])
            elif child is not None:
                envoy = envoy._child(name, child)
            else:
                raise envoy._no_such(name, is_path=True)
        return envoy

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return self.get(key)
        if isinstance(key, int):
            # Lists number their modules; a negative number, or a module that is no list, goes the long way.
            modules, name = self._module._modules, str(key)
            numbered = modules[name] if name in modules else None  # noqa: SIM401 - scripted modules have no get()
            if numbered is not None:
                return self._child(name, numbered)
        children = list(self._module._modules.items())
        try:
            chosen = children[key]
        except IndexError:
            raise NoSuchEntryError(int(key), described(self._module, self._path), len(children)) from None  # type: ignore[arg-type]
        if isinstance(chosen, list):
            return [self._child(name, module) for name, module in chosen if module is not None]
        name, module = chosen
        return module if module is None else self._child(name, module)

    def __len__(self) -> int:
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self.children())

    def named_modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> list[tuple[str, Envoy]]:
        """Every module from here on down, itself included, each once: ``(name, envoy)``, names as in torch.

        >>> [name for name, _ in model.named_modules(lambda each: each.path.endswith("mlp"))]  # doctest: +SKIP

        Args:
            include_fn: gives True for the envoys that are wanted; None for all.
        """
        found = self._walk("", set())
        return [(name, envoy) for name, envoy in found if include_fn is None or include_fn(envoy)]

    def modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> list[Envoy]:
        """The envoys of :meth:`named_modules`, without their names."""
        return [envoy for _, envoy in self.named_modules(include_fn)]

    def named_children(self) -> list[tuple[str, Envoy]]:
        """The modules directly below this one: ``(name, envoy)``."""
        return [(name, self._child(name, each)) for name, each in self._module._modules.items() if each is not None]

    def children(self) -> list[Envoy]:
        """The envoys of :meth:`named_children`, without their names."""
        return [envoy for _, envoy in self.named_children()]

    def _walk(self, name: str, seen: set[torch.nn.Module]) -> Iterator[tuple[str, Envoy]]:
        if self._module not in seen:
            seen.add(self._module)
            yield name, self
            for child, envoy in self.named_children():
                yield from envoy._walk(f"{name}.{child}" if name else child, seen)

    def __setattr__(self, name: str, value: Any) -> None:
        # isinstance() would look at a pending value.
        if issubclass(type(value), torch.nn.Module) and not name.startswith("_"):
            self._add(name, value)
        elif name.startswith("_") or hasattr(type(self), name) or name in annotations_of(type(self)):
            object.__setattr__(self, name, value)
        elif hasattr(self._module, name):
            # What was set before the weights are there would be lost when they come.
            self._tree.load()
            setattr(self._module, name, value)
        else:
            raise self._no_such(name)

    def _add(self, name: str, module: torch.nn.Module) -> None:
        """Hang ``module`` on this one, as its child ``name``; from then on it is part of the model."""
        why = ""
        if hasattr(type(self), name) or name in annotations_of(type(self)):
            why = "the name stands for something else in a trace."
        elif name in self._names:
            why = f"the name stands for the module {self._names[name]} already."
        elif name not in self._module._modules and hasattr(self._module, name):
            why = "the module has something else of this name already."
        if why:
            raise NameTakenError(name, described(self._module, self._path), why)
        setattr(self._module, name, module)
        self._tree.forget()

    def __delattr__(self, name: str) -> None:
        if name not in self._module._modules:
            object.__delattr__(self, name)
            return
        self._tree.load()
        delattr(self._module, name)
        self._children.pop(name, None)
        self._tree.forget()

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._names, *dir(self._module)})

    def __repr__(self) -> str:
        return tree_text(self._module, self._path, self._tree.aliases)

    def _no_such(self, name: str, is_path: bool = False) -> NoSuchModuleError:
        known = [*self._module._modules, *self._names]
        place = place_below(name, self._module, self._path, self._tree.aliases)
        others = () if is_path else object.__dir__(self)
        return NoSuchModuleError(name, described(self._module, self._path), known, others, place)

    # Values.

    def _label(self, what: str) -> str:
        return f"{self._path or 'model'}.{what}"

    def _trace(self, asked: str) -> OpenTrace:
        trace = open_trace(self._tree.root)
        if trace is None:
            raise NoTraceError(asked, user_site())
        return trace

    def open_scope(self, asked: str) -> Scope:
        """What is known of the open trace's input; ``asked`` is what errors are to call the thing that needs it.

        Raises:
            NoTraceError: no trace of the model is open here.
        """
        return self._trace(asked).scope

    def read(
        self,
        kind: str,
        label: str | None = None,
        setting: bool = False,
        site: Site | None = None,
        view: View | None = None,
        call: int | None = None,
    ) -> Any:
        """The value of ``kind`` as a proxy: ``"input"``, ``"output"``, or an operation's ``"source.softmax_0.output"``.

        Args:
            kind: which value.
            label: how errors are to call it.
            setting: it is asked for to be set.
            site: the user's line, if that is known.
            view: shows a part of the value in its place.
            call: which call of the module, counted from 0; None for the next that comes.

        Raises:
            NoTraceError: no trace of the model is open here.
            OutOfOrderError: the forward pass has gone by it.
            ModuleNotRunError: the module does not run in this pass.
        """
        module, tree, label = self._module, self._tree, label or f"{self._path or 'model'}.{kind}"
        trace = open_trace(tree.root)
        if trace is None:
            raise NoTraceError(label, user_site())
        step = None if self._is_result else trace.step_of(module)
        ancestors = tree.ancestors(module)
        over = tree.works_in_place or (module in tree.written_over and kind == "output")
        asked = Asked(module, kind, label, site or user_site(), ancestors, step, None, setting, over)
        if call is not None:
            asked.call = call, trace.counter_of(asked)
        return trace.ask(asked, view)

    def write(self, kind: str, value: Any, label: str | None = None, call: int | None = None) -> None:
        """Let the model go on with ``value`` as this module's ``kind``; raises what :meth:`read` raises.

        A plain number in the place of a tensor fills the tensor. For inputs, a pair ``(args, kwargs)`` replaces the
        call and anything else its first argument.
        """
        if value is None:
            raise ValueError(
                f"{label or self._label(kind)} cannot be set to None: torch takes a None from a hook for 'no change'."
            )
        current = self.read(kind, label, True, user_site(), call=call)
        if is_same_value(current, value):
            # After `module.output += x` Python sets the very proxy that was read and changed.
            return
        # isinstance() would look at a pending value, and that starts the model.
        if kind.endswith("input"):
            current.set_call(value)
        else:
            current.update_value(fitting_copy, value)

    @property
    def output(self) -> Any:
        """What the module's call gives; set it to replace it.

        If the module has a child of this name, reach the child by ``envoy["output"]``.
        """
        return self.read("output", None, False, user_site())

    @output.setter
    def output(self, value: Any) -> None:
        self.write("output", value)

    @property
    def input(self) -> Any:
        """The call of the module. ``.input[0]`` are its arguments and ``.input[1]`` its keyword arguments; everything
        else (attributes, arithmetic, slices) sees the first argument. Set it to replace the first argument, or the
        whole call by a pair ``(args, kwargs)``.
        """
        return self.read("input", site=user_site())

    @input.setter
    def input(self, value: Any) -> None:
        self.write("input", value)

    inputs = input

    @property
    def source(self) -> Source:
        """The torch operations that the module's own forward calls, in order, with their values:
        ``module.source.softmax_0.output``. ``print(module.source)`` lists them with their lines.

        If the module has a child of this name, reach the child by ``envoy["source"]``.

        Raises:
            SourceError: the module is scripted or compiled.
        """
        return Source(self)

    def skip(self, value: Any) -> None:
        """Do not run the module in this pass; ``value`` is what its call gives.

        Nothing inside the module runs, so that none of its values can be asked for. ``value`` has to be what the module
        gives, tuple or tensor; the module's own ``.input`` may be used for it. In an invoke, where other inputs go
        through the module, it runs for them, and ``value`` takes the place of what it gives for this one.

        Raises:
            OutOfOrderError: the module has run already.
        """
        self.skip_call(value, self._label("skip(...)"))

    def skip_call(self, value: Any, label: str, call: int | None = None) -> None:
        """:meth:`skip` for one call of several; ``label`` is how errors are to call it."""
        if self._trace(label).is_alone:
            self.read("skip", label, setting=True, call=call).set_result(value)
        else:
            self.write("output", value, label, call=call)

    @property
    def calls(self) -> Calls:
        """The calls of a module that runs several times in a pass: ``module.calls[2].output``, counted from 0.

        Without a number, ``module.output`` is the first call that the pass has not gone by. Numbers are counted from
        the start of a pass, so ask for one before the first value of it, or keep ``calls = module.calls`` there.
        """
        return Calls(self).counted()

    def count_calls(self, label: str) -> None:
        """Count the calls of this module in the open trace; ``label`` is how errors are to call what needs it.

        Raises:
            CallsNotCountedError: the pass is under way already.
        """
        trace = self._trace(label)
        trace.counter_of(Asked(self._module, "input", label, user_site(), ()))

    def next(self, increment: int = 1) -> Envoy:
        """The same module in the next generation step: ``model.lm_head.next().output``."""
        label = self._label("next()")
        self._trace(label).next_step_of(self._module, increment, label)
        return self

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Run the module here and now, apart from the forward pass: ``model.lm_head(model.ln_f(hidden))``.

        Nobody takes what it gives for a value of the model's, unless ``hook=True`` says so: then its values and those
        of its children can be asked for, and set, by everybody who waits for them; and whoever called it may ask for
        them afterwards.
        """
        trace = open_trace(self._tree.root)
        if trace is None:
            self._tree.load()
            return apply(self._module, *args, **kwargs)
        if hook:
            return trace.do(hooked_call, trace.scope, self._module, *args, **kwargs)
        return apply(trace.running(self._module), *args, **kwargs)
