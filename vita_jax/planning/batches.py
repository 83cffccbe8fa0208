"""The batch of a stage as shapes alone, for a step that is compiled without any data."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vita_jax.data.recognition import RecognitionShape
from vita_jax.errors import UserError
from vita_jax.parallel.mesh import batch_sharding
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.families import family_of
from vita_jax.training.stages import Stage

Shapes = dict[str, tuple[tuple[int, ...], jnp.dtype]]


def packed_rows(config: ExperimentConfig, stage: Stage) -> Shapes:
    """Rows of the language model (`vita_jax.data.packing.unpack_columns`), full to their budgets."""
    b, s, side = stage.batch_size, stage.row_length, config.model.vision.image_size
    names = ["tokens", "labels", "positions", "segment_ids", "feature_index"]
    if stage.state_labels:
        names.append("state_labels")
    shapes: Shapes = {name: ((b, s), jnp.int32) for name in names}
    channels = config.model.vision.num_channels
    shapes["tiles"] = ((b, stage.row_tiles, side, side, channels), jnp.uint8)
    if stage.row_clips:
        mel_bins = config.audio.filter_bank.num_mel_bins
        shapes["audio"] = ((b, stage.row_clips, stage.clip_frames, mel_bins), jnp.float32)
        shapes["audio_lengths"] = ((b, stage.row_clips), jnp.int32)
    return shapes


def named_cells(config: ExperimentConfig, stage: Stage) -> Shapes:
    """Tiles and the names of their cells (`unpack_cells`); two words a cell."""
    b, t, vision = stage.batch_size, stage.row_tiles, config.model.vision
    tokens = family_of(config.model).layout(config.model).tokens_per_tile
    tiles = (b, t, vision.image_size, vision.image_size, vision.num_channels)
    return {"tiles": (tiles, jnp.uint8), "cell_names": ((b, t * tokens, 2), jnp.int32)}


def joined_clips(config: ExperimentConfig, stage: Stage) -> Shapes:
    """Rows of the recogniser (`vita_jax.data.recognition.recognition_row`)."""
    b, units = stage.batch_size, RecognitionShape(stage.clip_frames).targets
    shapes: Shapes = {
        "features": ((b, stage.clip_frames, config.audio.filter_bank.num_mel_bins), jnp.float32),
        "lengths": ((b,), jnp.int32),
        "targets": ((b, units), jnp.int32),
        "target_lengths": ((b,), jnp.int32),
        "frame_targets": ((b, units), jnp.int32),
    }
    if config.model.ctc_training.token_weight > 0:
        shapes |= {"token_targets": ((b, units), jnp.int32), "token_lengths": ((b,), jnp.int32)}
    return shapes


def crops(config: ExperimentConfig, stage: Stage) -> Shapes:
    """Crops of the codec (`vita_jax.data.speech_pairs.make_crop_loader`)."""
    codec = config.model.codec
    if codec is None:
        raise UserError(f"stages.{stage.name}: objective {stage.objective!r} needs a codec; set `model.codec`")
    wave = ((stage.batch_size, stage.codec_frames * codec.hop), jnp.float32)
    return {"waves": wave, "other_waves": wave}


def spoken_sentences(config: ExperimentConfig, stage: Stage) -> Shapes:
    """Sentences with the codec's tokens, of the longest size that batches are cut to (`make_pair_loader`)."""
    b = stage.batch_size
    return {
        "text_tokens": ((b, stage.row_length), jnp.int32),
        "text_lengths": ((b,), jnp.int32),
        "codes": ((b, stage.codec_frames), jnp.int32),
        "frames": ((b,), jnp.int32),
    }


def mixed_documents(config: ExperimentConfig, stage: Stage) -> Shapes:
    """A batch of every data set (`vita_jax.data.document_loader`), full to its budgets."""
    vision, shapes = config.model.vision, {}
    for data in stage.sets:
        row = (data.batch_size, data.row_length)
        names = ("tokens", "labels", "positions", "segment_ids", "media_times")
        shapes |= {f"{data.name}/{name}": (row, jnp.int32) for name in names}
        picture = (data.frames, vision.image_size, vision.image_size, vision.num_channels)
        shapes[f"{data.name}/images"] = ((data.batch_size, data.row_images, *picture), jnp.uint8)
    return shapes


SHAPES: dict[str, Callable[[ExperimentConfig, Stage], Shapes]] = {
    "language_modeling": packed_rows,
    "text_pretraining": packed_rows,
    "cell_naming": named_cells,
    "ctc": joined_clips,
    "codec": crops,
    "speech_decoder": spoken_sentences,
    "flamingo": mixed_documents,
}


def abstract_batch(config: ExperimentConfig, stage: Stage, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one step over all devices, cut along the batch axes of the mesh.

    Raises:
      UserError: the model lacks what the objective trains.
    """
    sharding = batch_sharding(mesh)
    shapes = SHAPES[stage.objective](config, stage)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}
