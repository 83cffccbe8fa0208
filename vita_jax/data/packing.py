"""Several examples in one row: first-fit packing on up to three axes, positions, tile slots and slots for sounds.

Examples are never cut. In a packed row every segment of every example has its own number (attention stays inside it)
and feature indices count from the row's first tile slot; the row's clips follow its tiles. Axes: b rows, s positions,
t tile slots, S side of a tile, a clips, f frames, h mel bins.
The original packs offline by joining conversations into one (`data_tools/concat_data_patch.py`), which lets unrelated
samples attend to each other; segments avoid that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from vita_jax.data.splice import IGNORE_LABEL, TEXT_INDEX

# The five text arrays travel through packing as columns of one array: the packer's cost is per array, not per byte.
COLUMNS = ("tokens", "labels", "positions", "segment_ids", "feature_index")
COLUMN_PADDING = (0, IGNORE_LABEL, 0, 0, TEXT_INDEX)
# A sixth column, if the examples have it.
STATE_COLUMN = "state_labels"
MAX_COLUMN_PADDING = (*COLUMN_PADDING, IGNORE_LABEL)
NO_NAME_ID = -1


def to_columns(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An example as {"text": (s, 5) int32, "tiles": (t S S 3) uint8}, ready for `pack`.

    State labels are a sixth column; sounds come along as "audio" (a f h) and "audio_lengths" (a,).
    """
    names = (*COLUMNS, STATE_COLUMN) if STATE_COLUMN in example else COLUMNS
    columns = {"text": np.stack([example[name] for name in names], axis=1), "tiles": example["tiles"]}
    return columns | {name: example[name] for name in ("audio", "audio_lengths") if name in example}


def to_cells(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A cell-naming example as {"tiles": (t S S 3), "cell_names": (t k m)}, ready for `pack_cells`."""
    tiles, names = example["tiles"], example["cell_names"]
    return {"tiles": tiles, "cell_names": names.reshape(len(tiles), -1, names.shape[-1])}


def pack(
    parent: grain.IterDataset,
    *,
    row_length: int,
    row_tiles: int,
    bins: int,
    seed: int,
    row_clips: int = 0,
    has_states: bool = False,
) -> grain.IterDataset:
    """Packs what `to_columns` gives.

    Args:
      row_length, row_tiles, row_clips: s, t and a of a row; every example must fit (see `examples.Limits`).
      bins: rows that are open at the same time. More rows waste less space and take more memory.
      seed: for the order in which finished rows come out.
      has_states: the examples have state labels.

    Returns:
      Rows as `unpack_columns` takes them once batched.
    """
    lengths = {"text": row_length, "tiles": row_tiles}
    padding: dict[str, Any] = {"text": MAX_COLUMN_PADDING if has_states else COLUMN_PADDING, "tiles": 0}
    if row_clips:
        lengths |= {"audio": row_clips, "audio_lengths": row_clips}
        padding |= {"audio": 0, "audio_lengths": 0}
    return grain.experimental.FirstFitPackIterDataset(
        parent,
        length_struct=lengths,
        padding_struct=padding,
        num_packing_bins=bins,
        seed=seed,
    )


def pack_cells(parent: grain.IterDataset, *, row_tiles: int, bins: int, seed: int) -> grain.IterDataset:
    """Packs what `to_cells` gives; arguments as in `pack`."""
    return grain.experimental.FirstFitPackIterDataset(
        parent,
        length_struct={"tiles": row_tiles, "cell_names": row_tiles},
        padding_struct={"tiles": 0, "cell_names": NO_NAME_ID},
        num_packing_bins=bins,
        seed=seed,
    )


def stack_rows(rows: Sequence[Mapping[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
    """Stacks rows on a leading axis; missing ones become rows of padding, so that every batch has one shape."""
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    missing = batch_size - len(rows)
    if not missing:
        return batch
    padding: dict[str, Any] = {"cell_names": NO_NAME_ID}
    if "text" in batch:
        padding["text"] = MAX_COLUMN_PADDING[: batch["text"].shape[-1]]
    for name, array in batch.items():
        empty = np.empty((missing, *array.shape[1:]), array.dtype)
        empty[:] = padding.get(name, 0)
        batch[name] = np.concatenate([array, empty])
    return batch


def unpack_columns(
    batch: Mapping[str, np.ndarray], features_per_slot: int, features_per_clip: int = 0
) -> dict[str, np.ndarray]:
    """Gives segments and features their numbers within the row.

    Args:
      batch: stacked rows of `pack`: text (b s 5), tiles (b t S S 3), audio (b a f h), audio_lengths (b a), and for each
        the number of the example it comes from, 1, 2, ... in a row and 0 for padding.
      features_per_slot: feature table rows per tile slot (`FeatureLayout.features_per_slot`).
      features_per_clip: feature table rows per clip of sound.

    Returns:
      tokens, labels, positions, segment_ids, feature_index (b s) int32; tiles (b t S S 3) uint8. Padding: token 0,
      label -100, position 0, segment 0, feature -1. Where the rows have them: state_labels (b s) int32; audio
      (b a f h) float32 and audio_lengths (b a) int32, length 0 in unused slots.
    """
    names = (*COLUMNS, STATE_COLUMN)[: batch["text"].shape[-1]]
    out = {name: np.ascontiguousarray(batch["text"][..., i]) for i, name in enumerate(names)}
    example, owners = batch["text_segment_ids"], {"tiles": batch["tiles_segment_ids"]}
    out["segment_ids"] = _number_segments(example, out["segment_ids"])
    out["tiles"] = batch["tiles"]
    if "audio" in batch:
        owners["audio"] = batch["audio_segment_ids"]
        out |= {name: batch[name] for name in ("audio", "audio_lengths")}
    row_features = batch["tiles"].shape[1] * features_per_slot
    for row, index in enumerate(out["feature_index"]):
        own, before = (_slots(owners["tiles"][row], example[row], side) for side in ("own", "before"))
        is_tile = index < own * features_per_slot
        moved = before * features_per_slot
        if "audio" in owners:
            # Clips follow the tiles: those of the example in the example, those of the row in the row.
            clips = _slots(owners["audio"][row], example[row], "before") * features_per_clip
            moved = np.where(is_tile, moved, row_features - own * features_per_slot + clips)
        index += np.where(index >= 0, moved, 0).astype(np.int32)
    return out


def _slots(owners: np.ndarray, examples: np.ndarray, which: str) -> np.ndarray:
    """How many slots the example at each position has ("own"), or those before it in the row ("before").

    Examples lie in order, so an example's first slot is the number of slots that belong to earlier ones.
    """
    used = owners[owners > 0]
    before = np.searchsorted(used, examples, side="left")
    return before if which == "before" else np.searchsorted(used, examples, side="right") - before


def _number_segments(example: np.ndarray, local: np.ndarray) -> np.ndarray:
    """(b s) numbers 1, 2, ... for each run of equal (example, local segment); 0 where example is 0 (padding)."""
    before = ((0, 0), (1, 0))
    previous_example = np.pad(example, before)[:, :-1]
    previous_local = np.pad(local, before)[:, :-1]
    starts = (example > 0) & ((example != previous_example) | (local != previous_local))
    return np.where(example > 0, np.cumsum(starts, axis=1), 0).astype(np.int32)


def unpack_cells(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacked rows of `pack_cells` -> tiles (b t S S 3) uint8 and cell_names (b t*k m) int32, -1 in unused slots."""
    names = batch["cell_names"]
    rows, _, _, width = names.shape
    return {"tiles": batch["tiles"], "cell_names": names.reshape(rows, -1, width)}
