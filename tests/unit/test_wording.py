"""A run may word its task otherwise: prompt, answers, what is cut; what does not fit the task is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc.cli import make_parser, parse, to_yaml
from hpc.config import Config, DataConfig, TemplateConfig
from hpc.data.tasks import Example, make_examples
from hpc.data.wording import task_of
from hpc.errors import ConfigError, DataError
from tests.unit.task_records import RECORDS


def first(task: Any, record: dict[str, Any] | None = None, **template: Any) -> Example:
    data = DataConfig(task=task, train_file="x", partition="iid", template=TemplateConfig(**template))
    return make_examples(task_of(data), record or RECORDS[task], "data.jsonl:7")[0]


def test_prompt_and_verbalisers_of_a_task_can_be_others() -> None:
    found = first(
        "rte", prompt="{premise} Also {hypothesis}", verbalisers={"entailment": " ja", "not_entailment": " nein"}
    )
    assert found.prompt() == "Ada sells bread. Also Ada sells something."
    assert (found.choices, found.answer) == ((" ja", " nein"), " nein")
    assert (found.before, found.passage) == ("", "Ada sells bread.")


def test_the_order_of_labels_is_the_tasks_whatever_order_they_are_worded_in() -> None:
    found = first("boolq", verbalisers={"false": " faux", "true": " vrai"})
    assert (found.choices, found.answer) == ((" vrai", " faux"), " vrai")


def test_a_text_can_be_asked_for_and_parted_otherwise() -> None:
    found = first("xsum", prompt="Summarise: {document}\nSummary:", answer=" {summary}", cut="document")
    assert (found.prompt()[:11], found.prompt()[-9:]) == ("Summarise: ", "\nSummary:")
    assert found.answer == " A bakery opened."
    assert first("record", answer=" the {entity}").answer == " the Bo"


def test_braces_are_written_twice() -> None:
    assert first("jsonl", prompt="{{{prompt}}} =").prompt() == "{Two and two make} ="


def test_own_labels_make_a_choice_of_jsonl() -> None:
    record = {"text": "Rain again.", "mood": "bad", "by": "Ada"}
    words = {"good": " good", "bad": " bad"}
    found = first("jsonl", record, prompt="{text} Mood:", verbalisers=words, label_field="mood", group_field="by")
    assert (found.prompt(), found.choices, found.label) == ("Rain again. Mood:", (" good", " bad"), 1)
    assert (found.kind, found.group) == ("labels", "Ada")
    for value, answer in ((True, " Y"), (False, " N"), ("true", " Y")):
        same = first("jsonl", {"prompt": "x", "label": value}, verbalisers={"true": " Y", "false": " N"})
        assert same.answer == answer
    assert first("jsonl", {"prompt": "x", "label": 1}, verbalisers={"0": " N", "1": " Y"}).answer == " Y"


def test_a_field_named_by_the_configuration_must_be_there() -> None:
    with pytest.raises(DataError, match=r"data.jsonl:7: no field 'text'; the record has 'prompt', 'answer'"):
        first("jsonl", prompt="{text}")
    with pytest.raises(DataError, match=r"data.jsonl:7: no field 'mood'; it must be one of 'a', 'b'"):
        first("jsonl", verbalisers={"a": " a", "b": " b"}, label_field="mood")
    with pytest.raises(DataError, match=r"data.jsonl:7: field 'label' is 'c'; it must be one of 'a', 'b'"):
        first("jsonl", {"prompt": "x", "label": "c"}, verbalisers={"a": " a", "b": " b"})
    with pytest.raises(DataError, match=r"data.jsonl:7: field 'by' must be a text or a number to group by, not None"):
        first("jsonl", group_field="by")


@pytest.mark.parametrize(
    ("task", "template", "words"),
    [
        ("rte", {"answer": " {premise}"}, ["data.template.answer", "rte", "data.template.verbalisers"]),
        ("rte", {"verbalisers": {"yes": " a", "no": " b"}}, ["yes, no", "entailment, not_entailment"]),
        ("xsum", {"verbalisers": {"a": " a", "b": " b"}}, ["xsum has no labels", "data.template.answer"]),
        ("record", {"answer": " {query}"}, ["record", "{entity}"]),
        ("jsonl", {"label_field": "mood"}, ["label_field mood", "jsonl has no labels", "data.template.verbalisers"]),
        ("xsum", {"label_field": "mood"}, ["label_field mood", "xsum has no labels"]),
        ("rte", {"cut": "passage"}, ["data.template.cut passage", "hypothesis, premise"]),
        ("jsonl", {"prompt": "no field"}, ["data.template.prompt", "names no field"]),
        ("jsonl", {"prompt": "{open"}, ["data.template.prompt", "'{open'", "{{"]),
        ("jsonl", {"prompt": "{}"}, ["only names of fields"]),
        ("jsonl", {"prompt": "{a.b}"}, ["only names of fields"]),
        ("jsonl", {"prompt": "{a:>9}"}, ["only names of fields"]),
        ("jsonl", {"prompt": "{a} {a}"}, ["a twice"]),
        ("jsonl", {"answer": " {x}", "verbalisers": {"a": " a", "b": " b"}}, ["give one of them"]),
        ("jsonl", {"verbalisers": {"a": " a"}}, ["two or more"]),
        ("jsonl", {"verbalisers": {"a": " x", "b": " x"}}, ["different answers"]),
        ("jsonl", {"verbalisers": {"a": " x", "b": " "}}, ["without text"]),
    ],
)
def test_a_wording_that_does_not_fit_is_refused(task: str, template: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        first(task, **template)
    assert all(word in str(caught.value) for word in words), caught.value


RECIPE = """
data:
  task: jsonl
  data_dir: notes
  partition: size
  template:
    prompt: "{text} Mood:"
    verbalisers: {"true": " good", "false": " bad"}
