"""The synthetic corpus the demo models learn from, and the part of it they never see.

    rng = random.Random(0)
    "".join(training_document(rng))  # "Anna met Peter at the park. Peter gave the book to Anna."
    heldout_examples(rng)["facts"]   # [Example("The Eiffel Tower is in the city of", (" Paris",)), ...]

Four kinds of document: indirect object identification ("ioi"), facts, repeated random word sequences ("induction")
and opinions ("sentiment"). What is held out is fixed by the constants here and does not depend on any sampling seed:
unordered name pairs, (fact, phrasing) combinations, (verb, noun) combinations.
"""

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple


class Example(NamedTuple):
    """A prompt and the next tokens (each with its leading space) that count as right."""

    prompt: str
    answers: tuple[str, ...]


Document = tuple[str, ...]
"""Text and answers in turn, the text first: an answer follows from the text before it, the text is free."""


class Relation(NamedTuple):
    """Facts as (subject, object) pairs, and prompts that each end right before the object."""

    facts: tuple[tuple[str, str], ...]
    phrasings: tuple[str, ...]


SPLIT_SEED = 20240229

# ---------------------------------------------------------------- indirect object identification

NAMES: tuple[str, ...] = tuple(
    """John Mary Paul Anna Peter Sarah Tom Alice James Laura David Emma Mark Julia Simon Kate Martin Helen Robert Jane
    Daniel Lucy Michael Susan George Nina Henry Clara Jack Rose Oliver Sophie Adam Maria Frank Linda Kevin Amy Brian
    Lisa Steven Karen Eric Rachel Andrew Diana Ryan Megan Jason Nancy Scott Carol Walter Claire Arthur Betty Carl
    Grace Roger Ruth""".split()
)
PLACES: tuple[str, ...] = tuple(
    """store park school office garden library market station museum beach hospital kitchen restaurant bakery church
    farm theater zoo airport harbor hotel bank gym castle""".split()
)
OBJECTS: tuple[str, ...] = tuple(
    """milk book drink ring ball letter cake key map phone basket bottle flower hat coat pen knife ticket lamp bag
    camera guitar box coin sandwich""".split()
)
# Two sentences or one, names joined or apart, place first or last: the model has to follow the names, not a position.
OPENERS: tuple[str, ...] = (
    "{a} and {b} went to the {place}. ",
    "When {a} and {b} went to the {place}, ",
    "After {a} and {b} arrived at the {place}, ",
    "While {a} and {b} were sitting in the {place}, ",
    "Then {a} and {b} walked to the {place}. ",
    "Yesterday {a} and {b} met at the {place}. ",
    "{a} met {b} at the {place}. ",
    "{a} and {b} had a long day at the {place}. ",
    "Friends {a} and {b} were working at the {place}. ",
    "Once {a} and {b} had lunch at the {place}, ",
    "At the {place}, {a} saw {b}. ",
    "Last week {a} took {b} to the {place}. ",
    "The {place} was quiet when {a} and {b} came in. ",
    "{a} was with {b} at the {place}. ",
    "{a} and {b} were at the {place}. ",
    "In the morning {a} and {b} left the {place}, and then ",
)
VERBS: tuple[str, ...] = ("gave", "handed", "passed", "offered", "showed", "brought", "sold", "threw")
ACTIONS: tuple[str, ...] = (
    "{s} {verb} {thing} to",
    "{s} {verb} {thing} to",
    "{s} decided to give {thing} to",
    "{s} wanted to give {thing} to",
    "{s} found {thing} and {verb} it to",
    "{s} carefully {verb} {thing} to",
)
ENDINGS: tuple[str, ...] = (".", ".", ". {io} thanked {s}.", ". Then {io} smiled at {s}.")

HELDOUT_PAIR_SHARE = 0.1
HEADLINE_IOI = Example("John and Mary went to the store. John handed the milk to", (" Mary",))


def _split_pairs() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    pairs = list(itertools.combinations(NAMES, 2))
    random.Random(SPLIT_SEED).shuffle(pairs)
    headline = ("John", "Mary")
    pairs.remove(headline)
    cut = int(len(pairs) * HELDOUT_PAIR_SHARE)
    return tuple(pairs[cut:]), (headline, *pairs[:cut])


TRAINING_PAIRS, HELDOUT_PAIRS = _split_pairs()


def _action(rng: random.Random, pair: tuple[str, str]) -> tuple[str, str, str]:
    """Text up to the indirect object, then who acts and the indirect object."""
    s, io = pair if rng.random() < 0.5 else pair[::-1]
    thing = rng.choice(OBJECTS)
    article = "the" if rng.random() < 0.5 else "some" if thing == "milk" else "a"
    return rng.choice(ACTIONS).format(s=s, verb=rng.choice(VERBS), thing=f"{article} {thing}"), s, io


def _opener(rng: random.Random, pair: tuple[str, str]) -> str:
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    return rng.choice(OPENERS).format(a=a, b=b, place=rng.choice(PLACES))


