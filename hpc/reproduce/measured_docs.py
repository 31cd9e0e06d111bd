"""Measured numbers in the documentation: put between marks in a page, from committed files, so nothing is typed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.bench.markdown import table as markdown
from hpc.errors import DataError
from hpc.files import drafted
from hpc.reproduce.attack_rows import Attacked
from hpc.reproduce.numbers import NOTHING
from hpc.reproduce.raw import read_json

PAGE = Path("docs") / "threat-model.md"
PRESET = "small"
HIJACK = Path("raw") / "fsha-tiny.json"


def texts_of(results: Path, rows: Sequence[Attacked]) -> dict[str, str]:
    """Mark → what stands there. Raises `DataError` for a file that cannot be read."""
    found = {"table3": leaks_in_short(rows)} if rows else {}
    hijack = results / HIJACK
    return found | ({"fsha": hijack_in_short(read_json(hijack))} if hijack.is_file() else {})


def leaks_in_short(rows: Sequence[Attacked]) -> str:
    """A line for each task and cut: what the best attack recovers under each defence, and the loss that is left."""
    defences = list(dict.fromkeys(row.defence for row in rows))
    found = {(row.task, row.head_blocks, row.defence, row.seed): row for row in rows}
    places = list(dict.fromkeys((row.task, row.head_blocks, row.seed) for row in rows))
    lines = [
        [task, str(blocks), *(_cell(found.get((task, blocks, defence, seed))) for defence in defences)]
        for task, blocks, seed in places
    ]
    said = "Tokens that the best attack recovers; loss on held-out examples (nats a label token)."
    return f"{said}\n\n{markdown(('task', 'blocks on the client', *defences), lines, words=2)}"


def _cell(row: Attacked | None) -> str:
    leak = row.leak() if row else None
    return NOTHING if row is None or leak is None else f"{leak[1].value:.1f} %; {row.eval_loss:.2f}"


def hijack_in_short(content: Mapping[str, Any]) -> str:
    """What a server that returns gradients of its own read, and when the client's detector noticed."""
    score, figures, model = content["scores"]["token_accuracy"], content["figures"], content["config"]["model"]
    floor = max(each["value"] for each in score["floors"].values())
    step = int(figures["detector_noticed_at_step"])
    noticed = f"noticed at step {step} of {int(figures['steps'])}" if step else "noticed nothing"
    first = figures["first_rows_token_accuracy"]
    return (
        f"Measured on `{model['name_or_path']}` (blocks on the client: {model['head_blocks']}): the hijacker reads "
        f"{score['attack']['value']:.1f} % of the tokens of the last steps, and {first:.1f} % of those of the first, "
        f"which it has hardly steered (who saw nothing: {floor:.1f} %). The detector {noticed}."
    )


def filled_in(page: str, texts: Mapping[str, str]) -> str:
    """The page with the texts between their marks. Raises `DataError` for a page without them."""
    for name, text in texts.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise DataError(f"{PAGE} lacks the marks {begin} and {end}, between which measured numbers go")
        page = pattern.sub(f"{begin}\n{text}\n{end}".replace("\\", r"\\"), page)
    return page


def fill_in(root: Path, texts: Mapping[str, str]) -> Path | None:
    """Write the numbers into the repository's page; None where it is not there. Raises `DataError`."""
    path = root / PAGE
    if not path.is_file() or not texts:
        return None
    with drafted(path) as draft:
        draft.write_text(filled_in(path.read_text(encoding="utf-8"), texts), encoding="utf-8")
    return path
