"""Table 3 as a page to read: what attacks recover at each cut, with and without defences, and what these cost.

Generated from runs' files only, so the same files give the same page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpc.bench.markdown import table as markdown
from hpc.privacy.scores.interval import Interval
from hpc.reproduce import conditions
from hpc.reproduce.attack_plan import ATTACKED, TABLE, attack_jobs
from hpc.reproduce.attack_rows import TOKENS, Attacked
from hpc.reproduce.numbers import NOTHING, fixed, metric_title
from hpc.reproduce.preset import Preset
from hpc.reproduce.published import ATTACKS
from hpc.reproduce.raw import FOLDER
from hpc.reproduce.rows import Runs

LABELS = "label_accuracy"
SCORE_TITLES = {
    TOKENS: "tokens",
    "exact_rows": "exact rows",
    "bleu4_word": "BLEU-4, words",
    "bleu4_char": "BLEU-4, characters",
    "fact_f1": "facts, F1",
    LABELS: "labels",
}
HOW = (
    "An attacker has the published weights, what the trunk received of the victim, and all the text of one colluding "
    "client with what the trunk received for it. A cell is the percentage of the victim's tokens that are recovered at "
    "their place, prompt and answer together; of `label_inference`, of the answers' tokens. In brackets: the 95 % "
    "confidence interval (bootstrap over rows; of `label_inference`, over batches). `floor`: the best of those who saw "
    "nothing, which are unrelated text, the commonest token everywhere, and a language model that is told all true "
    "tokens before each place; it is a floor of tokens, and says nothing about labels. Utility is measured with the "
    "same defence switched on, so it is what that defence costs. The steps that the victim's rows are from are named: "
    "at the first its head is the public one, later it has learned. Of few rows the intervals are too narrow."
)
EPSILON = (
    "ε: of one token row over all its releases in the run, at the run's δ (`docs/threat-model.md` says what that does "
    "not promise). FedSEA's noise comes without clipping, and so without any ε."
)


def page(preset: Preset, rows: Sequence[Attacked], runs: Runs) -> str:
    """Raises nothing; rows that are missing are counted."""
    assert preset.attacks is not None
    planned = len(attack_jobs(preset))
    used = [runs[row.run] for row in rows]
    parts = [
        f"# Table 3: what an attacker recovers, preset {preset.name}",
        f"**{preset.scale}**",
        HOW,
        EPSILON,
    ]
    for task in dict.fromkeys(row.task for row in rows):
        parts += _task(task, [row for row in rows if row.task == task])
    parts += ["## The paper's attack", *_published(rows)]
    parts += ["## Where the numbers come from"]
    if len(rows) < planned:
        parts += [f"{NOTHING}: not there yet; {planned - len(rows)} of {planned} runs are missing."]
    parts += [
        f"Schedule: {ATTACKED.title}. A row's run is `results/{FOLDER / preset.name}/<model>-<task>-<adapter>-"
        f"{ATTACKED.name}-seed<seed>-cut<blocks>-<defence>.json`, with every attack's scores, floors and options; "
        f"`{TABLE}-{preset.name}.csv` has them line by line.",
        *conditions.origin(used, f"python launch/reproduce.py {TABLE} --preset {preset.name} --data_dir DATA"),
    ]
    return "\n\n".join(parts) + "\n"


def _task(task: str, rows: Sequence[Attacked]) -> list[str]:
    sizes = ", ".join(dict.fromkeys(_sent(row) for row in rows))
    parts = [f"## {task}", f"Of the victim: {sizes}.", _leaks(rows)]
    plain = [row for row in rows if row.defence == rows[0].defence]
    return [*parts, f"### {task}, undefended: every score", _every_score(plain)]


def _sent(row: Attacked) -> str:
    return f"{row.victim_rows} rows, {row.victim_tokens} tokens, sent in steps {row.steps[0]} to {row.steps[1]}"


def _leaks(rows: Sequence[Attacked]) -> str:
    """A line for each cut and defence."""
    methods = list(dict.fromkeys(method for row in rows for method in row.scores))
    heads = ["blocks", "defence", metric_title(rows[0].metric), "loss", "ε", *methods, "floor"]
    return markdown(heads, [_leak(row, methods) for row in rows], words=2)


def _leak(row: Attacked, methods: Sequence[str]) -> list[str]:
    floor = row.floor(TOKENS)
    return [
        str(row.head_blocks),
        row.defence,
        f"{row.utility:.1f}",
        f"{row.eval_loss:.3f}",
        NOTHING if row.epsilon is None else _epsilon(row.epsilon),
        *(_main(row, method) for method in methods),
        NOTHING if floor is None else f"{floor[1].value:.1f}",
    ]


def _main(row: Attacked, method: str) -> str:
    scores = row.scores.get(method, {})
    known = next((scores[name].attack for name in (TOKENS, LABELS) if name in scores), None)
    return NOTHING if known is None else _interval(known)


def _interval(score: Interval) -> str:
    return f"{score.value:.1f} ({score.low:.0f}–{score.high:.0f})"


def _epsilon(value: float) -> str:
    return f"{value:.2g}" if value < 1000 else f"{value:.1e}"


def _every_score(rows: Sequence[Attacked]) -> str:
    """A line for each cut and attack; the best floor in brackets."""
    names = list(dict.fromkeys(name for row in rows for scores in row.scores.values() for name in scores))
    heads = ["blocks", "attack", *(SCORE_TITLES.get(name, metric_title(name)) for name in names)]
    lines = [[str(row.head_blocks), method, *_scores(row, method, names)] for row in rows for method in row.scores]
    intro = "Percent; in brackets the best of the floors."
    return f"{intro}\n\n{markdown(heads, lines, words=2)}"


def _scores(row: Attacked, method: str, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        score = row.scores[method].get(name)
        if score is None:
            yield NOTHING
        else:
            floor = max((each.value for each in score.floors.values()), default=None)
            yield fixed(score.attack.value, 1) + ("" if floor is None else f" ({floor:.1f})")


def _published(rows: Sequence[Attacked]) -> list[str]:
    """The paper's own setting: its data set, its metrics, and a decoder that a colluding client's data taught."""
    said = [
        "The paper's attack is a decoder trained on a colluding client's data, on BoolQ; it reports BLEU-4 and "
        "ROUGE-1. Its code teaches that decoder the next token instead of the one at the same place. Passages that "
        "have nothing to do with each other score as in brackets, so a low score by itself proves nothing."
    ]
    lines = [
        [f"published, {each.model}", str(each.head_blocks), "one decoder", each.bleu4, "", each.rouge1]
        for each in ATTACKS
    ]
    for row in (row for row in rows if row.task == "boolq" and row.defence == rows[0].defence):
        for method in (method for method in row.scores if method.startswith("inverter")):
            scores = row.scores[method]
            cells = [_with_floor(scores[name].attack, scores[name].floors.get("unrelated")) for name in PAPER_SCORES]
            lines.append([f"here, seed {row.seed}", str(row.head_blocks), method, *cells])
    heads = ("", "blocks", "attack", "BLEU-4 (words)", "BLEU-4 (characters)", "ROUGE-1")
    return [*said, markdown(heads, lines, words=3), "In brackets: unrelated text."]


PAPER_SCORES = ("bleu4_word", "bleu4_char", "rouge1")


def _with_floor(score: Interval, floor: Interval | None) -> str:
    return f"{score.value:.1f}" + ("" if floor is None else f" ({floor.value:.1f})")
