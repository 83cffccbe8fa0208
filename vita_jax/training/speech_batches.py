"""Batches of the stages that train on speech alone: the recogniser and the voice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vita_jax.data.ctc_vocabulary import load_ctc_vocabulary
from vita_jax.data.lanes import lanes_of_process
from vita_jax.data.loader import Loader, SourceConfig
from vita_jax.data.manifests import CODEC_FILE, Manifest, has_codes, manifest_file
from vita_jax.data.recognition import RecognitionShape, make_recognition_loader
from vita_jax.data.records import read_json
from vita_jax.data.speech_pairs import CropShape, PairShape, make_crop_loader, make_pair_loader
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.training.experiment import CTC_VOCABULARY, ExperimentConfig, data_folder
from vita_jax.training.objectives.speech import SPEECH_OBJECTIVES
from vita_jax.training.stages import Stage, flatten, unflatten
from vita_jax.training.step import FlatParams

SPEECH_BATCHES = ("ctc", *SPEECH_OBJECTIVES)  # objectives that read manifests and not packed records


def codec_fingerprint(params: Mapping[str, Any]) -> str:
    """Of a codec's parameters: equal ones give equal tokens."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten(params).items()):
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()


def check_codes(config: ExperimentConfig, stage: Stage, params: FlatParams) -> None:
    """Raises UserError if a source of the stage has tokens of which it is not known that they are those of the model's
    codec.
    """
    own = None
    for source in stage.sources:
        manifest = manifest_file(data_folder(config) / source.path)
        # Batches may come from elsewhere; the loader says what is missing.
        if not manifest.is_file() or not has_codes(Manifest(manifest)):
            continue
        file = manifest.with_name(CODEC_FILE)
        made_by = read_json(file, "codec").get("codec") if file.is_file() else None
        own = own or codec_fingerprint(unflatten(params)["codec"])
        if made_by != own:
            raise UserError(
                f"stage {stage.name}: the codes of {source.path} are of another codec than the model's; make them anew "
                "with data_pipelines.codes"
            )


def speech_batches(
    config: ExperimentConfig, stage: Stage, sources: Sequence[SourceConfig], tokenizer: Tokenizer
) -> Loader:
    """Transcribed clips for the objective `ctc`, crops for `codec`, sentences with text for `speech_decoder`: this
    process's part of them.

    Args:
      config, stage: the run and its stage.
      sources: with the full paths of their manifests.
      tokenizer: of the language model.

    Raises:
      UserError: the model has no codec, or a manifest does not fit.
    """
    options = {
        "batch_size": stage.batch_size // jax.process_count(),
        "seed": config.seed + config.stages.index(stage),
        "reading": config.data.reading,
        "max_bad_fraction": config.data.max_bad_fraction,
        "lanes": lanes_of_process(config.data.lanes, jax.process_index(), jax.process_count()),
    }
    if stage.objective == "ctc":
        vocabulary = load_ctc_vocabulary(data_folder(config) / CTC_VOCABULARY)
        shape, with_tokens = RecognitionShape(stage.clip_frames), config.model.ctc_training.token_weight > 0
        return make_recognition_loader(sources, shape, vocabulary, tokenizer if with_tokens else None, **options)
    codec = config.model.codec
    if codec is None:
        raise UserError(f"stages.{stage.name}: objective {stage.objective!r} needs a codec; set `model.codec`")
    if stage.objective == "codec":
        return make_crop_loader(sources, CropShape(codec.sampling_rate, stage.codec_frames * codec.hop), **options)
    shape = PairShape(codec.sampling_rate, codec.hop, stage.codec_frames, stage.row_length, codec.num_codes)
    return make_pair_loader(sources, shape, tokenizer, **options)
