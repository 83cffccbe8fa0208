"""What the NAR decoder is worth, and what a voice pays for beginning early.

    python -m experiments.studies.speech_decoders --run runs/quickstart --run_dir runs/speech_decoders
    python -m experiments.studies.speech_decoders --run runs/quickstart --run_dir runs/speech_decoders --only nar_ar
    python -m experiments.studies.speech_decoders --run runs/quickstart --run_dir /tmp/speech_decoders --size smoke

Stage 3.2 is trained again from the language model and the codec of a finished run, both frozen, in three ways:

    nar_ar      as the run has it: a NAR decoder reads the text as a whole, the AR decoder goes on from what it makes
    ar          the AR decoder alone: its prompt is the rows of text themselves (`nar_layers=0`)
    ar_deep     the same with as many more layers as the NAR decoder had, and so with as many parameters as `nar_ar`

The run is only read. Equal for all arms: sentences, their order, steps, batches, rate and seed. Said are the true
answers to the benchmark's spoken questions, and texts that are held out; the run's recogniser reads them back:

    exactly        of the texts, those read back without any error, with the 95 % bootstrap interval
    misread        wrong characters by all characters, with the 95 % interval
    to NAR + AR    the difference in points on the same texts, with the 95 % interval of the pairs
    first sound    from the text to the first samples, median and most; nothing is compiled meanwhile
    real time      seconds of work by seconds of sound, and what of it is the decoders' and the codec's

Then `nar_ar` says some of the texts with its sound cut in other ways: frames (40 a second in the quickstart) of the
first chunk and of the later ones (each is twice the one before until then), frames of context that are decoded on both
sides of a chunk, and tokens (one a frame) that are drawn in one call. Beside the same tokens decoded at once stand the
largest difference of two samples (which lie in -1 .. 1) and the distance of the log-mel spectra. Nothing is played, so
work never waits for a player.

The same command goes on where it was stopped; arms that are finished are not trained again. Size `small` is laid out
for about 20 minutes of two CPU cores with the quickstart's small run. Leaves `<run_dir>/speech_decoders.md`, `.json`,
`.png` and `streams.png`, with `--write` also in `results/` beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments.benchmarks.turns import format_table
from experiments.studies.arms import (
    START,
    Arm,
    add_arguments,
    component_sizes,
    points,
    run_arms,
    run_study,
    with_interval,
    write_results,
    write_start,
)
from experiments.studies.finished_run import add_run, arm_config, open_run
from experiments.studies.speech_decoders.voice import (
    ANSWERS,
    AS_SERVED,
    GROUPS,
    HELD_OUT,
    latency_figures,
    make_speakers,
    read_back,
    speak,
    stream_all,
    stream_figures,
    texts_of,
)
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.evaluation.recognition import load_recogniser
from vita_jax.evaluation.sets import evenly
from vita_jax.inference.codec_stream import ORIGINAL_CONTEXT, StreamOptions
from vita_jax.inference.speak import SpeakOptions, voices
from vita_jax.models.codec.generator import context_frames
from vita_jax.models.speech.config import SpeechDecoderConfig
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder

NAME, STREAMS = "speech_decoders", "streams"
RESULTS = Path(__file__).parent / "results"
STAGE, SPEECH, CODEC = "speech_decoders", "speech", "codec"  # the stage, and components of the model
LANGUAGE_STAGE = "audio_sft"  # that trained everything but the voice
BASE = "nar_ar"
TITLES = {BASE: "NAR + AR", "ar": "AR", "ar_deep": "AR, more layers"}
# Frames. What is not varied is as the conversations of `vita_jax` have it (`TALKING`).
FIRST, CHUNK, CALL = 8, 40, AS_SERVED.steps_per_call
FIRST_CHUNKS, CHUNKS, CONTEXTS = (2, 4, 8, 16, 40), (8, 20, 80), (0, 1, 2, 4, ORIGINAL_CONTEXT)
WHOLE = "at once"


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in.

    Attributes:
      steps: of every arm; None = as many as the run's stage.
      per_kind: answers of each kind of question.
      streamed: texts that are streamed.
    """

    steps: int | None
    per_kind: int
    streamed: int


SIZES = {"small": Size(None, 16, 64), "smoke": Size(3, 1, 2)}


# ---- arms -----------------------------------------------------------------------------------------------------------


