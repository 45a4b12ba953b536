"""Values that operations inside an attention make: one accessor for all of them, whatever finds where they stand."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch

from nnterp.accessors import Place, ValueAccess

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_core.envoy import Envoy
    from nnterp.rename_plan import PartPlan
    from nnterp.spec import ArchitectureSpec


def running(root: torch.nn.Module, part: PartPlan) -> str:
    """The path of the part's module that is called: a list of several is not.

    Args:
        root: the model.
        part: one part of one layer.
    """
    module = part.module
    return part.output if module is None or isinstance(root.get_submodule(module), torch.nn.ModuleList) else module


class OperationAccess(ValueAccess):
    """A value that an operation makes, by layer, read and set.

    Args:
        root: the model.
        name: what the accessor is called.
        modules: the path of each layer's attention, None where it has none.
        why_not: for each layer the reason, where it has none.
        spec: says what the family cannot give.
    """

    def __init__(
        self,
        root: Envoy,
        name: str,
        modules: tuple[str | None, ...],
        why_not: tuple[str, ...],
        spec: ArchitectureSpec,
    ) -> None:
        places = tuple(None if path is None else Place(path, "call", name) for path in modules)
        super().__init__(root, name, places, why_not)
        self._spec = spec

    @abstractmethod
    def _found(self, path: str, label: str) -> tuple[Place, Iterable[str]]:
        """Where the value of the attention at ``path`` stands, and the modules whose operations have to be counted."""

    def _where(self, layer: int) -> tuple[Place, Iterable[str]]:
        path, label = super().place(layer).path, f"{self.name}[{self.position(layer)}]"
        self._spec.refuse(self.name, label)
        return self._found(path, label)

    def place(self, layer: int) -> Place:
        """Where layer ``layer``'s value stands.

        Raises:
            LayerIndexError: the model has no such layer.
            MissingPartError: the layer has no attention, or none that makes such a value.
            CannotError: the family has no such value.
            ClosedAttentionError: nobody knows where it stands.
        """
        return self._where(layer)[0]

    def _open(self, layer: int) -> Place:
        place, counted = self._where(layer)
        for path in counted:
            # Operations are counted from the start of a call: the module has to know before it runs.
            _ = self._root.get(path).source
        return place
