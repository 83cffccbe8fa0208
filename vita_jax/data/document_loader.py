"""From folders of documents to the batches of a mixture: the machinery of `loader`, with Flamingo's rows.

    document -> example (random choices from the record's own numbers) -> packed rows -> one batch of every data set

A batch has, for every data set, `<name>/tokens`, `<name>/labels`, `<name>/positions`, `<name>/segment_ids`,
`<name>/media_times` (b s) int32 and `<name>/images` (b t f S S 3) uint8. Several documents lie in a row, each a segment
of its own; pictures count through the row. The state of a mixture holds the lanes of all its data sets, so that runs go
on as `lanes` says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vita_jax.data import packing
from vita_jax.data.document_examples import DocumentContext, Example, NotUsed, training_example
from vita_jax.data.documents import decode_document
from vita_jax.data.interleaved import IGNORE
from vita_jax.data.lanes import LANES, ONE_THREAD, WHOLE, Examples, Lanes, Reading
from vita_jax.data.loader import (
    BUDGET_RECORDS,
    BadRecord,
    GoodRecords,
    Loader,
    RecordCounts,
    add_counts,
    join_rows,
    record_stream,
)
from vita_jax.data.mixture import DataSet, check_mixture
from vita_jax.data.records import RecordError
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError

COLUMNS = ("tokens", "labels", "positions", "media_times")
COLUMN_PADDING = (0, IGNORE, 0, 0)
FIELDS = (*COLUMNS, "segment_ids", "images")
SETS = "sets"  # of a state
LEAST_OPEN_ROWS = 8


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Stands in the stream for a document that its rules leave out. Not None, which Grain would skip uncounted: how
    many were taken is the state of a stream.
    """


@dataclasses.dataclass(frozen=True)
class _Build:
    """((source number, bytes), random numbers) -> an example, or what stands for none."""

    data: DataSet
    context: DocumentContext

    def __call__(self, element: tuple[int, bytes], rng: np.random.Generator) -> Example | BadRecord | LeftOut:
        number, stored = element
        path = self.data.sources[number].path
        try:
            return training_example(decode_document(stored), self.context, self.data, rng)
        except NotUsed:
            return LeftOut()
        except RecordError as error:
            return BadRecord(f"{path}: {error}", error.category)
        except UserError as error:
            return BadRecord(f"{path}: {error}", "unusable")


def pack_documents(examples: grain.IterDataset, data: DataSet, bins: int, seed: int) -> grain.IterDataset:
    """Examples in rows, by first fit on tokens and pictures; `unpack_documents` takes them once batched."""
    return grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={"text": data.row_length, "images": data.row_images},
        padding_struct={"text": COLUMN_PADDING, "images": 0},
        num_packing_bins=bins,
        seed=seed,
    )


