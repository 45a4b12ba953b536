"""Which specification serves a model type: finds the YAML files and reads them.

spec_for("gpt2").modules.layers             # 'transformer.h'
spec_from_file("my_model.yaml")             # a specification of the user's own
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from nnterp.errors import DuplicateArchitectureError, UnknownArchitectureError
from nnterp.frozen import FrozenMapping
from nnterp.spec import ArchitectureSpec, parse_spec

__all__ = ["load_specs", "spec_files", "spec_for", "spec_from_file", "specs_folder"]


def specs_folder() -> Path:
    """The folder of the YAML files that come with this package.

    A built wheel holds them inside the package; in a checkout they are the top-level folder beside it.
    """
    package = Path(__file__).resolve().parent
    installed = package / "architecture_specs"
    return installed if installed.is_dir() else package.parent / "architectures"


def spec_files(folder: Path | None = None) -> tuple[Path, ...]:
    """The YAML files of a folder, by name; without a folder, those that come with this package."""
    return tuple(sorted((specs_folder() if folder is None else folder).glob("*.yaml")))


@lru_cache(maxsize=8)
def load_specs(folder: Path | None = None) -> Mapping[str, ArchitectureSpec]:
    """Every specification of a folder, by the model types that it serves. Read once, then remembered.

        sorted(load_specs())            # ['gemma2', 'gpt2', 'gpt_neox', 'llama', ...]

    Raises `DuplicateArchitectureError` where two files serve one model type, and a `SpecError` where a file is wrong.
    """
    specs: dict[str, ArchitectureSpec] = {}
    for path in spec_files(folder):
        spec = spec_from_file(path)
        for index, model_type in enumerate(spec.model_types):
            line = spec.line_of(f"model_types.{index}")
            other = specs.get(model_type)
            if other is not None:
                where = other.where(f"model_types.{other.model_types.index(model_type)}")
                raise DuplicateArchitectureError(spec.source, line, model_type, where)
            specs[model_type] = spec
    return FrozenMapping(specs)


def spec_for(model_type: str, folder: Path | None = None) -> ArchitectureSpec:
    """The specification that serves a config's `model_type`.

        spec_for("llama").layer.attention         # 'self_attn'
        spec_for(model.config.model_type).for_config(model.config)

    Raises `UnknownArchitectureError`, which lists the types that are served, where there is none.
    """
    specs = load_specs(folder)
    if model_type not in specs:
        raise UnknownArchitectureError(model_type, tuple(specs))
    return specs[model_type]


def spec_from_file(path: str | Path) -> ArchitectureSpec:
    """A specification from one YAML file, the user's own for example.

        spec = spec_from_file("my_model.yaml").for_config(model.config)

    Raises a `SpecError` where the file is wrong, and `OSError` where it cannot be read.
    """
    return parse_spec(Path(path).read_text(encoding="utf-8"), str(path))
