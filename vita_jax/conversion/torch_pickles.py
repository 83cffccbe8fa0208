"""Reading the `.bin` and `.pt` files that `torch.save` writes, as tensors and nothing else.

Such files are pickles, and a pickle can run any program. They are read with `torch.load(weights_only=True)` by a torch
that has no known hole in it; there is no other way in. Torch is needed here alone: `pip install 'vita_jax[convert]'`.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from vita_jax.conversion.torch_files import INDEX_NAME, SINGLE_NAME, TensorFiles, TensorInfo, TensorSource
from vita_jax.errors import UserError

BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")
OLDEST_TORCH = (2, 10)


def require_torch() -> ModuleType:
    """Torch. Raises `UserError` where it is missing or too old to be trusted with files of others."""
    try:
        import torch
    except ImportError:
        raise UserError(
            ".bin and .pt files need torch: pip install 'vita_jax[convert]', or give safetensors files, which do not"
        ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__} is too old to read files of others safely; install "
            f"{'.'.join(map(str, OLDEST_TORCH))} or newer"
        )
    return torch


class PickledTensors(Mapping[str, np.ndarray]):
    """Files of `torch.save` as a mapping from name to array; nested dicts have names joined by dots.

    Entries that are no tensors (a step, a learning rate) are left out, a dict named `model`, `state_dict` or
    `model_state_dict` around everything is taken off. Tensors stay on disk until they are looked up.

    Args:
      files: read one after the other.

    Raises:
      UserError: no torch, a file that holds more than tensors and plain values, is damaged, or a name that comes twice.
    """

    def __init__(self, *files: Path) -> None:
        torch = require_torch()
        self._tensors: dict[str, tuple[Any, Path]] = {}
        for file in files:
            for name, tensor in _tensors_of(_unwrapped(_load(torch, file)), torch):
                if name in self._tensors:
                    raise UserError(f"{file}: tensor {name!r} is also in {self._tensors[name][1].name}")
                self._tensors[name] = (tensor, file)

    def __getitem__(self, name: str) -> np.ndarray:
        return _to_numpy(self._tensors[name][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of a tensor."""
        tensor, file = self._tensors[name]
        return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file)


def _load(torch: ModuleType, file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        # Files of old versions of torch are no archives and cannot be mapped into memory.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # Torch's own message recommends to switch the protection off.
        raise UserError(
            f"{file} holds something else than tensors and plain values, or is damaged; only tensors are read from "
            "such files, save them alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is not a complete file of torch.save; copy or download it again") from error


def _unwrapped(content: Any) -> Any:
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _tensors_of(content: Any, torch: ModuleType, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from _tensors_of(value, torch, f"{prefix}{key}.")


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        # numpy has no such type of its own: the bits go over as integers.
        return tensor.view(require_torch().int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def open_tensors(path: str | Path) -> TensorSource:
    """The tensors of a file or folder, safetensors preferred.

    Args:
      path: a safetensors, `.bin` or `.pt` file; an index file; or a folder with `model.safetensors`,
        `pytorch_model.bin`, either of their indices, or one single file of tensors.

    Raises:
      UserError: nothing there, several files without an index, or see `TensorFiles` and `PickledTensors`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        if path.name == BIN_INDEX_NAME:
            return PickledTensors(*_indexed_files(path))
        return PickledTensors(path) if path.suffix in SUFFIXES else TensorFiles(path)
    if (path / INDEX_NAME).is_file() or (path / SINGLE_NAME).is_file():
        return TensorFiles(path)
    if (path / BIN_INDEX_NAME).is_file():
        return PickledTensors(*_indexed_files(path / BIN_INDEX_NAME))
    if (path / BIN_NAME).is_file():
        return PickledTensors(path / BIN_NAME)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *SUFFIXES) and file.is_file())
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:4]) or "none"
        raise UserError(
            f"{path}: expected {SINGLE_NAME}, {INDEX_NAME}, {BIN_NAME} or one single file of tensors; found {found}"
        )
    return open_tensors(files[0])


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards ({error!r})") from error
