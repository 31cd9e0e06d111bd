"""A table as a page to read: our numbers beside the published ones, then how far each row is from centralised training.

Generated from runs' files only, so the same files give the same page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc.bench.markdown import table as markdown
from hpc.metrics.table import METRICS
from hpc.reproduce import conditions, published
from hpc.reproduce.methods import METHODS, TITLES
from hpc.reproduce.numbers import NOTHING, loss_difference, mean_and_sd, metric_title, points
from hpc.reproduce.preset import Preset
from hpc.reproduce.raw import FOLDER
from hpc.reproduce.rows import Comparison, Row, Runs

TABLE_TITLES = {
    "table1": "Table 1: SuperGLUE",
    "table2": "Table 2: summarisation",
    "table4": "Table 4: tasks with two answers",
    "table5": "Table 5: medical questions in Chinese (Huatuo)",
}
COMPARED = (
    "A cell: difference of the main metric in percentage points, mean over seeds (lowest … highest seed); in how many "
    "seeds every prediction is the same; largest absolute difference of a training step's loss in any seed. `0` is "
    "exactly 0."
)


def page(preset: Preset, table: str, rows: Sequence[Row], runs: Runs) -> str:
    used = [runs[name] for name in dict.fromkeys(result.run for row in rows for result in row.results)]
    missing = sum(row.planned - len(row.results) for row in rows)
    parts = [f"# {TABLE_TITLES.get(table, table)}, preset {preset.name}", f"**{preset.scale}**"]
    for model in dict.fromkeys(row.model for row in rows):
        parts += _model(table, [row for row in rows if row.model == model], runs)
    parts += ["## Where the numbers come from"]
    if missing:
        parts += [f"{NOTHING}: not there yet; {missing} of {sum(row.planned for row in rows)} results are missing."]
    folder = FOLDER / preset.name
    parts += [
        f"A cell's runs are `results/{folder}/<model>-<task>-<adapter>-<method>-seed<seed>.json` (zero-shot: what the "
        f"centralised LoRA run said before its first step); `{table}-{preset.name}.csv` names them line by line, with "
        "every metric unrounded.",
        *conditions.origin(used, f"python launch/reproduce.py {table} --preset {preset.name} --data_dir DATA"),
    ]
    return "\n\n".join(parts) + "\n"


def _model(table: str, rows: Sequence[Row], runs: Runs) -> list[str]:
    tasks = list(dict.fromkeys(row.task for row in rows))
    raws = [runs[result.run] for row in rows for result in row.results]
    parts = [f"## {rows[0].model}: {conditions.model_of(raws)}", _scores(table, tasks, rows)]
    parts += [_unparsed(rows), *([published.REMARKS[table]] if table in published.REMARKS else [])]
    if any(row.comparison for row in rows):
        parts += ["### Against centralised training", _promise(rows), COMPARED, _comparisons(table, tasks, rows)]
    for task in tasks:
        parts += _all_metrics(task, [row for row in rows if row.task == task])
    return [*parts, "### Settings", conditions.settings(rows, runs)]


def _scores(table: str, tasks: Sequence[str], rows: Sequence[Row]) -> str:
    main = {task: _main_metric(task, rows) for task in tasks}
    heads = [f"{task}: {metric_title(metric)}" for task, metric in main.items()]
    lines = [[*kind, *(_score(_at(rows, kind, task)) for task in tasks)] for kind in _kinds(rows)]
    scores = [score for score in published.SCORES if score.table == table]
    for method in dict.fromkeys(score.method for score in scores):
        told = {task: _told([each for each in scores if each.method == method], task, main) for task in tasks}
        lines += [["published", method, *told.values()]] if any(map(NOTHING.__ne__, told.values())) else []
    intro = "Percent; mean ± sample standard deviation over seeds, where there are several."
    return f"{intro}\n\n{markdown(('adapter', 'method', *heads), _titled(lines), words=2)}"


def _main_metric(task: str, rows: Sequence[Row]) -> str:
    """As the runs have it; before there are any, as they will."""
    known = (name for row in rows if row.task == task for name in row.metrics)
    return next(known, METRICS[task].names[0] if task in METRICS else "")


def _score(row: Row | None) -> str:
    if row is None or not row.results:
        return NOTHING
    said = mean_and_sd(next(iter(row.metrics.values())))
    seeds = f" ({len(row.results)} of {row.planned} seeds)" if len(row.results) < row.planned else ""
    return said + seeds + (f", {row.unparsed} unparsed" if row.unparsed else "")


def _told(scores: Sequence[published.Score], task: str, main: Mapping[str, str]) -> str:
    """What is published of a task; of which metric, where it is not the column's."""
    said = [
        f"{score.value:g}" + (f" ({metric_title(score.metric)})" if score.metric != main[task] else "")
        for score in scores
        if score.task == task
    ]
    return ", ".join(said) or NOTHING


