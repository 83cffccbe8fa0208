"""Writes the tables of full-size stages into the documents: what the configurations say, and what was planned.

    python -m experiments.stage_tables            # docs/stages.md, docs/llava.md, docs/flamingo.md
    python -m experiments.stage_tables --check    # writes nothing; status 1 if a document says otherwise

A table stands between `<!-- stages: NAME -->` and `<!-- end -->`. Its columns "trains" and "on" are a person's and stay
as they are; all others are of the stages' configurations and, where times are told, of the steps in docs/plans.md,
which `python -m experiments.plans` writes. What that has no line of is "not planned yet".
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from experiments.plans import DEVICE, ROOT, read_lines
from experiments.vita_1_0.curriculum import SLICES as SLICES_1_0
from experiments.vita_1_5.curriculum import SLICES as SLICES_1_5
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.config import load_config_file
from vita_jax.errors import UserError
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.optimizer import warmup_steps
from vita_jax.training.stages import Stage

PLANS = ROOT / "docs" / "plans.md"
COMMON = ("stage", "trains", "on", "rate", "optimiser, warm-up, schedule", "rows x length", "steps")
TIME = "takes at least (hours)"
SLICES = {"VITA-1.5": SLICES_1_5, "VITA-1.0": SLICES_1_0}
FRAMES_PER_SECOND = 100  # of the filter bank
# What a pattern of `learning_rate_scale` is called.
PARTS = {"^vision/": "tower", "^audio/encoder/": "speech encoder", "^audio/adapter/": "adapter"}


def scientific(rate: float) -> str:
    """0.0005 -> 5e-4."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def rates(stage: Stage) -> str:
    """The peak, and that of parts with one of their own."""
    named: dict[float, list[str]] = {}
    for pattern, factor in stage.learning_rate_scale:
        named.setdefault(factor, []).append(PARTS[pattern])
    others = [f"{' and '.join(parts)} {scientific(stage.learning_rate * by)}" for by, parts in named.items()]
    return ", ".join([scientific(stage.learning_rate), *others])


def optimiser(config: ExperimentConfig) -> str:
    """Name, moments, decay; steps of the warm-up; what comes behind it."""
    (stage,), common = config.stages, config.optimizer
    name = {"adamw": "AdamW", "muon": "Muon", "adafactor": "Adafactor"}[stage.optimizer]
    decay = f"decay {common.weight_decay:g}" if common.weight_decay else "no decay"
    warmup = warmup_steps(stage.steps, stage.warmup_ratio)
    schedule = {"cosine": "half a cosine", "constant": "constant"}[stage.schedule]
    return f"{name} {common.beta1:g}, {common.beta2:g}, {decay}; {warmup:,} steps; {schedule}"


def rows_of(config: ExperimentConfig) -> str:
    """Rows of a step and what a row has room for."""
    (stage,) = config.stages
    seconds = stage.codec_frames / config.model.codec.frame_rate if stage.codec_frames else 0
    length = {
        "ctc": f"{stage.clip_frames / FRAMES_PER_SECOND:g} s",
        "codec": f"{seconds:g} s",
        "speech_decoder": f"{stage.row_length} tokens, {seconds:g} s",
    }.get(stage.objective, f"{stage.row_length:,}")
    return f"{stage.batch_size} x {length}"


def step_seconds(line: str) -> float:
    """The least time of a step, of a line of docs/plans.md. Raises UserError if there is none."""
    found = re.search(r"\| ([\d.e+-]+) ms \|", line)
    if found is None:
        raise UserError(f"{PLANS.name}: there is no time of a step in {line!r}")
    return float(found[1]) / 1000


def hours(model: str, stage: Stage, lines: Mapping[str, str]) -> str:
    """Steps times the least time of a step, for every slice that the stage is laid out for."""
    told = []
    for slice in SLICES[model]:
        if slice != DEVICE:
            line = lines.get(f"{model} | {stage.title} | {slice}")
            told.append((slice, None if line is None else stage.steps * step_seconds(line) / 3600))
    if all(time is None for _, time in told):
        return "not planned yet"
    return ", ".join(f"{slice} {'not planned yet' if time is None else f'{time:,.3g}'}" for slice, time in told)


