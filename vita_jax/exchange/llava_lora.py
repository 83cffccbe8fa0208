"""A LLaVA as the original's LoRA training leaves it: adapters and the projector, beside the model that they are for.

`DIR/`
  config.json                                        of the whole LLaVA
  adapter_config.json, adapter_model.safetensors     of `peft` (or .bin)
  non_lora_trainables.bin                            what trained without adapters
  <last word of base_model_name_or_path>/            the language model, with its weights
  <last word of mm_vision_tower>/                    CLIP, with its weights

Read as the one checkpoint that the original's script would merge them into, one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vita_jax.conversion.torch_files import TensorInfo, TensorSource
from vita_jax.conversion.torch_pickles import open_tensors
from vita_jax.conversion.views import Source, View
from vita_jax.errors import UserError
from vita_jax.models.llava_weights import plain_name
from vita_jax.models.lora_weights import PREFIX, scale_from_peft

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What the original's training saves beside the adapters.
OTHER_WEIGHTS = "non_lora_trainables.bin"
FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


def is_lora_folder(folder: Path) -> bool:
    """Whether a folder holds adapters and what trained beside them."""
    return (folder / ADAPTER_CONFIG).is_file() and (folder / OTHER_WEIGHTS).is_file()


class Merged(Mapping[str, np.ndarray]):
    """Tensors with adapters added to them when they are asked for: W + scale B A, in float32 and then as W was.

    Args:
      base: of the language model.
      adapters: as `peft` names them.
      scale: alpha / rank.
      without: names that are left out.

    Raises:
      UserError: adapters that fit no tensor.
    """

    def __init__(self, base: TensorSource, adapters: TensorSource, scale: float, without: set[str]) -> None:
        self._base, self._adapters, self._scale = base, adapters, scale
        self._names = [name for name in base if name not in without]
        self._factors: dict[str, dict[str, str]] = {}
        for name in adapters:
            match = FACTOR.fullmatch(name)
            if match is None or f"{match['layer']}.weight" not in self._names:
                raise UserError(f"adapter {name} fits no tensor of the language model it is said to be for")
            self._factors.setdefault(f"{match['layer']}.weight", {})[match["side"]] = name
        for name, factors in self._factors.items():
            shapes = {side: adapters.info(factor).shape for side, factor in factors.items()}
            (rank, columns), (rows, rank_b) = shapes.get("A", (0, 0)), shapes.get("B", (0, 0))
            if rank != rank_b or base.info(name).shape != (rows, columns):
                raise UserError(f"adapters {shapes} do not fit {name}, which is of shape {base.info(name).shape}")

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._base[name]
        if name not in self._factors:
            return tensor
        a, b = (self._adapters[self._factors[name][side]].astype(np.float32) for side in "AB")
        return (tensor.astype(np.float32) + self._scale * (b @ a)).astype(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def info(self, name: str) -> TensorInfo:
        """See `TensorSource`."""
        return self._base.info(name)


def lora_sources(folder: Path, fields: Mapping[str, Any]) -> tuple[TensorSource, TensorSource]:
    """The language model with its adapters, and what trained beside them, under the names of a whole checkpoint.

    Args:
      folder: see above.
      fields: content of its `adapter_config.json`.

    Raises:
      UserError: something is not there or does not fit.
    """
    name = PurePosixPath(str(fields.get("base_model_name_or_path"))).name
    file = next((folder / file for file in ADAPTER_FILES if (folder / file).is_file()), None)
    if file is None:
        raise UserError(f"there is no {' and no '.join(ADAPTER_FILES)} beside {ADAPTER_CONFIG}")
    if not (folder / name).is_dir():
        raise UserError(
            f"it holds adapters for {fields.get('base_model_name_or_path')}; put that model's own folder, with its "
            f"weights, into it as {name}"
        )
    trained = open_tensors(folder / OTHER_WEIGHTS)
    others = View(trained, {plain_name(tensor): Source(tensor) for tensor in trained})
    scale = scale_from_peft(fields)
    return Merged(open_tensors(folder / name), open_tensors(file), scale, set(others)), others
