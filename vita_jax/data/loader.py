"""From folders of records to batches: Grain, deterministic, resumable.

source(s) -> seeded subset -> shuffle (anew every epoch) -> repeat -> lanes -> example (threads or worker processes) ->
leave out bad records -> pack -> join lanes -> batch -> number segments and features -> prefetch. The state of a loader
is a small JSON-able dict; a loader given the state of another one continues with exactly the batches that one would
have made, also with other threads, workers or, given the states of all, another number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import grain
import numpy as np

from vita_jax.data import packing
from vita_jax.data.examples import (
    Example,
    ExampleContext,
    Limits,
    cell_naming_example,
    training_example,
)
from vita_jax.data.lanes import LANES, ONE_THREAD, WHOLE, Examples, Joined, Lanes, Reading
from vita_jax.data.records import Manifest, RecordError, decode_record, load_manifest
from vita_jax.data.splice import IGNORE_LABEL
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.storage import place, size_of

Objective = Literal["language_modeling", "text_pretraining", "cell_naming"]

# The share of bad records is taken of at least this many, so that a few bad ones at the start do not stop a long run.
BUDGET_RECORDS = 1000


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One folder of records in a mixture.

    Attributes:
      path: a folder written by `data_pipelines.build records`.
      ratio: share of its records that is used at all, a seeded choice (the original's `data_ratio`).
      weight: None for every source = all records of all sources, shuffled together. A number for every source = that
        share of the examples comes from this one, whatever its size; small sources then repeat more often.
      split_rounds: see `examples.training_example`.
    """

    path: str
    ratio: float = 1.0
    weight: float | None = None
    split_rounds: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"source {self.path}: ratio is {self.ratio}; it must be above 0 and at most 1")
        if self.weight is not None and not self.weight > 0:
            raise UserError(f"source {self.path}: weight is {self.weight}; it must be positive, or none")


