"""A live tracing core: read and set the values inside any PyTorch module while it runs."""

from nnsight_core.arguments import apply, save
from nnsight_core.envoy import Envoy
from nnsight_core.errors import (
    CallsNotCountedError,
    EditError,
    EmptyPromptError,
    GradientError,
    InputError,
    MissingInputError,
    ModelNotFoundError,
    ModuleNotRunError,
    NameTakenError,
    NNsightError,
    NoSuchModuleError,
    NoTraceError,
    OrderError,
    OutOfOrderError,
    PaddingError,
    PromptTooLongError,
    RecomputedError,
    RecordingError,
    ReleasedValueError,
    RowsError,
    StepNotRunError,
    TraceStoppedError,
    WrongThreadError,
)
from nnsight_core.language_model import LanguageModel
from nnsight_core.model import NNsight
from nnsight_core.proxy import Proxy
from nnsight_core.tracer import Tracer

__all__ = [
    "apply",
    "CallsNotCountedError",
    "EditError",
    "EmptyPromptError",
    "Envoy",
    "GradientError",
    "InputError",
    "LanguageModel",
    "MissingInputError",
    "ModelNotFoundError",
    "ModuleNotRunError",
    "NameTakenError",
    "NNsight",
    "NNsightError",
    "NoSuchModuleError",
    "NoTraceError",
    "OrderError",
    "OutOfOrderError",
    "PaddingError",
    "PromptTooLongError",
    "Proxy",
    "RecomputedError",
    "RecordingError",
    "ReleasedValueError",
    "RowsError",
    "save",
    "StepNotRunError",
    "Tracer",
    "TraceStoppedError",
    "WrongThreadError",
]
