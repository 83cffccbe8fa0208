"""The parameters of a checkpoint, array by array: written and read without ever holding the model in memory.

Orbax saves and restores whole trees. A checkpoint that comes from PyTorch is larger than memory may be, so it is
written here one tensor at a time, in the format that Orbax itself reads: a zarr array per parameter, named by its path
with dots, and a `_METADATA` file that lists them. A stack of layers has a chunk for every layer, so each layer is
written, and read back, alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from vita_jax.conversion.tables import Rule, flatten, unflatten
from vita_jax.errors import UserError
from vita_jax.storage import absolute, is_remote

METADATA = "_METADATA"
OCDBT_MANIFEST = "manifest.ocdbt"
# Larger tensors are cut along their first axis, so that writing never needs a second copy of one.
CHUNK_BYTES = 64 << 20
_DICT_KEY = 2  # Orbax's number for a key of a dict


def chunk_shape(stack: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Shape of one chunk of a parameter (*stack *shape): one place of the stack, at most about `CHUNK_BYTES`.

    The chunks of a tensor are equally long: the last one is stored as long as the others, however little is in it.
    """
    inner = list(shape)
    if inner:
        rows, row = max(1, inner[0]), math.prod(inner[1:]) * itemsize
        count = -(-rows // max(1, CHUNK_BYTES // max(row, 1)))
        inner[0] = -(-rows // count)
    return (*(1 for _ in stack), *inner)


class ParamWriter:
    """Writes parameters part by part into `folder`, which becomes the item `params` of a checkpoint.

    Args:
      folder: created if needed. What an earlier, interrupted writer left in it may be written again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open: tuple[str, Any] | None = None
        self._dtypes: dict[str, np.dtype] = {}

    def write(self, rule: Rule, index: tuple[int, ...], part: np.ndarray) -> None:
        """Writes the part of a parameter at `index` of its stack; see `tables.iter_parts`.

        Raises:
          UserError: its dtype is not that of the parts before it, or the disk does not take it.
        """
        known = self._dtypes.setdefault(rule.path, part.dtype)
        if part.dtype != known:
            name = rule.names[int(np.ravel_multi_index(index, rule.stack))]
            raise UserError(f"tensor {name}: dtype {part.dtype}, but others of {rule.path} have {known}")
        try:
            array = self._array(rule, part.dtype)
            (array[index] if index else array).write(part).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{self.folder} cannot be written: {first_line(error)}") from error

    def write_all(self, rule: Rule, leaf: Any) -> None:
        """Writes a whole parameter (array or `StoredLeaf`), one place of its stack at a time. Errors as `write`."""
        for index in np.ndindex(rule.stack):
            self.write(rule, index, np.asarray(leaf[index] if rule.stack else leaf))

    def finish(self, rules: tuple[Rule, ...]) -> None:
        """Lists the parameters; from now on Orbax can read them."""
        entries = {}
        for rule in rules:
            keys = tuple(rule.path.split("/"))
            entries[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
        content = {"tree_metadata": entries, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}
        (self.folder / METADATA).write_text(json.dumps(content), encoding="utf-8")

    def _array(self, rule: Rule, dtype: np.dtype) -> Any:
        if self._open is None or self._open[0] != rule.path:
            shape = (*rule.stack, *rule.param_shape)
            metadata = {
                "shape": shape,
                "chunks": chunk_shape(rule.stack, rule.param_shape, dtype.itemsize),
                "compressor": None,
            }
            place = self.folder / rule.path.replace("/", ".")
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{place}/"},
                "metadata": metadata,
                "store_data_equal_to_fill_value": True,  # an absent chunk would read as zeros, here it is damage
            }
            array = ts.open(spec, dtype=ts.dtype(dtype), create=True, open=True).result()
            self._open = (rule.path, array)
        return self._open[1]


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class StoredLeaf:
    """A parameter on disk. `leaf[i]` or `leaf[i, j]` reads one place of its stack, `np.asarray(leaf)` all of it.

    Attributes:
      shape, dtype: of the array.
    """

    def __init__(self, store: Any, cache: dict[Any, np.ndarray]) -> None:
        self._store, self._cache = store, cache
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype: np.dtype = store.dtype.numpy_dtype

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        chunk = self._store.chunk_layout.read_chunk.shape or self.shape
        if math.prod(chunk[: len(index)]) == 1:
            return self._store[index].read().result()
        # Several layers lie in one chunk: read them once, and keep them only while this parameter is being read.
        if self not in self._cache:
            self._cache.clear()
            self._cache[self] = self._store.read().result()
        return self._cache[self][index]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._store.read().result(), dtype)


def open_params(folder: Path) -> dict[str, Any]:
    """The item `params` of a checkpoint as nested dicts of `StoredLeaf`; nothing is read yet.

    Raises:
      UserError: it is not there, or of a form that this program does not know.
    """
    folder = absolute(folder)
    try:
        content = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        paths = ["/".join(entry["key"] for entry in leaf["key_metadata"]) for leaf in content["tree_metadata"].values()]
        driver = "zarr3" if content.get("use_zarr3") else "zarr"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no parameters that can be read: {error!r}") from None
    cache: dict[Any, np.ndarray] = {}
    leaves = []
    for path in paths:
        try:
            store = ts.open({"driver": driver, "kvstore": _kvstore(folder, path)}, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{folder}: parameter {path} cannot be read: {first_line(error)}") from error
        leaves.append((path, StoredLeaf(store, cache)))
    return unflatten(iter(leaves))


def _kvstore(folder: Path, path: str) -> dict[str, str] | str:
    name, base = path.replace("/", "."), f"{folder}/" if is_remote(folder) else f"file://{folder}/"
    if (folder / OCDBT_MANIFEST).is_file():
        return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return f"{base}{name}/"


def total_bytes(params: Mapping[str, Any]) -> int:
    """Bytes of all leaves of a tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in flatten(params).values())
