"""What chosen modules take and give while the model runs, written down in whatever order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, SupportsIndex

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.errors import ModuleNotRunError, NoSuchModuleError, OptionError
from nnsight_core.hooks import collecting
from nnsight_core.sites import Site
from nnsight_core.values import first_argument, map_tensors


def collect(
    call: Callable[[], Any],
    modules: Iterable[torch.nn.Module],
    originals: dict[tuple[torch.nn.Module, str], Any] | None = None,
) -> tuple[dict[tuple[torch.nn.Module, str], Any], Any]:
    """Run ``call`` and keep what each of ``modules`` took and gave.

    Returns a dict from (module, "input") to ``(args, kwargs)`` and from (module, "output") to the result, of each
    module's first call; and the result of ``call``. Tensors are detached copies: what the model later writes into its
    own tensors does not reach them. What the copies were made of goes into ``originals``.
    """
    kept: dict[tuple[torch.nn.Module, str], Any] = {}
    with collecting(modules, kept, originals):
        result = call()
    return kept, result


#: How a script may name a module.
Wanted = Envoy | str | torch.nn.Module


def chosen_envoys(root: Envoy, modules: Wanted | Iterable[Wanted]) -> list[Envoy]:
    """The envoys of what a cache is to keep: envoys, paths or torch modules. A list of modules stands for its entries.

    Raises:
        NoSuchModuleError: one that is not in the model.
        OptionError: something that is no module, or none at all.
    """
    if isinstance(modules, Envoy) and isinstance(modules._module, torch.nn.ModuleList):
        modules = modules.children()
    wanted = [modules] if isinstance(modules, (Envoy, str, torch.nn.Module)) else list(modules)
    if not wanted:
        mend = "Leave modules out to keep all of them."
        raise OptionError("cache(modules=[])", "an empty list of modules keeps nothing.", mend=mend)
    return [_chosen_envoy(root, each) for each in wanted]


def _by_path(root: Envoy, path: str) -> Envoy:
    try:
        return root.get(path)
    except NoSuchModuleError:
        # Scripts of some eras begin every path with the name of the model itself.
        if path != "model" and not path.startswith("model."):
            raise
    return root.get(path.removeprefix("model").removeprefix("."))


def _chosen_envoy(root: Envoy, wanted: Wanted) -> Envoy:
    if isinstance(wanted, str):
        return _by_path(root, wanted)
    if isinstance(wanted, Envoy) and wanted._tree.root is root._module:
        return wanted
    if isinstance(wanted, (Envoy, torch.nn.Module)):
        module = wanted._module if isinstance(wanted, Envoy) else wanted
        for envoy in root.modules():
            if envoy._module is module:
                return envoy
        raise NoSuchModuleError(type(module).__name__, "The model that is traced", [])
    mend = "Give envoys, paths or torch modules."
    raise OptionError("cache(modules=...)", f"{wanted!r:.80} is no module.", mend=mend)


@dataclass(frozen=True)
class CacheOptions:
    """What a cache keeps, and how.

    Args:
        device: where to; None leaves tensors where they are.
        dtype: the type of floating-point tensors; None leaves it.
        detach: cut from the autograd graph.
        include_output: keep what modules give.
        include_inputs: keep what modules are called with.

    Raises:
        OptionError: nothing is to be kept.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    detach: bool = True
    include_output: bool = True
    include_inputs: bool = False

    def __post_init__(self) -> None:
        if not self.kinds:
            what = "without outputs and inputs it keeps nothing."
            raise OptionError("cache(include_output=False)", what, mend="Add include_inputs=True.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which of ``"input"`` and ``"output"`` are kept."""
        return ("input",) * self.include_inputs + ("output",) * self.include_output

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` as the options say; what the model later writes into its own does not reach it."""
        tensor = tensor.detach() if self.detach else tensor
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype, copy=True)


@dataclass
class CacheEntry:
    """What one module took and gave, call by call."""

    path: str
    calls: dict[str, list[Any]] = field(default_factory=lambda: {"input": [], "output": []})
    #: A generation gives a list, one entry for each step, even if there is only one.
    always_list: bool = False

    def _get(self, kind: str) -> Any:
        values = self.calls[kind]
        if not values:
            option = "include_inputs" if kind == "input" else "include_output"
            raise AttributeError(f"The cache has no {kind} of {self.path}. Open it with {option}=True.")
        return values if self.always_list or len(values) > 1 else values[0]

    @property
    def output(self) -> Any:
        """What the module gave; a list of it where the module was called several times."""
        return self._get("output")

    @property
    def inputs(self) -> Any:
        """The module's call as ``(args, kwargs)``; a list of them where it was called several times."""
        return self._get("input")

    @property
    def input(self) -> Any:
        """The first argument of the module's call; a list of them where it was called several times."""
        inputs = self._get("input")
        return [first_argument(each) for each in inputs] if isinstance(inputs, list) else first_argument(inputs)


class Cache:
    """What ``tracer.cache(...)`` gives: by name, ``cache["transformer.h.0"].output``, or down the tree,
    ``cache.transformer.h[0].output``. Every name that the model answers to finds the same entry.

    Args:
        root: the model's root.
        chosen: the modules to keep; None for all.
        options: what to keep of them.
        site: where the cache was opened.
    """

    def __init__(self, root: Envoy, chosen: list[Envoy] | None, options: CacheOptions, site: Site) -> None:
        self._root = root
        self._options = options
        self._site = site
        self._must_come = chosen is not None
        if chosen is None:
            chosen = [root.get(name) for name, _ in root._module.named_modules()]
        self._chosen = chosen
        self._entries: dict[str, CacheEntry] = {}

    def watched(self) -> Iterator[tuple[torch.nn.Module, str]]:
        """The modules to watch, each with ``"input"`` or ``"output"``."""
        for envoy in self._chosen:
            for kind in self._options.kinds:
                yield envoy._module, kind

    def recorder(self, in_steps: bool) -> Callable[[torch.nn.Module, str, Any], None]:
        """What notes values as they come, in a pass that has steps or not."""
        paths = {envoy._module: envoy.path for envoy in self._chosen}
        # Where a batch has to go through the model again, it is the last time that counts.
        self._entries.clear()

        def record(module: torch.nn.Module, kind: str, value: Any) -> None:
            path = paths[module]
            entry = self._entries.setdefault(path, CacheEntry(path or "model", always_list=in_steps))
            entry.calls[kind].append(map_tensors(self._options.kept, value))

        return record

    def check(self) -> None:
        """Raises:
        ModuleNotRunError: something that was to be kept did not come.
        """
        hint = "It did not run, or had run before the cache was opened: open it first."
        for envoy in self._chosen if self._must_come else ():
            entry = self._entries.get(envoy.path)
            for kind in self._options.kinds:
                if entry is None or not entry.calls[kind]:
                    what = f"The {kind} of {envoy.path or 'model'}, for a cache,"
                    raise ModuleNotRunError(what, self._site, hint=hint)
        if not self._entries:
            raise ModuleNotRunError("Anything at all, for a cache,", self._site, hint=hint)

    def save(self) -> Cache:
        """The cache itself, which lives as long as its variable does."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        mend = "Save what it holds: torch.save({name: entry.output for name, entry in cache.items()}, file)."
        raise OptionError("A cache as a file, or copied", "it knows the model, which would go along.", mend=mend)

    def keys(self) -> list[str]:
        """The modules' own paths, in the order in which they came."""
        return list(self._entries)

    def values(self) -> list[CacheEntry]:
        """The entries, in the order in which they came."""
        return list(self._entries.values())

    def items(self) -> list[tuple[str, CacheEntry]]:
        """Paths and entries, in the order in which they came."""
        return list(self._entries.items())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._found(name) is not None

    def _found(self, name: str) -> CacheEntry | None:
        if name in self._entries:
            return self._entries[name]
        try:
            return self._entries.get(_by_path(self._root, name).path)
        except NoSuchModuleError:
            return None

    def __getitem__(self, name: str) -> CacheEntry:
        entry = self._found(name)
        if entry is None:
            raise NoSuchModuleError(name, "The cache", self._names())
        return entry

    def _names(self) -> Iterator[str]:
        for path in self._entries:
            yield path
            for holder, names in self._root._tree.aliases.items():
                for new, target in names.items():
                    if path == target or path.startswith(f"{target}."):
                        yield (f"{holder}.{new}" if holder else new) + path[len(target) :]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("output", "input", "inputs"):
            return getattr(self[""], name)
        return CacheNode(self, _by_path(self._root, name))


class CacheNode:
    """A place in the tree of a cache: goes further down, or gives what the module took and gave."""

    def __init__(self, cache: Cache, envoy: Envoy) -> None:
        self._cache = cache
        self._envoy = envoy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("output", "input", "inputs"):
            return getattr(self._cache[self._envoy.path], name)
        return CacheNode(self._cache, self._envoy.get(name))

    def __getitem__(self, key: int | str) -> CacheNode:
        return CacheNode(self._cache, self._envoy[key])
