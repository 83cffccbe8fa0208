"""One spoken exchange from the end of the question to the first sound of the answer, as `Timeline`s.

What is said does not matter to how long it takes, so the words are numbers: the measurement needs no tokenizer and
works with random weights. The path is that of a conversation: sound is heard in blocks and fed ahead, the reply is cut
into pieces of a few tokens, each is spoken while the next one is still to be written.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.conversion.tables import flatten, unflatten
from vita_jax.errors import UserError
from vita_jax.inference.engine import Answer, AnswerOptions, Engine
from vita_jax.inference.listen import Listener
from vita_jax.inference.prefix import MediaId, Prompt, live_id
from vita_jax.inference.speak import Speaker
from vita_jax.inference.timings import EVENTS, FIRST_PIECE, FIRST_SAMPLE, FIRST_TOKEN, SPEECH_ENDS, STAGES, Timeline
from vita_jax.models.int8 import LeafChange
from vita_jax.models.vita import Vita, VitaConfig, text_inputs
from vita_jax.parallel.rules import unbox

LLM = "language model"  # stage whose work is measured per token
SAMPLE_RATE = 16_000  # Hz, of what is heard
BLOCK_SECONDS = 0.1  # what a microphone gives at a time


@dataclass(frozen=True)
class ExchangeOptions:
    """How long everything is.

    Attributes:
      seconds: of the spoken question.
      before: positions of the conversation before it.
      after: positions between the question and its answer (the end of the turn, the header of the next).
      reply: tokens of the answer.
      piece: tokens of the answer that are spoken together.
    """

    seconds: float = 3.0
    before: int = 64
    after: int = 6
    reply: int = 24
    piece: int = 8

    def __post_init__(self) -> None:
        for name in ("before", "after", "reply", "piece"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.seconds >= BLOCK_SECONDS:
            raise UserError(f"seconds {self.seconds} must be at least {BLOCK_SECONDS}")


def question(seconds: float) -> np.ndarray:
    """(n,) float32: a tone that wanders, with noise."""
    rng, time = np.random.default_rng(0), np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(200 + 100 * np.sin(2 * np.pi * time)) / SAMPLE_RATE
    return (0.3 * np.sin(phase) + rng.normal(0, 0.01, len(time))).astype(np.float32)


def run_exchange(
    engine: Engine, listener: Listener | None, speaker: Speaker | None, options: ExchangeOptions
) -> Timeline:
    """One exchange, measured.

    Args:
      engine: answers.
      listener: hears; None for a model that does not: its question is text.
      speaker: speaks; None for a model that does not.
      options: lengths.
    """
    timeline, seat = Timeline(), engine.join()
    vocabulary = engine.decoder.config.vocab_size
    ids = [i % vocabulary for i in range(1, options.before + options.after + 1)]
    before, after = ids[: options.before], ids[options.before :]
    # Another name each time, so that nothing of an earlier exchange is found.
    name, heard = live_id(), [np.zeros((0, engine.decoder.config.hidden_size), np.float32)]
    seat.feed(_prompt(before, name, heard[0], []))
    if listener is None:
        heard.append(np.zeros((1, heard[0].shape[1]), np.float32))
        timeline.mark(SPEECH_ENDS)
    else:
        listener.timeline = timeline
        listener.begin()
        wave, size = question(options.seconds), round(BLOCK_SECONDS * SAMPLE_RATE)
        for start in range(0, len(wave), size):
            tokens = listener.hear(wave[start : start + size])
            if len(tokens):
                heard.append(tokens)
                seat.feed(_prompt(before, name, np.concatenate(heard), []))
        heard.append(listener.end())
    prompt = _prompt(before, name, np.concatenate(heard), after)
    answer = seat.answer(prompt, AnswerOptions(options.reply))
    pieces = _pieces(answer, options.piece, timeline)
    if speaker is not None:
        speaker.timeline = timeline
    for number, piece in enumerate(pieces):
        for _ in () if speaker is None else speaker.stream_ids(piece, number, FIRST_SAMPLE not in timeline.marks):
            timeline.mark(FIRST_SAMPLE)
    seat.leave()
    return timeline


def _prompt(before: Sequence[int], name: MediaId, tokens: np.ndarray, after: Sequence[int]) -> Prompt:
    keys = (*before, *((name, i) for i in range(len(tokens))), *after)
    return Prompt(keys, np.arange(len(keys), dtype=np.int32), {name: tokens})


def _pieces(answer: Answer, size: int, timeline: Timeline) -> Iterator[list[int]]:
    """The answer in pieces, as soon as each is written."""
    piece: list[int] = []
    while True:
        with timeline.work(LLM):
            token = next(answer, None)
        if token is not None:
            timeline.mark(FIRST_TOKEN)
            timeline.made(LLM, 1)
            piece.append(token)
        if piece and (token is None or len(piece) == size):
            timeline.mark(FIRST_PIECE)
            yield piece
            piece = []
        if token is None:
            return


def format_timelines(timelines: Sequence[Timeline]) -> str:
    """The table: medians over exchanges."""

    def median(values: Sequence[float | None]) -> float | None:
        return None if any(value is None for value in values) else statistics.median(values)

    def cell(seconds: float | None) -> str:
        return f"{'-':>16}" if seconds is None else f"{seconds * 1000:13.1f} ms"

    lines, last = [f"{'':24}{'after the last':>16}{'after speech':>16}"], 0.0
    for event in EVENTS[1:]:
        seconds = median([timeline.since(event) for timeline in timelines])
        lines.append(f"{event:24}{cell(None if seconds is None else seconds - last)}{cell(seconds)}")
        last = last if seconds is None else seconds
    lines += ["", "seconds of work per second of sound (below 1 is faster than it plays)"]
    for stage in STAGES:
        factor = median([timeline.real_time_factor(stage) for timeline in timelines])
        lines.append(f"{stage:24}{'-' if factor is None else format(factor, '.3f'):>16}")
    seconds = median([timeline.real_time_factor(LLM) for timeline in timelines])
    return "\n".join([*lines, f"{LLM:24}{1 / seconds:9.1f} tokens/s" if seconds else f"{LLM:24}{'-':>16}"])


def random_params(config: VitaConfig, dtype: jnp.dtype, change: LeafChange | None = None) -> dict[str, Any]:
    """Parameters of no meaning; the codec's are float32, as everywhere.

    change: what becomes of each as soon as it is drawn, see `vita_jax.models.int8`.
    """
    inputs = text_inputs(np.zeros((1, 2), np.int32), image_size=config.vision.image_size)
    shapes = unbox(jax.eval_shape(Vita(config).init, jax.random.key(0), inputs))["params"]

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = path.split("/")
        kind = jnp.float32 if names[0] == "codec" else dtype
        if names[-1] in ("scale", "running_var", "istd") or names[-1].endswith("_g"):
            return jnp.ones(leaf.shape, kind)
        deviation = 0.0 if names[-1] in ("bias", "running_mean", "mean") else 0.02
        return deviation * jax.random.normal(jax.random.key(len(names)), leaf.shape, kind)

    drawn = ((path, draw(path, leaf)) for path, leaf in flatten(shapes).items())
    if change is not None:
        drawn = (new for path, leaf in drawn for new in change(path, leaf).items())
    return unflatten((path, jnp.asarray(leaf)) for path, leaf in drawn)
