"""Specification + the user's own names -> a `RenamePlan`: which module plays which part, and the names it answers to.

    names = [name for name, _ in model.named_modules()]
    made = plan(spec_for("gpt2").for_config(config), names, num_layers=12)
    made.aliases[""]                          # {'embed_tokens': 'transformer.wte', 'layers': 'transformer.h', ...}
    made.layers[3].attention                  # 'transformer.h.3.attn'
    made.resolve("model.layers.3.self_attn")  # 'transformer.h.3.attn'

Strings in, strings out: nothing here knows torch, so all of it can be tested without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from nnterp.dimensions import Dimensions, dimensions
from nnterp.errors import AliasConflictError, AmbiguousNameError, ModulePathError, UnknownNameError, nearest
from nnterp.frozen import FrozenMapping
from nnterp.rename_plan import LayerPlan, PartPlan, RenameConfig, RenamePlan, as_list, join
from nnterp.spec import ROLES, ArchitectureSpec, Part
from nnterp.spec_layer import PROJECTIONS

__all__ = ["Dimensions", "dimensions", "LayerPlan", "PartPlan", "plan", "RenameConfig", "RenamePlan"]

#: What the parts of a layer are called everywhere.
LAYER_NAMES = {"attention": "self_attn", "mlp": "mlp"}


def plan(
    spec: ArchitectureSpec,
    module_paths: Collection[str],
    num_layers: int,
    user: RenameConfig | None = None,
    rename: Mapping[str, str | list[str]] | None = None,
) -> RenamePlan:
    """Finds each part of a model, and gives it its standard names and the user's.

        plan(spec, [name for name, _ in model.named_modules()], 12, rename={"transformer.h": "blocks"})

    The spec should be that of the model's config (`spec.for_config(config)`). `user` says which modules play the
    parts, and wins over the spec. `rename` only adds names: a key is a module's name, wherever it occurs, or a dotted
    path (from any module; from the root if it begins with a dot), a value is the new name beside it, or a list of them.

    Raises `ModulePathError` where a path is not in the model, naming the line of the YAML file or the user's argument,
    `AmbiguousNameError` where a user's name fits several modules, `UnknownNameError` where a key of `rename` fits none,
    and `AliasConflictError` where a new name already belongs to another module.
    """
    finder = _Finder(spec, frozenset(module_paths) | {""}, user or RenameConfig())
    modules = finder.modules()
    layers = tuple(finder.layer(modules["layers"], index, num_layers) for index in range(num_layers))
    finder.check_user_layer_names(layers)
    aliases = _Aliases(finder.paths)
    for role, target in modules.items():
        if target and role != "model":
            aliases.add("", role, target, finder.origins[f"modules.{role}"])
    for layer in layers if modules["layers"] else ():
        for part, alias in LAYER_NAMES.items():
            target = getattr(layer, part)
            if target:
                aliases.add(layer.path, alias, target, finder.origins[f"layer.{part}"])
    for key, new_names in (rename or {}).items():
        aliases.add_renamed(key, [new_names] if isinstance(new_names, str) else new_names)
    aliases.add_conveniences(modules)
    return RenamePlan(
        aliases=FrozenMapping({parent: FrozenMapping(names) for parent, names in aliases.found.items() if names}),
        modules=FrozenMapping(modules),
        layers=layers,
        embed=finder.chain("embed", modules),
        unembed=finder.chain("unembed", modules),
        origins=FrozenMapping(finder.origins),
        shadowed=tuple(aliases.shadowed),
        paths=finder.paths,
        written_over=finder.written_over(layers),
    )


class _Finder:
    """Finds modules by the user's names or the spec's paths, and keeps who named them."""

    def __init__(self, spec: ArchitectureSpec, paths: frozenset[str], user: RenameConfig) -> None:
        self.spec = spec
        self.paths = paths
        self.user = user
        self.origins: dict[str, str] = {}
        self._found_in_a_layer: set[str] = set()
        self._is_whole = True
        self._endings: dict[str, list[str]] = {}

    def modules(self) -> dict[str, str | None]:
        """The full path of each role, and of the base model."""
        found: dict[str, str | None] = {}
        for role in ROLES:
            said = as_list(getattr(self.user, f"{role}_name", None))
            where = f"modules.{role}"
            self.origins[where] = self._argument(f"{role}_name") if said else self.spec.where(where)
            if said:
                found[role] = self._user_module(f"{role}_name", said)
            else:
                choice = getattr(self.spec.modules, role)
                found[role] = self._first(choice, "") or self._require(choice[0], where, role) if choice else None
        if said := as_list(self.user.model_name):
            found["model"] = self._user_module("model_name", said)
        else:
            # The base model is the child of the root that holds the layers: `model` then is what it is in Llama.
            head, dot, _ = (found["layers"] or self.spec.layer.input[0]).partition(".")
            found["model"] = head if dot else ""
        self.origins["modules.model"] = self._argument("model_name") if said else self.origins["modules.layers"]
        return found

    def layer(self, layers: str | None, index: int, num_layers: int) -> LayerPlan:
        """One layer's parts."""
        spec = self.spec.layer
        ends = (
            [join(layers, str(index))] * 2
            if layers
            else [each[0].replace("*", str(index)) for each in (spec.input, spec.output)]
        )
        path = ends[0]
        for end in ends:
            if end not in self.paths:
                count = f"layer {index} of the {num_layers} that the config speaks of"
                self._require(end, "modules.layers" if layers else "layer.input", count)
        parts: list[PartPlan] = []
        mixers = {"attention": spec.attention, **spec.mixers()}
        others = [kind for kind in mixers if kind != "attention"]
        for kind, part in mixers.items():
            optional = bool(others) or "attention" in self.spec.absent
            name, ignored = ("attn_name", bool(self.user.ignore_attn)) if kind == "attention" else ("", False)
            parts += self._part(path, kind, part, name, ignored, optional)
        optional = "mlp" in self.spec.absent
        parts += self._part(path, "mlp", spec.mlp, "mlp_name", bool(self.user.ignore_mlp), optional)
        if others and not parts:
            self._require(join(path, mixers[others[0]].module[0]), f"layer.{others[0]}", "the mixer of a layer")  # type: ignore[union-attr]
        contributions = {part.contribution for part in parts}
        for index, part in enumerate(spec.also_added):
            more = self._part(path, "also_added", part, "", False, True, f"layer.also_added.{index}")
            parts += [each for each in more if each.contribution not in contributions]
        is_whole, self._is_whole = self._is_whole, True
        router = self._first(spec.router, path)
        made = LayerPlan(path, ends[0], ends[1], tuple(parts), router, multiplier=spec.multiplier, is_whole=is_whole)
        if made.router is None:
            return made
        beside = join(made.router.rpartition(".")[0], "experts")
        experts = self._first(spec.experts, path) or (beside if beside in self.paths else None)
        return dataclasses.replace(made, experts=experts, router_logits=self._first(spec.router_logits, path))

    def check_user_layer_names(self, layers: tuple[LayerPlan, ...]) -> None:
        """A name of the user's for a layer part must occur in a layer at least once."""
        for field in ("attn_name", "mlp_name"):
            said = as_list(getattr(self.user, field))
            if said and layers and field not in self._found_in_a_layer:
                inside = {p[len(layers[0].path) + 1 :] for p in self.paths if p.startswith(layers[0].path + ".")}
                near = nearest(said[0], inside) or tuple(sorted(inside, key=lambda p: (p.count("."), p)))
                raise ModulePathError(
                    self._argument(field), said[0], "a part of a layer", near, "Give the name as it is in the layer."
                )

    def chain(self, name: str, modules: Mapping[str, str | None]) -> tuple[str, ...]:
        """The full paths of `embed` or `unembed`; a role that the model has not is passed over."""
        steps = []
        for index, step in enumerate(getattr(self.spec, name)):
            path = modules[step] if step in ROLES else self._require(step, f"{name}.{index}", f"a step of `{name}`")
            if path:
                steps.append(path)
        return tuple(steps)

    def written_over(self, layers: tuple[LayerPlan, ...]) -> tuple[str, ...]:
        """The full paths of what the model writes into, in the model or in any of its layers."""
        found: dict[str, None] = {}
        for index, path in enumerate(self.spec.written_over):
            places = [_inside(layer.path, path) for layer in layers] + [path]
            there = [place for place in places if place in self.paths]
            found |= dict.fromkeys(there or [self._require(path, f"written_over.{index}", "a module written into")])
        return tuple(found)

    def _part(
        self,
        layer: str,
        kind: str,
        part: Part | None,
        field: str,
        ignored: bool,
        optional: bool,
        where: str = "",
    ) -> list[PartPlan]:
        """The part of one layer, or nothing where the layer has no such part."""
        where = where or f"layer.{kind}"
        said = as_list(getattr(self.user, field)) if field else []
        self.origins[where] = self._argument(field) if said else self.spec.where(where)
        if ignored:
            self._is_whole = self._is_whole and part is None
            return []
        for name in said:
            found = self._matches(name, layer)
            if len(found) > 1:
                raise AmbiguousNameError(self._argument(field), name, found)
            if found:
                self._found_in_a_layer.add(field)
                return [self._around(layer, kind, part or Part(), found[0], where)]
        if part is None:
            return []
        ends = (*part.module, *part.input)
        there = self._first(tuple(f"{path}.{inside}" for path in ends for inside in part.has) or ends, layer)
        if there is None:
            # Where the user named the part, layers may differ: this one has it under neither name.
            if said or optional:
                self._is_whole = self._is_whole and optional
                return []
            self._require(_inside(layer, ends[0]), where, f"the {kind.replace('_', ' ')} of a layer")
        return [self._around(layer, kind, part, None, where)]

    def _around(self, layer: str, kind: str, part: Part, user_module: str | None, where: str) -> PartPlan:
        """What stands around a part in its layer; of what the spec says, that which the layer has."""

        def find(name: str) -> str | None:
            choice = getattr(part, name)
            found = self._first(choice, layer)
            if choice and found is None and name in ("input", "output", "contribution"):
                self._require(_inside(layer, choice[0]), f"{where}.{name}", f"the {name} of the {kind}")
            return found

        module = user_module or self._first(part.module, layer)
        ends = {name: find(name) if user_module is None else None for name in ("input", "output")}
        first, last = ends["input"] or module, ends["output"] or module
        assert first is not None and last is not None
        contribution = find("contribution") if user_module is None or part.contribution else None
        return PartPlan(
            kind=kind,
            module=module,
            input=first,
            output=last,
            contribution=contribution or last,
            norm=find("norm"),
            projection=self._projection(module, part) if kind == "attention" else None,
            stream=find("stream"),
            sum_norm=find("sum_norm"),
            multiplier=part.multiplier,
            stream_multiplier=part.stream_multiplier,
            bias=part.bias,
            stream_bias=part.stream_bias,
            state=part.state,
        )

    def _projection(self, module: str | None, part: Part) -> str | None:
        choice = PROJECTIONS if part.projection is None else part.projection
        return None if module is None else self._first(tuple(join(module, each) for each in choice), "")

    def _first(self, choice: tuple[str, ...], layer: str) -> str | None:
        return next((path for each in choice if (path := _inside(layer, each)) in self.paths), None)

    def _user_module(self, field: str, names: list[str]) -> str:
        for name in names:
            found = self._matches(name, "")
            if len(found) > 1:
                raise AmbiguousNameError(self._argument(field), name, found)
            if found:
                return found[0]
        near = self._nearest(names[0])
        mend = "Give a name or path as model.named_modules() has it."
        raise ModulePathError(self._argument(field), names[0], field.removesuffix("_name"), near, mend)

    def _matches(self, name: str, under: str) -> list[str]:
        """The modules that a user's name fits, of the most exact kind that there is."""
        name = name.strip(".")
        for exact in (name, name.removeprefix("model."), f"model.{name}"):
            path = join(under, exact)
            if exact and path in self.paths:
                return [path]
        for ending in dict.fromkeys([name, name.removeprefix("model.")]):
            if ending not in self._endings:
                self._endings[ending] = [path for path in self.paths if ending and path.endswith(f".{ending}")]
            inside = [path for path in self._endings[ending] if not under or path.startswith(f"{under}.")]
            top = min((path.count(".") for path in inside), default=0)
            if inside:
                return sorted(path for path in inside if path.count(".") == top)
        return []

    def _argument(self, field: str) -> str:
        return f"RenameConfig({field}={getattr(self.user, field)!r})"

    def _nearest(self, asked: str) -> tuple[str, ...]:
        # One layer stands for all: the others would only say the same again.
        numbers = {"0", *(part for part in asked.split(".") if part.isdigit())}
        options = (p for p in self.paths if p and all(n in numbers for n in p.split(".") if n.isdigit()))
        return nearest(asked, options)

    def _require(self, path: str, where: str, what: str) -> str:
        if path not in self.paths:
            mend = "Mend that line, or say what the model calls the part: rename_config=RenameConfig(...)."
            origin = self.origins.get(where, self.spec.where(where))
            raise ModulePathError(origin, path, what, self._nearest(path), mend)
        return path


