"""Several examples in one row: first-fit packing on two axes, positions and tile slots.

Examples are never cut. In a packed row every segment of every example has its own number (attention stays inside it)
and feature indices count from the row's first tile slot. Axes: b rows, s positions, t tile slots, S side of a tile.
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
NO_NAME_ID = -1


def to_columns(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An example as {"text": (s, 5) int32, "tiles": (t S S 3) uint8}, ready for `pack`."""
    return {"text": np.stack([example[name] for name in COLUMNS], axis=1), "tiles": example["tiles"]}


def to_cells(example: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A cell-naming example as {"tiles": (t S S 3), "cell_names": (t k m)}, ready for `pack_cells`."""
    tiles, names = example["tiles"], example["cell_names"]
    return {"tiles": tiles, "cell_names": names.reshape(len(tiles), -1, names.shape[-1])}


def pack(parent: grain.IterDataset, *, row_length: int, row_tiles: int, bins: int, seed: int) -> grain.IterDataset:
    """Packs what `to_columns` gives.

    Args:
      row_length, row_tiles: s and t of a row; every example must fit (see `examples.Limits`).
      bins: rows that are open at the same time. More rows waste less space and take more memory.
      seed: for the order in which finished rows come out.

    Returns:
      Rows as `unpack_columns` takes them once batched.
    """
    return grain.experimental.FirstFitPackIterDataset(
        parent,
        length_struct={"text": row_length, "tiles": row_tiles},
        padding_struct={"text": COLUMN_PADDING, "tiles": 0},
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
    padding: dict[str, Any] = {"text": COLUMN_PADDING, "cell_names": NO_NAME_ID}
    for name, array in batch.items():
        empty = np.empty((missing, *array.shape[1:]), array.dtype)
        empty[:] = padding.get(name, 0)
        batch[name] = np.concatenate([array, empty])
    return batch


def unpack_columns(batch: Mapping[str, np.ndarray], features_per_slot: int) -> dict[str, np.ndarray]:
    """Gives segments and features their numbers within the row.

    Args:
      batch: stacked rows of `pack`: text (b s 5), tiles (b t S S 3), and for both the number of the example they come
        from, 1, 2, ... in a row and 0 for padding.
      features_per_slot: feature table rows per tile slot (`FeatureLayout.features_per_slot`).

    Returns:
      tokens, labels, positions, segment_ids, feature_index (b s) int32; tiles (b t S S 3) uint8. Padding: token 0,
      label -100, position 0, segment 0, feature -1.
    """
    out = {name: np.ascontiguousarray(batch["text"][..., i]) for i, name in enumerate(COLUMNS)}
    example, tile_example = batch["text_segment_ids"], batch["tiles_segment_ids"]
    out["segment_ids"] = _number_segments(example, out["segment_ids"])
    for row, index in enumerate(out["feature_index"]):
        # Examples lie in order, so an example's first slot is the number of slots that belong to earlier ones.
        owners = tile_example[row][tile_example[row] > 0]
        first_slot = np.searchsorted(owners, example[row], side="left")
        index += np.where(index >= 0, first_slot * features_per_slot, 0).astype(np.int32)
    out["tiles"] = batch["tiles"]
    return out


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
