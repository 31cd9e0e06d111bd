"""Federated ward notes: invented patients and yes/no questions about them, in BoolQ's format, skewed between sites.

A note states some facts about one patient. A false question names a value that the note does not give, or one that it
gives for another field (the drug that was stopped, the old diagnosis), so finding the value in the note is not enough.
Each site has its own specialities, note style and share of yes. Patients in `train` and `val` never share a surname.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpc.data import seeding, ward_words
from hpc.data.ward_words import Speciality

Split = Literal["train", "val"]

BLOCK = 10  # records; a short list must not stray far from its site's share of yes
YES_IN_BLOCK = ((4, 5), (6, 5))  # of even and odd sites; in even and odd blocks
OWN_SPECIALITY = 0.7  # share of a site's patients that are in its main speciality
OPTIONAL_FACTS = 2  # beside name, age, ward and diagnosis
MISPLACED = 0.15  # share of false questions that name a value of another field, where the note has one

ALL_DIAGNOSES = tuple(diagnosis for speciality in ward_words.SPECIALITIES for diagnosis in speciality.diagnoses)
ALL_DRUGS = tuple(drug for speciality in ward_words.SPECIALITIES for drug in speciality.drugs)


@dataclass(kw_only=True, frozen=True)
class Note:
    """A patient's facts and a question about one of them; `record()` is what a data file would hold."""

    facts: dict[str, str]
    """Field → value, in the order of the passage."""
    passage: str
    question: str
    asked_field: str
    asked_value: str

    @property
    def label(self) -> bool:
        return self.facts[self.asked_field] == self.asked_value

    def record(self) -> dict[str, Any]:
        return {"passage": self.passage, "question": self.question, "label": self.label}


def ward_notes(*, site: int, sites: int, split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` records of `site` (0 … sites-1): passage, question, label. The first n of more are the same n."""
    return [note.record() for note in make_notes(site=site, sites=sites, split=split, count=count, seed=seed)]


def make_notes(*, site: int, sites: int, split: Split, count: int, seed: int) -> list[Note]:
    """As `ward_notes`, with the facts behind each record."""
    return [_make_note(site=site, sites=sites, split=split, index=index, seed=seed) for index in range(count)]


def _make_note(*, site: int, sites: int, split: Split, index: int, seed: int) -> Note:
    rng = seeding.stream(seed, "ward_notes", site, split, index)
    facts = _draw_facts(rng, _speciality(rng, site), split)
    truth = _is_yes(site=site, sites=sites, split=split, index=index, seed=seed)
    field = seeding.pick(rng, [name for name in facts if name in ward_words.QUESTIONS])
    value = facts[field] if truth else _false_value(rng, facts, field, site, split)
    style = ward_words.STYLES[site % len(ward_words.STYLES)]
    question = seeding.pick(rng, ward_words.QUESTIONS[field])
    return Note(
        facts=facts,
        passage=" ".join(seeding.pick(rng, style[name]).format(**facts) for name in facts if name in style),
        question=question.format(**facts, value=value),
        asked_field=field,
        asked_value=value,
    )


def _is_yes(*, site: int, sites: int, split: Split, index: int, seed: int) -> bool:
    """Exactly so many yes in each block of records; the last of an odd number of sites is balanced."""
    block, place = divmod(index, BLOCK)
    unpaired = sites % 2 == 1 and site == sites - 1
    yes = BLOCK // 2 if unpaired else YES_IN_BLOCK[site % 2][block % 2]
    return seeding.permutation(seeding.stream(seed, "yes", site, split, block), BLOCK)[place] < yes


def _speciality(rng: random.Random, site: int) -> Speciality:
    if rng.random() < OWN_SPECIALITY:
        return ward_words.SPECIALITIES[site % len(ward_words.SPECIALITIES)]
    return seeding.pick(rng, ward_words.SPECIALITIES)


def _draw_facts(rng: random.Random, speciality: Speciality, split: Split) -> dict[str, str]:
    """A patient's facts; those of the optional ones that the note leaves out are not among them."""
    diagnosis, history = _two(rng, speciality.diagnoses, ALL_DIAGNOSES)
    drug, stopped = _two(rng, list(speciality.drugs), ALL_DRUGS)
    facts = {
        "name": f"{seeding.pick(rng, ward_words.TITLES)} {seeding.pick(rng, ward_words.SURNAMES[split])}",
        "age": seeding.pick(rng, ward_words.AGES),
        "ward": seeding.pick(rng, ward_words.WARDS),
        "diagnosis": diagnosis,
        "history": history,
        "drug": drug,
        "dose": seeding.pick(rng, speciality.drugs[drug]),
        "stopped": stopped,
        "allergy": _other(rng, ALL_DRUGS, {drug, stopped}),
        "potassium": seeding.pick(rng, ward_words.LEVELS),
        "home": seeding.pick(rng, ward_words.DAYS),
    }
    order = seeding.permutation(rng, len(ward_words.OPTIONAL))
    left_out = {ward_words.OPTIONAL[place] for place in order[OPTIONAL_FACTS:]}
    return {name: value for name, value in facts.items() if ("drug" if name == "dose" else name) not in left_out}


def _two(rng: random.Random, first_from: Sequence[str], second_from: Sequence[str]) -> tuple[str, str]:
    first = seeding.pick(rng, first_from)
    return first, _other(rng, second_from, {first})


def _other(rng: random.Random, choices: Sequence[str], taken: set[str]) -> str:
    return seeding.pick(rng, [choice for choice in choices if choice not in taken])


def _false_value(rng: random.Random, facts: dict[str, str], field: str, site: int, split: Split) -> str:
    """Another field's value, or the value of another patient of this site."""
    kind = next((kind for kind in ward_words.KINDS if field in kind), ())
    misplaced = [facts[other] for other in kind if other != field and other in facts]
    if misplaced and rng.random() < MISPLACED:
        return seeding.pick(rng, misplaced)
    while True:
        value = _draw_facts(rng, _speciality(rng, site), split).get(field, facts[field])
        if value != facts[field]:
            return value
