"""Opens a checkpoint for answering, over all devices of this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.subject import Subject
from vita_jax.inference.quantization import FLOATS, QuantizationConfig
from vita_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh, num_batch_shards
from vita_jax.parallel.rules import param_shardings
from vita_jax.storage import is_remote
from vita_jax.training.checkpoint import MANIFEST, LoadedModel, load_config, load_params
from vita_jax.training.experiment import build_model
from vita_jax.training.families import family_of
from vita_jax.training.objectives import OBJECTIVES
from vita_jax.training.plan import parameter_shapes
from vita_jax.training.portable import MODEL_FILE, is_portable

BATCH_SIZE = 64


def mesh_config(sizes: Sequence[str]) -> MeshConfig:
    """From texts like "fsdp=4". Raises UserError for another axis, or a size that is no whole number."""
    axes: dict[str, int] = {}
    for text in sizes:
        axis, _, size = text.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or axis == "context":
            known = ", ".join(axis for axis in MESH_AXES if axis != "context")
            raise UserError(f"--mesh {text}: expected AXIS=SIZE, such as fsdp=4; axes: {known}")
        axes[axis] = int(size)
    return MeshConfig(**axes)


def open_subject(
    checkpoint: str | os.PathLike[str],
    *,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    quantization: QuantizationConfig = FLOATS,
    batch_size: int = BATCH_SIZE,
) -> tuple[Subject, LoadedModel]:
    """A model that holds conversations, ready to be asked.

    Args:
      checkpoint: see `load_params`.
      mesh: how the devices of this process share the work: by default each has the model and a part of every batch.
        With one device nothing is laid out.
      quantization: what is int8; a model whose weights are lies on the first device alone.
      batch_size: questions per call; raised to a multiple of the parts that the mesh cuts a batch in.

    Raises:
      UserError: as `load_params`; the mesh does not fit the devices or the model; or a Flamingo, which is asked by
        demonstrations.
    """
    config, run_dir = load_config(checkpoint)
    family = family_of(config.model)
    if family.in_context:
        raise UserError(f"questions are asked of models that hold conversations; {checkpoint} is a {family.title}")
    devices = jax.local_devices()[: None if quantization.weights is None else 1]
    grid = make_mesh(mesh, devices)
    if len(devices) == 1:
        loaded, grid = load_params(checkpoint, change=quantization.change), None
    else:
        boxed = parameter_shapes(build_model(config), OBJECTIVES["language_modeling"])
        loaded = load_params(checkpoint, param_shardings(boxed, grid))
    shards = 1 if grid is None else num_batch_shards(grid)
    # A run may have been moved since; where it is now is what counts.
    config = dataclasses.replace(config, run_dir=str(run_dir))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    size = -(-batch_size // shards) * shards
    return Subject(config, loaded.params, tokenizer, batch_size=size, mesh=grid), loaded


def identity(loaded: LoadedModel, int8: Sequence[str]) -> str:
    """Stands for the model that answers: its place in the curriculum, its weights, and which parts of it are int8."""
    return f"{loaded.stage} {loaded.step} {weights_mark(loaded.path)} {sorted(int8)}"


def weights_mark(folder: Path) -> str:
    """Another text for other weights, without reading them.

    Of a checkpoint it is made from what its manifest says of its files: their CRC-32, or in a bucket, where there are
    none, their sizes and the second in which the manifest was written. Of a model that needs no run: from names, sizes
    and times of its files.

    Args:
      folder: `LoadedModel.path`.
    """
    if is_portable(folder):
        stats = [(file.name, file.stat()) for file in (folder / MODEL_FILE, *sorted(folder.glob("*.safetensors")))]
        known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    else:
        manifest = folder / MANIFEST
        known = [manifest.read_text(encoding="utf-8"), manifest.stat().mtime if is_remote(folder) else None]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