def _unparsed(rows: Sequence[Row]) -> str:
    total = sum(row.unparsed for row in rows)
    kind = "Unparsed predictions (decoded texts that are no answer, or empty) count as wrong"
    return f"{kind}: {total} over all cells and seeds{'; the cells say where' if total else ''}."


def _promise(rows: Sequence[Row]) -> str:
    """What the rows that compute the same function promise, and whether these runs kept it."""
    pairs = [(row, row.comparison) for row in rows if row.comparison and row.comparison.loss_bound is not None]
    names = "; ".join(TITLES[name] for name, method in METHODS.items() if method.same_function)
    broken = [f"{row.task}, {row.adapter}, {TITLES[row.method]}" for row, each in pairs if not each.is_kept]
    kept = f"**NOT in {'; '.join(broken)}**" if broken else "so it is in all of them"
    return (
        f"These compute what their reference does: {names}. So metrics and predictions must be equal, and every step's "
        "loss, too; client-batch, which sums in another order, may differ by a thousandth of the mean loss. "
        f"Pairs of runs compared: {sum(len(each.equal) for _, each in pairs)}; {kept}."
    )


def _comparisons(table: str, tasks: Sequence[str], rows: Sequence[Row]) -> str:
    kinds = [kind for kind in _kinds(rows) if kind[1] in METHODS and METHODS[kind[1]].reference]
    lines = []
    for adapter, method in kinds:
        cells = (_at(rows, (adapter, method), task) for task in tasks)
        reference = TITLES[str(METHODS[method].reference)]
        lines.append(
            [adapter, TITLES[method], reference, *(_compared(row.comparison if row else None) for row in cells)]
        )
    gaps = [gap for gap in published.GAPS if gap.table == table]
    for method in dict.fromkeys(gap.method for gap in gaps):
        told = {gap.task: _gap(gap) for gap in gaps if gap.method == method}
        lines.append(["published", method, "centralised", *(told.get(task, NOTHING) for task in tasks)])
    return markdown(("adapter", "method", "reference", *tasks), lines, words=3)


def _compared(comparison: Comparison | None) -> str:
    if comparison is None:
        return NOTHING
    main = next(iter(comparison.differences.values()))
    equal = f"{sum(comparison.equal)} of {len(comparison.equal)}"
    return f"{points(main)}; {equal}; {loss_difference(comparison.loss)}"


def _gap(gap: published.Gap) -> str:
    said = f"{gap.value:+.2f}" if gap.value else "0"
    kind = f", {gap.metric}" if gap.metric else ""
    return f"0 to {said}{kind}" if gap.at_most else said


def _all_metrics(task: str, rows: Sequence[Row]) -> list[str]:
    """Nothing, where the main metric is the only one."""
    done = [row for row in rows if row.results]
    names = list(done[0].metrics) if done else []
    if len(names) < 2:
        return []
    lines = [
        [row.adapter, TITLES[row.method], *(mean_and_sd(spread) for spread in row.metrics.values()), str(row.unparsed)]
        for row in done
    ]
    heads = ("adapter", "method", *map(metric_title, names), "unparsed")
    return [f"### {task}: all metrics", markdown(heads, lines, words=2)]


def _kinds(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.adapter, row.method) for row in rows))


def _at(rows: Sequence[Row], kind: tuple[str, str], task: str) -> Row | None:
    return next((row for row in rows if (row.adapter, row.method) == kind and row.task == task), None)


def _titled(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[adapter, TITLES.get(method, method), *cells] for adapter, method, *cells in lines]
