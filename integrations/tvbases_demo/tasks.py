"""Eight text classification tasks from a seeded generator, after SentEval's probing tasks.

Each asks for something else about a sentence than its topic, which is what a sentence encoder knows by itself, and
most of them ask about the same kind of sentences, so that merged models have to serve all tasks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .grammar import (
    TENSES,
    Vocabulary,
    article,
    clause,
    draw,
    person_phrase,
    sentence,
    thing_phrase,
    verb_phrase,
    vocabularies,
    with_place,
)

Task = dict[str, Any]  # labels: descriptions; train, val, test: lists of [text, label index]
Maker = Callable[[Random, Vocabulary, int], str]


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def tense(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    return sentence(clause(rng, vocabulary, draw(rng, tense=TENSES[label])))


def voice(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    return sentence(clause(rng, vocabulary, draw(rng, passive=bool(label))))


def number(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    return sentence(clause(rng, vocabulary, draw(rng, plural=bool(label))))


def negation(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    return sentence(clause(rng, vocabulary, draw(rng, negated=bool(label)), distract=0.4))


SURE = lines("""
there is no doubt that {}
everyone agrees that {}
{}, and nobody doubts it
we have proof that {}
{}, as the records confirm
I saw with my own eyes that {}
it is a known fact that {}
nobody can deny that {}
{}, that much is settled
""")
UNSURE = lines("""
there is some doubt whether {}
not everyone agrees that {}
{}, or so it seems
we have no proof that {}
{}, if the rumours are right
I could not really see whether {}
it is an open question whether {}
nobody can say whether {}
{}, but that is only a guess
""")


def certainty(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    return sentence(rng.choice((SURE, UNSURE)[label]).format(clause(rng, vocabulary, draw(rng), distract=0.0)))


QUESTIONS = (
    lines("""
who {did} {thing}
which person {did} {thing}
by whom {was} {thing} {done}
whose job is it to {do} {thing}
"""),
    lines("""
where did {person} {do} {thing}
in which place {was} {thing} {done}
what spot did {person} pick to {do} {thing}
from which town is {person} who {did} {thing}
"""),
    lines("""
when did {person} {do} {thing}
in what year {was} {thing} {done}
how long ago did {person} {do} {thing}
at what hour does {person} begin to {do} {thing}
"""),
    lines("""
why did {person} {do} {thing}
what made {person} {do} {thing}
what caused {person} to {do} {thing}
for what purpose {was} {thing} {done}
"""),
    lines("""
how many people {did} {thing}
how much did {person} pay to {do} {thing}
what is the number of people who {did} {thing}
how often did {person} {do} {thing}
"""),
)
FRAMES = lines("""
{}
excuse me, {}
one more thing: {}
{}, where {} was
{}, when {} came in
{}, because of {}
""")


def question(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    do, did, done = rng.choice(vocabulary.verbs)
    plural = rng.random() < 0.5
    text = rng.choice(QUESTIONS[label]).format(
        person=person_phrase(rng, vocabulary, False),
        thing=thing_phrase(rng, vocabulary, plural),
        was="were" if plural else "was",
        do=do,
        did=did,
        done=done,
    )
    return sentence(rng.choice(FRAMES).format(text, person_phrase(rng, vocabulary, False)), "?")


# {x} is what the review says, {y} the opposite
REVIEWS = lines("""
the {topic} was {x}
the {aspect} of the {topic} was {x}
I expected {a_y} {topic}, but it turned out to be {x}
the {topic} is far from {y}
the {topic} was anything but {y}
nobody could call this {topic} {y}
despite the {y} {aspect}, the {topic} as a whole is {x}
my friends found the {topic} {y}, I thought it was {x}
they promised {a_y} {topic} and gave us {a_x} one
{a_x} {topic}, even though the {aspect} was {y}
I was told that the {aspect} would be {y}, yet it was {x}
""")


def sentiment(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    x, y = rng.choice(vocabulary.good), rng.choice(vocabulary.bad)
    if label:
        x, y = y, x
    text = rng.choice(REVIEWS).format(
        topic=rng.choice(vocabulary.topics),
        aspect=rng.choice(vocabulary.aspects),
        x=x,
        y=y,
        a_x=article(x),
        a_y=article(y),
    )
    return sentence(text)


# subjects with a singular and with a plural verb
ALL = lines("every {0}\neach of the {1}"), lines("all the {1}\nthe {1} all\nnot one {0} is missing: they all")
SOME = lines("one of the {1}\nmore than one {0}"), lines("a few {1}\ntwo or three {1}\nhardly half of the {1}")
NONE = lines("no {0}\nnot one of the {1}"), lines("none of the {1}\nhardly a {0} came, they never")


def quantity(rng: Random, vocabulary: Vocabulary, label: int) -> str:
    plural = rng.random() < 0.5
    start = rng.choice((ALL, SOME, NONE)[label][plural]).format(*rng.choice(vocabulary.people))
    features = draw(rng, passive=False, negated=False, plural=plural)
    verb = verb_phrase(rng, rng.choice(vocabulary.verbs), features)
    text = f"{start} {verb} {thing_phrase(rng, vocabulary, rng.random() < 0.5)}"
    return sentence(with_place(rng, vocabulary, text, 0.2))


@dataclass(frozen=True)
class Kind:
    """A task's generator and the descriptions of its labels, which the zero-shot head embeds."""

    make: Maker
    labels: tuple[str, ...]


KINDS = {
    "tense": Kind(
        tense, ("This happened in the past.", "This is happening now, in the present.", "This will happen in future.")
    ),
    "voice": Kind(voice, ("Someone does something to a thing.", "Something is done to a thing by someone.")),
    "number": Kind(number, ("This is about a single person or thing.", "This is about several people or things.")),
    "negation": Kind(negation, ("It is so: this is true.", "It is not so: this is denied.")),
    "certainty": Kind(certainty, ("This is certain.", "This is doubtful.")),
    "question": Kind(
        question,
        (
            "This asks for a person.",
            "This asks for a place.",
            "This asks for a time.",
            "This asks for a reason.",
            "This asks for a number or an amount.",
        ),
    ),
    "sentiment": Kind(sentiment, ("This is good, I liked it.", "This is bad, I did not like it.")),
    "quantity": Kind(quantity, ("All of them.", "Some of them.", "None of them.")),
}
TASKS = tuple(KINDS)


def make_task(name: str, seed: int = 0, sizes: Sequence[int] = (600, 150, 300)) -> Task:
    """One task: `sizes` are the numbers of training, validation and test sentences, labels in turn, no text twice."""
    kind = KINDS[name]
    known, held_out = vocabularies(seed)
    seen: set[str] = set()
    task: Task = {"labels": list(kind.labels)}
    for split, size, vocabulary in zip(("train", "val", "test"), sizes, (known, held_out, held_out), strict=True):
        rng = Random(f"{name} {split} {seed}")
        examples: list[list] = []
        while len(examples) < size:
            label = len(examples) % len(kind.labels)
            text = kind.make(rng, vocabulary, label)
            if text not in seen:
                seen.add(text)
                examples.append([text, label])
        rng.shuffle(examples)
        task[split] = examples
    return task
