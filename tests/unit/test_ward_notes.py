"""The generator: deterministic, disjoint, balanced, skewed, and its labels follow from its facts."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys

import pytest

from hpc.data import ward_words
from hpc.data.ward_notes import Note, make_notes, ward_notes

SITES = 4


def notes(site: int, split: str = "train", count: int = 400, seed: int = 0) -> list[Note]:
    return make_notes(site=site, sites=SITES, split=split, count=count, seed=seed)  # type: ignore[arg-type]


DIGEST = """
import hashlib, json
from hpc.data.ward_notes import ward_notes
records = [ward_notes(site=site, sites=4, split="train", count=30, seed=3) for site in range(4)]
digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
"""


@pytest.mark.parametrize("hash_seed", ["0", "123"])
def test_the_same_in_another_process_whatever_its_hash_seed(hash_seed: str) -> None:
    here: dict[str, str] = {}
    exec(DIGEST, here)
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", f"{DIGEST}print(digest)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == here["digest"], done.stderr


def test_the_first_records_do_not_depend_on_how_many_follow() -> None:
    many = ward_notes(site=1, sites=SITES, split="train", count=60, seed=0)
    assert ward_notes(site=1, sites=SITES, split="train", count=7, seed=0) == many[:7]
    assert ward_notes(site=1, sites=SITES, split="train", count=0, seed=0) == []


def test_seed_site_and_split_change_the_records() -> None:
    variants = [notes(0), notes(1), notes(0, seed=1), notes(0, split="val")]
    assert len({tuple(note.passage for note in variant) for variant in variants}) == len(variants)


def test_records_have_boolqs_format() -> None:
    for record in ward_notes(site=2, sites=SITES, split="val", count=50, seed=0):
        assert list(record) == ["passage", "question", "label"]
        assert isinstance(record["label"], bool)
        assert record["passage"].endswith(".")
        assert not record["question"].endswith("?")
        assert not re.search(r"[{}]", record["passage"] + record["question"])


def test_no_patient_and_no_passage_is_in_both_splits() -> None:
    train, val = ([n for site in range(SITES) for n in notes(site, split)] for split in ("train", "val"))
    assert not {n.passage for n in train} & {n.passage for n in val}
    assert not {n.facts["name"] for n in train} & {n.facts["name"] for n in val}


def test_passages_hardly_repeat() -> None:
    assert len({note.passage for note in notes(0)}) > 0.99 * 400


def test_labels_follow_from_the_facts_and_the_facts_from_the_passage() -> None:
    for site in range(SITES):
        for note in notes(site):
            assert note.label == (note.asked_value == note.facts[note.asked_field])
            assert note.asked_field in ward_words.QUESTIONS
            assert note.question.endswith(note.asked_value)
            assert all(value in note.passage for value in note.facts.values())


def test_values_of_one_kind_differ_within_a_note() -> None:
    for note in notes(0):
        for kind in ward_words.KINDS:
            values = [note.facts[field] for field in kind if field in note.facts]
            assert len(set(values)) == len(values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [32, 64, 128])
def test_held_out_labels_are_balanced_at_each_site(count: int, seed: int) -> None:
    for site in range(SITES):
        yes = sum(note.label for note in notes(site, "val", count, seed)) / count
        assert 0.4 <= yes <= 0.6


def test_sites_differ_in_their_share_of_yes_but_not_overall() -> None:
    shares = [sum(note.label for note in notes(site)) / 400 for site in range(SITES)]
    assert shares == [0.45, 0.55, 0.45, 0.55]


def test_an_unpaired_site_is_balanced() -> None:
    only = make_notes(site=0, sites=1, split="train", count=400, seed=0)
    assert sum(note.label for note in only) == 200


def test_sites_differ_in_their_specialities_and_wordings() -> None:
    for site in range(SITES):
        own = set(ward_words.SPECIALITIES[site].diagnoses)
        counted = collections.Counter(note.facts["diagnosis"] in own for note in notes(site))
        assert 0.65 < counted[True] / 400 < 0.85
        assert all(note.passage.startswith("We saw") or "Your patient" in note.passage for note in notes(2))


def test_the_question_alone_does_not_tell_the_answer() -> None:
    """Asked values are as frequent in true questions as in false ones, up to chance."""
    everything = [note for site in range(SITES) for note in notes(site, count=1000)]
    for field in ward_words.QUESTIONS:
        values = collections.Counter((n.asked_value, n.label) for n in everything if n.asked_field == field)
        best_guess = sum(max(values[v, True], values[v, False]) for v in {v for v, _ in values})
        assert best_guess / values.total() < 0.65, field


def test_finding_the_value_in_the_passage_is_not_enough() -> None:
    false = [n for site in range(SITES) for n in notes(site) if not n.label]
    misplaced = [n for n in false if n.asked_value in n.facts.values()]
    assert 0.05 < len(misplaced) / len(false) < 0.15
    for note in misplaced:
        assert note.asked_value in note.passage
