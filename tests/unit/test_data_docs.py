"""What docs/data.md shows is what works: its example is run as it stands there, its table is the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpc.cli import make_parser, parse, to_yaml
from hpc.data.examples import held_out_examples, training_examples
from hpc.data.folders import FOLDERS
from hpc.data.templates import FORMATS
from hpc.preflight import check_data
from hpc.reproduce.score_command import scores_of
from tests.loopback import run_centralised

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_data_set_without_code_works_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = blocks("jsonl")
    (recipe,) = blocks("yaml")
    assert len(recipe.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    for name in ("notes/train.jsonl", "notes/val.jsonl", "notes.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(recipe if name.endswith("yaml") else lines)
    config, _ = parse(make_parser("test"), ["--config", "notes.yaml"])
    check_data(config, range(config.train.clients))
    shares = [training_examples(config, client) for client in range(config.train.clients)]
    asked = {example.prompt(): example.answer for share in shares for example in share}
    records = [json.loads(line) for line in lines.splitlines()]
    assert asked == {
        f"Note: {record['note']} Is the patient better?": " Yes" if record["better"] else " No" for record in records
    }
    assert [len(share) for share in shares] == [2, 2]
    assert sum(len(held_out_examples(config, client)) for client in range(2)) == 4


def test_it_is_scored_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (flags,) = re.findall(r"^torchrun launch/local.py (--config notes.yaml .+)$", TEXT, re.MULTILINE)
    (folder,) = re.findall(r"^python launch/reproduce.py score (\S+)$", TEXT, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for name, text in (("notes/train.jsonl", blocks("jsonl")[1]), ("notes/val.jsonl", blocks("jsonl")[1])):
        Path(name).write_text(text)
    Path("notes.yaml").write_text(blocks("yaml")[0])
    parser = make_parser("test")
    small = ["--model.name_or_path", "tiny-llama", "--train.max_steps", "1", "--train.schedule", "centralised"]
    config, namespace = parse(parser, [*flags.split(), *small])
    assert folder == f"results/runs/{config.run.name}"
    run_centralised(config, Path(folder))
    (Path(folder) / "config.yaml").write_text(to_yaml(parser, namespace))
    _, head, *rows = scores_of(Path(folder)).splitlines()
    assert head.split() == ["step", "accuracy", "unparsed", "examples"]
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [("0", "4"), ("1", "4")]


def test_prompt_and_answer_work_as_shown(tmp_path: Path) -> None:
    line = blocks("jsonl")[0]
    (tmp_path / "train.jsonl").write_text(line)
    flags = ["--data.task", "jsonl", "--data.data_dir", str(tmp_path), "--data.partition", "group"]
    config, _ = parse(make_parser("test"), [*flags, "--data.val_examples", "0", "--train.clients", "1"])
    (example,) = training_examples(config, 0)
    assert (example.prompt()[-11:], example.answer) == ("\nNext step:", " chest X-ray")
    assert example.group == "patient-17"


def test_the_table_of_tasks_is_the_codes() -> None:
    rows = [re.split(r"(?<!\\) \| ", row.strip("| ")) for row in re.findall(r"^\| `\w+` \| .*\|$", TEXT, re.MULTILINE)]
    told = {row[0].strip("`"): row for row in rows if row[0].strip("`") in FORMATS}
    assert told.keys() == FORMATS.keys()
    for name, (_, folder, prompt, answer, cut) in told.items():
        task = FORMATS[name]
        if name == "ward_notes":
            continue
        assert folder.strip("`") == FOLDERS.get(name, ("the folder itself",))[0]
        assert prompt.replace("\\|", "|").split("`")[1] == task.template
        assert cut.split(" ")[0] == (task.truncated or "-")
        assert ("its beginning" in cut) == (task.truncated is not None and task.loses == "beginning")
        if task.kind == "labels":
            assert answer == ", ".join(text.strip() for text in task.verbalisers)
        elif task.kind == "text":
            assert answer.split("`")[1] == (task.answer or "").strip()
