"""The commands of the command line, one a file: what adds its parser, and what carries it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnterp.commands.attention import add_attention
from nnterp.commands.check import add_check
from nnterp.commands.heads import add_heads
from nnterp.commands.lens import add_lens
from nnterp.commands.patch import add_patch
from nnterp.commands.spec import add_spec
from nnterp.commands.steer import add_steer

__all__ = ["COMMANDS"]

#: One line for each command: what adds its parser. The parser's default for `run` is what carries it out, and gives the
#: exit status if that is not 0.
COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_lens,
    add_patch,
    add_attention,
    add_heads,
    add_steer,
    add_spec,
    add_check,
)
