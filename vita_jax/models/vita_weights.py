"""Names of the whole released checkpoint: the parts' tables under the prefixes of `vita/model/vita_arch.py`."""

from __future__ import annotations

from vita_jax.conversion.tables import Table
from vita_jax.models import state_head
from vita_jax.models.audio import tower_weights
from vita_jax.models.connectors.projectors_weights import weight_table as projector_table
from vita_jax.models.language.decoder_weights import weight_table as decoder_table
from vita_jax.models.vision.internvit_weights import weight_table as internvit_table
from vita_jax.models.vita import VitaConfig

# The doubled name is real: a wrapper module holding the tower.
VISION_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
# What a model without an audio tower passes over.
AUDIO_PATTERN = r"model\.audio_encoder\..*"


def weight_table(config: VitaConfig) -> Table:
    """The table of the model; without an audio tower that side of a checkpoint is passed over."""
    if config.audio is None:
        audio = Table((), ignore=(AUDIO_PATTERN,))
    else:
        audio = tower_weights.weight_table(config.audio).prefixed(torch=tower_weights.VITA_PREFIX, path="audio/")
    state = Table(())
    if config.state_head is not None:
        state = state_head.weight_table(config.state_head).prefixed(path="state_head/")
    return (
        internvit_table(config.vision).prefixed(torch=VISION_PREFIX, path="vision/")
        + projector_table(config.projector).prefixed(torch=PROJECTOR_PREFIX, path="projector/")
        + decoder_table(config.language).prefixed(path="language/")
        + audio
        + state
    )
