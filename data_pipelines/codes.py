"""`python -m data_pipelines.codes`: recordings of a voice -> the codec's tokens of them, for stage 3.2.

Stage 3.2 trains the speech decoders on the codec's tokens. From sound it computes them in every step; from a manifest
with tokens it does not, which pays for large sets and for many epochs (VITA-1.5, arXiv 2501.01957, section 3.3.3,
prepares 3,000 h so). OUTPUT gets manifest.jsonl, whose lines have `codes` beside what they had, rejects.jsonl, and
codec.json, by which training notices the tokens of another codec.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.build import Line, add_budget, add_runner, runner_of
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.parts import Progress, Report, Runner

EXAMPLES = """\
examples:
  python -m data_pipelines.codes --checkpoint runs/mine --from voice --output voice_codes
  python -m data_pipelines.codes --checkpoint runs/mine --from voice.jsonl --output voice_codes \\
      --runner-option direct_running_mode=multi_processing --runner-option direct_num_workers=8
"""
PART_LINES = 500
PADDED_TO = 25  # frames: recordings of about one length share a compiled program


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m data_pipelines.codes", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="whose codec it is: a run, or kept weights")
    parser.add_argument("--from", dest="source", required=True, metavar="PATH", help="a manifest, or its folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new, or an earlier one of this command")
    add_budget(parser)
    add_runner(parser)
    return parser


@functools.lru_cache(maxsize=1)
def _codec(checkpoint: str) -> tuple[Any, Callable[[np.ndarray, int], np.ndarray], str]:
    """(configuration, samples and frames -> codes (t,), fingerprint) of a checkpoint's codec."""
    import jax
    import numpy as np

    from vita_jax.models.codec.codec import Codec
    from vita_jax.training.checkpoint import load_params
    from vita_jax.training.speech_batches import codec_fingerprint

    loaded = load_params(checkpoint)
    config, params = loaded.config.model.codec, loaded.params.get("codec")
    if config is None or params is None:
        raise UserError(f"checkpoint {checkpoint} has no codec; give a run whose stage 3.1 is done")
    if config.num_quantizers != 1:
        raise UserError(f"the codec of {checkpoint} has {config.num_quantizers} codes per frame; stage 3.2 takes one")
    encode = jax.jit(lambda waves, frames: Codec(config).apply({"params": params}, waves, frames, method=Codec.encode))

    def codes(samples: np.ndarray, frames: int) -> np.ndarray:
        padded = -(-frames // PADDED_TO) * PADDED_TO * config.hop
        waves = np.pad(samples, (0, padded - len(samples)))[None]
        return np.asarray(encode(waves, np.asarray([frames], np.int32))[0])[0, :frames, 0]

    return config, codes, codec_fingerprint(params)


@dataclass(frozen=True)
class CodesBuilder:
    """The work of one part: its recordings are encoded."""

    checkpoint: str
    output: str

    def __call__(self, part: Path, report: Report) -> dict[str, list[dict[str, Any]]]:
        """Lines of the manifest, and of the rejects."""
        from data_pipelines.parts import read_part
        from vita_jax.data.records import RecordError
        from vita_jax.data.speech_pairs import read_wave

        config, codes, _ = _codec(self.checkpoint)
        good, bad = [], []
        for _, entry in read_part(part):
            try:
                samples = read_wave(entry["path"], config.sampling_rate)
                found = codes(samples, -(-len(samples) // config.hop)).tolist()
                audio = os.path.relpath(entry["path"], self.output)
                good.append({**entry["line"], "audio": audio, "codes": found})
            except RecordError as error:
                bad.append({"place": entry["place"], "category": error.category, "reason": str(error)})
            report.show(done=len(good) + len(bad), rejected=len(bad))
        return {"good": good, "bad": bad}


def build_codes(
    checkpoint: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_bad_fraction: float = 0.01,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes the folder described at the top of this file.

    Args:
      checkpoint: see `load_params`; whose codec makes the tokens.
      source: a manifest of recordings with their texts, see `vita_jax.data.speech_pairs`, or its folder.
      output: folder to make; an earlier result in it is replaced, anything else is refused.
      max_bad_fraction: of the recordings; more that cannot be read are an error.
      runner: who does the work; None = this process.
      progress: called with a short line now and then.

    Returns:
      Counts of "recordings", "codes" and "rejected".

    Raises:
      UserError: no codec of one token per frame, no manifest, a refused output, too many rejects (all of them are then
        in OUTPUT.rejects.jsonl and `output` is as before).
    """
    from data_pipelines.parts import (
        LOCAL,
        deal_out,
        file_state,
        forget,
        forget_work,
        replace_folder,
        run_parts,
        shown_counts,
        work_folder,
    )
    from data_pipelines.rejects import REJECTS_NAME, beside, check_budget, check_budget_bounds, check_output
    from vita_jax.data.manifests import CODEC_FILE, MANIFEST, manifest_file, read_manifest

    check_budget_bounds(max_bad_fraction)
    output = Path(output).absolute()
    check_output(output, (CODEC_FILE,))
    pairs, fingerprint = read_manifest(source), _codec(checkpoint)[2]
    lines = [json.loads(line) for line in manifest_file(source).read_text("utf-8-sig").split("\n") if line.strip()]
    entries = [
        {"path": str(pair.audio.resolve()), "place": pair.place, "line": line}
        for pair, line in zip(pairs, lines, strict=True)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    inputs = json.dumps([fingerprint, entries, [file_state(pair.audio) for pair in pairs]])
    work = work_folder(output, hashlib.sha256(inputs.encode()).hexdigest())
    total = deal_out(entries, work, lambda place: place // PART_LINES)
    builder, shown = CodesBuilder(checkpoint, str(output.resolve())), shown_counts("recordings", total, progress)
    results = run_parts(work, builder, runner or LOCAL, shown)
    good, bad = ([line for result in results for line in result[kind]] for kind in ("good", "bad"))
    new = work / "output"
    new.mkdir(exist_ok=True)
    files = {MANIFEST: good, REJECTS_NAME: bad, CODEC_FILE: [{"codec": fingerprint, "checkpoint": checkpoint}]}
    for name, content in files.items():
        (new / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content), "utf-8")
    try:
        first = bad[0]["reason"] if bad else ""
        check_budget(str(source), "recordings", len(bad), total, max_bad_fraction, beside(output), first)
    except UserError:
        shutil.copyfile(new / REJECTS_NAME, beside(output))
        forget(work, lambda result: bool(result["bad"]))  # what failed once may work when it is tried again
        raise
    replace_folder(new, output)
    forget_work(output)
    beside(output).unlink(missing_ok=True)
    return {"recordings": len(good), "codes": sum(len(line["codes"]) for line in good), "rejected": len(bad)}


def encode(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    with Line() as line:
        counts: Mapping[str, int] = build_codes(
            arguments.checkpoint,
            arguments.source,
            arguments.output,
            max_bad_fraction=arguments.max_bad_fraction,
            runner=runner_of(arguments),
            progress=line.show,
        )
    print(f"{arguments.output}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(encode, make_parser(), argv)


if __name__ == "__main__":
    # By its name, so that other processes find what they are sent.
    from data_pipelines import codes

    sys.exit(codes.main())
