"""Measured numbers in the documentation: put between marks in a page, from the committed runs, so nothing is typed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hpc.bench.markdown import table as markdown
from hpc.errors import DataError
from hpc.files import drafted
from hpc.reproduce.attack_rows import Attacked
from hpc.reproduce.numbers import NOTHING

PAGE = Path("docs") / "threat-model.md"
NAME, PRESET = "table3", "small"


def leaks_in_short(rows: Sequence[Attacked]) -> str:
    """A line for each task and cut: what the best attack recovers under each defence, and the loss that is left."""
    defences = list(dict.fromkeys(row.defence for row in rows))
    found = {(row.task, row.head_blocks, row.defence, row.seed): row for row in rows}
    places = list(dict.fromkeys((row.task, row.head_blocks, row.seed) for row in rows))
    lines = [
        [task, str(blocks), *(_cell(found.get((task, blocks, defence, seed))) for defence in defences)]
        for task, blocks, seed in places
    ]
    said = (
        "Tokens that the best of the attacks tried recovers; loss on held-out examples (nats a label token). On "
        "defended runs fewer attacks may have been tried, so their numbers are the least that leaks: "
        f"`results/tables/{NAME}-{PRESET}.md` says which."
    )
    return f"{said}\n\n{markdown(('task', 'blocks on the client', *defences), lines, words=2)}"


def _cell(row: Attacked | None) -> str:
    leak = row.leak() if row else None
    return NOTHING if row is None or leak is None else f"{leak[1].value:.1f} %; {row.eval_loss:.2f}"


def filled_in(page: str, text: str) -> str:
    """The page with `text` between its marks. Raises `DataError` for a page without them."""
    begin, end = f"<!-- measured: {NAME} -->", f"<!-- end of {NAME} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise DataError(f"{PAGE} lacks the marks {begin} and {end}, between which measured numbers go")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def fill_in(root: Path, rows: Sequence[Attacked]) -> Path | None:
    """Write the numbers into the repository's page; None where it is not there. Raises `DataError`."""
    path = root / PAGE
    if not path.is_file() or not rows:
        return None
    with drafted(path) as draft:
        draft.write_text(filled_in(path.read_text(encoding="utf-8"), leaks_in_short(rows)), encoding="utf-8")
    return path
