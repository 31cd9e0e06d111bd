"""Suite `generation`: time of a token through the split, beside the uncut model's own `generate`.

The trunk is a process of its own at the other end of a sealed link; both models answer the same prompts in turn, and
their tokens are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc.bench.load import Monitor
from hpc.bench.markdown import footer, span
from hpc.bench.markdown import table as markdown_table
from hpc.bench.suite import Figures, Measured, Options, Raw, Suite
from hpc.report.drawing import BLUE, GREEN, GREY, new_figure, save

TOKENS = 40
WARM_UP = 2
LIMIT = 1.25  # time of a token, times the uncut model's
PROMPTS = ("The capital of France is", "A hospital is", "Two and two make", "The night nurse wrote that")
WAYS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "greedy, 1 prompt": (1, {}),
    "greedy, 4 prompts": (4, {}),
    "3 beams, 1 prompt": (1, {"num_beams": 3}),
}


def measure(options: Options) -> Measured:
    """Every turn is one answer of each model to the same prompts."""
    from transformers import AutoModelForCausalLM

    from hpc.ask import encode
    from hpc.generate import split_model

    rounds: dict[str, list[dict[str, float]]] = {}
    with Monitor() as monitor, split_model(options.config) as split:
        plain = AutoModelForCausalLM.from_pretrained(str(split.name_or_path), trust_remote_code=False).eval()
        for way, (count, extra) in WAYS.items():
            print(f"generation: {way}", file=sys.stderr, flush=True)
            ids_BT, mask_BT = encode(split, PROMPTS[:count])
            given = {"attention_mask": mask_BT, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
            taken = [
                _turn(split, plain, ids_BT, {**given, "do_sample": False, **extra})
                for _ in range(options.turns + WARM_UP)
            ]
            rounds[way] = taken[WARM_UP:]
    config = options.config
    setting = {
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "cut": [config.model.head_blocks, config.model.tail_blocks],
        "tokens": TOKENS,
        "turns": options.turns,
        "warm_up_turns": WARM_UP,
    }
    return {"setting": setting, "rounds": rounds, "shares": monitor.share()}


def _turn(split: Any, plain: Any, ids_BT: Any, given: dict[str, Any]) -> dict[str, float]:
    start = time.perf_counter()
    ours = split.generate(ids_BT, **given)
    middle = time.perf_counter()
    theirs = plain.generate(ids_BT, **given)
    end = time.perf_counter()
    return {
        "split": (middle - start) / TOKENS,
        "uncut": (end - middle) / TOKENS,
        "same_tokens": float(ours.equal(theirs)),
    }


def figures(measured: Mapping[str, Any]) -> Figures:
    """Seconds of a token, and the ratio turn by turn."""
    rows = []
    for way, rounds in measured["rounds"].items():
        ratios = [each["split"] / each["uncut"] for each in rounds]
        row = {"way": way, "same_tokens": all(each["same_tokens"] for each in rounds)}
        row |= {name: _spread([each[name] for each in rounds]) for name in ("split", "uncut")}
        rows.append({**row, "ratio": _spread(ratios), "met": statistics.median(ratios) <= LIMIT})
    return {"ways": rows, "limit": LIMIT}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(raw: Raw) -> str:
    own, found = raw["measured"]["setting"], figures(raw["measured"])
    head, tail = own["cut"]
    rows = [
        (
            row["way"],
            f"{1000 * row['split']['median']:.1f} ms",
            f"{1000 * row['uncut']['median']:.1f} ms",
            f"{row['ratio']['median']:.3f}",
            span(row["ratio"], ".3f"),
            "yes" if row["same_tokens"] else "NO",
            "met" if row["met"] else "not met",
        )
        for row in found["ways"]
    ]
    columns = ("answer", "split, a token", "uncut, a token", "ratio", "range", "same tokens", f"at most {LIMIT}")
    others = raw["measured"]["shares"]["others"]
    parts = [
        "# Generation through the split",
        f"{own['model']} ({own['dtype']}, cut {head} / trunk / {tail}), {own['tokens']} new tokens, the trunk in a "
        f"process of its own behind a sealed link. Both models answer the same prompts in turn; {own['turns']} turns "
        f"count, after {own['warm_up_turns']} to warm up. The uncut model is transformers' own `generate`.",
        markdown_table(columns, rows),
        f"Other processes had {others:.1%} of the cores meanwhile.",
        *footer(raw),
    ]
    return "\n\n".join(parts) + "\n"


def draw(raw: Raw, path: Path) -> Path:
    """Bars are medians, dots the single turns."""
    measured = raw["measured"]
    rows = figures(measured)["ways"]
    figure, (axis,) = new_figure(8, 1.4 + 0.8 * len(rows))
    for place, row in enumerate(rows):
        for offset, name, colour in ((-0.2, "split", BLUE), (0.2, "uncut", GREY)):
            axis.barh(place + offset, 1000 * row[name]["median"], 0.35, color=colour, label=name if place == 0 else "")
            seconds = [1000 * each[name] for each in measured["rounds"][row["way"]]]
            axis.plot(seconds, [place + offset] * len(seconds), ".", color="black", markersize=4, alpha=0.6)
        goal = 1000 * LIMIT * row["uncut"]["median"]
        axis.plot([goal] * 2, [place - 0.4, place + 0.4], color=GREEN, linewidth=2, label="goal" if place == 0 else "")
    axis.set_yticks(range(len(rows)), [f"{row['way']}\n{row['ratio']['median']:.2f}x" for row in rows])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("time of a new token (ms)")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    own = measured["setting"]
    axis.set_title(f"Generation, {own['model']}, {raw['machine']['cores']} cores", loc="left", fontsize=11)
    return save(figure, path)


SUITE = Suite(title="Generation through the split", measure=measure, figures=figures, table=table, draw=draw)
