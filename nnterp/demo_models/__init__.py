"""Small language models that ship with the package, so that examples and tests need no download.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from nnterp.demo_models import demo_model_path

    folder = demo_model_path("demo-gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

Remake them with ``python -m nnterp.demo_models.train`` and score them with ``python -m nnterp.demo_models.evaluate``.
"""

from pathlib import Path

__all__ = ["DEMO_MODELS", "demo_model_path"]

DEMO_MODELS: tuple[str, ...] = ("demo-gpt2", "demo-llama")


def demo_model_path(name: str) -> Path | None:
    """Folder of the shipped model called ``name``, or None when no such model is shipped.

        demo_model_path("demo-llama")  # .../nnterp/demo_models/demo-llama
        demo_model_path("gpt2")        # None

    Nothing heavy is imported for it.
    """
    if name not in DEMO_MODELS:
        return None
    folder = Path(__file__).parent / name
    return folder if (folder / "model.safetensors").is_file() else None
