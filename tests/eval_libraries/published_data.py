"""Data sets as they are published on the hub, with a few questions each, in a folder.

`datasets` looks for `owner/name` below the working directory before it asks the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml

from vita_jax.evaluation.lmms.command import TASKS

Rows = Sequence[Mapping[str, Any]]
SUBJECTS = tuple(sorted(path.stem for path in (TASKS / "ceval").glob("*.yaml") if path.stem != "ceval"))
LETTERS = "ABCD"
SUMS = ((2, 3), (4, 4), (7, 1), (9, 5), (6, 2), (8, 3))


def write_ceval(folder: Path) -> None:
    """ceval/ceval-exam: five examples and one question of every subject; right is B, in law D."""
    dev = [_choice(number, LETTERS[number % 4]) for number in range(5)]
    subsets = {name: {"dev": dev, "val": [_choice(7, "D" if name == "law" else "B")]} for name in SUBJECTS}
    _write(folder / "ceval" / "ceval-exam", subsets)


def _choice(number: int, answer: str) -> dict[str, Any]:
    options = {letter: f"{number + place}" for place, letter in enumerate(LETTERS)}
    return {"id": number, "question": f"数{number}？", **options, "answer": answer, "explanation": ""}


def write_gsm8k(folder: Path) -> str:
    """gsm8k: five examples and one question. Returns what is asked, examples first."""
    rows = [
        {"question": f"{a} and {b}?", "answer": f"It is {a}+{b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        for a, b in SUMS
    ]
    _write(folder / "gsm8k", {"main": {"train": rows[:5], "test": rows[5:]}})
    examples = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows[:5]]
    return "\n\n".join([*examples, f"Question: {rows[5]['question']}\nAnswer:"])


def _write(folder: Path, subsets: Mapping[str, Mapping[str, Rows]]) -> None:
    """A repository of Parquet files: CONFIG/SPLIT-00000-of-00001.parquet, which the head of its README.md lists."""
    configs = []
    for config, splits in subsets.items():
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        configs.append({"config_name": config, "data_files": files})
        for split, rows in splits.items():
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(list(rows)).to_parquet(path)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
