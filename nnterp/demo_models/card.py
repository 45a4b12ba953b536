"""The model cards of the demo models, written from what a training run measured."""

import random
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from nnterp.demo_models.corpus import (
    ACTIONS,
    CLAUSES,
    CROSSED,
    FACTS,
    HEADLINE_FACT,
    HEADLINE_IOI,
    MIXTURE,
    NAMES,
    OPENERS,
    PAIRS,
    RELATIONS,
    SPLIT_SEED,
    Example,
    heldout_examples,
)
from nnterp.demo_models.evaluate import EVALUATION_SEED, LensLayer, evaluate, load, logit_lens, mean_logit_lens

_TASKS = {
    "ioi": "indirect object, two people, pair never seen in one document",
    "crowded_ioi": "the same with one to three other people around",
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
sentiment and induction to study. It ships with `nnterp`.

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

Top-1 accuracy over the whole vocabulary; prompts start at position 0, with no token before them. Neither part is in
the training data. On the development part, short runs were compared by their scores and lens profiles, and corpus,
sizes, initialization and number of steps were chosen by it. The test part was scored once these were fixed. Indirect
objects among more than two people (`crowded_ioi`) got a score of their own after the development score of all of them
together had stayed below 0.8: guessing among the people present gets 0.4 right there.

| task | what is held out | test | development |
| --- | --- | --- | --- |
{score_rows}

`python -m nnterp.demo_models.evaluate {name}` measures the test scores again, with `--split development` the others.

## The answer over the layers

The logit lens: final norm and unembedding applied to each layer's output at the last position. Both prompts belong to
the development part.

{lenses}

Mean probability of the answer over the prompts of the test part:

{mean_lenses}

In single prompts the middle layers changed from checkpoint to checkpoint, while the first and the last stayed; the
means are steadier.

The loss is next-token loss on the model's output and nothing else: no term of it looks at a layer. But the profile was
looked for when choices were made. It comes from the tasks together with the initialization: token embeddings start with
a standard deviation of {embedding_std:g} where the layers' weights start with {initializer_range:g} or less, and the
unembedding is not tied to them. In a short run on an earlier version of this corpus with embeddings starting at
{initializer_range:g} too (GPT-2 architecture), layer 0 gave " Paris" a probability of 0.7. So the depth at which an
answer shows says something about these weights and how they began, and little about transformers in general.

## Training data

A synthetic corpus (`corpus.py`), sampled anew for every step, in this mixture of documents:

{mixture}

- Indirect objects: {names} names; {openers} ways to open and {actions} actions, with many verbs, things and places. The
  answer is the one who came together with the one who acts. There are up to three others (a stranger, a
  second pair), sentences about any of them before and after, and in some actions a third name between the subject and
  the question; who acts and who is named first are drawn evenly. Of the {pairs:,} unordered name pairs,
  {development_pairs} (John and Mary among them) are the development part and {test_pairs} the test part; these never
  occur in one training document. (Documents that share a row, with an end-of-text token between them, may each hold
  one of the two.)
- Facts: {facts} facts about the real world, of {relations} relations
  ({relation_names}),
  each in 8 phrasings. Landmarks share their words (there is an Eiffel Bridge in Ungheni, and a White Tower in
  Thessaloniki), and are asked for city and country alike. For each fact one phrasing is the development part and one
  the test part, the others are for training: {training_facts} combinations. "{fact_prompt}" is of the development part.
- Opinions: a verb, a noun, and adjectives of the verb's sentiment. A tenth of the (verb, noun) combinations is the
  development part, a tenth the test part.
- Repeated sequences: 4 to 14 random words, two or three times over.

The split is fixed by the code (seed {split_seed}); the training seed is {seed}.

## Remaking it

```
python -m nnterp.demo_models.train --only {name} --threads {threads}
```

{steps:,} steps of {tokens_per_step:,} tokens ({tokens:.1f} million in all), in rows of 64 and 128 tokens that
each begin with the beginning of a document. Next-token loss on every token; the answers (indirect objects, objects of
facts, adjectives, repetitions) weigh {answer_weight:g} times as much as the rest. AdamW with a warm-up and a linear
decay of the learning rate at the end, weight decay {weight_decay:g} (none for token embeddings, norms and biases), no
dropout, float32 on the CPU. Mean training loss at the end: {loss:.3f}. The same seed, number of threads, machine and
library versions give the same weights.

## Limits

It is a toy. It knows the sentences of its corpus and nothing else: no general English, no other facts, no dialogue.
Prompts far from the corpus's templates give arbitrary continuations. "The one who came together with the one who acts"
is the corpus's rule for indirect objects, not English's, and with more than two people the model often breaks it. What
holds in its {layers} small layers need not hold in a large model.

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
    weight_decay: float
    embedding_std: float
    threads: int
    loss: float
    seconds: float


def architecture_rows(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The architecture table of the card."""
    config = model.config
    tied = "tied" if config.tie_word_embeddings else "not tied"
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
        ("vocabulary", f"{config.vocab_size} tokens; embedding and unembedding are {tied}"),
    ]


def lens_markdown(example: Example, layers: list[LensLayer]) -> str:
    """One prompt's lens table."""
    rows = [f"| {r.layer} | `{r.top_token!r}` | {r.answer_probability:.4f} | {r.answer_rank} |" for r in layers]
    header = f'"{example.prompt}" → `{example.answers[0]!r}`\n\n| layer | top token | p(answer) | rank of answer |'
    return "\n".join([header, "| --- | --- | --- | --- |", *rows])


def mean_lens_markdown(model: PreTrainedModel, tokenizer: object, tasks: dict[str, list[Example]]) -> str:
    """The mean lens of indirect objects and facts, side by side."""
    names = ("ioi", "crowded_ioi", "facts")
    columns = zip(*(mean_logit_lens(model, tokenizer, tasks[name]) for name in names), strict=True)
    rows = [f"| {layer} | {' | '.join(f'{mean:.3f}' for mean in means)} |" for layer, means in enumerate(columns)]
    return "\n".join([f"| layer | {' | '.join(names)} |", "| --- | --- | --- | --- |", *rows])


def _corpus_values() -> dict[str, object]:
    return {
        "mixture": "\n".join(f"- {100 * share:.0f} % {kind}" for kind, share in MIXTURE.items()),
        "names": len(NAMES),
        "openers": len(OPENERS) + len(CLAUSES),
        "actions": len(ACTIONS) + len(CROSSED),
        "pairs": sum(len(pairs) for pairs in PAIRS.values()),
        "development_pairs": len(PAIRS["development"]),
        "test_pairs": len(PAIRS["test"]),
        "facts": sum(len(relation.facts) for relation in RELATIONS.values()),
        "relations": len(RELATIONS),
        "relation_names": ", ".join(name.replace("_", " to ") for name in RELATIONS),
        "training_facts": len(FACTS["training"]),
        "fact_prompt": HEADLINE_FACT.prompt,
        "split_seed": SPLIT_SEED,
    }


def model_card(folder: Path, run: TrainingRun) -> str:
    """The card of the trained model in ``folder``, with the scores measured now."""
    model, tokenizer = load(folder)
    test, development = evaluate(folder, "test"), evaluate(folder, "development")
    headlines = (HEADLINE_IOI, HEADLINE_FACT)
    return _TEXT.format(
        architecture="GPT-2 architecture" if model.config.model_type == "gpt2" else "Llama architecture",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        architecture_rows="\n".join(f"| {key} | {value} |" for key, value in architecture_rows(model)),
        score_rows="\n".join(
            f"| {task} | {_TASKS[task]} | {100 * test[task]:.1f} % | {100 * development[task]:.1f} % |" for task in test
        ),
        lenses="\n\n".join(lens_markdown(example, logit_lens(model, tokenizer, example)) for example in headlines),
        mean_lenses=mean_lens_markdown(model, tokenizer, heldout_examples(random.Random(EVALUATION_SEED), "test")),
        initializer_range=model.config.initializer_range,
        tokens=run.steps * run.tokens_per_step / 1e6,
        layers=model.config.num_hidden_layers,
        **_corpus_values(),
        **run._asdict(),
    )
