"""The synthetic corpus the demo models learn from, and the parts of it they never see.

    rng = random.Random(0)
    "".join(training_document(rng))  # "Anna met Peter at the park. Peter gave the book to Anna."
    heldout_examples(rng, "test")["facts"]  # [Example("The Eiffel Tower stands in the city of", (" Paris",)), ...]

Four kinds of document: indirect object identification ("ioi"), facts, repeated random word sequences ("induction")
and opinions ("sentiment"). What is held out is fixed by a constant seed and does not depend on any sampling seed:
unordered name pairs, (fact, phrasing) combinations, (verb, noun) combinations.
"""

import itertools
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

Split = Literal["training", "development", "test"]
"""Choices were made on the development part. No choice looks at the test part: it is only reported."""

Document = tuple[str, ...]
"""Text and answers in turn, the text first: an answer follows from the text before it, the text is free."""


class Example(NamedTuple):
    """A prompt and the next tokens (each with its leading space) that count as right."""

    prompt: str
    answers: tuple[str, ...]


Pair = tuple[str, str]
SPLIT_SEED = 20261123


def _rows(text: str) -> tuple[str, ...]:
    return tuple(row.strip() for row in text.split("|"))


def _table(text: str) -> list[list[str]]:
    return [row.split("=") for row in _rows(text)]


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
OPENERS = _rows(
    """{a} and {b} went to the {place}.|Then {a} and {b} walked to the {place}.|At the {place}, {a} saw {b}.|
    Yesterday {a} and {b} met at the {place}.|{a} met {b} at the {place}.|{a} was with {b} at the {place}.|
    {a} and {b} had a long day at the {place}.|Friends {a} and {b} were working at the {place}.|
    Last week {a} took {b} to the {place}.|The {place} was quiet when {a} and {b} came in.|
    {a} and {b} were at the {place}."""
)
CLAUSES = _rows(
    """When {a} and {b} went to the {place},|After {a} and {b} arrived at the {place},|
    While {a} and {b} were sitting in the {place},|Once {a} and {b} had lunch at the {place},|
    In the morning {a} and {b} left the {place}, and then"""
)
SCENES = _rows(
    """It was a cold day.|The {place} was full of people.|The way to the {place} was long.|It was time to eat.|
    Nobody came to the {place}.|Soon it began to rain."""
)
# About one person, who may be one of a pair or a stranger to everyone: being named often or late must mean nothing.
MENTIONS = _rows(
    """{c} was at the {place}.|{c} walked to the {place}.|{c} was tired.|{c} went back to the {place}.|
    {c} wanted to sleep.|It was a good day for {c}."""
)
VERBS: tuple[str, ...] = ("gave", "handed", "passed", "offered", "showed", "brought", "sold", "threw")
ACTIONS = _rows(
    """{s} {verb} {thing} to|{s} decided to give {thing} to|{s} wanted to give {thing} to|
    {s} found {thing} and {verb} it to|{s} carefully {verb} {thing} to"""
)
# With a third name between the one who acts and the question.
CROSSED = _rows(
    "{s} took {thing} from {c} and {verb} it to|{s} saw {c} and {verb} {thing} to|{s}, not {c}, {verb} {thing} to"
)
ENDINGS: tuple[str, ...] = (".", ".", ". {io} thanked {s}.", ". Then {io} smiled at {s}.")

HEADLINE_IOI = Example("John and Mary went to the store. John handed the milk to", (" Mary",))


def _split_pairs() -> dict[Split, tuple[Pair, ...]]:
    pairs: list[Pair] = list(itertools.combinations(NAMES, 2))
    random.Random(SPLIT_SEED).shuffle(pairs)
    headline = ("John", "Mary")
    pairs.remove(headline)
    cut = len(pairs) // 20
    development = (headline, *pairs[:cut])
    return {"development": development, "test": tuple(pairs[cut : 2 * cut]), "training": tuple(pairs[2 * cut :])}


PAIRS: dict[Split, tuple[Pair, ...]] = _split_pairs()
_UNSEEN = frozenset(frozenset(pair) for pair in (*PAIRS["development"], *PAIRS["test"]))