def _inside(layer: str, path: str) -> str:
    """The full path of what a layer has under ``path``; with a star, it is the model's, and the star the index."""
    return path.replace("*", layer.rpartition(".")[2]) if "*" in path else join(layer, path)


class _Aliases:
    """The extra names, and the rules about names that are taken.

    A standard name must mean the standard part everywhere, so a real child of that name that is something else is an
    error, never hidden in silence. Only where the user said in a RenameConfig which module plays the part does the
    alias hide the real child, which `shadowed` then lists; its own full path still leads to it.
    """

    def __init__(self, paths: frozenset[str]) -> None:
        self.paths = paths
        self.found: dict[str, dict[str, str]] = {}
        self.shadowed: list[str] = []

    def add(self, parent: str, alias: str, target: str, origin: str) -> None:
        real = join(parent, alias)
        names = self.found.setdefault(parent, {})
        if target in (real, names.get(alias)):
            return
        said_so = origin.startswith("RenameConfig(")
        if alias in names:
            mend = "Choose another name; which module plays a part is said with a RenameConfig."
            raise AliasConflictError(origin, parent, alias, target, f"a name of {names[alias]}", mend)
        if real in self.paths and not said_so:
            mend = "Choose another name, or say with a RenameConfig which module plays the part."
            raise AliasConflictError(origin, parent, alias, target, f"the model's own {real}", mend)
        if real in self.paths:
            self.shadowed.append(real)
        names[alias] = target

    def add_renamed(self, key: str, new_names: list[str]) -> None:
        origin, old = f"rename={{{key!r}: ...}}", key.strip(".")
        fits = (p for p in self.paths if p and (p == old or (p.endswith(f".{old}") and not key.startswith("."))))
        hits = sorted(fits, key=lambda path: (len(path), path))
        if not hits:
            names = {name for path in self.paths for name in (path, path.rpartition(".")[2]) if name}
            fact = f"{origin}: the model has no module '{key}'."
            raise UnknownNameError(key, fact, nearest(old, names), "Give a name as model.named_modules() has it.")
        for new in new_names:
            # As in ".layers": a leading dot puts the new name at the root.
            alias = new.removeprefix(".")
            if not alias.isidentifier():
                mend = "A new name is a single name, such as 'my_attn'."
                raise AliasConflictError(origin, "", new, key, "no name that Python takes for an attribute", mend)
            for path in hits:
                parent = "" if new.startswith(".") else path[: -len(old)].rstrip(".")
                self.add(parent, alias, path, origin)

    def add_conveniences(self, modules: Mapping[str, str | None]) -> None:
        """`model` for the base model, and the model-wide names below it as well, where nothing else has those names."""
        base = modules["model"] or ""
        wanted = [("", "model", base)] if base else []
        below = [(role, path) for role, path in modules.items() if path and base and path.startswith(f"{base}.")]
        wanted += [(base, role, path) for role, path in below if role != "model"]
        for parent, alias, target in wanted:
            if alias not in self.found.get(parent, {}) and join(parent, alias) not in self.paths:
                self.found.setdefault(parent, {})[alias] = target
