"""A live tracing core: read and set the values inside any PyTorch module while it runs."""

from nnsight_core.arguments import apply, save
from nnsight_core.envoy import Envoy
from nnsight_core.errors import (
    CopyError,
    EditError,
    EmptyPromptError,
    GradientError,
    InputError,
    MissingInputError,
    MissingWeightsError,
    ModelNotFoundError,
    ModuleNotRunError,
    NameTakenError,
    NNsightError,
    NoSuchModuleError,
    NoTraceError,
    OrderError,
    OutOfOrderError,
    PromptTooLongError,
    RecordingError,
    ReleasedValueError,
    ScanError,
    SessionError,
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
    "CopyError",
    "EditError",
    "EmptyPromptError",
    "Envoy",
    "GradientError",
    "InputError",
    "LanguageModel",
    "MissingInputError",
    "MissingWeightsError",
    "ModelNotFoundError",
    "ModuleNotRunError",
    "NameTakenError",
    "NNsight",
    "NNsightError",
    "NoSuchModuleError",
    "NoTraceError",
    "OrderError",
    "OutOfOrderError",
    "PromptTooLongError",
    "Proxy",
    "RecordingError",
    "ReleasedValueError",
    "save",
    "ScanError",
    "SessionError",
    "StepNotRunError",
    "Tracer",
    "TraceStoppedError",
    "WrongThreadError",
]