def arm_speech(config: SpeechDecoderConfig) -> dict[str, SpeechDecoderConfig]:
    """Arm -> its speech decoders.

    Raises:
      UserError: the run's own have no NAR decoder, or a head that reads what it makes.
    """
    if not config.num_nar_layers or config.initial_head:
        raise UserError("the study needs a run whose speech decoders have NAR layers and no initial head")
    alone = dataclasses.replace(config, nar_layers=0)
    deep = dataclasses.replace(alone, num_layers=config.num_layers + config.num_nar_layers)
    return {BASE: config, "ar": alone, "ar_deep": deep}


def save_frozen(config: ExperimentConfig, run_dir: str) -> str:
    """A checkpoint of all of the run but its speech decoders; returns its folder.

    Raises:
      UserError: the run does not speak.
    """
    if config.model.speech is None or config.model.codec is None:
        raise UserError(f"{config.run_dir}: the study needs a model that speaks; its config needs `codec` and `speech`")
    parts = {part: CODEC if part == CODEC else LANGUAGE_STAGE for part in component_sizes(config.model)}
    del parts[SPEECH]
    return write_start(config, Path(run_dir) / START, parts)


def make_arms(config: ExperimentConfig, run_dir: str, start: str, steps: int | None = None) -> list[Arm]:
    """All arms; each a run in `<run_dir>/<arm>`.

    Args:
      config: of the finished run, see `open_run`.
      start: see `save_frozen`.
      steps: in place of the run's.
    """
    stage = config.stage(STAGE)
    stage = dataclasses.replace(stage, start_from=start, steps=steps or stage.steps)

    def arm(name: str, speech: SpeechDecoderConfig) -> Arm:
        own = arm_config(config, f"{NAME}_{name}", str(Path(run_dir) / name), stage)
        return Arm(name, TITLES[name], dataclasses.replace(own, model=dataclasses.replace(own.model, speech=speech)))

    return [arm(name, speech) for name, speech in arm_speech(config.model.speech).items()]


# ---- figures --------------------------------------------------------------------------------------------------------


