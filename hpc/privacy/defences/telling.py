"""What the noise of a run promises, in words: a number without its meaning is worse than none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc.config import Config
from hpc.privacy.defences.accounting import Mechanism, Releases

_UNITS = {
    "token": "one token row by itself (rows behind it depend on the same token, and this promises nothing of them)",
    "example": "one example (all its token rows; its length is not hidden)",
}


def told(figures: Mapping[str, Any], config: Config) -> str:
    """One line of `Shield.figures`."""
    if figures["epsilon"] is None:
        return f"{_measures(figures)}; no guarantee: no epsilon can be named"
    planned, made = figures["releases_planned"], figures["releases"]
    of_all = f"epsilon {figures['epsilon_planned']:.4g} for {planned} releases planned"
    of_made = f"epsilon {figures['epsilon']:.4g} for {made} releases made"
    return (
        f"{_measures(figures)}; at delta {figures['delta']:g}: {of_all}, {of_made}, of {_UNITS[figures['unit']]}. "
        f"Not covered: {'; '.join(not_covered(config))}"
    )


def told_of_prompts(figures: Mapping[str, Any], config: Config) -> str:
    """One line for generation: prompts are no examples of a run, so each release stands for itself."""
    if not figures["noise_multiplier"]:
        return f"privacy: {_measures(figures)}; no guarantee"
    mechanism = Mechanism(rows=1, noise_multiplier=figures["noise_multiplier"])
    epsilon = mechanism.epsilon(Releases(smashed=1), config.privacy.delta)
    return (
        f"privacy: {_measures(figures)}; epsilon {epsilon:.4g} at delta {config.privacy.delta:g} for each time that a "
        "token row leaves, by itself; with beams it leaves once for each. It is on no run's account"
    )


def not_covered(config: Config) -> list[str]:
    """What else leaves the client, or tells of an example, and has no part in epsilon."""
    found = ["row lengths", "numbers of label tokens", "copies of a text"]
    if not config.privacy.gradient_clip_norm:
        found.append("gradients that go back (--privacy.gradient_clip_norm)")
    elif not config.privacy.gradient_noise_multiplier and config.privacy.epsilon is None:
        found.append("gradients that go back, which are clipped only (--privacy.gradient_noise_multiplier)")
    if config.head_learns:
        found.append("what the client head learns of one example and shows in others (--adapter.parts without head)")
    what = {"gradient": "gradients", "fedavg": "values"}.get(config.train.resolved_aggregation)
    if {"head", "tail"} & set(config.adapter.parts):
        if what:
            sum_only = "the sum of " if config.train.secure_aggregation else ""
            found.append(f"{sum_only}the client parts' {what}, which go to the server")
        if not (what == "gradients" and config.train.secure_aggregation):
            found.append("the norm of the client parts' gradient, which goes to the server in each step")
    return found


def _measures(figures: Mapping[str, Any]) -> str:
    found = [
        (figures["clip_norm"], f"rows clipped to {figures['clip_norm']:g}"),
        (figures["noise_multiplier"], f"noise multiplier {figures['noise_multiplier']:.4g}"),
        (figures["noise_scale"], f"FedSEA's noise of scale {figures['noise_scale']:g}"),
        (figures["gradient_clip_norm"], f"gradient rows clipped to {figures['gradient_clip_norm']:g}"),
        (
            figures["gradient_noise_multiplier"],
            f"noise multiplier {figures['gradient_noise_multiplier']:.4g} on gradients",
        ),
        (figures["label_protection"] != "none", f"label protection {figures['label_protection']}"),
    ]
    return ", ".join(words for there, words in found if there)
