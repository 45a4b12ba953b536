"""A live tracing core: read and set the values inside any PyTorch module while it runs."""

from nnsight_core.arguments import apply
from nnsight_core.envoy import Envoy
from nnsight_core.errors import (
    CallsNotCountedError,
    CopyError,
    EditError,
    GradientError,
    ModuleNotRunError,
    NameTakenError,
    NNsightError,
    NoSuchEntryError,
    NoSuchModuleError,
    NoSuchOperationError,
    NoTraceError,
    OptionError,
    OrderError,
    OutOfOrderError,
    RecomputedError,
    RecordingError,
    ReleasedValueError,
    RemoteError,
    RenameError,
    RowsError,
    ScanError,
    SessionError,
    SourceError,
    StepNotRunError,
    TraceStoppedError,
    WrittenOverError,
    WrongThreadError,
)
from nnsight_core.input_errors import (
    EmptyPromptError,
    InputError,
    MissingInputError,
    MissingWeightsError,
    ModelClassError,
    ModelNotFoundError,
    PaddingError,
    PromptTooLongError,
)
from nnsight_core.keeping import log, save
from nnsight_core.language_model import LanguageModel
from nnsight_core.model import NNsight
from nnsight_core.old_spellings import of_the_package as _of_the_package
from nnsight_core.proxy import Proxy
from nnsight_core.tracer import Tracer

__all__ = [
    "apply",
    "CallsNotCountedError",
    "CopyError",
    "EditError",
    "EmptyPromptError",
    "Envoy",
    "GradientError",
    "InputError",
    "LanguageModel",
    "log",
    "MissingInputError",
    "MissingWeightsError",
    "ModelClassError",
    "ModelNotFoundError",
    "ModuleNotRunError",
    "NameTakenError",
    "NNsight",
    "NNsightError",
    "NoSuchEntryError",
    "NoSuchModuleError",
    "NoSuchOperationError",
    "NoTraceError",
    "OptionError",
    "OrderError",
    "OutOfOrderError",
    "PaddingError",
    "PromptTooLongError",
    "Proxy",
    "RecomputedError",
    "RecordingError",
    "ReleasedValueError",
    "RemoteError",
    "RenameError",
    "RowsError",
    "save",
    "ScanError",
    "SessionError",
    "SourceError",
    "StepNotRunError",
    "Tracer",
    "TraceStoppedError",
    "WrittenOverError",
    "WrongThreadError",
]

# Not as a function of that name: for type checkers the package would then have every name.
globals()["__getattr__"] = _of_the_package