def unpack_documents(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives documents and pictures their numbers within the row.

    Args:
      batch: stacked rows of `pack_documents`: text (b s 4), images (b t f S S 3), and for each the number of the
        document it comes from, 1, 2, ... in a row and 0 for padding.

    Returns:
      What `FIELDS` names, see the top of this file. Padding: token 0, label -100, position, segment and time 0.
    """
    out = {name: np.ascontiguousarray(batch["text"][..., i]) for i, name in enumerate(COLUMNS)}
    segments, owners = batch["text_segment_ids"].astype(np.int32), batch["images_segment_ids"]
    for row, times in enumerate(out["media_times"]):
        used = owners[row][owners[row] > 0]
        # Documents lie in order, so the pictures before a document's own are those of smaller numbers.
        times += np.where(times > 0, np.searchsorted(used, segments[row], side="left"), 0).astype(np.int32)
    return out | {"segment_ids": segments, "images": batch["images"]}


def make_document_loader(
    data: DataSet,
    context: DocumentContext,
    *,
    batch_size: int,
    seed: int,
    reading: Reading = ONE_THREAD,
    num_epochs: int | None = None,
    shuffle: bool = True,
    max_bad_fraction: float = 0.01,
    lanes: Lanes = WHOLE,
    drop_remainder: bool = True,
    prefetch_batches: int = 2,
) -> Loader:
    """Batches of one data set: the fields of `FIELDS`, without its name.

    Args:
      data: the rules, and paths of its sources.
      context: how documents become examples.
      batch_size: b, rows of a batch of this process.
      seed: of subset, order, packing, and of what is drawn for each document anew in every epoch.
      reading, num_epochs, shuffle, max_bad_fraction, lanes, drop_remainder, prefetch_batches: see `loader.make_loader`.

    Raises:
      UserError: a missing or damaged source, or lanes that do not fit; from the iterator: too many bad documents.
    """
    records, total = record_stream(data.sources, seed=seed, shuffle=shuffle, num_epochs=num_epochs)
    draw_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])  # not one of the stream's own
    elements = records.random_map(_Build(data, context), seed=draw_seed)
    budget_records = min(BUDGET_RECORDS, max(total // lanes.count, 1))
    bins = max(lanes.rows_of_each(batch_size), LEAST_OPEN_ROWS)

    def rows_of(elements: grain.MapDataset, counts: RecordCounts) -> grain.IterDataset:
        good = GoodRecords(Examples(elements, reading), counts, max_bad_fraction, budget_records)
        return pack_documents(good.filter(_is_used), data, bins, seed)

    rows, counts = join_rows(rows_of, elements, lanes, batch_size, total)
    stack = functools.partial(packing.stack_rows, batch_size=batch_size)
    batches = rows.batch(batch_size, drop_remainder=drop_remainder, batch_fn=stack).map(unpack_documents)
    if prefetch_batches:
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch_batches)
    return Loader(batches, counts, lanes)


def _is_used(example: Example | LeftOut) -> bool:
    return not isinstance(example, LeftOut)


class MixtureLoader:
    """One batch of every data set at a time; made by `make_mixture_loader`. States are as those of `Loader`: they may
    be joined by `lanes.merge_states` and given to a loader of another number of processes.
    """

    def __init__(self, loaders: Mapping[str, Loader]) -> None:
        self._loaders = dict(loaders)

    @property
    def counts(self) -> RecordCounts:
        """How many documents of all data sets were read, and how many of them were bad."""
        return add_counts(loader.counts for loader in self._loaders.values())

    def __iter__(self) -> MixtureLoader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return {
            f"{name}/{field}": array for name, loader in self._loaders.items() for field, array in next(loader).items()
        }

    def get_state(self) -> dict[str, Any]:
        """Of the last batch that was handed out."""
        states = {name: loader.get_state() for name, loader in self._loaders.items()}
        lanes = {f"{name}/{lane}": s for name, state in states.items() for lane, s in state[LANES].items()}
        rest = {name: {k: v for k, v in state.items() if k != LANES} for name, state in states.items()}
        return {LANES: lanes, SETS: rest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that the state belongs to. Raises UserError for one of other data sets."""
        found = state.get(SETS, {})
        if set(found) != set(self._loaders):
            raise UserError(
                f"the data of the checkpoint came from {', '.join(sorted(found)) or 'one stream'}, this run has "
                f"{', '.join(sorted(self._loaders))}; start the stage anew"
            )
        for name, loader in self._loaders.items():
            lanes = {
                key.removeprefix(f"{name}/"): lane
                for key, lane in state[LANES].items()
                if key.rpartition("/")[0] == name
            }
            loader.set_state({**found[name], LANES: lanes})

    def close(self) -> None:
        """Ends threads and workers."""
        for loader in self._loaders.values():
            loader.close()


def make_mixture_loader(
    sets: Sequence[DataSet],
    context: DocumentContext,
    *,
    seed: int,
    reading: Reading = ONE_THREAD,
    max_bad_fraction: float = 0.01,
    lanes: Lanes = WHOLE,
    processes: int = 1,
) -> MixtureLoader:
    """The mixture of a stage.

    Args:
      sets: with the full paths of their sources; each has numbers of its own from `seed`.
      context: how documents become examples.
      lanes: this process's part of the documents of every data set.
      processes: how many share the rows of a batch.

    Raises:
      UserError: as `make_document_loader`, or no data set, or two of one name.
    """
    check_mixture(tuple(sets))
    seeds = np.random.SeedSequence(seed).generate_state(len(sets))
    options = {"reading": reading, "max_bad_fraction": max_bad_fraction, "lanes": lanes}
    return MixtureLoader(
        {
            one.name: make_document_loader(
                one, context, batch_size=one.batch_size // processes, seed=int(own), **options
            )
            for one, own in zip(sets, seeds, strict=True)
        }
    )


def format_mixture(
    batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, rows: int = 1, marks: tuple[str, str] = ("«", "»")
) -> str:
    """The first `rows` rows of every data set as text: shapes, fill, and every document with its targets between
    `marks` and the picture that each part sees as [1].
    """
    lines = [f"{name}: {array.dtype} {array.shape}" for name, array in batch.items()]
    for name in dict.fromkeys(key.rpartition("/")[0] for key in batch):
        tokens, labels, times, segments = (
            batch[f"{name}/{field}"] for field in ("tokens", "labels", "media_times", "segment_ids")
        )
        for row in range(min(rows, len(tokens))):
            count = segments[row].max()
            lines.append(f"{name}, row {row}: {np.mean(segments[row] > 0):.0%} filled, {count} documents")
            for number in range(1, count + 1):
                at = np.flatnonzero(segments[row] == number)
                text = _document_text(tokens[row, at], labels[row, at], times[row, at], tokenizer, marks)
                lines.append(f"  document {number} ({len(at)} positions): {text}")
    return "\n".join(lines)


def _document_text(
    tokens: np.ndarray, labels: np.ndarray, times: np.ndarray, tokenizer: Tokenizer, marks: tuple[str, str]
) -> str:
    """One document, runs of equal kind decoded together."""
    learnt = labels != IGNORE
    parts, seen = [], 0
    for run in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(learnt) | (np.diff(times) != 0)) + 1):
        if times[run[0]] != seen:
            seen = int(times[run[0]])
            parts.append(f"[{seen}]" if seen else "[]")
        text = tokenizer.decode(tokens[run].tolist()).replace("\n", "\\n")
        parts.append(f"{marks[0]}{text}{marks[1]}" if learnt[run[0]] else text)
    return "".join(parts)
