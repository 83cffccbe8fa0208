"""Spoken sentences and their text, for training the voice: Grain, deterministic, resumable.

The audio of a manifest is in any format that `vita_jax.data.audio` decodes; 16-bit mono WAV at the rate that is wanted
(the codec's, or 16 kHz for the recogniser) is read fastest. manifest(s) -> seeded subset -> shuffle (anew every epoch)
-> repeat -> lanes -> crops or padded pairs (threads or workers) -> leave out bad records -> sort pairs by length ->
join lanes -> batch -> prefetch. The state of a loader is a small dict, as in `loader`.
"""

from __future__ import annotations

import dataclasses
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from vita_jax.data.audio import MAX_SECONDS, AudioConfig, read_audio
from vita_jax.data.lanes import ONE_THREAD, WHOLE, Examples, Lanes, Reading
from vita_jax.data.loader import (
    BUDGET_RECORDS,
    BadRecord,
    GoodRecords,
    Loader,
    RecordCounts,
    SourceConfig,
    join_rows,
)
from vita_jax.data.manifests import Manifest, SpokenText, has_codes
from vita_jax.data.records import RecordError
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError

PCM_SCALE = 32768.0
# Pairs are sorted by length among as many batches, and batches cut to one of as many lengths: each is compiled once.
SORTED_BATCHES = 8
BATCH_LENGTHS = 4
# A stage may accept less, never more.
LONGEST = AudioConfig(max_seconds=MAX_SECONDS)

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class CropShape:
    """Crops: their rate in Hz and their length in samples."""

    sampling_rate: int
    samples: int


@dataclasses.dataclass(frozen=True)
class PairShape:
    """Padded pairs.

    Attributes:
      sampling_rate: Hz.
      hop: samples per codec frame.
      frames: of the longest sentence; longer ones are bad records.
      tokens: of the longest text; longer ones are bad records.
      num_codes: entries of the codebook; codes beyond it are bad records. None = any.
    """

    sampling_rate: int
    hop: int
    frames: int
    tokens: int
    num_codes: int | None = None


# ---- reading --------------------------------------------------------------------------------------------------------


def read_wave(path: str | Path, sampling_rate: int) -> np.ndarray:
    """Samples of a sound file: (n,) float32 in -1 .. 1.

    16-bit mono WAV at the wanted rate is read as it is; any other format, rate and number of channels goes through the
    decoder of `vita_jax.data.audio`, which takes the first channel and resamples.

    Raises:
      RecordError: it cannot be read, is damaged, too long, or holds no samples.
    """
    samples = _plain_wave(path, sampling_rate)
    if samples is not None:
        return samples
    try:
        return read_audio(str(path), LONGEST, sample_rate=sampling_rate)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise RecordError(str(path), "", reason, "damaged media") from error


def _plain_wave(path: str | Path, sampling_rate: int) -> np.ndarray | None:
    """Samples of a 16-bit mono WAV file at that rate; None for a file of another form."""
    try:
        with wave.open(str(path), "rb") as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, sampling_rate):
                return None
            promised = file.getnframes()
            data = file.readframes(promised)
    except OSError as error:
        raise RecordError(str(path), "", f"cannot be read: {error.strerror}", "missing media") from None
    except (wave.Error, EOFError):
        return None
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / PCM_SCALE
    # Whether fewer samples than promised are a damage is for the decoder to say, which knows headers of streams, too.
    return samples if len(samples) and len(samples) == promised else None


class PairSource:
    """Random access to the pairs of several manifests, of each a seeded share."""

    def __init__(self, sources: Sequence[SourceConfig], seed: int) -> None:
        if not sources:
            raise UserError("there must be at least one speech source")
        self._manifests: list[Manifest] = []
        self._lines: list[np.ndarray] = []
        for number, source in enumerate(sources):
            if source.weight is not None:
                raise UserError(f"source {source.path}: speech sources have no weight; leave it out, or use ratio")
            manifest = Manifest(source.path)
            count = max(1, int(len(manifest) * source.ratio))
            order = np.random.default_rng([seed, number]).permutation(len(manifest))
            self._manifests.append(manifest)
            self._lines.append(np.sort(order[:count]))
        self._ends = np.cumsum([len(lines) for lines in self._lines])
        with_codes = {has_codes(manifest) for manifest in self._manifests}
        if len(with_codes) > 1:
            raise UserError("some of the manifests have codes and others have none; use either")
        #: Whether the lines have the codec's tokens.
        self.coded = with_codes.pop()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> SpokenText | RecordError:
        """A pair, or what is wrong with its line."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        lines = self._lines[number]
        try:
            pair = self._manifests[number][lines[index - int(self._ends[number])]]  # counted from the end
            if (pair.codes is not None) != self.coded:
                reason = "are missing, as they are not in the first" if self.coded else "are here, and not in the first"
                return RecordError(pair.place, "codes", reason, "mixed codes")
        except RecordError as error:
            return error
        return pair

    def __repr__(self) -> str:
        return f"PairSource({len(self)} pairs)"


# ---- elements -------------------------------------------------------------------------------------------------------


def crop(samples: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random piece of (n,) samples, (size,); a shorter wave is followed by zeros."""
    start = int(rng.integers(max(0, len(samples) - size) + 1))
    piece = samples[start : start + size]
    return np.pad(piece, (0, size - len(piece)))


