"""What chosen modules take and give while the model runs, written down in whatever order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.errors import ModuleNotRunError, NoSuchModuleError
from nnsight_core.hooks import collecting
from nnsight_core.rows import Rows
from nnsight_core.sites import Site
from nnsight_core.values import first_argument, map_tensors


def collect(
    call: Callable[[], Any], modules: Iterable[torch.nn.Module]
) -> tuple[dict[tuple[torch.nn.Module, str], Any], Any]:
    """Run ``call`` and keep what each of ``modules`` took and gave.

    Returns a dict from (module, "input") to ``(args, kwargs)`` and from (module, "output") to the result, of each
    module's first call; and the result of ``call``. Tensors are detached copies: what the model later writes into its
    own tensors does not reach them.
    """
    kept: dict[tuple[torch.nn.Module, str], Any] = {}
    with collecting(modules, kept):
        result = call()
    return kept, result


@dataclass(frozen=True)
class CacheOptions:
    """What a cache keeps, and how.

    Args:
        device: where to; None leaves tensors where they are.
        dtype: the type of floating-point tensors; None leaves it.
        detach: cut from the autograd graph.
        include_output: keep what modules give.
        include_inputs: keep what modules are called with.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    detach: bool = True
    include_output: bool = True
    include_inputs: bool = False

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

    def recorder(self, rows: Rows | None, in_steps: bool) -> Callable[[torch.nn.Module, str, Any], None]:
        """What notes values as they come: of these rows of the batch, in a pass that has steps or not."""
        paths = {envoy._module: envoy.path for envoy in self._chosen}
        # Where a batch has to go through the model again, it is the last time that counts.
        self._entries.clear()

        def record(module: torch.nn.Module, kind: str, value: Any) -> None:
            path = paths[module]
            entry = self._entries.setdefault(path, CacheEntry(path or "model", always_list=in_steps))
            entry.calls[kind].append(
                map_tensors(self._options.kept, value if rows is None else rows.take(value, (module, kind, ())))
            )

        return record

    def check(self) -> None:
        """Raises:
        ModuleNotRunError: a module that was asked for by name did not run.
        """
        for envoy in self._chosen if self._must_come else ():
            if envoy.path not in self._entries:
                hint = "It did not run, or had run before the cache was opened: open it first."
                raise ModuleNotRunError(f"The cache entry {envoy.path or 'model'}", self._site, hint=hint)

    def save(self) -> Cache:
        """The cache itself, which lives as long as its variable does."""
        return self

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
        # Scripts of some eras begin every path with the name of the model itself.
        for spelled in (name, name.removeprefix("model.")):
            if spelled in self._entries:
                return self._entries[spelled]
            try:
                path = self._root.get(spelled).path
            except NoSuchModuleError:
                continue
            if path in self._entries:
                return self._entries[path]
        return None

    def __getitem__(self, name: str) -> CacheEntry:
        entry = self._found(name)
        if entry is None:
            raise NoSuchModuleError(name, "The cache", [*self._entries])
        return entry

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(CacheNode(self, self._root), name)


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
