"""An invented record of each task in its publisher's format, and the library `datasets`' form of the nested ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BAKERY = "Ada opened a bakery in Leeds. It sells rye bread. Bo helps on Sundays."

RECORDS: dict[str, dict[str, Any]] = {
    "boolq": {"passage": BAKERY, "question": "does the bakery sell rye bread", "label": True, "idx": 4},
    "cb": {
        "premise": "It was late. Ada thought that Bo had gone",
        "hypothesis": "Bo had gone",
        "label": "neutral",
        "idx": 1,
    },
    "copa": {
        "premise": "The glass broke.",
        "choice1": "It fell.",
        "choice2": "It was full.",
        "question": "cause",
        "label": 0,
        "idx": 3,
    },
    "multirc": {
        "idx": 7,
        "version": 1.1,
        "passage": {
            "text": BAKERY,
            "questions": [
                {
                    "question": "Who helps?",
                    "idx": 30,
                    "answers": [{"text": "Bo", "idx": 1, "label": 1}, {"text": "Leeds", "idx": 2, "label": 0}],
                },
                {"question": "What is sold?", "idx": 31, "answers": [{"text": "bread", "idx": 3, "label": 1}]},
            ],
        },
    },
    "record": {
        "source": "invented",
        "passage": {
            "text": BAKERY,
            "entities": [{"start": 0, "end": 2}, {"start": 23, "end": 27}, {"start": 50, "end": 51}],
        },
        "qas": [
            {
                "query": "On Sundays @placeholder is in the shop",
                "idx": 9,
                "answers": [{"start": 50, "end": 51, "text": "Bo"}, {"start": 0, "end": 2, "text": "Ada"}],
            }
        ],
        "idx": 2,
    },
    "rte": {"premise": "Ada sells bread.", "hypothesis": "Ada sells something.", "label": "not_entailment", "idx": 5},
    "wic": {
        "word": "roll",
        "sentence1": "A roll with cheese.",
        "sentence2": "Roll the dough.",
        "start1": 2,
        "end1": 6,
        "start2": 0,
        "end2": 4,
        "idx": 6,
        "version": 1.1,
        "label": False,
    },
    "wsc": {
        "text": "Ada thanked Bo because he had baked.",
        "target": {"span1_index": 2, "span1_text": "Bo", "span2_index": 4, "span2_text": "he"},
        "idx": 8,
        "label": True,
    },
    "cnn_dailymail": {"id": "a", "article": BAKERY, "highlights": "Ada bakes .\nBo helps ."},
    "xsum": {"id": 3, "document": BAKERY, "summary": "A bakery opened."},
    "huatuo": {"question": "我昨天开始咳嗽。今天喉咙也痛。应该吃什么药？", "answer": "多喝水，注意休息。"},
    "jsonl": {"prompt": "Two and two make", "answer": "four"},
}

# First prompt of the record and its answer, written from the paper's table.
FIRST: dict[str, tuple[str, str]] = {
    "boolq": (f"{BAKERY} Question: does the bakery sell rye bread? Answer:", " Yes"),
    "cb": ('"Bo had gone"? | [MASK], "It was late. Ada thought that Bo had gone"', " Maybe"),
    "copa": ('Choice A: "It fell." or Choice B: "It was full." Premise: The glass broke. The cause is', " A"),
    "multirc": (f'"{BAKERY}" Question: Who helps? Is it answer "Bo"?', " Yes"),
    "record": (f"[{BAKERY}][On Sundays [MASK] is in the shop]", " Bo"),
    "rte": ('"Ada sells something."? | [MASK], "Ada sells bread."', " No"),
    "wic": ('"A roll with cheese." / "Roll the dough." Similar sense of roll?', " No"),
    "wsc": ("[Ada thanked Bo because he had baked.] The pronoun '*he*' refers to Bo?", " Yes"),
    "cnn_dailymail": (BAKERY, "\nAda bakes .\nBo helps ."),
    "xsum": (BAKERY, "\nA bakery opened."),
    "huatuo": ("我昨天开始咳嗽。今天喉咙也痛。应该吃什么药？", "\n多喝水，注意休息。"),
    "jsonl": ("Two and two make", " four"),
}

# Records as `datasets` gives them: flat, with numbers for labels.
HUB: dict[str, list[dict[str, Any]]] = {
    **{
        task: [{**RECORDS[task], "label": number}] for task, number in {"boolq": 1, "cb": 2, "rte": 1, "wic": 0}.items()
    },
    "copa": [RECORDS["copa"]],
    "wsc": [
        {
            "text": RECORDS["wsc"]["text"],
            "span1_index": 2,
            "span2_index": 4,
            "span1_text": "Bo",
            "span2_text": "he",
            "idx": 8,
            "label": 1,
        }
    ],
    "multirc": [
        {
            "paragraph": BAKERY,
            "question": question,
            "answer": answer,
            "label": label,
            "idx": {"paragraph": 7, "question": number, "answer": place},
        }
        for place, (question, answer, label, number) in enumerate(
            [("Who helps?", "Bo", 1, 30), ("Who helps?", "Leeds", 0, 30), ("What is sold?", "bread", 1, 31)]
        )
    ],
    "record": [
        {
            "passage": BAKERY,
            "query": "On Sundays @placeholder is in the shop",
            "entities": ["Ada", "Leeds", "Bo"],
            "answers": ["Bo", "Ada"],
            "idx": {"passage": 2, "query": 9},
        }
    ],
    **{task: [RECORDS[task]] for task in ("cnn_dailymail", "xsum", "huatuo")},
}


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path
