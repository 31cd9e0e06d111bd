"""What the papers publish, to stand beside our rows. Only numbers that are known to us; a gap stays a gap.

FL-GLM: Zheng et al., EMNLP 2024 main 303, arXiv 2406.14898. FedSEA-LLaMA: arXiv 2505.15683, by the same group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FL_GLM = "arXiv 2406.14898"
FEDSEA = "arXiv 2505.15683"


@dataclass(kw_only=True, frozen=True)
class Score:
    """A number of a table, in percent."""

    table: str
    method: str
    """As the paper calls it, with its model."""
    task: str
    metric: str
    """As `hpc.metrics.table` names it."""
    value: float
    source: str


@dataclass(kw_only=True, frozen=True)
class Gap:
    """How far a split row is said to be from the centralised one, in percentage points."""

    table: str
    method: str
    task: str
    metric: str | None
    """None: the paper's text does not say of which."""
    value: float
    at_most: bool = False
    """Whether the value is the end of a range that begins at 0."""
    source: str = FL_GLM


CHATGLM, LLAMA = "FL-GLM, ChatGLM-6B", "FL-GLM, Llama-2-7B-chat"
SUPERGLUE = {"record": 78.4, "rte": 81.6, "boolq": 81.9, "wic": 69.6}
MULTIRC_FEDSEA = {"f1_a": 82.19, "em": 49.53}
# "Equal to centralised" but for one, on six tasks with two classes: SuperGLUE has just these six.
TWO_CLASS = {"boolq": -1.44, "copa": 0.0, "multirc": 0.0, "rte": 0.0, "wic": 0.0, "wsc": 0.0}

SCORES: Sequence[Score] = (
    *(
        Score(table="table1", method=CHATGLM, task=task, metric="accuracy", value=value, source=FL_GLM)
        for task, value in SUPERGLUE.items()
    ),
    *(
        Score(table="table1", method="FedSEA-LLaMA, LoRA", task="multirc", metric=metric, value=value, source=FEDSEA)
        for metric, value in MULTIRC_FEDSEA.items()
    ),
)
GAPS: Sequence[Gap] = (
    Gap(table="table2", method=CHATGLM, task="cnn_dailymail", metric="ROUGE", value=-1.0, at_most=True),
    *(Gap(table="table4", method=LLAMA, task=task, metric=None, value=value) for task, value in TWO_CLASS.items()),
    Gap(table="table5", method=CHATGLM, task="huatuo", metric=None, value=-0.72, at_most=True),
    Gap(table="table5", method="FL-Chinese-Llama", task="huatuo", metric=None, value=-0.38, at_most=True),
)
REMARKS = {"table1": f"The paper calls FL-GLM's scores slightly below those of centralised ChatGLM-6B ({FL_GLM})."}
"""Table → what is said without a number."""


@dataclass(kw_only=True, frozen=True)
class Recovered:
    """A line of the paper's inversion attack on BoolQ, in its words."""

    model: str
    head_blocks: int
    bleu4: str
    rouge1: str
    source: str = FL_GLM


ATTACKS: Sequence[Recovered] = (
    Recovered(model="ChatGLM-6B", head_blocks=0, bleu4="28.570", rouge1="33.290"),
    Recovered(model="ChatGLM-6B", head_blocks=1, bleu4="near 0", rouge1="near 0"),
)
