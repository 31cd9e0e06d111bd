"""The words of a text that say something about somebody: names, numbers, diagnoses.

Of ward notes they are known: the values of the generator's facts. Of any other text, plainly: words with a digit, and
words with a capital letter, the first of a sentence too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from hpc.config import Config
from hpc.data.ward_notes import Split, make_notes

_WORD = re.compile(r"\w+(?:[.,]\d+)*")
_FILLERS = frozenset(("a", "mr", "mrs", "the", "of", "in", "on", "to"))
_SPLITS: tuple[Split, ...] = ("train", "val")


def facts_of(config: Config) -> Callable[[str], Counter[str]]:
    """How to find the words of facts in a text of the run's task: lower case, with how often each occurs."""
    return of_words(ward_words(config)) if config.data.generated else plain_facts


def ward_words(config: Config) -> frozenset[str]:
    """The words of all facts of all notes that the run's clients have."""
    data, sites, seed = config.data, config.train.clients, config.train.seed
    counts = {"train": data.train_examples, "val": data.val_examples}
    notes = [
        note
        for split in _SPLITS
        for site in range(sites)
        for note in make_notes(site=site, sites=sites, split=split, count=counts[split], seed=seed)
    ]
    values = {value for note in notes for value in note.facts.values()}
    return frozenset(word for value in values for word in words_of(value)) - _FILLERS


def of_words(known: frozenset[str]) -> Callable[[str], Counter[str]]:
    """Finds the known words."""
    return lambda text: Counter(word for word in words_of(text) if word in known)


def plain_facts(text: str) -> Counter[str]:
    """Words with a digit or a capital letter."""
    return Counter(word.lower() for word in _WORD.findall(text) if word != word.lower() or any(map(str.isdigit, word)))


def words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
