"""Train the demo models from nothing: corpus, tokenizer, both models, their cards.

    python -m nnterp.demo_models.train                          # remakes the shipped folders
    python -m nnterp.demo_models.train --out remade --only demo-gpt2

Everything that is random comes from one seed, so the same machine and library versions give the same weights again.
One thread takes about ten minutes for each model; with two cores, train both at once, each with its ``--only``.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
from nnterp.demo_models.evaluate import final_norm

SEED = 0
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 128
TOKENIZER_DOCUMENTS = 30_000

STEPS = 3500
TOKENS_PER_STEP = 1024
# Short rows put most documents near position 0, where prompts start; long ones train every position up to the context.
ROW_LENGTHS = (32, 64, CONTEXT)
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
# Most of a document cannot be predicted; at equal weight its noise hides the few tokens that the tasks are about.
ANSWER_WEIGHT = 8.0
# Widths this small need a wider start than the libraries' 0.02, at which attention stays uniform for long.
INITIALIZER_RANGE = 0.07
# The tasks fit into one layer, and left alone the first layer says the answer. Above these probabilities, for the first
# layers in order, an answer that the logit lens can already read costs loss: it has to form later.
LENS_CEILINGS = (0.02, 0.05, 0.15, 0.5)
LENS_WEIGHT = 0.5


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


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model called ``name``."""
    shared = {
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "demo-gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=CONTEXT,
                n_embd=128,
                n_layer=6,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **shared,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            **shared,
        )
    )


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
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def lens_penalty(
    model: PreTrainedModel, hidden_states: tuple[torch.Tensor, ...], ids: torch.Tensor, answers: torch.Tensor
) -> torch.Tensor:
    """How far the logit lens is above ``LENS_CEILINGS``, in nats, summed over layers, averaged over the answers."""
    positions = answers[:, 1:]
    targets = ids[:, 1:][positions].unsqueeze(-1)
    norm, unembedding = final_norm(model), model.get_output_embeddings()
    total = torch.zeros(())
    # The first hidden states are the embeddings.
    for hidden, ceiling in zip(hidden_states[1:], LENS_CEILINGS, strict=False):
        read = unembedding(norm(hidden[:, :-1][positions])).log_softmax(-1).gather(-1, targets)
        total = total + F.relu(read - math.log(ceiling)).mean()
    return total


def train_model(
    name: str, tokenizer: PreTrainedTokenizerFast, steps: int = STEPS, seed: int = SEED
) -> tuple[PreTrainedModel, float]:
    """The trained model and its mean loss over the last hundred steps."""
    torch.manual_seed(seed)
    model = build_model(name, tokenizer).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": other, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    losses: list[float] = []
    progress = tqdm(training_batches(tokenizer, seed, steps), total=steps, desc=name, mininterval=1.0)
    for batch in progress:
        output = model(input_ids=batch.ids, output_hidden_states=True)
        logits = output.logits
        losses_of_tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        weights = batch.weights[:, 1:].flatten()
        loss = (losses_of_tokens * weights).sum() / weights.sum()
        penalty = lens_penalty(model, output.hidden_states, batch.ids, batch.weights > 1)
        (loss + LENS_WEIGHT * penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        mean = sum(losses[-100:]) / len(losses[-100:])
        progress.set_postfix(loss=f"{mean:.3f}", lens_penalty=f"{penalty.item():.3f}", refresh=False)
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


def make_demo_model(name: str, out: Path, steps: int = STEPS, seed: int = SEED) -> TrainingRun:
    """Train ``name`` and write its folder, card included, under ``out``."""
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
        lens_ceilings=LENS_CEILINGS,
        threads=torch.get_num_threads(),
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
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in their last digits")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in (options.only,) if options.only else DEMO_MODELS:
        run = make_demo_model(name, options.out, options.steps, options.seed)
        sys.stdout.write(f"{name}: {run.steps} steps in {run.seconds:.0f} s, loss {run.loss:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