def written_by_hand(table: str) -> dict[tuple[str, str], str]:
    """(stage, column) -> cell, of the table as it is."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    head, *others = rows or [[]]
    return {(row[0], column): cell for row in others for column, cell in zip(head, row, strict=True)}


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown; steps are numbers, to the right."""
    rule = ["---:" if column == "steps" else "---" for column in columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def vita_table(model: str, folder: str, before: str, lines: Mapping[str, str]) -> str:
    """One of the two curricula; a stage of which nobody has written what it trains is an error."""
    kept, rows = written_by_hand(before), []
    for path in sorted((ROOT / "experiments" / folder).glob("stage_*.py")):
        config = load_config_file(path)
        (stage,) = config.stages
        name = f"`{path.stem}` {stage.title.split(' ', 1)[1]}"
        if (name, "trains") not in kept:
            raise UserError(f"docs/stages.md has no line that begins with {name}; write what it trains, and on what")
        by_hand = (name, kept[name, "trains"], kept[name, "on"])
        facts = (rates(stage), optimiser(config), rows_of(config), f"{stage.steps:,}")
        rows.append((*by_hand, *facts, hours(model, stage, lines)))
    return table_text((*COMMON, TIME), rows)


def llava_table() -> str:
    """Both versions and ScienceQA; both sizes of a version take the same, or have a line each."""
    rows: list[tuple[str, ...]] = []
    folder = ROOT / "experiments" / "llava"
    for path in (*sorted(folder.glob("*_stage_*.py")), folder / "scienceqa.py"):
        facts: dict[tuple[str, ...], list[str]] = {}
        for scale in ("7b", "13b"):
            config = load_config_file(path, {"scale": scale})
            (stage,) = config.stages
            told = (rates(stage), optimiser(config), rows_of(config), f"{stage.steps:,}")
            facts.setdefault(told, []).append(scale.upper())
        rows += [(f"`{path.stem}` {', '.join(scales)}", *told) for told, scales in facts.items()]
    return table_text((COMMON[0], *COMMON[3:]), rows)


def flamingo_table() -> str:
    """The runs of the 9B: every data set of a step with its rows, their length and its weight."""
    rows = []
    for name in ("pretrain", "finetune"):
        config = load_config_file(ROOT / "experiments" / "flamingo" / f"{name}.py")
        (stage,) = config.stages
        sets = [f"{d.name}: {d.batch_size:,} x {d.row_length:,}, weight {d.weight:g}" for d in stage.sets]
        rows.append((f"`{name}`", "; ".join(sets), rates(stage), optimiser(config), f"{stage.steps:,}"))
    return table_text(("run", "rows x length of a step", "rate", "optimiser, warm-up, schedule", "steps"), rows)


def with_tables(text: str, lines: Mapping[str, str]) -> str:
    """A document with its tables written anew."""

    def table(found: re.Match[str]) -> str:
        name, before = found[1], found[2]
        if name in SLICES:
            made = vita_table(name, name.lower().replace("-", "_").replace(".", "_"), before, lines)
        else:
            made = {"LLaVA": llava_table, "Flamingo": flamingo_table}[name]()
        return f"<!-- stages: {name} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- stages: (\S+) -->\n(.*?)<!-- end -->", table, text, flags=re.DOTALL)


def write(arguments: Namespace) -> int:
    """Writes, or compares; returns the exit status."""
    lines, status = read_lines(PLANS), 0
    for name in ("stages", "llava", "flamingo"):
        path = ROOT / "docs" / f"{name}.md"
        text = path.read_text(encoding="utf-8")
        made = with_tables(text, lines)
        if arguments.check and made != text:
            print(f"error: docs/{name}.md is not what the configurations say: python -m experiments.stage_tables")
            status = 1
        elif made != text:
            path.write_text(made, encoding="utf-8")
            print(f"written: docs/{name}.md")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = ArgumentParser(prog="python -m experiments.stage_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a document says otherwise")
    return run_command(write, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
