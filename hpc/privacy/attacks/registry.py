"""The attacks by name. A method is one line in `METHODS`; its module is imported when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hpc.config import Config
from hpc.errors import ConfigError
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.recorded import Sealed, load_sealed
from hpc.privacy.seen import Sample, Seen

Guesses = list[list[list[int]]]
"""For each batch that was seen, for each of its rows, as many token ids as the row is long."""


@dataclass(kw_only=True)
class Material:
    """What an attack may use. The victim's truth is not in it."""

    config: Config
    """Of the run."""
    options: AttackConfig
    run_folder: Path
    public: PublicModel
    seen: Sequence[Seen]
    """Of the victim."""
    shadow: Sequence[Sample]
    """Of the colluding client; empty if there is none."""

    @cached_property
    def sealed(self) -> list[Sealed]:
        """What an eavesdropper has of the victim's messages."""
        return load_sealed(self.run_folder, self.options.victim)


@dataclass(kw_only=True, frozen=True)
class Found:
    """What an attack makes of its material."""

    guesses: Guesses | None = None
    """Of token ids, scored beside their floors."""
    labels: list[list[int]] | None = None
    """For each batch that was seen, a label id for each of its label positions, in the order of `Truth.label_ids`."""
    label_places: list[list[tuple[int, int]]] | None = None
    """For each batch, row and position of each of these labels: where the attack thinks they are."""
    figures: dict[str, float] = field(default_factory=dict)
    """Further numbers, written as they are."""


Runner = Callable[[Material], Found]


@dataclass(kw_only=True, frozen=True)
class Method:
    """An attack as the command knows it."""

    runner: Callable[[], Runner]
    """Imports the attack."""
    needs_shadow: bool = False
    """Whether there must be a colluding client."""
    steers: bool = False
    """Whether it returns gradients of its own to the victim: it needs a run under way (`hpc.privacy.attack_live`)."""


def _nearest_embedding() -> Runner:
    from hpc.privacy.attacks.nearest_embedding import nearest_embedding

    return lambda material: Found(guesses=nearest_embedding(material.seen, material.public))


def _causal_search() -> Runner:
    from hpc.privacy.attacks.causal_search import causal_search

    return lambda material: Found(guesses=causal_search(material.seen, material.public, material.options.causal_search))


def _sealed_frames() -> Runner:
    from hpc.privacy.attacks.sealed_frames import sealed_frames

    return lambda material: Found(guesses=sealed_frames(material.seen, material.sealed, material.public))


def _inverter() -> Runner:
    from hpc.privacy.attacks.inverter import invert_by_learning

    return lambda material: Found(
        guesses=invert_by_learning(
            material.seen,
            shadow=material.shadow,
            embedding_VD=material.public.embedding_VD,
            options=material.options.inverter,
            seed=material.options.seed,
        )
    )


def _optimisation() -> Runner:
    from hpc.privacy.attacks.optimisation import invert_by_optimising

    return lambda material: Found(
        guesses=invert_by_optimising(
            material.seen,
            embedding_VD=material.public.embedding_VD,
            head=material.public.head,
            options=material.options.optimisation,
            seed=material.options.seed,
        )
    )


def _label_inference() -> Runner:
    from hpc.privacy.attacks.label_inference import infer_labels

    def run(material: Material) -> Found:
        found = infer_labels(material.seen, tail=material.public.tail, options=material.options.label_inference)
        return Found(
            labels=[list(guess.ids) for guess in found],
            label_places=[list(zip(guess.rows, guess.positions, strict=True)) for guess in found],
        )

    return run


def _fsha() -> Runner:
    raise ConfigError(
        "--attack.method fsha steers the victim's training, so a run that was made is of no use to it; leave out "
        "--attack.run_folder, and describe the run with --config and its flags"
    )


METHODS: dict[str, Method] = {
    "nearest_embedding": Method(runner=_nearest_embedding),
    "causal_search": Method(runner=_causal_search),
    "sealed_frames": Method(runner=_sealed_frames),
    "inverter": Method(runner=_inverter, needs_shadow=True),
    "optimisation": Method(runner=_optimisation),
    "label_inference": Method(runner=_label_inference),
    "fsha": Method(runner=_fsha, needs_shadow=True, steers=True),
}


def method_of(name: str) -> Method:
    """Raises `ConfigError` with the nearest name and the list."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--attack.method is {name}; it must be one of {', '.join(METHODS)}{meant}")
