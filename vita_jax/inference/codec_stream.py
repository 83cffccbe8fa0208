"""Codec tokens to sound while they are being drawn (`llm2tts.py`), and the ends of what is played.

    tokens -> windows of `chunk` frames with `context` frames on both sides -> decode -> trim the context
           -> cut at the quietest place -> segments for the player

With the generator's receptive field as context (the default) the segments joined are what one decode of all tokens
gives. The original takes 10 frames instead, less than the full-size generator sees, and so differs a little at the
joints. Waves are (n,) float32 arrays in -1 .. 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference.timings import CODEC, Timeline
from vita_jax.models.codec.codec import Codec
from vita_jax.models.codec.generator import context_frames

ORIGINAL_CONTEXT = 10  # frames
SPEECH_LEVEL = 0.03  # a sample above it is no longer leading silence
PCM_SCALE = 32768
# Utterances that are decoded together, and the multiple of frames they are padded to, so that few shapes are compiled.
UTTERANCES_AT_ONCE, FRAME_STEP = 8, 40

Decode = Callable[[np.ndarray], np.ndarray]  # (n,) int32 codec ids -> (n * hop,) samples


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is cut.

    Attributes:
      chunk: frames per decode.
      context: frames on either side of a chunk that are decoded with it; None = the generator's receptive field.
      quiet_window: samples that are summed to find the quietest place of a chunk.
      quiet_level: mean magnitude below which a place is quiet enough to cut at; None gives every chunk as it comes.
      first_chunk: frames of the first decode of a reply, at most `chunk`, so that it begins early; every next one is
        twice as long until they are `chunk`. None = `chunk` from the start.
    """

    chunk: int = 40
    context: int | None = None
    quiet_window: int = 2401
    quiet_level: float | None = 0.01
    first_chunk: int | None = None

    @property
    def first_chunks(self) -> tuple[int, ...]:
        """Frames of the first decodes of a reply, until they are `chunk`."""
        sizes, size = [], self.first_chunk or self.chunk
        while size < self.chunk:
            sizes.append(size)
            size *= 2
        return tuple(sizes)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("chunk", self.chunk, 1),
            ("first_chunk", self.first_chunk or self.chunk, 1),
            ("context", self.context or 0, 0),
            ("quiet_window", self.quiet_window, 1),
        ):
            if value < least:
                raise UserError(f"{name} {value} must be at least {least}")


# The settings of VITA-1.5's server: the first sentence starts sooner and is cut at louder places.
FIRST_SENTENCE = StreamOptions(chunk=20, quiet_level=0.1)
LATER_SENTENCES = StreamOptions(chunk=40, quiet_level=0.015)
# For a player without gaps: the first sound after a fifth of a second of tokens (and the context), nothing held back.
TALKING = StreamOptions(chunk=40, quiet_level=None, first_chunk=8)


def stream_chunks(
    tokens: Iterable[int], decode: Decode, hop: int, chunk: int, context: int, first: Sequence[int] = ()
) -> Iterator[tuple[np.ndarray, bool]]:
    """Decodes a growing sequence of tokens in windows that overlap.

    Args:
      tokens: codec ids, as they come.
      decode: decodes a window.
      hop: samples per frame.
      chunk, context: frames, see `StreamOptions`.
      first: frames of the first chunks, which may be shorter.

    Yields:
      (chunk * hop,) samples and False for each window, then the rest and True. Joined they are as long as all tokens.
      Nothing without tokens.
    """
    window: list[int] = []
    left = 0  # frames of the window that have been given already
    sizes = itertools.chain(first, itertools.repeat(chunk))
    size = next(sizes)
    for token in tokens:
        window.append(token)
        if len(window) == left + size + context:
            wave = decode(np.asarray(window, np.int32))
            yield wave[left * hop : (left + size) * hop], False
            left = min(context, left + size)
            window = window[len(window) - left - context :]
            size = next(sizes)
    if len(window) > left:
        yield decode(np.asarray(window, np.int32))[left * hop :], True


