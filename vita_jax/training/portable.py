"""One folder that holds a model and needs no run: what is kept, handed on, or shipped.

`DIR/`
  vita_jax.json          format version, stage, step, and the configuration without places of one machine
  model.safetensors      all parameters under the names of the public checkpoints (or shards with an index)
  tokenizer/             the tokenizer's files
  ctc_vocabulary.json, voices.json   where the run has them

`python -m vita_jax.convert export --layout vita_jax` writes it; everything that takes a checkpoint reads it
(`vita_jax.training.checkpoint.load_params`). It may be moved, renamed and read-only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from vita_jax import config as config_lib
from vita_jax.conversion.tables import flatten, iter_export, iter_import, unflatten
from vita_jax.conversion.torch_files import INDEX_NAME, SINGLE_NAME, TensorFiles, write_tensors
from vita_jax.data.loader import SourceConfig
from vita_jax.errors import UserError
from vita_jax.models.int8 import LeafChange
from vita_jax.models.lora import detach, merge
from vita_jax.parallel.processes import DistributedConfig
from vita_jax.storage import on_disk, place
from vita_jax.training.experiment import CTC_VOCABULARY, VOICES, ExperimentConfig, data_folder
from vita_jax.training.families import weight_table
from vita_jax.training.stages import Stage

FORMAT_VERSION = 1
MODEL_FILE = "vita_jax.json"
TOKENIZER = "tokenizer"
# Small files that a model's other abilities need; each is in the run's folder or in its data folder.
EXTRA_FILES = (CTC_VOCABULARY, VOICES)
WRITTEN = "what this command writes"  # in messages

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class PortableModel:
    """What such a folder holds.

    Attributes:
      params: nested dicts of arrays.
      config: the configuration they were trained with.
      stage, step: where in the curriculum they were saved.
    """

    params: dict[str, Any]
    config: ExperimentConfig
    stage: str
    step: int


def is_portable(path: str | Path) -> bool:
    """Whether the folder holds a model that needs no run."""
    return (place(path) / MODEL_FILE).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_portable(
    folder: str | Path, model: PortableModel, run_dir: str | Path, dtype: DType | None = None
) -> list[Path]:
    """Writes the folder, complete or not at all.

    Args:
      folder: must not exist, or be empty.
      model: what to write; its leaves may be numpy or jax arrays. Adapters (LoRA) are merged.
      run_dir: the run that the parameters come from, for its tokenizer and the files of `EXTRA_FILES`.
      dtype: of matrices and larger; vectors (norms, biases, statistics), which are few and sensitive, keep theirs.
        None keeps all.

    Returns:
      The files written, relative to the folder.

    Raises:
      UserError: the folder is in use, one of the two is in a bucket, the run has no tokenizer, a value does not fit
        `dtype`, or the parameters are not those of the configuration.
    """
    folder, run_dir = on_disk(folder, WRITTEN), on_disk(run_dir, "a run that is exported")
    if not (run_dir / TOKENIZER).is_dir():
        raise UserError(f"{run_dir} has no folder {TOKENIZER!r}; a model without its tokenizer is of no use")
    with new_folder(folder) as partial:
        base, adapters = detach(model.params)
        params = merge(base, adapters) if adapters else base
        tensors = iter_export(weight_table(model.config.model), params)
        write_tensors(partial, as_dtype(tensors, dtype))
        shutil.copytree(run_dir / TOKENIZER, partial / TOKENIZER)
        for file in extra_files(model.config, run_dir):
            shutil.copyfile(file, partial / file.name)
        content = {
            "format_version": FORMAT_VERSION,
            "stage": model.stage,
            "step": model.step,
            "config": config_lib.to_dict(without_places(model.config)),
        }
        # Last: what has this file can be loaded.
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (partial / MODEL_FILE).write_text(text, encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; it takes its place when all went well, and else disappears.

    Raises:
      UserError: there is something at `folder` already, or it cannot be written (a full disk, say).
    """
    with new_run(folder) as partial:
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def new_run(folder: str | Path, keep: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """As `new_folder`, but what was written so far stays if it is interrupted, as `<folder>.partial`.

    Args:
      folder: where the result goes.
      keep: whether what an earlier attempt left at that path may be gone on with; else it is deleted.

    Raises:
      UserError: see `new_folder`.
    """
    folder = on_disk(folder, WRITTEN)
    check_new_folder(folder)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists() and not keep(partial):
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error


def check_new_folder(folder: str | Path) -> None:
    """Raises UserError unless `folder` can be made or is empty."""
    path = on_disk(folder, WRITTEN)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already and not empty; give a new folder")


def as_dtype(
    tensors: Iterator[tuple[str, np.ndarray]], dtype: DType | None, smallest_rank: int = 2
) -> Iterator[tuple[str, np.ndarray]]:
    """Casts floating-point tensors with at least `smallest_rank` axes, one at a time.

    Raises:
      UserError: a finite value becomes infinite.
    """
    for name, array in tensors:
        floating = array.dtype in DTYPES.values()
        if dtype is None or array.ndim < smallest_rank or not floating or array.dtype == DTYPES[dtype]:
            yield name, array
            continue
        with np.errstate(over="ignore"):
            cast = array.astype(DTYPES[dtype])
        if not np.isfinite(cast).all() and np.isfinite(array).all():
            largest = float(np.abs(array.astype(np.float32)).max())
            raise UserError(f"tensor {name} holds {largest:g}, which {dtype} cannot; use bfloat16 or float32")
        yield name, cast


def extra_files(config: ExperimentConfig, run_dir: Path) -> list[Path]:
    """Those of `EXTRA_FILES` that the run has, in its own folder or else in its data folder."""
    here = dataclasses.replace(config, run_dir=str(run_dir))
    found = []
    for name in EXTRA_FILES:
        places = (run_dir / name, data_folder(here) / name)
        found += [path for path in places if path.is_file()][:1]
    return found


def without_places(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without absolute paths: they mean nothing elsewhere, and tell who trained where."""
    files = {name: _relative(getattr(config.data, name)) for name in ("folder", "json", "folders", "asr", "speech")}
    return dataclasses.replace(
        config,
        run_dir=_last(config.run_dir),
        data=dataclasses.replace(config.data, root=None, **files),
        tokenizer=dataclasses.replace(config.tokenizer, folder=None),
        distributed=DistributedConfig(),
        stages=tuple(_stage_without_places(stage) for stage in config.stages),
    )


def _stage_without_places(stage: Stage) -> Stage:
    def moved(source: SourceConfig) -> SourceConfig:
        return dataclasses.replace(source, path=_last(source.path))

    sets = tuple(dataclasses.replace(data, sources=tuple(map(moved, data.sources))) for data in stage.sets)
    start = stage.start_from
    start = tuple(map(_last, start)) if isinstance(start, tuple) else None if start is None else _last(start)
    return dataclasses.replace(stage, sources=tuple(map(moved, stage.sources)), sets=sets, start_from=start)


def _last(path: str) -> str:
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _relative(path: str | None) -> str | None:
    return None if path is None or PurePath(path).is_absolute() else path


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_portable(
    folder: str | Path, shardings: Mapping[str, Any] | None = None, change: LeafChange | None = None
) -> PortableModel:
    """Reads the folder; parameters become float32, the dtype of all parameters in use.

    Args:
      folder: see `is_portable`.
      shardings: nested dict of shardings; what it lacks goes to the first device, as everything does with None.
      change: what becomes of every parameter, such as `vita_jax.models.int8.int8_weights`; integers stay what they are.

    Raises:
      UserError: written by another version, damaged, or weights that are not those of its configuration.
    """
    folder = on_disk(folder, "a model that was exported")
    content, config = _read_model_file(folder / MODEL_FILE), portable_config(folder)
    if not (folder / SINGLE_NAME).is_file() and not (folder / INDEX_NAME).is_file():
        raise UserError(f"{folder} has a {MODEL_FILE} but no {SINGLE_NAME}; copy the whole folder again")
    layout = flatten(shardings or {})
    default = SingleDeviceSharding(jax.local_devices()[0])

    def placed(path: str, leaf: np.ndarray) -> jax.Array:
        leaf = leaf if leaf.dtype == np.int8 else leaf.astype(np.float32, copy=False)
        return jax.device_put(leaf, layout.get(path, default))

    try:
        read = iter_import(weight_table(config.model), TensorFiles(folder))
        if change is not None:
            read = (new for path, leaf in read for new in change(path, leaf).items())
        params = unflatten((path, placed(path, leaf)) for path, leaf in read)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return PortableModel(params, config, content["stage"], content["step"])


def portable_config(folder: str | Path) -> ExperimentConfig:
    """The configuration alone. Raises `UserError` as `read_portable`."""
    path = place(folder) / MODEL_FILE
    content = _read_model_file(path)
    try:
        return config_lib.from_dict(ExperimentConfig, content["config"])
    except UserError as error:
        raise UserError(f"{path}: a configuration this program does not know: {error}") from None


def _read_model_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        fields = {name: content[name] for name in ("stage", "step", "config")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); copy the folder again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads version {FORMAT_VERSION}")
    return fields
