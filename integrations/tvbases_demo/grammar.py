"""A small English grammar: clauses with a chosen tense, voice, number and polarity.

What is not asked for is drawn at random, also in the relative clauses, so that one sentence carries the properties of
several tasks, and the words that decide one task turn up as distractors in the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from . import words

TENSES = ("past", "present", "future")
PLURAL_AUXILIARIES = {"is": "are", "was": "were", "does": "do"}
Noun = tuple[str, ...]  # singular, plural
Verb = tuple[str, ...]  # base form, past, participle


@dataclass(frozen=True)
class Vocabulary:
    """The words that the sentences of one split are made of."""

    people: list[Noun]
    things: list[Noun]
    verbs: list[Verb]
    social: list[Verb]
    looks: list[str]
    places: list[str]
    topics: list[str]
    aspects: list[str]
    good: list[str]
    bad: list[str]


def vocabularies(seed: int, held_out: float = 0.4) -> tuple[Vocabulary, Vocabulary]:
    """(words for training, words for validation and test), disjoint, so that nothing is won by remembering words."""
    lists = {
        "people": words.pairs(words.PEOPLE),
        "things": words.pairs(words.THINGS),
        "verbs": words.pairs(words.VERBS),
        "social": words.pairs(words.SOCIAL),
        "looks": words.LOOKS.split(),
        "places": words.phrases(words.PLACES),
        "topics": words.TOPICS.split(),
        "aspects": words.ASPECTS.split(),
        "good": words.GOOD.split(),
        "bad": words.BAD.split(),
    }
    rng = Random(f"words {seed}")
    train: dict[str, Any] = {}
    test: dict[str, Any] = {}
    for name, items in lists.items():
        rng.shuffle(items)
        cut = round(len(items) * held_out)
        test[name], train[name] = items[:cut], items[cut:]
    return Vocabulary(**train), Vocabulary(**test)


@dataclass(frozen=True)
class Features:
    """What a clause says besides its words. `plural` is the number of the grammatical subject."""

    tense: str
    passive: bool
    plural: bool
    negated: bool


def draw(rng: Random, **fixed: Any) -> Features:
    """Random features, except those in `fixed`."""
    features = Features(rng.choice(TENSES), rng.random() < 0.4, rng.random() < 0.5, rng.random() < 0.35)
    return replace(features, **fixed)


def third_person(verb: str) -> str:
    """paint -> paints, carry -> carries, wash -> washes"""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x")) else "s")


def gerund(verb: str) -> str:
    """paint -> painting, hide -> hiding; no verb in the lists doubles its last letter"""
    return (verb[:-1] if verb.endswith("e") else verb) + "ing"


def article(word: str) -> str:
    """dull film -> a dull film"""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def verb_phrase(rng: Random, verb: Verb, features: Features) -> str:
    """The verb with its auxiliaries, in one of the forms that express `features`."""
    base, past, participle = verb
    present = base if features.plural else third_person(base)
    match features.passive, features.tense:
        case False, "past":
            forms = [("", past), ("", past), ("had", participle), ("was", gerund(base))]
        case False, "present":
            forms = [("", present), ("", present), ("is", gerund(base))]
        case False, _:
            forms = [("will", base), ("is", f"going to {base}"), ("is", f"about to {base}")]
        case True, "past":
            forms = [("was", participle), ("was", participle), ("had", f"been {participle}")]
        case True, "present":
            forms = [("is", participle), ("is", f"being {participle}")]
        case _:
            forms = [("will", f"be {participle}"), ("is", f"going to be {participle}")]
    auxiliary, rest = rng.choice(forms)
    if not features.negated:
        return f"{agree(auxiliary, features.plural)} {rest}".strip()
    how = rng.choice(("not", "n't", "never"))
    if not auxiliary and how != "never":
        auxiliary, rest = ("did" if features.tense == "past" else "does"), base
    return negate(agree(auxiliary, features.plural), how, rest)


def agree(auxiliary: str, plural: bool) -> str:
    return PLURAL_AUXILIARIES.get(auxiliary, auxiliary) if plural else auxiliary


def negate(auxiliary: str, how: str, rest: str) -> str:
    """is + n't + painting -> isn't painting; will -> won't; no auxiliary goes with never only"""
    if how == "n't":
        return f"{'wo' if auxiliary == 'will' else auxiliary}n't {rest}"
    return f"{auxiliary} {how} {rest}".strip()


def person_phrase(rng: Random, vocabulary: Vocabulary, plural: bool) -> str:
    """the pilots"""
    return f"the {rng.choice(vocabulary.people)[plural]}"


def thing_phrase(rng: Random, vocabulary: Vocabulary, plural: bool) -> str:
    """my dusty lamps"""
    adjective = f"{rng.choice(vocabulary.looks)} " if rng.random() < 0.4 else ""
    return f"{rng.choice(('the', 'the', 'my', 'our'))} {adjective}{rng.choice(vocabulary.things)[plural]}"


def relative(rng: Random, vocabulary: Vocabulary, of_person: bool, plural: bool) -> str:
    """A relative clause whose features have nothing to do with those of the main clause."""
    other_plural = rng.random() < 0.5
    other = person_phrase(rng, vocabulary, other_plural)
    if of_person:
        features = draw(rng, plural=plural)
        verb = verb_phrase(rng, rng.choice(vocabulary.social), features)
        return f"who {verb} {'by ' if features.passive else ''}{other}"
    return (
        f"which {other} {verb_phrase(rng, rng.choice(vocabulary.verbs), draw(rng, passive=False, plural=other_plural))}"
    )


def clause(rng: Random, vocabulary: Vocabulary, features: Features, distract: float = 0.25) -> str:
    """A main clause, no capital, no full stop. With probability `distract` its subject has a relative clause."""
    passive = features.passive
    subject = (thing_phrase if passive else person_phrase)(rng, vocabulary, features.plural)
    if rng.random() < distract:
        subject += f", {relative(rng, vocabulary, not passive, features.plural)},"
    verb = verb_phrase(rng, rng.choice(vocabulary.verbs), features)
    rest = (person_phrase if passive else thing_phrase)(rng, vocabulary, rng.random() < 0.5)
    text = f"{subject} {verb} {'by ' if passive else ''}{rest}"
    return with_place(rng, vocabulary, text, 0.2)


def with_place(rng: Random, vocabulary: Vocabulary, text: str, probability: float) -> str:
    """With this probability a place, before or after the clause."""
    if rng.random() >= probability:
        return text
    place = rng.choice(vocabulary.places)
    return f"{text} {place}" if rng.random() < 0.5 else f"{place} {text}"


def sentence(text: str, end: str = ".") -> str:
    """First letter upper case, closing mark."""
    return text[0].upper() + text[1:] + end