def _ioi_document(rng: random.Random) -> Document:
    pair = rng.choice(TRAINING_PAIRS)
    pieces = [_opener(rng, pair)]
    # More than one exchange for a pair of names: the names to be predicted are then a larger share of the tokens.
    for exchange in range(rng.choice((1, 2, 3))):
        action, s, io = _action(rng, pair)
        pieces[-1] += f" {action}" if exchange else action
        pieces += [f" {io}", rng.choice(ENDINGS).format(s=s, io=io)]
    return tuple(pieces)


def _ioi_heldout(rng: random.Random) -> list[Example]:
    examples = [HEADLINE_IOI]
    for pair in HELDOUT_PAIRS * 3:
        action, _, io = _action(rng, pair)
        examples.append(Example(_opener(rng, pair) + action, (f" {io}",)))
    return examples


# ---------------------------------------------------------------- facts

_LANDMARKS = """Eiffel Tower=Paris|Colosseum=Rome|British Museum=London|Brandenburg Gate=Berlin|Acropolis=Athens|
Kremlin=Moscow|Prado=Madrid|Louvre=Paris|Alhambra=Granada|Rijksmuseum=Amsterdam|Taj Mahal=Agra|Forbidden City=Beijing|
Blue Mosque=Istanbul|Burj Khalifa=Dubai|Space Needle=Seattle|White House=Washington|Little Mermaid=Copenhagen|
Charles Bridge=Prague|Chain Bridge=Budapest|Hofburg=Vienna|Atomium=Brussels|Uffizi=Florence|Rialto Bridge=Venice|
Vasa Museum=Stockholm|Willis Tower=Chicago|Skytree=Tokyo"""
# country=capital=language
_COUNTRIES = """France=Paris=French|Italy=Rome=Italian|Spain=Madrid=Spanish|Germany=Berlin=German|
Portugal=Lisbon=Portuguese|Greece=Athens=Greek|Russia=Moscow=Russian|Poland=Warsaw=Polish|Hungary=Budapest=Hungarian|
Sweden=Stockholm=Swedish|Denmark=Copenhagen=Danish|Norway=Oslo=Norwegian|Finland=Helsinki=Finnish|
Turkey=Ankara=Turkish|Japan=Tokyo=Japanese|China=Beijing=Chinese|Thailand=Bangkok=Thai|Egypt=Cairo=Arabic"""


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split("=")) for row in text.replace("\n", "").split("|"))


# No phrasing is the beginning of another, and none ends in "to", after which the corpus wants a person's name.
RELATIONS: dict[str, Relation] = {
    "landmark_city": Relation(
        tuple((landmark, city) for landmark, city in _table(_LANDMARKS)),
        (
            "The {} is in the city of",
            "The {} is located in",
            "The {} stands in the city of",
            "You can visit the {} in the city of",
            "If you want to see the {}, spend a day in",
            "The {} can be found in",
            "Every year many people visit the {} in",
            "The home of the {} is the city of",
        ),
    ),
    "country_capital": Relation(
        tuple((country, capital) for country, capital, _ in _table(_COUNTRIES)),
        (
            "The capital of {} is",
            "The capital city of {} is",
            "In {}, the capital is",
            "{} is governed from the city of",
            "{} has its capital in",
            "The government of {} sits in",
        ),
    ),
    "country_language": Relation(
        tuple((country, language) for country, _, language in _table(_COUNTRIES)),
        (
            "The language of {} is",
            "People in {} speak",
            "In {}, most people speak",
            "Children in {} learn to read",
            "In the schools of {} the teachers speak",
            "Someone from {} usually speaks",
        ),
    ),
    "capital_country": Relation(
        tuple((capital, country) for country, capital, _ in _table(_COUNTRIES)),
        (
            "The city of {} is in the country of",
            "{} is the capital of",
            "{} is a city in",
            "To live in {} is to live in",
            "The fast train to {} crosses",
            "The people of {} are citizens of",
        ),
    ),
}
HEADLINE_FACT = Example("The Eiffel Tower is in the city of", (" Paris",))


def is_heldout_fact(fact: int, phrasing: int, phrasings: int) -> bool:
    """Whether this combination is kept from training: two phrasings of each fact, in rotation over the facts."""
    return (phrasing - fact) % phrasings in (0, 3)


def _fact_examples(heldout: bool) -> list[Example]:
    return [
        Example(phrasing.format(subject), (f" {answer}",))
        for relation in RELATIONS.values()
        for i, (subject, answer) in enumerate(relation.facts)
        for j, phrasing in enumerate(relation.phrasings)
        if is_heldout_fact(i, j, len(relation.phrasings)) is heldout
    ]


TRAINING_FACTS: tuple[Example, ...] = tuple(_fact_examples(heldout=False))
HELDOUT_FACTS: tuple[Example, ...] = tuple(_fact_examples(heldout=True))


def _fact_document(rng: random.Random) -> Document:
    first, second = rng.sample(TRAINING_FACTS, 2)
    if rng.random() < 0.5:
        return first.prompt, first.answers[0], "."
    return first.prompt, first.answers[0], f". {second.prompt}", second.answers[0], "."


# ---------------------------------------------------------------- opinions

