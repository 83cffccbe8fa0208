"""How near a codec's copies of recordings are to them: PESQ, STOI, the distance of mel spectra, and a judge of yours.

mel_distance  between the log-mel spectra, in the first resolution that the codec is trained with; 0 is a perfect copy
stoi          short-time objective intelligibility (`pystoi`), at most 1
pesq          ITU-T P.862.2 wideband at 16 kHz (`pesq`), 1.04 to 4.64
mos           what a function of yours says of a copy: MODULE:FUNCTION, called with samples (n,) float32 and their rate
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.data.audio import AudioConfig, read_audio
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import ID
from vita_jax.evaluation.answering import Progress
from vita_jax.evaluation.asking import KeptAnswers, mark
from vita_jax.evaluation.bootstrap import interval
from vita_jax.evaluation.sets import SOUNDS
from vita_jax.evaluation.subject import Subject
from vita_jax.evaluation.waves import copy_waves, mel_distances
from vita_jax.ops.filter_bank import resample

PACKAGES = ("pystoi", "pesq")
PESQ_RATE, PESQ_MODE = 16_000, "wb"
# What PESQ and STOI can be taken of: the former wants 1/4 s, the latter 30 frames of 256 samples at 10 kHz.
SHORTEST_SECONDS = 0.5
MEASURES = ("mel_distance", "stoi", "pesq", "mos")
SEED = 0
# Sounds between two writes of lines.
AT_ONCE = 32

Mos = Callable[[np.ndarray, int], float]


def load_mos(name: str) -> Mos:
    """The function MODULE:FUNCTION. Raises UserError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--mos {name}: expected MODULE:FUNCTION that can be imported ({error})") from error
    if not callable(found):
        raise UserError(f"--mos {name} is no function")
    return found


def missing_packages() -> list[str]:
    """Which of PACKAGES are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def measure_copies(
    subject: Subject,
    folder: Path,
    kept: KeptAnswers,
    identity: str = "",
    mos: Mos | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Copies every sound of a folder through the model's codec, each in its own voice.

    Args:
      subject: a model with a codec.
      folder: sounds, at any depth.
      kept: gets the lines as they are made; those of an earlier call are not measured again.
      identity: what else a line depends on: the model, see `opening.identity`, and the judge by its name.
      mos: see the top of this file.
      progress: called with (copied, total), first with those that were kept.

    Returns:
      {"num_items", "sampling_rate", "figures": {measure: {"value", "low", "high" (95 % bootstrap interval), "n"}}}: a
      file of silence has no PESQ; and a line for every file: {"question_id" and "file" (its path), "seconds", the
      measures, "model_id", "asked" (see `asking`)}.

    Raises:
      UserError: no codec, no sound, a sound that is too short or damaged, or a package is missing.
    """
    model = subject.config.model
    if model.codec is None or model.codec_training is None:
        raise UserError("copies need a codec; this model has none")
    if missing := missing_packages():
        raise UserError(f"copies are measured by {' and '.join(missing)}: pip install 'vita_jax[quality]'")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SOUNDS)
    if not files:
        raise UserError(f"{folder} has no sound ({', '.join(sorted(SOUNDS))})")
    names = {path: path.relative_to(folder).as_posix() for path in files}
    marks = {path: mark([name, path.stat().st_size, identity]) for path, name in names.items()}
    known = {path: kept.find(name, marks[path]) for path, name in names.items()}
    left = [path for path in files if known[path] is None]
    for start in range(0, len(left), AT_ONCE):
        if progress is not None:
            progress(len(files) - len(left) + start, len(files))
        part = left[start : start + AT_ONCE]
        new = [
            {ID: names[path], "file": names[path], **line, "model_id": kept.model_name, "asked": marks[path]}
            for path, line in zip(part, _copied(subject, part, mos), strict=True)
        ]
        kept.add(new)
        known |= dict(zip(part, new, strict=True))
    if progress is not None:
        progress(len(files), len(files))
    lines = list(known.values())
    return {"num_items": len(lines), "sampling_rate": model.codec.sampling_rate, "figures": figures(lines)}, lines


def _copied(subject: Subject, files: Sequence[Path], mos: Mos | None) -> list[dict[str, Any]]:
    """{"seconds", and the measures} of every file. Raises UserError for one that is too short or damaged."""
    model, rate = subject.config.model, subject.config.model.codec.sampling_rate
    waves = [read_audio(path, AudioConfig(), sample_rate=rate) for path in files]
    for path, wave in zip(files, waves, strict=True):
        if len(wave) < SHORTEST_SECONDS * rate:
            raise UserError(f"{path}: {len(wave) / rate:.2f} s of sound; at least {SHORTEST_SECONDS} s are needed")
    copies = copy_waves(model, subject.params, waves)
    distances = mel_distances(waves, copies, rate, model.codec_training.losses)
    lines = []
    for wave, copy, distance in zip(waves, copies, distances, strict=True):
        line = {"seconds": len(wave) / rate, "mel_distance": distance}
        line |= {"stoi": stoi(wave, copy, rate), "pesq": pesq(wave, copy, rate)}
        lines.append(line if mos is None else {**line, "mos": float(mos(copy, rate))})
    return lines


def figures(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean of every measure over the files that have it; see `measure_copies`."""
    found = {}
    for name in MEASURES:
        values = np.array([line[name] for line in lines if line.get(name) is not None])
        if len(values):
            low, high = interval([values], SEED)
            found[name] = {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}
    return found


def stoi(wave: np.ndarray, copy: np.ndarray, rate: int) -> float | None:
    """Of a copy (n,) beside its recording (n,); None where too little of it is louder than silence."""
    from pystoi import stoi as measured

    with warnings.catch_warnings():
        # Which it says, returning 1e-5. Other warnings, of NumPy say, are no reason to leave a sound out.
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(measured(wave, copy, rate))
        except RuntimeWarning:
            return None


def pesq(wave: np.ndarray, copy: np.ndarray, rate: int) -> float | None:
    """Of a copy (n,) beside its recording (n,); None where it finds nothing that is said."""
    from pesq import NoUtterancesError
    from pesq import pesq as measured

    both = (resample(np.asarray(x, np.float32), rate, PESQ_RATE) for x in (wave, copy))
    try:
        return float(measured(PESQ_RATE, *both, PESQ_MODE))
    except NoUtterancesError:
        return None


def format_copies(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"copies of {result['num_items']} sounds at {result['sampling_rate']} Hz"]
    for name, found in result["figures"].items():
        reach = f"{found['low']:.3f} .. {found['high']:.3f}"
        lines.append(f"{name:13}{found['value']:7.3f}  (95 % interval {reach}, {found['n']} sounds)")
    return "\n".join(lines)
