"""Configuration of each client's private text: which task, where it is read, how it is dealt, how it is worded."""

from __future__ import annotations

from dataclasses import dataclass, field
from string import Formatter
from typing import Dict, Literal, Optional

from hpc.rules import require, require_at_least

TaskName = Literal[
    "ward_notes",
    "boolq",
    "cb",
    "copa",
    "multirc",
    "record",
    "rte",
    "wic",
    "wsc",
    "cnn_dailymail",
    "xsum",
    "huatuo",
    "jsonl",
]


def spelt(label: object) -> str:
    """A label as JSON spells it, without quotes."""
    return str(label).lower() if isinstance(label, bool) else str(label)


@dataclass(kw_only=True, frozen=True)
class TemplateConfig:
    """How records are worded, where it is not as the task's own template says."""

    prompt: Optional[str] = None
    """Prompt with the record's fields in braces, such as "{title}: {text} Topic:"; {{ and }} are braces. None: the
    task's own."""
    answer: Optional[str] = None
    """Text to be generated, with fields in braces and the space that parts it from the prompt, such as " {summary}".
    None: the task's own."""
    verbalisers: Optional[Dict[str, str]] = None
    """Label in the record: its answer, such as {"true": " Yes", "false": " No"}. None: the task's own."""
    label_field: Optional[str] = None
    """Field of the record that has the label; none: the task's own (`label`)."""
    cut: Optional[str] = None
    """The one field that loses its end where the prompt is too long; none: the task's own."""
    group_field: Optional[str] = None
    """Field by which `data.partition: group` keeps records together; none: the task's own (else `group`)."""
    language: Optional[Literal["en", "zh"]] = None
    """Language of the answers, for the metrics; none: the task's own."""

    def __post_init__(self) -> None:
        if self.verbalisers is not None:  # YAML makes a truth value of a true that has no quotes
            object.__setattr__(self, "verbalisers", {spelt(label): text for label, text in self.verbalisers.items()})
        for name in ("prompt", "answer"):
            text = getattr(self, name)
            if text is not None:
                _check_format(f"data.template.{name}", text)
        require(
            self.answer is None or self.verbalisers is None,
            "--data.template.answer is for text to generate, --data.template.verbalisers for labels; give one of them",
        )
        require(
            self.verbalisers is None or len(set(self.verbalisers.values())) == len(self.verbalisers) >= 2,
            f"--data.template.verbalisers {self.verbalisers} must give two or more labels different answers",
        )
        require(
            all(answer.strip() for answer in (self.verbalisers or {}).values()),
            f"--data.template.verbalisers {self.verbalisers} has an answer without text",
        )


