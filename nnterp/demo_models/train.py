"""Train the demo models from nothing: corpus, tokenizer, both models, their cards.

    python -m nnterp.demo_models.train                          # remakes the shipped folders
    python -m nnterp.demo_models.train --out remade --only demo-gpt2

Everything that is random comes from one seed, so the same machine and library versions give the same weights again.
Both models are trained at once, with one thread each, which takes two cores about a quarter of an hour.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nnterp.demo_models import DEMO_MODELS
from nnterp.demo_models.card import TrainingRun, model_card
from nnterp.demo_models.corpus import single_token_words, training_document

SEED = 0
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 128
TOKENIZER_DOCUMENTS = 30_000
LAYERS = 6
WIDTH = 112
HEADS = 4

STEPS = 4700
TOKENS_PER_STEP = 1024
# Short rows put most documents near position 0, where prompts start; long ones train every position up to the context.
ROW_LENGTHS = (64, CONTEXT)
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
DECAY_STEPS = 800
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
# Most of a document cannot be predicted; at equal weight its noise hides the few tokens that the tasks are about.
ANSWER_WEIGHT = 8.0
# Widths this small need a wider start than the libraries' 0.02, at which attention stays uniform for long.
INITIALIZER_RANGE = 0.07
# Beside embeddings this wide what one layer adds weighs little, so answers form over several layers; with embeddings as
# narrow as the other weights the first layer says them alone. Tied to the unembedding, they would start as huge logits.
EMBEDDING_STD = 0.7
# Positions start as sinusoids, so that one linear map takes any of them to the one before it.
POSITION_SCALE = 0.5


def build_tokenizer(seed: int = SEED) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a sample of the corpus: encodes any text, adds nothing to it."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The corpus has few distinct words, so the merges run out before this vocabulary is full.
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(training_document(rng)) for _ in range(TOKENIZER_DOCUMENTS)), trainer)
    split = [word for word in single_token_words() if len(tokenizer.encode(word).ids) != 1]
    if split:
        raise RuntimeError(f"the tokenizer splits {split}, which must be single tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        # Never token type ids: GPT-2 would add their embeddings.
        model_input_names=["input_ids", "attention_mask"],
    )


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Sines and cosines of the position, ``[positions, width]``."""
    frequencies = 1000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.arange(positions).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model called ``name``."""
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: Any
    if name == "demo-gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                n_positions=CONTEXT,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **shared,
            )
        )
        model.transformer.wpe.weight.data.copy_(sinusoids(CONTEXT, WIDTH) * POSITION_SCALE)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS // 2,
                max_position_embeddings=CONTEXT,
                **shared,
            )
        )
        for layer in model.model.layers:
            # As GPT-2 begins: smaller, the more layers add to the stream.
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                torch.nn.init.normal_(projection.weight, std=INITIALIZER_RANGE / math.sqrt(2 * LAYERS))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    untrained: PreTrainedModel = model
    return untrained


class Batch(NamedTuple):
    """Token ids ``[rows, row length]`` and each token's weight in the loss."""

    ids: torch.Tensor
    weights: torch.Tensor


def _row(tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        # Each piece ends where a word does, so its tokens are those it has within the whole document.
        for index, piece in enumerate(tokenizer(list(training_document(rng)))["input_ids"]):
            ids.extend(piece)
            weights.extend([ANSWER_WEIGHT if index % 2 else 1.0] * len(piece))
        ids.append(tokenizer.eos_token_id)
        weights.append(1.0)
    return ids[:length], weights[:length]


def training_batches(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[Batch]:
    """One batch for each step; its rows are packed documents, the first of them whole at the row's beginning."""
    rng = random.Random(seed)
    for step in range(steps):
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        rows = [_row(tokenizer, rng, length) for _ in range(TOKENS_PER_STEP // length)]
        yield Batch(torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows]))


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then constant, then linearly down to zero over the last steps."""
    return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / DECAY_STEPS))


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    tokens = model.get_input_embeddings().weight
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not tokens]
    other = [p for p in model.parameters() if p.ndim < 2 or p is tokens]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": other, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )


def train_model(
    name: str, tokenizer: PreTrainedTokenizerFast, steps: int = STEPS, seed: int = SEED
) -> tuple[PreTrainedModel, float]:
    """The trained model and its mean loss over the last hundred steps."""
    torch.manual_seed(seed)
    model = build_model(name, tokenizer).train()
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    losses: list[float] = []
    place = DEMO_MODELS.index(name)
    progress = tqdm(training_batches(tokenizer, seed, steps), total=steps, desc=name, mininterval=1.0, position=place)
    for batch in progress:
        logits = model(input_ids=batch.ids).logits
        losses_of_tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        weights = batch.weights[:, 1:].flatten()
        loss = (losses_of_tokens * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        mean = sum(losses[-100:]) / len(losses[-100:])
        progress.set_postfix(loss=f"{mean:.3f}", refresh=False)
    return model.eval(), sum(losses[-100:]) / len(losses[-100:])


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what ``from_pretrained`` reads."""
    model.save_pretrained(folder)
    # The weights come out readable by their owner alone, which an installation would carry on.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # The name every version of transformers knows this class by; the newest ones write another.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_demo_model(name: str, out: Path, steps: int = STEPS, seed: int = SEED, threads: int = 1) -> TrainingRun:
    """Train ``name`` and write its folder, card included, under ``out``."""
    torch.set_num_threads(threads)
    folder = out / name
    start = time.monotonic()
    tokenizer = build_tokenizer(seed)
    model, loss = train_model(name, tokenizer, steps, seed)
    run = TrainingRun(
        name=name,
        seed=seed,
        steps=steps,
        tokens_per_step=TOKENS_PER_STEP,
        answer_weight=ANSWER_WEIGHT,
        weight_decay=WEIGHT_DECAY,
        embedding_std=EMBEDDING_STD,
        threads=threads,
        loss=loss,
        seconds=time.monotonic() - start,
    )
    save(folder, model, tokenizer)
    (folder / "README.md").write_text(model_card(folder, run), encoding="utf-8")
    return run


def main(arguments: list[str] | None = None) -> int:
    """Train the models and write their folders."""
    parser = argparse.ArgumentParser(
        prog="python -m nnterp.demo_models.train", description="Train the demo models from nothing."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the model folders go")
    parser.add_argument("--only", choices=DEMO_MODELS, help="train this model alone")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1, help="for each model; the weights depend on it")
    options = parser.parse_args(arguments)
    names = (options.only,) if options.only else DEMO_MODELS
    # Processes of their own, since the number of threads is a process's.
    with ProcessPoolExecutor(len(names), multiprocessing.get_context("spawn")) as processes:
        runs = [
            processes.submit(make_demo_model, name, options.out, options.steps, options.seed, options.threads)
            for name in names
        ]
        for run in (future.result() for future in runs):
            sys.stdout.write(f"{run.name}: {run.steps} steps in {run.seconds:.0f} s, loss {run.loss:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