@dataclasses.dataclass
class RecordCounts:
    """What came out of the records read so far (those of prefetched batches included).

    Attributes:
      seen, bad: records read, and how many of them could not be used.
      reasons: bad records by category.
      first: the first message of each category.
    """

    seen: int = 0
    bad: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A copy that JSON can hold."""
        return dataclasses.asdict(self)

    def assign(self, values: Mapping[str, Any]) -> None:
        """Takes the values of `to_dict`."""
        for field in dataclasses.fields(self):
            value = values[field.name]
            setattr(self, field.name, dict(value) if isinstance(value, Mapping) else value)


def add_counts(parts: Iterable[RecordCounts]) -> RecordCounts:
    """The sum; of the first messages, those of the first part that has one."""
    whole = RecordCounts()
    for part in parts:
        whole.seen, whole.bad = whole.seen + part.seen, whole.bad + part.bad
        for category, number in part.reasons.items():
            whole.reasons[category] = whole.reasons.get(category, 0) + number
            whole.first.setdefault(category, part.first[category])
    return whole


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """Stands in the stream for a record that cannot be used, for `GoodRecords` to count."""

    message: str
    category: str


# ---- reading --------------------------------------------------------------------------------------------------------


class RecordSource:
    """Random access to the stored records of one folder; elements are (source number, bytes)."""

    def __init__(self, config: SourceConfig, number: int, seed: int) -> None:
        folder = place(config.path)
        self.manifest: Manifest = load_manifest(folder)
        for shard in self.manifest.shards:
            path = folder / shard.name
            size = size_of(path) if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path} {found}; the manifest says {shard.bytes} bytes, build the data again")
        self._records = grain.sources.ArrayRecordDataSource([str(folder / s.name) for s in self.manifest.shards])
        self._number = number
        self._chosen = None
        if config.ratio < 1:
            count = max(1, int(len(self._records) * config.ratio))
            order = np.random.default_rng([seed, number]).permutation(len(self._records))
            self._chosen = np.sort(order[:count])

    def __len__(self) -> int:
        return len(self._records) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        at = index if self._chosen is None else int(self._chosen[index])
        return self._number, self._records[at]

    def __repr__(self) -> str:
        return f"RecordSource({self._number}, {len(self)} records)"


@dataclasses.dataclass(frozen=True)
class _Build:
    """(source number, bytes) -> arrays ready for packing, or a BadRecord."""

    sources: tuple[SourceConfig, ...]
    context: ExampleContext
    limits: Limits
    objective: Objective

    def __call__(self, element: tuple[int, bytes]) -> Example | BadRecord:
        number, data = element
        source = self.sources[number]
        try:
            record = decode_record(data)
            if self.objective == "cell_naming":
                return packing.to_cells(cell_naming_example(record, self.context, limits=self.limits))
            example = training_example(record, self.context, split_rounds=source.split_rounds, limits=self.limits)
            return packing.to_columns(example)
        except RecordError as error:
            return BadRecord(f"{source.path}: {error}", error.category)
        except UserError as error:
            return BadRecord(f"{source.path}: {error}", "unusable")


# ---- bad records ----------------------------------------------------------------------------------------------------


class GoodRecords(grain.IterDataset):
    """Drops bad records and counts them; fails when there are too many."""

    def __init__(self, parent: grain.IterDataset, counts: RecordCounts, max_fraction: float, at_least: int) -> None:
        super().__init__(parent)
        self._counts, self._max_fraction, self._at_least = counts, max_fraction, at_least

    def __iter__(self) -> grain.DatasetIterator:
        return _GoodRecordsIterator(iter(self._parent), self._counts, self._max_fraction, self._at_least)


class _GoodRecordsIterator(grain.DatasetIterator):
    """The counts are part of the state, so that they are those of an uninterrupted run after a restart."""

    def __init__(self, parent: grain.DatasetIterator, counts: RecordCounts, max_fraction: float, at_least: int) -> None:
        super().__init__(parent)
        self._counts, self._max_fraction, self._at_least = counts, max_fraction, at_least

    def __next__(self) -> Example:
        counts = self._counts
        while True:
            element = next(self._parent)
            counts.seen += 1
            if not isinstance(element, BadRecord):
                return element
            counts.bad += 1
            counts.reasons[element.category] = counts.reasons.get(element.category, 0) + 1
            counts.first.setdefault(element.category, element.message)
            if counts.bad > self._max_fraction * max(counts.seen, self._at_least):
                raise UserError(self._over_budget())

    def _over_budget(self) -> str:
        counts = self._counts
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.reasons.items()))
        worst = max(counts.reasons, key=lambda reason: counts.reasons[reason])
        return (
            f"{counts.bad} of the first {counts.seen} records cannot be used ({reasons}), more than max_bad_fraction "
            f"{self._max_fraction:g} allows; for example {counts.first[worst]}"
        )

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "counts": self._counts.to_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._counts.assign(state["counts"])


# ---- the loader -----------------------------------------------------------------------------------------------------


class Loader(grain.DatasetIterator):
    """Yields batches; made by `make_loader`.

    `get_state()` belongs to the last batch that was handed out, `set_state()` continues after it; the states of several
    processes are joined by `lanes.merge_states`. `close()` ends threads and workers.
    """

    def __init__(self, batches: grain.IterDataset, counts: Mapping[int, RecordCounts], lanes: Lanes) -> None:
        super().__init__(iter(batches))
        self._counts, self._lanes = counts, lanes
        self._is_fresh = True

    @property
    def counts(self) -> RecordCounts:
        """How many records of all own lanes were read, and how many of them were bad."""
        return add_counts(self._counts.values())

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._parent)
        except StopIteration:
            if self._is_fresh:
                raise UserError(
                    f"{self.counts.seen} records do not fill one batch; lower batch_size, or let num_epochs be none"
                ) from None
            raise
        self._is_fresh = False
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        if LANES not in state:
            raise UserError("the checkpoint is of a version whose data had no lanes; start the stage anew")
        found = len(state[LANES])
        if found != self._lanes.count:
            raise UserError(
                f"the data of the checkpoint went in {found} lanes, this run has {self._lanes.count}; "
                f"go on with --config.data.lanes={found}"
            )
        self._parent.set_state(state)
        self._is_fresh = False


def join_rows(
    make_rows: Callable[[grain.MapDataset, RecordCounts], grain.IterDataset],
    records: grain.MapDataset,
    lanes: Lanes,
    batch_size: int,
    total: int,
) -> tuple[grain.IterDataset, dict[int, RecordCounts]]:
    """The rows of all own lanes in the order of batches, and the counts of each lane.

    Args:
      make_rows: the rows of one lane from its records.
      records: the stream of all lanes.
      batch_size: rows of a batch of this process.
      total: records of an epoch.

    Raises:
      UserError: the lanes cannot share the batch, or the records.
    """
    rows_of_each = lanes.rows_of_each(batch_size)
    if total < lanes.count:
        raise UserError(f"{total} records cannot be shared by {lanes.count} lanes")
    counts = {lane: RecordCounts() for lane in lanes.own}
    rows = {
        lane: make_rows(records[lane :: lanes.count] if lanes.count > 1 else records, counts[lane])
        for lane in lanes.own
    }
    return Joined(rows, rows_of_each), counts


def record_stream(
    sources: Sequence[SourceConfig], *, seed: int, shuffle: bool, num_epochs: int | None
) -> tuple[grain.MapDataset, int]:
    """The stream of (source number, bytes), and how many records one epoch has (the sum over sources)."""
    weights = [source.weight for source in sources]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise UserError(f"sources have weights {weights}; give a weight to every source or to none")
    opened = [RecordSource(source, number, seed) for number, source in enumerate(sources)]
    total = sum(len(source) for source in opened)
    datasets = [grain.MapDataset.source(source) for source in opened]
    # Independent numbers: Grain adds the epoch to the seed, so neighbouring seeds would share shuffles.
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(len(datasets) + 1)]
    if weights[0] is None:
        joined = datasets[0] if len(datasets) == 1 else grain.MapDataset.concatenate(datasets)
        joined = joined.shuffle(seed=seeds[-1]) if shuffle else joined
        return joined.repeat(num_epochs), total
    if num_epochs is not None:
        raise UserError("sources with weights have no epochs; leave num_epochs at none, or leave the weights out")
    shuffled = [d.shuffle(seed=s) if shuffle else d for d, s in zip(datasets, seeds[:-1], strict=True)]
    return grain.MapDataset.mix([d.repeat(None) for d in shuffled], weights=weights), total


def make_loader(
    sources: Sequence[SourceConfig],
    context: ExampleContext,
    *,
    batch_size: int,
    row_length: int,
    row_tiles: int,
    seed: int,
    row_clips: int = 0,
    clip_frames: int = 0,
    objective: Objective = "language_modeling",
    reading: Reading = ONE_THREAD,
    num_epochs: int | None = None,
    shuffle: bool = True,
    max_bad_fraction: float = 0.01,
    lanes: Lanes = WHOLE,
    drop_remainder: bool = True,
    prefetch_batches: int = 2,
    packing_bins: int | None = None,
) -> Loader:
    """Batches of packed rows.

    Args:
      sources: at least one; all weighted or none.
      context: how a record becomes an example.
      batch_size: b, rows per batch of this process.
      row_length, row_tiles: s and t. Records that need more are bad records. row_tiles may be 0 for text.
      row_clips, clip_frames: a and f: sounds of a row, and frames of 10 ms of each. Records that need more are bad
        records. 0 clips: no sound.
      seed: of subset, shuffle and packing; not negative.
      objective: "language_modeling" or "text_pretraining", or "cell_naming" for `examples.cell_naming_example`.
      reading: threads or worker processes that decode and tokenise. The result does not depend on it. More than one
        thread pays for large pictures (decoding runs in parallel), not for small ones (Python's work does not): there
        workers pay.
      num_epochs: None = forever.
      shuffle: False keeps the order of the files (rows still come out in a seeded order).
      max_bad_fraction: of the records of a lane, at least BUDGET_RECORDS of them or one epoch.
      lanes: this process's part of the records.
      drop_remainder: False fills an incomplete last batch with rows of padding.
      prefetch_batches: finished batches held ready by a background thread; 0 = none.
      packing_bins: rows of a lane open at the same time, default 8 or, if more, its rows in a batch.

    Returns:
      A Loader of dicts: tokens, labels, positions, segment_ids, feature_index (b s) int32, tiles (b t S S 3) uint8;
      with `context.state_labels` state_labels (b s) int32; with row_clips audio (b a f h) float32 and audio_lengths
      (b a) int32. Or for cell naming tiles and cell_names (b t*k m) int32.

    Raises:
      UserError: a value out of range, a missing or damaged source; from the iterator: too many bad records.
    """
    _check_numbers(sources, batch_size, row_length, row_tiles, seed, num_epochs, max_bad_fraction)
    _check_sound(context, row_clips, clip_frames)
    if objective not in get_args(Objective):
        raise UserError(f"objective {objective!r} is unknown; use one of {', '.join(get_args(Objective))}")
    records, total = record_stream(sources, seed=seed, shuffle=shuffle, num_epochs=num_epochs)
    limits = Limits(row_length, row_tiles, row_clips, clip_frames)
    build = _Build(tuple(sources), context, limits, objective)
    budget_records = min(BUDGET_RECORDS, max(total // lanes.count, 1))
    bins = packing_bins or max(lanes.rows_of_each(batch_size), 8)

    def rows_of(records: grain.MapDataset, counts: RecordCounts) -> grain.IterDataset:
        examples = GoodRecords(Examples(records.map(build), reading), counts, max_bad_fraction, budget_records)
        return _packed(examples, context, limits, objective, bins, seed)

    rows, counts = join_rows(rows_of, records, lanes, batch_size, total)
    stack = functools.partial(packing.stack_rows, batch_size=batch_size)
    batches = rows.batch(batch_size, drop_remainder=drop_remainder, batch_fn=stack)
    batches = batches.map(_finish(context, limits, objective))
    if prefetch_batches:
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch_batches)
    return Loader(batches, counts, lanes)


def _packed(
    examples: grain.IterDataset, context: ExampleContext, limits: Limits, objective: Objective, bins: int, seed: int
) -> grain.IterDataset:
    """The examples in rows."""
    if objective == "cell_naming":
        return packing.pack_cells(examples, row_tiles=limits.row_tiles, bins=bins, seed=seed)
    return packing.pack(
        examples,
        row_length=limits.row_length,
        row_tiles=limits.row_tiles,
        row_clips=limits.row_clips,
        has_states=context.state_labels is not None,
        bins=bins,
        seed=seed,
    )


def _finish(
    context: ExampleContext, limits: Limits, objective: Objective
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """What makes a batch of stacked rows."""
    if objective == "cell_naming":
        return packing.unpack_cells
    return functools.partial(
        packing.unpack_columns,
        features_per_slot=context.layout.features_per_slot,
        features_per_clip=context.audio.num_tokens(limits.clip_frames) if limits.row_clips else 0,
    )


def _check_numbers(
    sources: Sequence[SourceConfig],
    batch_size: int,
    row_length: int,
    row_tiles: int,
    seed: int,
    num_epochs: int | None,
    max_bad_fraction: float,
) -> None:
    if not sources:
        raise UserError("no data sources were given; name at least one folder of records")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("row_length", row_length, 1),
        ("row_tiles", row_tiles, 0),
        ("seed", seed, 0),
        ("num_epochs", 1 if num_epochs is None else num_epochs, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction is {max_bad_fraction}; it must be between 0 and 1")


def _check_sound(context: ExampleContext, row_clips: int, clip_frames: int) -> None:
    if row_clips < 0 or clip_frames < 0:
        raise UserError(f"row_clips is {row_clips} and clip_frames {clip_frames}; neither may be negative")
    if not row_clips:
        return
    if context.audio is None:
        raise UserError(f"row_clips is {row_clips}, but the model does not hear; use 0, or give it an audio tower")
    if context.audio.num_tokens(clip_frames) <= context.audio.num_tokens(0):
        raise UserError(f"clip_frames is {clip_frames} (of 10 ms), too short for any sound; 100 are a second")


# ---- looking at a batch ---------------------------------------------------------------------------------------------


def format_batch(
    batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, rows: int = 1, marks: tuple[str, str] = ("«", "»")
) -> str:
    """The first `rows` rows of a batch as text: shapes, fill, and every segment with its targets between `marks`.

    A run of feature positions is shown as [n features a..b], with a and b from `feature_index`.
    """
    lines = [f"{name}: {array.dtype} {array.shape}" for name, array in batch.items()]
    if "tokens" not in batch:
        for row, names in enumerate(batch["cell_names"][:rows]):
            words = [tokenizer.decode([int(i) for i in ids if i >= 0]) or "-" for ids in names if np.any(ids >= 0)]
            lines += [f"row {row}: {len(words)} named cells of {len(names)}", "  " + " | ".join(words)]
        return "\n".join(lines)
    for row in range(min(rows, len(batch["tokens"]))):
        segments = batch["segment_ids"][row]
        lines.append(f"row {row}: {np.mean(segments > 0):.0%} filled, {segments.max()} segments")
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            columns = (batch[name][row, at] for name in ("tokens", "labels", "feature_index"))
            text = _segment_text(*columns, tokenizer, marks)
            lines.append(f"  segment {segment} ({len(at)} positions): {text}")
    return "\n".join(lines)


def _segment_text(
    tokens: np.ndarray, labels: np.ndarray, features: np.ndarray, tokenizer: Tokenizer, marks: tuple[str, str]
) -> str:
    """One segment, runs of equal kind decoded together."""
    kinds = np.where(features >= 0, 2, labels != IGNORE_LABEL)
    parts = []
    for run in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(kinds)) + 1):
        if kinds[run[0]] == 2:
            parts.append(f"[{len(run)} features {features[run[0]]}..{features[run[-1]]}]")
            continue
        text = tokenizer.decode(tokens[run].tolist()).replace("\n", "\\n")
        parts.append(f"{marks[0]}{text}{marks[1]}" if kinds[run[0]] else text)
    return "".join(parts)


def describe_sources(sources: Sequence[SourceConfig]) -> list[str]:
    """One line per source: name, records, pictures, videos, ratio or weight. Raises UserError for a missing source."""
    lines = []
    for source in sources:
        counts = load_manifest(source.path).counts
        share = f"weight {source.weight:g}" if source.weight is not None else f"ratio {source.ratio:g}"
        name = os.path.basename(os.path.normpath(source.path))
        detail = ", ".join(f"{counts[kind]} {kind.replace('_', ' ')}" for kind in counts)
        lines.append(f"{name}: {detail}; {share}" + ("; rounds apart" if source.split_rounds else ""))
    return lines