def stream_settings(full: int) -> dict[str, SpeakOptions]:
    """Name -> how tokens are drawn and the sound is cut.

    Args:
      full: frames of context with which streamed sound is that of all tokens decoded at once.
    """

    def cut(first: int, chunk: int, context: int | None = None, call: int = CALL) -> tuple[str, SpeakOptions]:
        around = "full" if context is None else str(context)
        options = StreamOptions(chunk=chunk, context=context, quiet_level=None, first_chunk=first)
        return f"{first}, {chunk}, {around}, {call}", SpeakOptions(steps_per_call=call, stream=options)

    contexts = [context for context in CONTEXTS if context < full or context == ORIGINAL_CONTEXT]
    settings = [cut(first, CHUNK) for first in FIRST_CHUNKS] + [cut(FIRST, chunk) for chunk in CHUNKS]
    settings += [cut(FIRST, CHUNK, context) for context in contexts]
    settings += [cut(first, CHUNK, None, CALL // 4) for first in FIRST_CHUNKS if first <= FIRST]
    longest = StreamOptions(chunk=AS_SERVED.max_tokens, quiet_level=None)
    return {**dict(settings), WHOLE: SpeakOptions(stream=longest)}


def measure(arm: Arm, per_kind: int, run: ExperimentConfig, streamed: int) -> dict[str, Any]:
    """The figures of a trained arm.

    Args:
      per_kind: see `texts_of`.
      run: the finished run, whose recogniser and voices are taken.
      streamed: how many texts are streamed.

    Returns:
      {"parameters", "read": see `read_back`, "latency": see `latency_figures`}, and of the first arm "streams": see
      `stream_figures`.
    """
    params, tokenizer = load_params(arm.config.run_dir).params, load_tokenizer(tokenizer_folder(arm.config))
    recogniser = load_recogniser(run, params).in_chunks(-1, -1)
    model, own_voices = arm.config.model, voices(run, params)
    texts, rate = texts_of(run, per_kind), model.codec.sampling_rate
    speakers = make_speakers(model, params, own_voices)
    some = evenly(texts, streamed)
    figures = {
        "parameters": component_sizes(model)[SPEECH],
        "read": read_back(texts, speak(speakers, texts, tokenizer), recogniser, rate),
        "latency": latency_figures(stream_all(speakers, some, tokenizer), rate),
    }
    if arm.name == BASE:
        settings = stream_settings(context_frames(model.codec))
        figures[STREAMS] = stream_figures(model, params, own_voices, settings, some, tokenizer, recogniser)
    return figures


# ---- the page -------------------------------------------------------------------------------------------------------


def latency_cells(found: Mapping[str, float | None]) -> tuple[str, str]:
    """First sound and real-time factor."""
    if found["first_ms"] is None:
        return "-", "-"
    parts = f"{found['real_time_factor']:.3f} ({found['decoder']:.3f}, {found['codec']:.3f})"
    return f"{found['first_ms']:.1f}, {found['first_ms_most']:.1f} ms", parts


def table_of_arms(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each arm, in Markdown."""
    rows = []
    for name, found in results.items():
        cells = [found["title"], f"{found['parameters']:,}"]
        for group in GROUPS:
            read, base = found["read"][group], results.get(BASE)
            compared = base is not None and name != BASE
            cells += [with_interval(read), with_interval(read["misread"], "rate")]
            cells += [points(compare_groups(base["read"][group], read)) if compared else "-"]
        cells += [*latency_cells(found["latency"]), f"{found['last_loss']:.3f}", f"{1000 * found['step_seconds']:.0f}"]
        rows.append(tuple(cells))
    columns = [f"{group}: {what}" for group in GROUPS for what in ("exactly", "misread", f"to {TITLES[BASE]}")]
    head = ("decoders", "parameters", *columns, "first sound", "real time (decoders, codec)", "last loss", "ms/step")
    return format_table(head, rows, markdown=True)


def table_of_streams(streams: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each way of cutting the sound, in Markdown."""
    rows = []
    for name, found in streams.items():
        read = [found["read"][group] for group in GROUPS if group in found["read"]]
        exact = ", ".join(f"{sum(part['outcomes'][part['title']].values())} of {part['n']}" for part in read)
        misread = ", ".join(f"{100 * part['misread']['rate']:.1f} %" for part in read)
        differs = (f"{found['largest']:.1e}", f"{found['mel_distance']:.4f}")
        rows.append((name, *latency_cells(found), *differs, exact, misread))
    head = ("first chunk, later, context, call", "first sound", "real time (decoders, codec)", "largest difference")
    head = (*head, "log-mel distance", f"exactly ({ANSWERS}, {HELD_OUT})", "misread")
    return format_table(head, rows, markdown=True)


def draw_streams(streams: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Time to the first sound, and the distance to sound that is decoded at once, of every way that gave a sound."""
    said = {name: found for name, found in streams.items() if found["first_ms"] is not None}
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 1.2 + 0.22 * len(said)), layout="constrained")
        panels = {"first_ms": "first sound, ms (median)", "mel_distance": "log-mel distance to sound decoded at once"}
        for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            axes.barh(range(len(said)), [found[key] for found in said.values()], color="#8fb0e8")
            axes.set_yticks(range(len(said)), list(said))
            axes.set_title(title, fontsize=9, loc="left")
            axes.grid(color="#e3e7ee", linewidth=0.8, axis="x")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    return figure


def study(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes."""
    size, run_dir = SIZES[arguments.size], arguments.run_dir
    run = open_run(arguments.run, (LANGUAGE_STAGE, CODEC))
    start = save_frozen(run, run_dir)
    arms = make_arms(run, run_dir, start, arguments.steps or size.steps)
    per_kind = arguments.per_kind or size.per_kind
    results = run_arms(arms, arguments.only, per_kind, functools.partial(measure, run=run, streamed=size.streamed))
    tables, folders = [table_of_arms(results)], [Path(run_dir), *([RESULTS] if arguments.write else [])]
    if BASE in results:
        streams = results[BASE][STREAMS]
        tables += [f"{TITLES[BASE]}, streamed:", table_of_streams(streams), f"![streams]({STREAMS}.png)"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            draw_streams(streams).savefig(folder / f"{STREAMS}.png", dpi=150)
    print("\n\n".join(tables))
    stage = arms[0].config.stages[0]
    settings = {
        "size": arguments.size,
        "run": f"{run.name}, {run.size}",
        "steps": stage.steps,
        "sentences of a step": stage.batch_size,
        "rate": stage.learning_rate,
        "texts streamed": size.streamed,
        "frames of full context": context_frames(run.model.codec),
    }
    bars = {
        f"{group}, read back exactly": {
            found["title"]: tuple(found["read"][group][key] for key in ("accuracy", "low", "high"))
            for found in results.values()
        }
        for group in GROUPS
    }
    write_results(folders, NAME, "Speech decoders and chunks of sound", tables, settings, results, bars)


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.studies.speech_decoders", description="Compares speech decoders.", epilog=__doc__
    )
    add_run(parser)
    add_arguments(parser, "runs/speech_decoders", tuple(TITLES))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for bad input, 128 + signal number when stopped."""
    return run_command(functools.partial(run_study, study), make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