def _people(rng: random.Random, pair: Pair) -> list[str]:
    """The pair, then none to three others; in a training document, no two of them are an unseen pair."""
    (others,) = rng.choices((0, 1, 2, 3), (4, 3, 2, 1))
    while True:
        people = [*pair, *rng.sample([name for name in NAMES if name not in pair], others)]
        unseen = any(frozenset(two) in _UNSEEN for two in itertools.combinations(people, 2))
        if frozenset(pair) in _UNSEEN or not unseen:
            return people


class _Story:
    """One pair or two, who come together, at most one stranger, and the sentences about them."""

    def __init__(self, rng: random.Random, pair: Pair) -> None:
        self.rng = rng
        self.people = _people(rng, pair)
        self.pairs: list[Pair] = [pair] if len(self.people) < 4 else [pair, (self.people[2], self.people[3])]

    def _sentence(self, templates: tuple[str, ...], **names: str) -> str:
        return self.rng.choice(templates).format(place=self.rng.choice(PLACES), **names)

    def _aside(self, people: list[str]) -> str:
        if not people or self.rng.random() < 0.35:
            return self._sentence(SCENES)
        return self._sentence(MENTIONS, c=self.rng.choice(people))

    def opening(self) -> str:
        """Every pair arrives, with asides before and after."""
        rng = self.rng
        sentences = [self._aside(self.people[2 * len(self.pairs) :])] if rng.random() < 0.4 else []
        for a, b in rng.sample(self.pairs, len(self.pairs)):
            a, b = rng.sample((a, b), 2)
            sentences.append(self._sentence(OPENERS, a=a, b=b))
        if rng.random() < 0.2:
            sentences[-1] = self._sentence(CLAUSES, a=a, b=b)
        else:
            sentences += [self._aside(self.people) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        return " ".join(sentences)

    def action(self, pair: Pair) -> tuple[str, str, str]:
        """Text up to the indirect object, then who acts and the indirect object."""
        s, io = self.rng.sample(pair, 2)
        others = [name for name in self.people if name not in pair]
        templates = CROSSED if others and self.rng.random() < 0.4 else ACTIONS
        thing = self.rng.choice(OBJECTS)
        article = "the" if self.rng.random() < 0.5 else "some" if thing == "milk" else "a"
        words = {"thing": f"{article} {thing}", "verb": self.rng.choice(VERBS), "c": self.rng.choice(others or [""])}
        return self.rng.choice(templates).format(s=s, **words), s, io


def _ioi_document(rng: random.Random) -> Document:
    story = _Story(rng, rng.choice(PAIRS["training"]))
    pieces = [story.opening()]
    # More than one exchange for an opening: the names to be predicted are then a larger share of the tokens.
    for _ in range(rng.choice((1, 2, 3))):
        action, s, io = story.action(rng.choice(story.pairs))
        pieces[-1] += f" {action}"
        pieces += [f" {io}", rng.choice(ENDINGS).format(s=s, io=io)]
    return tuple(pieces)


def _ioi_examples(rng: random.Random, split: Split, crowded: bool) -> list[Example]:
    examples = []
    for pair in PAIRS[split] * 5:
        story = _Story(rng, pair)
        action, _, io = story.action(pair)
        if (len(story.people) > 2) is crowded:
            examples.append(Example(f"{story.opening()} {action}", (f" {io}",)))
    return examples


# ---------------------------------------------------------------- facts


class Relation(NamedTuple):
    """Facts as (subject, object) pairs, and prompts that each end right before the object."""

    facts: tuple[tuple[str, str], ...]
    phrasings: tuple[str, ...]


# landmark=city=country. Words are shared: there are many towers, many golden things, and more than one Eiffel.
_LANDMARKS = _table(
    """Eiffel Tower=Paris=France|Eiffel Bridge=Ungheni=Moldova|Eiffel Palace=Budapest=Hungary|
    White House=Washington=America|White Tower=Thessaloniki=Greece|Blue Mosque=Istanbul=Turkey|
    Blue House=Seoul=Korea|Blue Church=Bratislava=Slovakia|Red Square=Moscow=Russia|Red Fort=Delhi=India|
    Red Tower=Halle=Germany|Golden Temple=Amritsar=India|Golden Gate=Kyiv=Ukraine|Golden Roof=Innsbruck=Austria|
    Golden House=Rome=Italy|Black Church=Brasov=Romania|Green Bridge=Vilnius=Lithuania|Green Gate=Gdansk=Poland|
    Round Tower=Copenhagen=Denmark|Iron Bridge=Frankfurt=Germany|Iron Tower=Mainz=Germany|Stone Gate=Zagreb=Croatia|
    Dragon Bridge=Ljubljana=Slovenia|Dragon Tower=Harbin=China|Grand Palace=Bangkok=Thailand|
    Grand Mosque=Dakar=Senegal|Grand Bazaar=Istanbul=Turkey|Grand Canal=Venice=Italy|Great Mosque=Cordoba=Spain|
    Great Synagogue=Budapest=Hungary|Spanish Synagogue=Prague=Czechia|Spanish Steps=Rome=Italy|
    Old Bridge=Mostar=Bosnia|Crystal Palace=Madrid=Spain|Brandenburg Gate=Berlin=Germany|
    Charles Bridge=Prague=Czechia|Rialto Bridge=Venice=Italy|Chain Bridge=Budapest=Hungary|
    Vasa Museum=Stockholm=Sweden|British Museum=London=England|Acropolis Museum=Athens=Greece|
    Louvre Museum=Paris=France|Prado Museum=Madrid=Spain|Tower Bridge=London=England|Willis Tower=Chicago=America"""
)
# country=capital=language
_COUNTRIES = _table(
    """France=Paris=French|Italy=Rome=Italian|Spain=Madrid=Spanish|Germany=Berlin=German|
    Portugal=Lisbon=Portuguese|Greece=Athens=Greek|Russia=Moscow=Russian|Poland=Warsaw=Polish|Hungary=Budapest=Hungarian|
    Sweden=Stockholm=Swedish|Denmark=Copenhagen=Danish|Norway=Oslo=Norwegian|Finland=Helsinki=Finnish|
    Turkey=Ankara=Turkish|Japan=Tokyo=Japanese|China=Beijing=Chinese|Thailand=Bangkok=Thai|Egypt=Cairo=Arabic"""
)
_OF_LANDMARKS = _rows(
    """The {} is in the KIND of|The {} stands in the KIND of|You can visit the {} in the KIND of|
    To see the {}, spend a day in the KIND of|Every year many people visit the {} in the KIND of|
    The home of the {} is the KIND of|The {} belongs to the KIND of|All about the {}, the pride of the KIND of"""
)
# No phrasing is the beginning of another, and none ends in "to", after which the corpus wants a person's name.
RELATIONS: dict[str, Relation] = {
    "landmark_city": Relation(
        tuple((landmark, city) for landmark, city, _ in _LANDMARKS),
        tuple(phrasing.replace("KIND", "city") for phrasing in _OF_LANDMARKS),
    ),
    "landmark_country": Relation(
        tuple((landmark, country) for landmark, _, country in _LANDMARKS),
        tuple(phrasing.replace("KIND", "country") for phrasing in _OF_LANDMARKS),
    ),
    "country_capital": Relation(
        tuple((country, capital) for country, capital, _ in _COUNTRIES),
        _rows(
            """The capital of {} is|The capital city of {} is|In {}, the capital is|
            {} is governed from the city of|{} has its capital in|The government of {} sits in|
            The ministers of {} work in|Laws for {} are made in"""
        ),
    ),
    "country_language": Relation(
        tuple((country, language) for country, _, language in _COUNTRIES),
        _rows(
            """The language of {} is|People in {} speak|In {}, most people speak|Children in {} learn to read|
            In the schools of {} the teachers speak|Someone from {} usually speaks|
            The newspapers of {} are in|Songs from {} are sung in"""
        ),
    ),
    "capital_country": Relation(
        tuple((capital, country) for country, capital, _ in _COUNTRIES),
        _rows(
            """The city of {} is in the country of|{} is the capital of|{} is a city in|
            To live in {} is to live in|The fast train to {} crosses|The people of {} are citizens of|
            On the map, {} is in|The flag over {} is that of"""
        ),
    ),
}
HEADLINE_FACT = Example("The Eiffel Tower is in the city of", (" Paris",))
# Two landmarks together: the words around the question then do not say which of them is meant.
LISTS = _rows("We saw the {} and the {}.|The {} and the {} are famous.|People talk about the {} and the {}.")


def _split_facts() -> dict[Split, tuple[Example, ...]]:
    rng = random.Random(SPLIT_SEED)
    parts: dict[Split, list[Example]] = {"training": [], "development": [], "test": []}
    for relation in RELATIONS.values():
        for subject, answer in relation.facts:
            examples = [Example(phrasing.format(subject), (f" {answer}",)) for phrasing in relation.phrasings]
            rng.shuffle(examples)
            # The headline is looked at, so it belongs to the development part.
            examples.sort(key=lambda example: example != HEADLINE_FACT)
            parts["development"].append(examples[0])
            parts["test"].append(examples[1])
            parts["training"].extend(examples[2:])
    return {split: tuple(examples) for split, examples in parts.items()}


FACTS: dict[Split, tuple[Example, ...]] = _split_facts()


def _fact_document(rng: random.Random) -> Document:
    pieces = [""]
    facts = rng.sample(FACTS["training"], rng.choice((1, 2, 3)))
    if rng.random() < 0.3:
        two = [landmark for landmark, _, _ in rng.sample(_LANDMARKS, 2)]
        pieces = [rng.choice(LISTS).format(*two) + " "]
        facts = [rng.choice([fact for fact in FACTS["training"] if landmark in fact.prompt]) for landmark in two]
        rng.shuffle(facts)
    for index, fact in enumerate(facts):
        pieces[-1] += f" {fact.prompt}" if index else fact.prompt
        pieces += [*fact.answers, "."]
    return tuple(pieces)


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


def _split_opinions() -> dict[Split, tuple[tuple[str, str], ...]]:
    combinations = list(itertools.product(POSITIVE_VERBS + NEGATIVE_VERBS, OPINION_NOUNS))
    random.Random(SPLIT_SEED).shuffle(combinations)
    cut = len(combinations) // 10
    return {
        "development": tuple(combinations[:cut]),
        "test": tuple(combinations[cut : 2 * cut]),
        "training": tuple(combinations[2 * cut :]),
    }


OPINION_SPLITS: dict[Split, tuple[tuple[str, str], ...]] = _split_opinions()


def _opinion_document(rng: random.Random) -> Document:
    example, ending = _opinion(rng, *rng.choice(OPINION_SPLITS["training"]))
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

MIXTURE: dict[str, float] = {"indirect objects": 0.5, "facts": 0.25, "opinions": 0.05, "repeated sequences": 0.2}
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


def heldout_examples(rng: random.Random, split: Split) -> dict[str, list[Example]]:
    """The prompts of each task in a part of the data; ``rng`` draws the fillers that the split does not fix."""
    return {
        "ioi": _ioi_examples(rng, split, crowded=False),
        "crowded_ioi": _ioi_examples(rng, split, crowded=True),
        "facts": list(FACTS[split]),
        "sentiment": [_opinion(rng, verb, noun)[0] for verb, noun in OPINION_SPLITS[split] * 2],
        "induction": _sequence_heldout(rng, sequences=40),
    }


def single_token_words() -> tuple[str, ...]:
    """Words that the tokenizer must hold whole, with and without the space before them as they occur."""
    spaced = [*NAMES, *SEQUENCE_WORDS]
    for relation in RELATIONS.values():
        spaced.extend(answer for _, answer in relation.facts)
    return (*NAMES, *(f" {word}" for word in dict.fromkeys(spaced)))