def split_at_quiet(
    held: np.ndarray, wave: np.ndarray, window: int, level: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Cuts a new chunk at its quietest place, if that is quiet enough (`find_min_sum_index`).

    The window with the smallest sum of magnitudes is looked for in the later half of the chunk; the cut is at the
    smallest sample from there on. As in the original, the search for that sample reaches beyond the window, since the
    window's place is added to its end twice.

    Args:
      held: (m,) samples that no segment has had yet.
      wave: (n,) new samples, n >= `window`.
      window: samples.
      level: largest mean magnitude of a window that may be cut.

    Returns:
      What is held from now on, and a segment to play, or None.

    Raises:
      UserError: the chunk is shorter than the window.
    """
    if len(wave) < window:
        raise UserError(f"a chunk of {len(wave)} samples is shorter than quiet_window {window}; lower it")
    running = np.cumsum(np.concatenate([[0.0], np.abs(wave)]))  # float64: the sums are differences
    sums = running[window:] - running[:-window]
    start = len(wave) // 2 - window // 2
    searched = sums[start:]  # a negative start counts from the end, as in the original
    quietest = int(np.argmin(searched))
    first = max(0, quietest + start)
    last = min(len(wave), quietest + window + first)
    cut = first + int(np.argmin(np.abs(wave[first:last])))
    if searched[quietest] / window < level:
        return wave[cut:], np.concatenate([held, wave[:cut]])
    return np.concatenate([held, wave]), None


def stream_segments(
    tokens: Iterable[int], decode: Decode, hop: int, options: StreamOptions, context: int, opening: bool = False
) -> Iterator[np.ndarray]:
    """Segments for the player: the chunks of `stream_chunks`, cut at quiet places. Joined they are the whole stream.

    opening: a reply begins here, and with it the short chunks of `options.first_chunk`.
    """
    held = np.zeros((0,), np.float32)
    first = options.first_chunks if opening else ()
    for wave, last in stream_chunks(tokens, decode, hop, options.chunk, context, first):
        if last or options.quiet_level is None:
            yield np.concatenate([held, wave])
            held = held[:0]
            continue
        held, segment = split_at_quiet(held, wave, options.quiet_window, options.quiet_level)
        if segment is not None:
            yield segment
    if len(held):
        yield held


@partial(jax.jit, static_argnames="codec")
def decode_codes(
    codec: Codec, params: Any, codes: jax.Array, voices: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """`Codec.decode`, compiled once per shape: (b t q), (b g) int32 -> (b t*hop) samples."""
    return codec.apply({"params": params}, codes, voices, lengths, method=Codec.decode)


class CodecStreamer:
    """Plays token streams with one voice: holds the codec's parameters and the compiled decode.

    Windows are padded to their full size, so one shape is compiled per size of chunk; padding changes nothing.
    """

    def __init__(self, codec: Codec, params: Any, global_codes: np.ndarray) -> None:
        """
        Args:
          codec, params: the codec; only `quantizer` and `generator` are used.
          global_codes: (g,) int, codes of the voice.

        Raises:
          UserError: the codec has several codes per frame, or another number of codes for the voice.
        """
        c = codec.config
        if c.num_quantizers != 1:
            raise UserError(
                f"streaming takes one code per frame, but this codec has {c.num_quantizers}; use Codec.decode"
            )
        if len(global_codes) != c.num_global_codes:
            raise UserError(f"{len(global_codes)} codes for the voice, but this codec has {c.num_global_codes}")
        self.codec, self.context = codec, context_frames(c)
        self._voice = jnp.asarray(global_codes, jnp.int32)[None]
        self._params = {name: params[name] for name in ("quantizer", "generator")}

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """A whole utterance at once: (t,) int32 -> (t * hop,) samples; no tokens are no sound."""
        if not len(tokens):
            return np.zeros((0,), np.float32)
        codes = jnp.asarray(tokens, jnp.int32)[None, :, None]
        return np.asarray(decode_codes(self.codec, self._params, codes, self._voice)[0])

    def decode_many(self, utterances: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Whole utterances, several at a time: (t,) int32 each -> (t * hop,) samples each; as `decode` gives them."""
        waves = [np.zeros((0,), np.float32)] * len(utterances)
        order = sorted((i for i, tokens in enumerate(utterances) if len(tokens)), key=lambda i: len(utterances[i]))
        for start in range(0, len(order), UTTERANCES_AT_ONCE):
            chosen = order[start : start + UTTERANCES_AT_ONCE]
            size = -(-len(utterances[chosen[-1]]) // FRAME_STEP) * FRAME_STEP
            codes = np.zeros((UTTERANCES_AT_ONCE, size, 1), np.int32)
            lengths = np.ones((UTTERANCES_AT_ONCE,), np.int32)
            for row, i in enumerate(chosen):
                codes[row, : len(utterances[i]), 0] = utterances[i]
                lengths[row] = len(utterances[i])
            voices = jnp.repeat(self._voice, UTTERANCES_AT_ONCE, axis=0)
            decoded = np.asarray(decode_codes(self.codec, self._params, codes, voices, lengths))
            for row, i in enumerate(chosen):
                waves[i] = decoded[row, : len(utterances[i]) * self.codec.config.hop]
        return waves

    def segments(
        self,
        tokens: Iterable[int],
        options: StreamOptions = LATER_SENTENCES,
        opening: bool = False,
        timeline: Timeline | None = None,
    ) -> Iterator[np.ndarray]:
        """Segments of a stream of codec ids, see `stream_segments`; the decodes are measured in `timeline`."""
        timeline = Timeline() if timeline is None else timeline
        hop = self.codec.config.hop
        chunks = (*(options.first_chunks if opening else ()), options.chunk)
        if options.quiet_level is not None and chunks[0] * hop < options.quiet_window:
            raise UserError(
                f"quiet_window {options.quiet_window} is longer than a chunk of {chunks[0]} frames "
                f"({chunks[0] * hop} samples); lower it or enlarge the chunk"
            )
        context = self.context if options.context is None else options.context
        sizes = [chunk + 2 * context for chunk in chunks]

        def decode(window: np.ndarray) -> np.ndarray:
            size = next(size for size in sizes if size >= len(window))
            codes = np.zeros((1, size, 1), np.int32)
            codes[0, : len(window), 0] = window
            lengths = np.asarray([len(window)], np.int32)
            with timeline.work(CODEC):
                wave = np.asarray(decode_codes(self.codec, self._params, codes, self._voice, lengths))
            return wave[0, : len(window) * hop]

        return stream_segments(tokens, decode, hop, options, context, opening)


def cut_leading_silence(wave: np.ndarray, level: float = SPEECH_LEVEL) -> np.ndarray:
    """(n,) samples from the first one above `level` on; all of them if none is."""
    loud = np.flatnonzero(np.abs(wave) > level)
    return wave[loud[0] :] if len(loud) else wave


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """(n,) float -> (n,) int16. Full scale is clipped, where the original would wrap around."""
    return np.clip(wave * PCM_SCALE, -PCM_SCALE, PCM_SCALE - 1).astype(np.int16)
