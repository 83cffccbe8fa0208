"""Tensors under other names, or in parts: for checkpoints that name one thing in two ways, or stack what a table has
apart. A table then reads the view, and `joined` turns what it writes into the stacked tensors again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from vita_jax.conversion.torch_files import TensorInfo
from vita_jax.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where a tensor of a view comes from: part `part` of `parts` equal ones, cut on the first axis, of `name`."""

    name: str
    part: int = 0
    parts: int = 1


class View(Mapping[str, np.ndarray]):
    """A mapping over another one; a tensor is fetched, and cut, when it is asked for.

    Args:
      tensors: torch name -> array; may be lazy.
      sources: name in the view -> where it comes from. What no entry names is not in the view.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], sources: Mapping[str, Source]) -> None:
        self._tensors, self._sources = tensors, sources

    def __getitem__(self, name: str) -> np.ndarray:
        source = self._sources[name]
        tensor = self._tensors[source.name]
        if source.parts == 1:
            return tensor
        if tensor.shape[0] % source.parts:
            raise UserError(f"tensor {source.name}: {tensor.shape[0]} rows cannot be cut in {source.parts} equal parts")
        rows = tensor.shape[0] // source.parts
        return tensor[source.part * rows : (source.part + 1) * rows]

    def info(self, name: str) -> TensorInfo:
        """Of a tensor of the view, over a mapping that is a `TensorSource`."""
        source = self._sources[name]
        info = self._tensors.info(source.name)
        shape = info.shape if source.parts == 1 else (info.shape[0] // source.parts, *info.shape[1:])
        return replace(info, shape=shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def joined(
    tensors: Iterable[tuple[str, np.ndarray]], sources: Mapping[str, Source]
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of a view: (name in the view, array) pairs -> (torch name, array), parts put together again.

    A stacked tensor comes when its last part has; at most the parts that wait are held.

    Raises:
      UserError: a name that `sources` lacks, or a stacked tensor of which a part never came.
    """
    waiting: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors:
        if name not in sources:
            raise UserError(f"tensor {name} has no place in the checkpoint's own layout")
        source = sources[name]
        if source.parts == 1:
            yield source.name, tensor
            continue
        parts = waiting.setdefault(source.name, {})
        parts[source.part] = tensor
        if len(parts) == source.parts:
            del waiting[source.name]
            yield source.name, np.concatenate([parts[i] for i in range(source.parts)])
    if waiting:
        raise UserError(f"parts of {', '.join(sorted(waiting))} are missing")
