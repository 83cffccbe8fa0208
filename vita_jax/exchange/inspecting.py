"""What is in a checkpoint, theirs or ours: names, shapes, dtypes, bytes, and where each tensor goes or comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vita_jax.conversion.tables import MAX_NAMES_IN_MESSAGE, Table, compare, flatten, iter_export
from vita_jax.conversion.torch_files import TensorSource
from vita_jax.conversion.torch_pickles import open_tensors
from vita_jax.errors import UserError
from vita_jax.exchange.exporting import Counter, Part, Stored, open_checkpoint, parts_of
from vita_jax.exchange.importing import Progress
from vita_jax.exchange.released import Released, guess_model, read_released
from vita_jax.training.checkpoint import CONFIG as RUN_CONFIG
from vita_jax.training.portable import is_portable

ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


@dataclass(frozen=True)
class Row:
    """One tensor: its name, shape, dtype and bytes, and its counterpart on the other side ("" for none)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    other: str


def is_ours(path: str | Path) -> bool:
    """Whether the path is a run, a checkpoint or an exported folder of this package."""
    path = Path(path)
    run = (path / RUN_CONFIG).is_file() and (path / "stages").is_dir()
    return is_portable(path) or run or (path / "checkpoints").is_dir() or (path / "params").is_dir()


def inspect(path: str | Path, model: str | None = None) -> Iterator[str]:
    """Lines that describe what is at `path`.

    Args:
      path: a public folder or file, a run, a checkpoint, or an exported folder.
      model: how to read a public folder; default what its names suggest.

    Raises:
      UserError: nothing there, or it cannot be read.
    """
    if is_ours(path):
        stored = open_checkpoint(path)
        yield f"checkpoint of this package: experiment {stored.config.name}, stage {stored.stage}, step {stored.step}"
        yield from format_rows(stored_rows(stored))
        return
    model = model or guess_model(path)
    released = read_released(model, path)
    yield f"public checkpoint, read as {model}"
    yield from (f"note: {note}" for note in released.notes)
    yield from format_rows(released_rows(released))
    yield from differences(released)


def released_rows(released: Released) -> list[Row]:
    """The tensors of a public folder and the parameters they become."""
    places = places_of(released.table)
    rows = []
    for name in released.tensors:
        info = released.tensors.info(name)
        size = ITEMSIZE.get(info.dtype, 1) * math.prod(info.shape)
        rows.append(Row(name, info.shape, info.dtype, size, places.get(name, "")))
    return rows


def places_of(table: Table) -> dict[str, str]:
    """Torch name -> path of its parameter, with the place in the stack: `language/layers/mlp/up_proj/kernel[3]`."""
    places = {}
    for rule in table.rules:
        for index, name in zip(np.ndindex(rule.stack), rule.names, strict=True):
            places[name] = rule.path + (f"[{', '.join(map(str, index))}]" if index else "")
    return places


def stored_rows(stored: Stored) -> list[Row]:
    """The parameters of a checkpoint and the names they have in a public one."""
    names: dict[str, str] = {}
    for part in parts_of(stored):
        ids = {id(leaf): rule for rule in part.table.rules for leaf in [flatten(part.params).get(rule.path)]}
        for path, leaf in flatten(stored.params).items():
            if id(leaf) in ids:
                names[path] = f"{part.place}/{ids[id(leaf)].torch}".lstrip("/")
    rows = []
    for path, leaf in flatten(stored.params).items():
        dtype = np.dtype(leaf.dtype)
        size = dtype.itemsize * math.prod(leaf.shape)
        rows.append(Row(path, tuple(leaf.shape), dtype.name, size, names.get(path, "")))
    return rows


def format_rows(rows: list[Row]) -> Iterator[str]:
    """A table, and the sums below it."""
    cells = [(row.name, "x".join(map(str, row.shape)) or "()", row.dtype, f"{row.bytes:,}", row.other) for row in rows]
    widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(4)]
    for name, shape, dtype, size, other in cells:
        arrow = f"  -> {other}" if other else "  -> nothing"
        yield f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}{arrow}"
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    elements = sum(math.prod(row.shape) for row in rows)
    yield f"{len(rows):,} tensors, {elements:,} elements, {sum(row.bytes for row in rows):,} bytes ({dtypes})"


def differences(released: Released) -> Iterator[str]:
    """What an import would complain about."""
    found = compare(released.table, released.shapes)
    shapes = [f"{name}: {got}, expected {want}" for name, (got, want) in found.misshapen.items()]
    for what, names in (("missing", found.missing), ("unexpected", found.unused), ("misshapen", shapes)):
        for name in names:
            yield f"{what}: {name}"
    if not (found.missing or found.unused or found.misshapen):
        yield "complete: every tensor has its place, and every parameter its tensor"


def verify(stored: Stored, parts: Sequence[Part], tensors: dict[str, TensorSource], progress: Progress) -> int:
    """Compares a checkpoint with public folders, bit for bit and one tensor at a time.

    Args:
      stored: the checkpoint.
      parts: of its export.
      tensors: place of a part of the export ("" for the main one) -> the folder's tensors.
      progress: called after every tensor.

    Returns:
      How many tensors were compared.

    Raises:
      UserError: tensors that differ in bits, dtype or shape, or are on one side only.
    """
    total = sum(np.dtype(leaf.dtype).itemsize * math.prod(leaf.shape) for leaf in flatten(stored.params).values())
    count, compared, wrong = Counter(total, progress), 0, []
    for part in parts:
        if part.place not in tensors:
            raise UserError(f"the checkpoint has a part {part.place!r} that there is nothing to compare with")
        source = tensors[part.place]
        compare(part.table, {name: source.info(name).shape for name in source}).raise_any()
        for name, array in count.over(iter_export(part.table, part.params)):
            compared += 1
            theirs = source[name]
            if theirs.dtype != array.dtype:
                wrong.append(f"{name} ({array.dtype} here, {theirs.dtype} there)")
            elif not np.array_equal(array.view(_bits(array)), theirs.view(_bits(theirs))):
                wrong.append(name)
    if wrong:
        some = ", ".join(wrong[:MAX_NAMES_IN_MESSAGE]) + (", ..." if len(wrong) > MAX_NAMES_IN_MESSAGE else "")
        raise UserError(f"{len(wrong)} of {compared} tensors differ: {some}")
    return compared


def _bits(array: np.ndarray) -> np.dtype:
    """An integer type of the same size: NaN is equal to itself then, and 0 is not equal to -0."""
    return np.dtype(f"u{array.dtype.itemsize}")


def open_and_verify(checkpoint: str | Path, model: str, folder: str | Path, progress: Progress) -> int:
    """`verify` of a checkpoint against one public folder."""
    stored = open_checkpoint(checkpoint)
    parts = parts_of(stored)
    tensors = {part.place: open_tensors(Path(folder) / part.place) for part in parts if part.place}
    if any(not part.place for part in parts):
        released = read_released(model, folder)
        tensors[""] = released.tensors
        if model == "llava":  # has several layouts
            parts = [replace(part, table=released.table) for part in parts]
    return verify(stored, parts, tensors, progress)
