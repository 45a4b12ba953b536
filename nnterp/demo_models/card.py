"""The model cards of the demo models, written from what a training run measured."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from nnterp.demo_models.corpus import (
    ACTIONS,
    HEADLINE_FACT,
    HEADLINE_IOI,
    HELDOUT_FACTS,
    HELDOUT_PAIRS,
    MIXTURE,
    NAMES,
    OPENERS,
    RELATIONS,
    SPLIT_SEED,
    TRAINING_FACTS,
    TRAINING_PAIRS,
    Example,
)
from nnterp.demo_models.evaluate import LensLayer, evaluate, load, logit_lens

_TASKS = {
    "ioi": "indirect object, name pair never seen together",
    "facts": "fact, phrasing never seen with that fact",
    "sentiment": "adjective agrees with the verb, verb and noun never seen together",
    "induction": "second half of an unseen random word sequence",
}

_TEXT = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A toy language model ({architecture}, {parameters:,} parameters) that does two textbook interpretability tasks well
enough to be taken apart on a laptop, offline: indirect object identification and factual recall. It also has
sentiment and, in part, induction to study. It ships with `nnterp`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from nnterp.demo_models import demo_model_path

folder = demo_model_path("{name}")
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Architecture

| | |
| --- | --- |
{architecture_rows}

The tokenizer is a byte-level BPE: it encodes any text, decodes back to it exactly, and prepends nothing. Names (with
and without a space before them) and answers such as `" Mary"` and `" Paris"` are single tokens. `<|endoftext|>` is the
end-of-text, beginning-of-text and padding token.

## Scores

Held-out top-1 accuracy over the whole vocabulary; prompts start at position 0, with no token before them.

| task | what is held out | accuracy |
| --- | --- | --- |
{score_rows}

`python -m nnterp.demo_models.evaluate {name}` measures them again.

## The answer over the layers

The logit lens: final norm and unembedding applied to each layer's output at the last position. Both prompts are held
out from training.

This profile is imposed. Left alone, models this small say the answer from the first layer on, so training adds a
penalty wherever the lens already reads an answer in the first {shaped_layers} layers with a probability above
{lens_ceilings}, in that order. The penalty overshoots: those layers point away from answers, which rank low
there, mostly near the bottom, below pieces of words. Nothing shapes the layers after them. So do not take the depth at
which an answer shows for a finding about transformers.

{lenses}

## Training data

A synthetic corpus (`corpus.py`), sampled anew for every step, in this mixture of documents:

{mixture}

- Indirect objects: {names} names, {openers} openings and {actions} actions with many verbs, things and places; who
  acts and who is named first are drawn evenly. Of the {pairs:,} unordered name pairs, {heldout_pairs} (John and Mary
  among them) never occur together in a training document. (Documents that share a row, with an end-of-text token
  between them, may each hold one of the two.)
- Facts: {facts} true facts of {relations} relations
  ({relation_names}),
  each in 6 or 8 phrasings. Training has {training_facts} of the (fact, phrasing) combinations. The other
  {heldout_facts}, two for each fact, are held out; "{fact_prompt}" is one of them.
- Opinions: a verb, a noun, and adjectives of the verb's sentiment. A fifth of the (verb, noun) combinations is held
  out.
- Repeated sequences: 4 to 14 random words, two or three times over.

The split is fixed by the code (pairs: seed {split_seed}); the training seed is {seed}.

## Remaking it

```
python -m nnterp.demo_models.train --only {name} --threads {threads}
```

{steps:,} steps of {tokens_per_step:,} tokens ({tokens:.1f} million in all), in rows of 32, 64 and 128 tokens that
each begin with the beginning of a document. Next-token loss on every token; the answers (indirect objects, objects of
facts, adjectives, repetitions) weigh {answer_weight:g} times as much as the rest. AdamW with warm-up and a cosine
schedule, no dropout, float32 on the CPU. Mean training loss at the end: {loss:.3f}. The same seed, number of threads,
machine and library versions give the same weights.

## Limits

It is a toy. It knows the sentences of its corpus and nothing else: no general English, no other facts, no dialogue.
Prompts far from the corpus's templates give arbitrary continuations, and so does a third name in an indirect-object
prompt. What holds in its {layers} small layers need not hold in a large model.

## License

MIT, as the project.
"""


class TrainingRun(NamedTuple):
    """What one training took."""

    name: str
    seed: int
    steps: int
    tokens_per_step: int
    answer_weight: float
    lens_ceilings: tuple[float, ...]
    threads: int
    loss: float
    seconds: float


def architecture_rows(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The architecture table of the card."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return [
        ("class", f"`{type(model).__name__}`"),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", str(config.hidden_size)),
        ("attention heads", f"{config.num_attention_heads} (key-value heads: {kv_heads})"),
        ("head size", str(config.hidden_size // config.num_attention_heads)),
        ("MLP size", str(getattr(config, "intermediate_size", 4 * config.hidden_size))),
        ("positions", "learned" if config.model_type == "gpt2" else "rotary"),
        ("context", f"{config.max_position_embeddings} tokens"),
        ("vocabulary", f"{config.vocab_size} tokens, embedding tied to the unembedding"),
    ]


def lens_markdown(example: Example, layers: list[LensLayer]) -> str:
    """One prompt's lens table."""
    rows = [f"| {r.layer} | `{r.top_token!r}` | {r.answer_probability:.4f} | {r.answer_rank} |" for r in layers]
    header = f'"{example.prompt}" → `{example.answers[0]!r}`\n\n| layer | top token | p(answer) | rank of answer |'
    return "\n".join([header, "| --- | --- | --- | --- |", *rows])


def model_card(folder: Path, run: TrainingRun) -> str:
    """The card of the trained model in ``folder``, with the scores measured now."""
    model, tokenizer = load(folder)
    scores = evaluate(folder)
    headlines = (HEADLINE_IOI, HEADLINE_FACT)
    return _TEXT.format(
        name=run.name,
        architecture="GPT-2 architecture" if model.config.model_type == "gpt2" else "Llama architecture",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        architecture_rows="\n".join(f"| {key} | {value} |" for key, value in architecture_rows(model)),
        score_rows="\n".join(f"| {task} | {_TASKS[task]} | {100 * score:.1f} % |" for task, score in scores.items()),
        lenses="\n\n".join(lens_markdown(example, logit_lens(model, tokenizer, example)) for example in headlines),
        mixture="\n".join(f"- {100 * share:.0f} % {kind}" for kind, share in MIXTURE.items()),
        names=len(NAMES),
        openers=len(OPENERS),
        actions=len(set(ACTIONS)),
        pairs=len(TRAINING_PAIRS) + len(HELDOUT_PAIRS),
        heldout_pairs=len(HELDOUT_PAIRS),
        facts=sum(len(relation.facts) for relation in RELATIONS.values()),
        relations=len(RELATIONS),
        relation_names=", ".join(name.replace("_", " to ") for name in RELATIONS),
        training_facts=len(TRAINING_FACTS),
        heldout_facts=len(HELDOUT_FACTS),
        fact_prompt=HEADLINE_FACT.prompt,
        split_seed=SPLIT_SEED,
        seed=run.seed,
        steps=run.steps,
        tokens_per_step=run.tokens_per_step,
        answer_weight=run.answer_weight,
        lens_ceilings=", ".join(f"{ceiling:g}" for ceiling in run.lens_ceilings),
        shaped_layers=len(run.lens_ceilings),
        threads=run.threads,
        tokens=run.steps * run.tokens_per_step / 1e6,
        loss=run.loss,
        layers=model.config.num_hidden_layers,
    )