"""


def test_a_wording_in_yaml_reads_back_as_saved(tmp_path: Path) -> None:
    parser, recipe = make_parser("test"), tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    config, namespace = parse(parser, ["--config", str(recipe)])
    assert config.data.template == TemplateConfig(prompt="{text} Mood:", verbalisers={"true": " good", "false": " bad"})
    recipe.write_text(to_yaml(parser, namespace))
    assert parse(make_parser("test"), ["--config", str(recipe)])[0] == config


@pytest.mark.parametrize("label", ["true", "0"])
def test_labels_in_yaml_need_no_quotes(tmp_path: Path, label: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace('"true"', label))
    config = parse(make_parser("test"), ["--config", str(recipe)])[0]
    assert config.data.template.verbalisers == {label: " good", "false": " bad"}


def test_an_unknown_key_of_the_template_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('data:\n  template:\n    promt: "{x}"\n')
    with pytest.raises(ConfigError, match=r"template.promt; did you mean data.template.prompt"):
        parse(make_parser("test"), ["--config", str(recipe)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "rte"}, ["--data.task rte reads files", "--data.data_dir", "--data.hub_name"]),
        ({"task": "rte", "data_dir": "d"}, ["--data.partition files", "--data.data_dir", "group"]),
        ({"task": "rte", "hub_name": "h"}, ["--data.partition files", "--data.hub_name"]),
        ({"task": "rte", "data_dir": "d", "train_file": "f"}, ["train_file", "data_dir", "give one"]),
        ({"task": "rte", "data_dir": "d", "val_file": "f"}, ["val_file", "data_dir", "give one"]),
        ({"task": "rte", "data_dir": "d", "partition": "iid", "hub_config": "c"}, ["hub_config"]),
        ({"data_dir": "d"}, ["ward_notes generates"]),
    ],
)
def test_where_data_is_must_be_said_once(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(data=DataConfig(**settings))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_folder_or_a_hub_name_has_held_out_examples() -> None:
    for where in ({"data_dir": "d"}, {"hub_name": "h"}):
        assert DataConfig(task="rte", partition="iid", **where).evaluates
        assert not DataConfig(task="rte", partition="iid", val_examples=0, **where).evaluates
