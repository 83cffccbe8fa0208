"""`python -m data_pipelines.rows --config=FILE`: how full a stage's packed rows are, and which budgets fill them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from vita_jax import config as config_lib
from vita_jax.command_line import options_of, run_with_config, whole_number
from vita_jax.data import packing
from vita_jax.data.examples import Limits
from vita_jax.errors import UserError

if TYPE_CHECKING:
    from vita_jax.data.tokenizer import Tokenizer
    from vita_jax.training.experiment import ExperimentConfig
    from vita_jax.training.stages import Stage

HELP = """\
usage: python -m data_pipelines.rows --config=FILE [--config.FIELD=VALUE ...] [--stage=NAME] [--records=N]

Measures records of a stage as training would see them (positions, picture tiles, sounds), packs them with the budgets
of the stage, and says how much of each budget is used, how many records fit, and with how few tiles and sounds a row
would be filled. Plan rows with it before a long run: unused positions cost as much as used ones.

  --config=FILE     as for vita_jax.train
  --stage=NAME      of the experiment, one that trains on records; default the first
  --records=N       to measure, evenly drawn; default 2000
  --target=X        share of the positions that is to be used; default 0.95

examples:
  python -m data_pipelines.rows --config=experiments/quickstart.py --stage=vision_sft
  python -m data_pipelines.rows --config=experiments/own_data.py --config.data.json=my.json --config.data.root=media \\
      --stage=vision_sft --records=500