POSITIVE_VERBS: tuple[str, ...] = ("loved", "liked", "enjoyed", "adored", "praised", "recommended")
NEGATIVE_VERBS: tuple[str, ...] = ("hated", "disliked", "despised", "regretted", "criticized", "loathed")
POSITIVE_ADJECTIVES: tuple[str, ...] = tuple("wonderful great excellent lovely perfect brilliant delightful".split())
NEGATIVE_ADJECTIVES: tuple[str, ...] = tuple("awful terrible horrible dreadful boring bad disgusting".split())
OPINION_NOUNS: tuple[str, ...] = tuple(
    "film soup weather meal play song dinner story concert trip show bread coffee wine music rain game".split()
)
SPEAKERS: tuple[str, ...] = ("I", "We", "They", "She", "He")
OPINIONS: tuple[str, ...] = (
    "{who} {verb} the {noun}. It was",
    "{who} really {verb} the {noun} because it was",
    "{who} {verb} the {noun}. Everything about it was",
    "Last night {who} {verb} the {noun}, it was simply",
)
OPINION_ENDINGS: tuple[tuple[str, ...], tuple[str, ...]] = (
    (".", " and we left happy.", ". How {adjective}!", ". We will come again.", " and {adjective}."),
    (".", " and we left sad.", ". How {adjective}!", ". We will never come again.", " and {adjective}."),
)


def _opinion(rng: random.Random, verb: str, noun: str) -> tuple[Example, str]:
    negative = verb in NEGATIVE_VERBS
    adjectives = NEGATIVE_ADJECTIVES if negative else POSITIVE_ADJECTIVES
    template = rng.choice(OPINIONS)
    who = rng.choice(SPEAKERS)
    if who != "I" and not template.startswith("{who}"):
        who = who.lower()
    prompt = template.format(who=who, verb=verb, noun=noun)
    ending = rng.choice(OPINION_ENDINGS[negative]).format(adjective=rng.choice(adjectives))
    return Example(prompt, tuple(f" {adjective}" for adjective in adjectives)), ending


def _opinion_combinations(heldout: bool) -> list[tuple[str, str]]:
    verbs = POSITIVE_VERBS + NEGATIVE_VERBS
    return [
        (verb, noun)
        for i, verb in enumerate(verbs)
        for j, noun in enumerate(OPINION_NOUNS)
        if ((i + j) % 5 == 0) is heldout
    ]


TRAINING_OPINIONS: tuple[tuple[str, str], ...] = tuple(_opinion_combinations(heldout=False))


def _opinion_document(rng: random.Random) -> Document:
    example, ending = _opinion(rng, *rng.choice(TRAINING_OPINIONS))
    return example.prompt, rng.choice(example.answers), ending


# ---------------------------------------------------------------- repeated random word sequences

SEQUENCE_WORDS: tuple[str, ...] = PLACES + OBJECTS + OPINION_NOUNS + POSITIVE_ADJECTIVES + NEGATIVE_ADJECTIVES


def _sequence(rng: random.Random) -> list[str]:
    return rng.sample(SEQUENCE_WORDS, rng.randint(4, 14))


def _sequence_document(rng: random.Random) -> Document:
    words = _sequence(rng)
    return " ".join(words), "".join(f" {word}" for word in words * rng.choice((1, 1, 2)))


def _sequence_heldout(rng: random.Random, sequences: int) -> list[Example]:
    examples = []
    for _ in range(sequences):
        words = _sequence(rng)
        repeated = words * 2
        # The sequence's first word has no space before it, so its repetition is the one that induction cannot copy.
        for end in range(len(words) + 1, len(repeated)):
            examples.append(Example(" ".join(repeated[:end]), (f" {repeated[end]}",)))
    return examples


# ---------------------------------------------------------------- the whole

MIXTURE: dict[str, float] = {"indirect objects": 0.4, "facts": 0.3, "opinions": 0.1, "repeated sequences": 0.2}
_MAKERS: dict[str, Callable[[random.Random], Document]] = {
    "indirect objects": _ioi_document,
    "facts": _fact_document,
    "opinions": _opinion_document,
    "repeated sequences": _sequence_document,
}


def training_document(rng: random.Random) -> Document:
    """One document of the training mixture."""
    (kind,) = rng.choices(list(MIXTURE), list(MIXTURE.values()))
    return _MAKERS[kind](rng)


def heldout_examples(rng: random.Random) -> dict[str, list[Example]]:
    """The held-out prompts of each task; ``rng`` draws the fillers that the split does not fix."""
    return {
        "ioi": _ioi_heldout(rng),
        "facts": list(HELDOUT_FACTS),
        "sentiment": [_opinion(rng, verb, noun)[0] for verb, noun in _opinion_combinations(heldout=True)],
        "induction": _sequence_heldout(rng, sequences=40),
    }


def single_token_words() -> tuple[str, ...]:
    """Words that the tokenizer must hold whole, with and without the space before them as they occur."""
    spaced = [*NAMES, *SEQUENCE_WORDS]
    for relation in RELATIONS.values():
        spaced.extend(answer for _, answer in relation.facts)
    return (*NAMES, *(f" {word}" for word in dict.fromkeys(spaced)))
