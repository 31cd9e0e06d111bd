"""Table 3 for programs: one line a run, attack and score, unrounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from hpc.reproduce.attack_rows import Attacked

FIRST = ("task", "seed", "head_blocks", "defence", "metric", "utility", "eval_loss", "epsilon", "rows", "tokens")
SCORE = ("attack", "score", "value", "low", "high")


def text(rows: Sequence[Attacked]) -> str:
    """Numbers as Python writes them, so that nothing is lost; empty where there is none."""
    floors = list(
        dict.fromkeys(name for row in rows for each in row.scores.values() for s in each.values() for name in s.floors)
    )
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([*FIRST, *SCORE, *(f"floor_{name}" for name in floors), "run"])
    for row in rows:
        first = [row.task, row.seed, row.head_blocks, row.defence, row.metric, row.utility, row.eval_loss]
        first += [row.epsilon, row.victim_rows, row.victim_tokens]
        for method, scores in row.scores.items():
            for name, score in scores.items():
                own = [method, name, score.attack.value, score.attack.low, score.attack.high]
                told = [score.floors[floor].value if floor in score.floors else None for floor in floors]
                writer.writerow([*first, *own, *told, row.run])
    return target.getvalue()