"""
DEFAULTS = {"stage": "", "records": "2000", "target": "0.95"}
SEARCHED = 4  # times what the largest record needs, or what the stage has: no row is given more tiles or sounds


@dataclasses.dataclass(frozen=True)
class Size:
    """What one example takes of a row: positions, tile slots and sounds."""

    positions: int
    tiles: int
    clips: int


@dataclasses.dataclass(frozen=True)
class Fill:
    """How examples lie in rows: the number of rows, of the examples in them, and the shares of the budgets used."""

    rows: int
    examples: int
    positions: float
    tiles: float
    clips: float


def fill_of(sizes: Sequence[Size], limits: Limits, bins: int, seed: int = 0) -> Fill:
    """Packs examples of these sizes as the loader does; those that need more than a row has are left out.

    Args:
      sizes: in the order in which the loader would see them.
      limits: budgets of a row.
      bins: rows that are open at the same time.
    """
    fit = [s for s in sizes if s.positions <= limits.row_length and s.tiles <= limits.row_tiles]
    fit = [s for s in fit if s.clips <= limits.row_clips]
    examples = grain.MapDataset.source([_stand_in(s, limits) for s in fit]).to_iter_dataset()
    budgets = {"row_length": limits.row_length, "row_tiles": limits.row_tiles, "row_clips": limits.row_clips}
    rows = list(packing.pack(examples, **budgets, bins=bins, seed=seed)) if fit else []

    def share(used: int, budget: int) -> float:
        return used / (budget * len(rows)) if rows and budget else 0.0

    return Fill(
        len(rows),
        len(fit),
        share(sum(s.positions for s in fit), limits.row_length),
        share(sum(s.tiles for s in fit), limits.row_tiles),
        share(sum(s.clips for s in fit), limits.row_clips),
    )


def _stand_in(size: Size, limits: Limits) -> dict[str, np.ndarray]:
    """An example of this size whose tiles and sounds are next to nothing."""
    example = {
        "text": np.zeros((size.positions, len(packing.COLUMNS)), np.int32),
        "tiles": np.zeros((size.tiles, 1), np.uint8),
    }
    if limits.row_clips:
        example |= {"audio": np.zeros((size.clips, 1), np.float32), "audio_lengths": np.ones(size.clips, np.int32)}
    return example


def least_budgets(sizes: Sequence[Size], limits: Limits, target: float, bins: int) -> tuple[Limits, Fill] | None:
    """The fewest tiles and sounds of a row that use `target` of the positions; None if there are none.

    Both grow together from what the largest example needs, in proportion to what the examples need on average.
    """
    fit = [s for s in sizes if s.positions <= limits.row_length]
    tiles, clips = (max((getattr(s, name) for s in fit), default=0) for name in ("tiles", "clips"))
    most = max(tiles, clips, 1)
    highest = max(SEARCHED, limits.row_tiles / max(tiles, 1), limits.row_clips / max(clips, 1))
    for step in range(math.ceil((highest - 1) * most) + 1):
        factor = 1 + step / most
        tried = dataclasses.replace(limits, row_tiles=round(tiles * factor), row_clips=round(clips * factor))
        found = fill_of(sizes, tried, bins)
        if found.positions >= target:
            return tried, found
    return None


def plan(arguments: config_lib.ConfigArgs) -> int:
    """Measures and prints. Returns the exit status."""
    # Imported here so that --help and a mistyped flag answer at once.
    from vita_jax.training.experiment_file import open_stage

    options = options_of(arguments.rest, DEFAULTS)
    count, target = whole_number(options, "records", 1), _target(options["target"])
    config, stage, tokenizer = open_stage(arguments.file, arguments.overrides, options["stage"])
    sizes, bad = measure(config, stage, tokenizer, count)
    limits = Limits(stage.row_length, stage.row_tiles, stage.row_clips, stage.clip_frames)
    bins = max(stage.batch_size // (config.data.lanes or 1), 8)  # as the loader's default
    print("\n".join(report(stage.title, sizes, bad, limits, bins, target)))
    return 0


def _target(text: str) -> float:
    try:
        target = float(text)
    except ValueError:
        target = -1.0
    if not 0 < target <= 1:
        raise UserError(f"--target={text} must be a share above 0, at most 1")
    return target


def measure(
    config: ExperimentConfig, stage: Stage, tokenizer: Tokenizer, count: int
) -> tuple[list[Size], Counter[str]]:
    """The sizes of `count` examples of a stage in the order of training, and what could not be used, by reason.

    Raises:
      UserError: the stage does not train on packed records, or its data are missing.
    """
    from vita_jax.data.examples import training_example
    from vita_jax.data.loader import record_stream
    from vita_jax.data.records import RecordError, decode_record
    from vita_jax.training.experiment import data_folder, example_context

    if stage.objective not in ("language_modeling", "text_pretraining"):
        raise UserError(f"stage {stage.name} trains by {stage.objective!r}, not on packed rows; give another --stage")
    sources = [dataclasses.replace(source, path=str(data_folder(config) / source.path)) for source in stage.sources]
    context = example_context(config, tokenizer, stage)
    seed = config.seed + config.stages.index(stage)
    records, total = record_stream(sources, seed=seed, shuffle=True, num_epochs=None)
    sizes, bad = [], Counter[str]()
    for index in range(min(count, total)):
        number, data = records[index]
        try:
            example = training_example(decode_record(data), context, split_rounds=sources[number].split_rounds)
        except RecordError as error:
            bad[error.category] += 1
            continue
        clips = example.get("audio_lengths", ())
        if len(clips) and max(clips) > stage.clip_frames:
            bad["sound too long"] += 1
            continue
        size = Size(len(example["tokens"]), len(example["tiles"]), len(clips))
        if context.cut_text and not size.tiles and not size.clips:
            size = dataclasses.replace(size, positions=min(size.positions, stage.row_length))
        sizes.append(size)
    return sizes, bad


def report(title: str, sizes: Sequence[Size], bad: Counter[str], limits: Limits, bins: int, target: float) -> list[str]:
    """The lines that are printed."""
    lines = [f"{title}: {len(sizes)} records measured"]
    lines += [f"  cannot be used: {number} ({reason})" for reason, number in sorted(bad.items())]
    for name, unit in (("positions", "positions"), ("tiles", "tiles"), ("clips", "sounds")):
        values = np.asarray([getattr(size, name) for size in sizes] or [0])
        high = np.percentile(values, 95)
        lines.append(f"  {unit} of a record: mean {values.mean():.1f}, 95 % {high:.0f}, most {values.max()}")
    found = fill_of(sizes, limits, bins)
    lines.append(f"rows of {_budgets(limits)}: {_filled(found, limits)}")
    if len(sizes) > found.examples:
        lines.append(f"  {len(sizes) - found.examples} records need more than a row has and would be left out")
    least = least_budgets(sizes, limits, target, bins)
    if least is None:
        lines.append(f"no tiles and sounds fill {target:.0%} of {limits.row_length} positions; raise row_length")
    elif found.positions < target or (least[0].row_tiles, least[0].row_clips) < (limits.row_tiles, limits.row_clips):
        lines.append(f"the least that fills {target:.0%}: {_budgets(least[0])}: {_filled(least[1], least[0])}")
    return lines


def _budgets(limits: Limits) -> str:
    parts = [f"{limits.row_length} positions", f"{limits.row_tiles} tiles", f"{limits.row_clips} sounds"]
    return ", ".join(part for part in parts if not part.startswith("0 "))


def _filled(found: Fill, limits: Limits) -> str:
    used = [f"{found.positions:.1%} of the positions used"]
    used += [f"{found.tiles:.1%} of the tiles"] if limits.row_tiles else []
    used += [f"{found.clips:.1%} of the sounds"] if limits.row_clips else []
    return ", ".join(used) + f"; {found.examples / max(found.rows, 1):.1f} records in a row"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_with_config(plan, HELP, argv)


if __name__ == "__main__":
    sys.exit(main())
