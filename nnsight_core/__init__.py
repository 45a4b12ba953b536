"""A live tracing core: read and set the values inside any PyTorch module while it runs."""

from nnsight_core.arguments import apply
from nnsight_core.envoy import Envoy
from nnsight_core.errors import (
    EditError,
    EmptyPromptError,
    GradientError,
    InputError,
    MissingInputError,
    ModelNotFoundError,
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
    PromptTooLongError,
    RecordingError,
    ReleasedValueError,
    RemoteError,
    RenameError,
    RowsError,
    SourceError,
    StepNotRunError,
    TraceStoppedError,
    WrongThreadError,
)
from nnsight_core.keeping import log, save
from nnsight_core.language_model import LanguageModel
from nnsight_core.model import NNsight
from nnsight_core.proxy import Proxy
from nnsight_core.tracer import Tracer

__all__ = [
    "apply",
    "EditError",
    "EmptyPromptError",
    "Envoy",
    "GradientError",
    "InputError",
    "LanguageModel",
    "log",
    "MissingInputError",
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
    "PromptTooLongError",
    "Proxy",
    "RecordingError",
    "ReleasedValueError",
    "RemoteError",
    "RenameError",
    "RowsError",
    "save",
    "SourceError",
    "StepNotRunError",
    "Tracer",
    "TraceStoppedError",
    "WrongThreadError",
]
