"""What a model was asked to run on, or to be loaded from, cannot be. The tree of all errors stands in `errors.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nnsight_core.error_text import did_you_mean
from nnsight_core.errors import NNsightError


class InputError(NNsightError, ValueError):
    """What the model was asked to run on cannot be run."""


class MissingInputError(InputError):
    """A trace was opened with nothing to run on."""

    def __init__(self, alone: bool = False) -> None:
        if alone:
            super().__init__(
                "An invoke without an input sees the whole batch, but no input has been gathered for one.\n"
                "Put it after invokes with inputs, and before one that looks at its values, which runs them."
            )
            return
        super().__init__(
            "trace() was opened without an input.\nGive what the model is to run on:\n    with model.trace(inputs): ..."
        )


class EmptyPromptError(InputError):
    """A prompt came out with no token at all."""

    def __init__(self, index: int, count: int) -> None:
        which = "The prompt is empty" if count == 1 else f"Prompt {index} of {count} (counted from 0) is empty"
        if count == 0:
            which = "The list of prompts is empty"
        super().__init__(f"{which}: there is no token to run the model on.\nGive at least one token of text.")


class PaddingError(InputError):
    """Prompts of different lengths were put into one batch, and the model lets padding change their numbers."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"{model} gives other numbers to a prompt that is padded on the left than to the prompt alone: it counts\n"
            "the padding as positions, or lets it run through its state. So prompts of different lengths cannot share\n"
            "a batch. Give prompts with the same number of tokens, or trace them one after the other."
        )


class PromptTooLongError(InputError):
    """A prompt has more tokens than the model has positions."""

    def __init__(self, index: int, tokens: int, limit: int, model: str) -> None:
        super().__init__(
            f"Prompt {index} (counted from 0) has {tokens} tokens, but {model} has a context of {limit} positions.\n"
            f"Shorten it by {tokens - limit} tokens, or cut it where it is tokenised:\n"
            f"    model.trace(prompt, invoker_args={{'truncation': True, 'max_length': {limit}}})"
        )


class ModelNotFoundError(InputError):
    """Neither a folder with a model, nor a model that can be fetched by that name."""

    def __init__(self, name: str, reason: str, known: Iterable[str] = ()) -> None:
        known = list(known)
        lines = [f"No model could be loaded from {name!r}: {reason}", did_you_mean(name, known)]
        if known:
            lines.append(f"Models that come with the package: {', '.join(known)}.")
        lines.append("Give a folder that holds config.json and weights, a name on the hub, or a model object.")
        super().__init__("\n".join(line for line in lines if line))


class ModelClassError(ModelNotFoundError):
    """A model that is there, and is not of the kind that was to be loaded."""

    def __init__(self, name: str, model_type: str, loader: str, is_encoder_decoder: bool) -> None:
        other, also = ("AutoModelForSeq2SeqLM", ", decoder_input_ids=ids") if is_encoder_decoder else ("AutoModel", "")
        InputError.__init__(
            self,
            f"{name!r} holds a model of type {model_type!r}, and {loader} has none of that type.\n"
            "Open it by the names of its own modules, which print(model) shows:\n"
            f"    model = nnsight_core.LanguageModel({name!r}, automodel={other!r})\n"
            f"    with model.trace(text{also}): ...",
        )


class MissingWeightsError(InputError):
    """A checkpoint lacks weights of its model, which would be left to chance."""

    def __init__(self, name: str, missing: Sequence[str], model: str) -> None:
        shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        super().__init__(
            f"{name!r} lacks {len(missing)} of the weights of {model}, which would start out random: {shown}\n"
            "If that is meant, say so by loading it yourself:\n"
            f"    LanguageModel({model}.from_pretrained({name!r}), tokenizer=...)"
        )
