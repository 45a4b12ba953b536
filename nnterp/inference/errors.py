"""What can go wrong when a model's structure is to be found: its place in the tree is in nnterp/errors.py."""

from __future__ import annotations

from collections.abc import Mapping

from nnterp.errors import NnterpError, UnknownArchitectureError, listed

__all__ = ["LayersNotFoundError", "ProbeError"]

MEND = (
    "Or write a specification (architectures/README.md shows how) and open the model with spec='my_model.yaml'; "
    "check_renaming=False opens it unchecked."
)


class ProbeError(UnknownArchitectureError):
    """The model cannot be run on two short prompts, so that its structure cannot be found."""

    def __init__(self, model: str, reason: str) -> None:
        self.model_type = model
        NnterpError.__init__(
            self,
            f"No specification serves {model}, and its structure cannot be found without running it.\n"
            f"  tried      a forward pass over two prompts of a few tokens\n"
            f"  seen       {reason}\n{MEND}",
        )


class LayersNotFoundError(UnknownArchitectureError):
    """The layers of a model cannot be told from its other modules."""

    def __init__(self, model: str, lists: Mapping[str, str], asked: str | None) -> None:
        self.model_type = model
        seen = [f"{path or 'the model itself'} ({what})" for path, what in lists.items()]
        looked = f"the list '{asked}'" if asked else "a list of modules that run in turn and hand one stream on"
        NnterpError.__init__(
            self,
            f"No specification serves {model}, and its layers cannot be told from its other modules.\n"
            f"  looked for   {looked}\n"
            f"  lists seen   {listed(seen)}\n"
            "Say which list they are: rename_config=RenameConfig(layers_name='...'), a path as model.named_modules() "
            f"has it.\n{MEND}",
        )
