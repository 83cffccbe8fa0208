"""`python -m data_pipelines.show --config=FILE`: a batch of a stage as text, a picture of what is seen and heard."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vita_jax import config as config_lib
from vita_jax.command_line import options_of, run_with_config, whole_number
from vita_jax.errors import UserError

HELP = """\
usage: python -m data_pipelines.show --config=FILE [--config.FIELD=VALUE ...] [--stage=NAME] [--rows=N] [...]

Prints what a training step gets: the prompt with the text that is trained on marked (green in a terminal, else «»),
features as [n features a..b]. Saves tiles and sounds of the same rows as a picture. Data that are missing are built.

  --config=FILE     as for vita_jax.train
  --stage=NAME      of the experiment; default the first
  --rows=N          of the batch; default 1
  --batch=N         which batch, from 0; default 0
  --picture=FILE    PNG; default batch.png

examples:
  python -m data_pipelines.show --config=experiments/quickstart.py --stage=audio_sft
  python -m data_pipelines.show --config=experiments/quickstart.py --config.run_dir=runs/mine --stage=codec --rows=4
"""
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
DEFAULTS = {"stage": "", "rows": "1", "batch": "0", "picture": "batch.png"}
COLUMNS, CELL_INCHES, DPI = 8, 1.5, 110
CELLS_AT_MOST = 96
SPECTRUM = (400, 160)  # samples per window and hop, of waves that are shown as spectra


def show(arguments: config_lib.ConfigArgs) -> int:
    """Prints the batch and saves its picture. Returns the exit status."""
    # Imported here so that --help and a mistyped flag answer at once.
    from vita_jax.data.document_loader import format_mixture
    from vita_jax.data.loader import format_batch
    from vita_jax.training.experiment_file import open_stage
    from vita_jax.training.loop import record_batches

    options = options_of(arguments.rest, DEFAULTS)
    rows, number = whole_number(options, "rows", 1), whole_number(options, "batch", 0)
    config, stage, tokenizer = open_stage(arguments.file, arguments.overrides, options["stage"])
    batches = record_batches(config, stage, tokenizer=tokenizer)
    for _ in range(number):
        next(batches)
    batch = next(batches)
    batches.close()
    marks = (GREEN, PLAIN) if sys.stdout.isatty() else ("«", "»")
    print(f"batch {number} of {stage.title}")
    if stage.sets:
        print(format_mixture(batch, tokenizer, rows, marks))
    elif "tokens" in batch or "cell_names" in batch:
        print(format_batch(batch, tokenizer, rows, marks))
    else:
        print(_format_speech(batch, tokenizer, rows))
    bank, codec = config.audio.filter_bank, config.model.codec
    cells = cells_of(batch, rows, 1e3 / bank.frame_shift_ms, bank.sample_rate if codec is None else codec.sampling_rate)
    if cells:
        draw(cells, options["picture"])
        print(f"picture: {options['picture']}")
    return 0


def _format_speech(batch: Mapping[str, np.ndarray], tokenizer: Any, rows: int) -> str:
    """Shapes, and the texts of sentences."""
    lines = [f"{name}: {array.dtype} {array.shape}" for name, array in batch.items()]
    if "text_tokens" in batch:
        for row, (ids, length) in enumerate(zip(batch["text_tokens"], batch["text_lengths"], strict=True)):
            if row < rows:
                text = tokenizer.decode(ids[:length].tolist())
                lines.append(f"row {row}: {batch['frames'][row]} codec frames: {text}")
    return "\n".join(lines)


Cell = tuple[str, np.ndarray]  # title, and an RGB picture (h w 3) uint8 or a spectrum (f t) float


def cells_of(batch: Mapping[str, np.ndarray], rows: int, frame_rate: float, wave_rate: int) -> list[Cell]:
    """What there is to see in the first rows: tiles or pictures, filter-bank features, and spectra of waves.

    Args:
      batch: of any stage; its empty slots are left out.
      rows: how many.
      frame_rate, wave_rate: features and samples of waves per second.
    """
    cells: list[Cell] = []
    for name, pictures in batch.items():
        if name.endswith("/images"):
            shown = np.argwhere(pictures[:rows].any(axis=(3, 4, 5)))
            cells += [(f"{name.split('/')[0]} {row}, [{t + 1}]", pictures[row, t, f]) for row, t, f in shown]
    for row in range(min(rows, len(next(iter(batch.values()))))):
        for i, tile in enumerate(batch["tiles"][row] if "tiles" in batch else ()):
            if np.any(tile):
                cells.append((f"row {row}, tile {i}", np.asarray(tile, np.uint8)))
        for i, sound in enumerate(batch["audio"][row] if "audio" in batch else ()):
            frames = int(batch["audio_lengths"][row, i])
            if frames:
                cells.append((f"row {row}, sound {i}: {frames / frame_rate:.2f} s", np.asarray(sound[:frames]).T))
        if "features" in batch:
            frames = int(batch["lengths"][row])
            cells.append((f"row {row}: {frames / frame_rate:.2f} s", np.asarray(batch["features"][row, :frames]).T))
        if "waves" in batch:
            wave = np.trim_zeros(np.asarray(batch["waves"][row]), "b")
            if len(wave) >= SPECTRUM[0]:
                cells.append((f"row {row}: {len(wave) / wave_rate:.2f} s", _spectrum(wave)))
    return cells


def _spectrum(wave: np.ndarray) -> np.ndarray:
    """Logarithm of the magnitudes: (n,) -> (f t)."""
    size, hop = SPECTRUM
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[::hop] * np.hanning(size)
    return np.log(np.abs(np.fft.rfft(frames)).T + 1e-4)


def draw(cells: Sequence[Cell], path: str | Path) -> None:
    """Saves the cells as one PNG, `CELLS_AT_MOST` of them.

    Raises:
      UserError: the file cannot be written.
    """
    cells = cells[:CELLS_AT_MOST]
    columns = min(COLUMNS, len(cells))
    lines = -(-len(cells) // columns)
    figure = Figure(figsize=(columns * CELL_INCHES, lines * CELL_INCHES), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, content) in zip(axes, cells, strict=False):
        spectrum = content.ndim == 2
        axis.imshow(content, origin="lower" if spectrum else "upper", aspect="auto" if spectrum else "equal")
        axis.set_title(title, fontsize=7)
    try:
        figure.savefig(path, format="png", dpi=DPI)
    except OSError as error:
        raise UserError(f"--picture={path} cannot be written: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_with_config(show, HELP, argv)


if __name__ == "__main__":
    sys.exit(main())