def crops_of(pair: SpokenText, shape: CropShape, rng: np.random.Generator) -> Arrays:
    """Two independent crops of one utterance: `waves`, `other_waves` (n,) float32. Raises RecordError."""
    samples = read_wave(pair.audio, shape.sampling_rate)
    return {"waves": crop(samples, shape.samples, rng), "other_waves": crop(samples, shape.samples, rng)}


def padded_pair(pair: SpokenText, shape: PairShape, tokenizer: Tokenizer) -> Arrays:
    """`text_tokens` (s,) int32, `text_lengths` (), `waves` (n,) float32, `frames` (); a begun frame counts as one.

    A pair with codes has `codes` (f,) int32 in place of the waves, and its sound is not read.

    Raises:
      RecordError: no or too much text, unreadable or too long audio.
    """
    ids = tokenizer.encode(pair.text, allow_special=False, add_bos=False)
    if not ids:
        raise RecordError(pair.place, "text", "is empty", "no text")
    if len(ids) > shape.tokens:
        raise RecordError(pair.place, "text", f"has {len(ids)} tokens, more than {shape.tokens}", "too long")
    samples = read_wave(pair.audio, shape.sampling_rate) if pair.codes is None else None
    frames = len(pair.codes) if samples is None else -(-len(samples) // shape.hop)
    if frames > shape.frames:
        raise RecordError(pair.place, "audio", f"has {frames} codec frames, more than {shape.frames}", "too long")
    if samples is None:
        if shape.num_codes is not None and int(pair.codes.max()) >= shape.num_codes:
            reason = f"hold {pair.codes.max()}, but the codebook has {shape.num_codes} entries"
            raise RecordError(pair.place, "codes", reason, "foreign codes")
        spoken = {"codes": np.pad(pair.codes.astype(np.int32), (0, shape.frames - frames))}
    else:
        spoken = {"waves": np.pad(samples, (0, shape.frames * shape.hop - len(samples)))}
    return {
        "text_tokens": np.pad(np.asarray(ids, np.int32), (0, shape.tokens - len(ids))),
        "text_lengths": np.int32(len(ids)),
        **spoken,
        "frames": np.int32(frames),
    }


# ---- batches of similar length --------------------------------------------------------------------------------------


class _SortWindow(grain.experimental.FlatMapTransform):
    """A window of pairs, sorted by length; runs of `batch_size` stay together, long and short ones take turns."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.max_fan_out = SORTED_BATCHES * batch_size

    def flat_map(self, element: Sequence[Arrays]) -> list[Arrays]:
        pairs = sorted(element, key=lambda pair: int(pair["frames"]))
        runs = [pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size)]
        half = (len(runs) + 1) // 2
        # A run that is not full must stay the last one, so that those before it fill their batches.
        turns = runs if len(runs[-1]) < self.batch_size else [run for i in range(half) for run in runs[i::half]]
        return [pair for run in turns for pair in run]


def sort_by_length(elements: grain.IterDataset, batch_size: int) -> grain.IterDataset:
    """The same pairs, in an order in which each `batch_size` are of similar length."""
    windows = elements.batch(SORTED_BATCHES * batch_size, drop_remainder=False, batch_fn=list)
    return grain.experimental.FlatMapIterDataset(windows, _SortWindow(batch_size))


def cut_padding(batch: Arrays, shape: PairShape) -> Arrays:
    """The batch with waves or codes no longer than its longest needs, in steps of a quarter of the full length."""
    step = -(-shape.frames // BATCH_LENGTHS)
    frames = min(shape.frames, -(-int(batch["frames"].max()) // step) * step)
    lengths = {"waves": frames * shape.hop, "codes": frames}
    return batch | {name: batch[name][:, :length] for name, length in lengths.items() if name in batch}


# ---- loaders --------------------------------------------------------------------------------------------------------


def make_crop_loader(sources: Sequence[SourceConfig], shape: CropShape, *, seed: int, **options: Any) -> Loader:
    """Batches for the codec: `waves`, `other_waves` (b n) float32, new crops in every epoch.

    Args:
      sources: paths of manifests; `ratio` is honoured, `weight` is not offered.
      shape: of the crops.
      seed: of subset, order and crops.
      options: see `make_element_loader`.

    Raises:
      UserError: a value out of range or a manifest that does not fit; from the iterator: too many bad records.
    """
    if shape.samples < 1:
        raise UserError(f"crops of {shape.samples} samples: there must be at least 1")

    def build(pair: SpokenText, rng: np.random.Generator) -> Arrays:
        return crops_of(pair, shape, rng)

    return make_element_loader(sources, build, seed=seed, **options)


def make_pair_loader(
    sources: Sequence[SourceConfig], shape: PairShape, tokenizer: Tokenizer, *, seed: int, **options: Any
) -> Loader:
    """Batches for the speech decoders: `text_tokens` (b s), `text_lengths` (b,), `waves` (b n), `frames` (b,); `codes`
    (b f) in place of the waves where the manifests have them.

    The pairs of a batch are of similar length, and n only as long as they need. Where several processes read, n is
    always the longest, because they must agree.

    Args:
      sources, seed, options: as in `make_crop_loader`.
      shape: the longest; longer pairs are bad records.
      tokenizer: of the language model.

    Raises:
      UserError: as `make_crop_loader`.
    """
    if min(shape.frames, shape.tokens) < 1:
        raise UserError(f"pairs of {shape.frames} frames and {shape.tokens} tokens: both must be at least 1")

    def build(pair: SpokenText, rng: np.random.Generator) -> Arrays:
        return padded_pair(pair, shape, tokenizer)

    def sort(elements: grain.IterDataset) -> grain.IterDataset:
        return sort_by_length(elements, lanes.rows_of_each(options["batch_size"]))

    lanes = options.get("lanes", WHOLE)

    def cut(batch: Arrays) -> Arrays:
        return cut_padding(batch, shape) if len(lanes.own) == lanes.count else batch

    return make_element_loader(sources, build, seed=seed, pack=sort, finish=cut, **options)


def make_element_loader(
    sources: Sequence[SourceConfig],
    build: Callable[[SpokenText, np.random.Generator], Arrays],
    *,
    batch_size: int,
    seed: int,
    reading: Reading = ONE_THREAD,
    num_epochs: int | None = None,
    shuffle: bool = True,
    max_bad_fraction: float = 0.01,
    lanes: Lanes = WHOLE,
    prefetch_batches: int = 2,
    pack: Callable[[grain.IterDataset], grain.IterDataset] | None = None,
    finish: Callable[[Arrays], Arrays] | None = None,
) -> Loader:
    """The stream of batches.

    Args:
      build: one pair and its random numbers -> an element.
      batch_size: b, of this process.
      reading: threads or worker processes that read. The result does not depend on it.
      num_epochs: None = forever.
      max_bad_fraction: of the records of a lane, at least `BUDGET_RECORDS` of them or one epoch.
      lanes: this process's part of the pairs.
      prefetch_batches: finished batches held ready by a background thread; 0 = none.
      pack: joins good elements to the rows of batches, or orders them; None = each is a row.
      finish: what is still done to a batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    pairs = PairSource(sources, seed)
    # Independent numbers: Grain adds the epoch to the seed, so neighbouring seeds would share shuffles.
    order_seed, crop_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    stream = grain.MapDataset.source(pairs)
    stream = stream.shuffle(seed=order_seed) if shuffle else stream
    stream = stream.repeat(num_epochs)
    budget_records = min(BUDGET_RECORDS, max(len(pairs) // lanes.count, 1))

    def element(pair: SpokenText | RecordError, rng: np.random.Generator) -> Mapping[str, np.ndarray] | BadRecord:
        try:
            if isinstance(pair, RecordError):
                raise pair
            return build(pair, rng)
        except RecordError as error:
            return BadRecord(str(error), error.category)

    def rows_of(elements: grain.MapDataset, counts: RecordCounts) -> grain.IterDataset:
        rows = GoodRecords(Examples(elements, reading), counts, max_bad_fraction, budget_records)
        return rows if pack is None else pack(rows)

    rows, counts = join_rows(rows_of, stream.random_map(element, seed=crop_seed), lanes, batch_size, len(pairs))
    batches = rows.batch(batch_size, drop_remainder=True)
    batches = batches if finish is None else batches.map(finish)
    if prefetch_batches:
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch_batches)
    return Loader(batches, counts, lanes)
