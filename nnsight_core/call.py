"""A call of the model that is to be made, and where its result comes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Call:
    """A call of the model, ready to be made.

    Args:
        function: what is called, the module itself as a rule.
        args: its arguments.
        kwargs: its keyword arguments.
        padding: how many padding tokens stand left of each prompt, if the input is a batch of prompts.
        prompt_length: the length of the padded prompts.
        runs_repeatedly: the call may run the model several times, as generation does.
        names: for keyword arguments that a script asks for by another name than the model's, that name.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    padding: Sequence[int] | None = None
    prompt_length: int = 0
    runs_repeatedly: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments by the names that a script asks for them."""
        if not self.names:
            return self.kwargs
        return {self.names.get(name, name): value for name, value in self.kwargs.items()}


class Result(torch.nn.Module):
    """The last module of every pass: it is called with what the pass gives, and hands it on."""

    def forward(self, result: Any) -> Any:
        """The result itself."""
        return result
