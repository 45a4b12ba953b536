"""One interface over every Hugging Face causal language model."""

import sys
import typing

if typing.TYPE_CHECKING:
    from nnterp.rename import RenameConfig
    from nnterp.standardized_transformer import StandardizedTransformer

__all__ = ["RenameConfig", "StandardizedTransformer"]


def _load(name: str) -> object:
    """What the package has by that name. Torch comes with the first one, and not before: it takes seconds, and the
    help of the command line does without.
    """
    from nnterp.rename import RenameConfig
    from nnterp.standardized_transformer import StandardizedTransformer

    globals().update(RenameConfig=RenameConfig, StandardizedTransformer=StandardizedTransformer)
    # Or a module that has been imported with them.
    if name not in globals():
        raise AttributeError(f"module 'nnterp' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Not as a function of that name: for type checkers the package would then have every name.
globals()["__getattr__"] = _load