def _check_format(flag: str, text: str) -> None:
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        require(False, f"--{flag} {text!r} cannot be read: {error}; write a brace itself as {{{{ or }}}}")
    names = [name for _, name, _, _ in parsed if name is not None]
    require(bool(names), f"--{flag} {text!r} names no field; put one in braces, such as {{text}}")
    plain = all(
        name.isidentifier() and not spec and conversion is None
        for _, name, spec, conversion in parsed
        if name is not None
    )
    require(plain, f"--{flag} {text!r}: only names of fields can be in braces, such as {{text}}")
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"--{flag} {text!r} has {', '.join(twice)} twice; a field can be there once")


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    """Each client's private text."""

    task: TaskName = "ward_notes"
    """`ward_notes` is generated. The others are read in their publishers' formats: the eight of SuperGLUE,
    `cnn_dailymail`, `xsum`, `huatuo`; `jsonl` has fields prompt and answer, or those that `template` names."""
    train_file: Optional[str] = None
    """JSON-lines file; `{client_id}` in the path gives each client its own."""
    val_file: Optional[str] = None
    """Held-out JSON-lines file; may contain `{client_id}`."""
    data_dir: Optional[str] = None
    """Instead of the two files: a folder with the task's train.jsonl and val.jsonl in it, or in the publisher's folders
    (such as superglue/BoolQ or BoolQ); may contain `{client_id}`."""
    hub_name: Optional[str] = None
    """Instead of files: a data set that the library `datasets` finds, such as super_glue (its splits train and
    validation)."""
    hub_config: Optional[str] = None
    """Configuration of that data set; none: the task's own (such as boolq, or 3.0.0 of CNN/DailyMail)."""
    partition: Literal["iid", "dirichlet", "size", "group", "files"] = "files"
    """How one data set is dealt to the clients. `dirichlet` skews labels, `size` the number of examples; `group` keeps
    what belongs together (MultiRC, ReCoRD: a passage) on one client; `files`: each client's data is its own already."""
    alpha: float = 0.5
    """Dirichlet concentration of the skew of labels or sizes; smaller is more skewed."""
    train_examples: int = 512
    """`ward_notes`: training examples of each client."""
    max_train_examples: int = 0
    """Training examples of each client at most, drawn from its share; 0: all. For trials on a part of a data set."""
    val_examples: int = 64
    """Held-out examples of each client (at most; 0: no evaluation)."""
    evaluate_by: Literal["likelihood", "generation"] = "likelihood"
    """`likelihood` scores the answers that there are; `generation` also decodes one (greedily) and compares it."""
    max_source_length: int = 512
    """Longest prompt (tokens); longer ones lose the end of the passage or article (CB, Huatuo: the beginning), never
    the question."""
    max_target_length: int = 16
    """Longest answer (tokens). Longer reference texts lose their end; longer choices are refused."""
    save_predictions: bool = False
    """Each client writes what was predicted for its held-out examples, with the right answers, to
    roles/<role>/predictions-<step>-client-<k>.jsonl, which only its owner can read."""
    chat_template: bool = False
    """Put the prompt into the chat template that the model's tokenizer brings."""
    template: TemplateConfig = field(default_factory=TemplateConfig)

    def __post_init__(self) -> None:
        require(self.alpha > 0, f"--data.alpha is {self.alpha}; it must be above 0")
        require_at_least("data.train_examples", self.train_examples, 1)
        require_at_least("data.max_train_examples", self.max_train_examples, 0)
        require_at_least("data.val_examples", self.val_examples, 0)
        require_at_least("data.max_source_length", self.max_source_length, 8)
        require_at_least("data.max_target_length", self.max_target_length, 1)
        self._check_source()
        if self.partition == "files" and not self.generated:
            flag = "hub_name" if self.hub_name else "data_dir" if self.data_dir else "train_file"
            require(
                "{client_id}" in str(getattr(self, flag)) and not self.hub_name,
                f"--data.partition files needs {{client_id}} in --data.train_file or --data.data_dir; to deal what "
                f"--data.{flag} gives out to the clients use --data.partition iid, dirichlet, size or group",
            )

    def _check_source(self) -> None:
        given = [name for name in ("train_file", "data_dir", "hub_name") if getattr(self, name) is not None]
        if self.generated:
            require(
                not given and self.val_file is None,
                "--data.task ward_notes generates its data; for files use --data.task jsonl",
            )
            return
        require(
            bool(given),
            f"--data.task {self.task} reads files; give --data.train_file, --data.data_dir or --data.hub_name",
        )
        require(
            len(given) == 1 and (self.val_file is None or given == ["train_file"]),
            f"--data.{given[0]} and --data.{(given[1:] or ['val_file'])[0]} both say where the data is; give one of "
            "train_file (with val_file), data_dir and hub_name",
        )
        require(self.hub_config is None or self.hub_name is not None, "--data.hub_config is for --data.hub_name")

    @property
    def generated(self) -> bool:
        """Whether records are made instead of read."""
        return self.task == "ward_notes"

    @property
    def longest_row(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.max_source_length + self.max_target_length

    @property
    def decodes(self) -> bool:
        """Whether evaluation generates."""
        return self.evaluates and self.evaluate_by == "generation"

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out examples to score."""
        return self.val_examples > 0 and (self.generated or self.train_file is None or self.val_file is not None)
