"""Names of a whole checkpoint: the parts' tables under the prefixes of `vita/model/vita_arch.py`.

The recogniser's head and the voice have no place in a released checkpoint (the voice comes in folders of its own). A
model that has them here keeps them under prefixes of our own, and a released one has neither.
"""

from __future__ import annotations

from vita_jax.conversion.tables import Table
from vita_jax.models import state_head
from vita_jax.models.audio import ctc_head_weights, tower_weights
from vita_jax.models.codec import codec_weights
from vita_jax.models.connectors.projectors_weights import weight_table as projector_table
from vita_jax.models.language.decoder_weights import weight_table as decoder_table
from vita_jax.models.speech import speech_decoder_weights
from vita_jax.models.vision.internvit_weights import weight_table as internvit_table
from vita_jax.models.vita import VitaConfig

# The doubled name is real: a wrapper module holding the tower.
VISION_PREFIX = "model.vision_tower.vision_tower."
PROJECTOR_PREFIX = "model.mm_projector."
# What a model without an audio tower passes over.
AUDIO_PATTERN = r"model\.audio_encoder\..*"
CODEC_PREFIX, SPEECH_PREFIX = "codec.", "speech_decoder."


def weight_table(config: VitaConfig) -> Table:
    """The table of the model; without an audio tower that side of a checkpoint is passed over."""
    table = (
        internvit_table(config.vision).prefixed(torch=VISION_PREFIX, path="vision/")
        + projector_table(config.projector).prefixed(torch=PROJECTOR_PREFIX, path="projector/")
        + decoder_table(config.language).prefixed(path="language/")
    )
    if config.audio is None:
        table += Table((), ignore=(AUDIO_PATTERN,))
    else:
        table += tower_weights.weight_table(config.audio).prefixed(torch=tower_weights.VITA_PREFIX, path="audio/")
        if config.ctc_vocab_size:
            head = ctc_head_weights.weight_table(config.audio.encoder.hidden_size, config.ctc_vocab_size)
            table += head.prefixed(torch=tower_weights.VITA_PREFIX, path="ctc_head/")
    if config.state_head is not None:
        table += state_head.weight_table(config.state_head).prefixed(path="state_head/")
    if config.codec is not None:
        table += codec_weights.weight_table(config.codec).prefixed(torch=CODEC_PREFIX, path="codec/")
    if config.speech is not None:
        speech = speech_decoder_weights.weight_table(config.speech)
        table += speech.prefixed(torch=SPEECH_PREFIX, path="speech/")
    return table
