"""Names of the whole released checkpoint: the parts' tables under the prefixes of `vita/model/vita_arch.py`."""

from __future__ import annotations

from vita_jax.conversion.tables import Table
from vita_jax.models.connectors.projectors_weights import weight_table as projector_table
from vita_jax.models.language.decoder_weights import weight_table as decoder_table
from vita_jax.models.vision.internvit_weights import weight_table as internvit_table
from vita_jax.models.vita import VitaConfig

# The doubled name is real: a wrapper module holding the tower.
VISION_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
# Tensors of the checkpoint that this model has no parameters for, because it has no audio side.
AUDIO_PATTERN = r"model\.audio_encoder\..*"


def weight_table(config: VitaConfig) -> Table:
    """The table of the model's vision and language side; the audio side of a checkpoint is passed over."""
    return (
        internvit_table(config.vision).prefixed(torch=VISION_PREFIX, path="vision/")
        + projector_table(config.projector).prefixed(torch=PROJECTOR_PREFIX, path="projector/")
        + decoder_table(config.language).prefixed(path="language/")
        + Table((), ignore=(AUDIO_PATTERN,))
    )
