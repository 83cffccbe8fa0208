"""What the speech encoder is trained on in stage 2.1a: transcripts, by connectionist temporal classification.

VITA-1.5 (arXiv 2501.01957, section 3.3.2) trains its encoder so before it meets the language model; its code has no CTC
training, so conventions are those of WeNet, which the encoder descends from. Chunks are drawn anew in every step when
the encoder's config says so (`dynamic_chunks`), after which full and streamed recognition both work.

Where in the sound a character lies is what CTC finds last. The first steps (`flat_start_steps`) therefore also ask for
each clip's characters spread evenly over its frames, with a weight that falls to 0: the flat start of hidden Markov
models, which shortens the search several times. Stretches of time and bands of frequency can be blanked out
(SpecAugment, arXiv 1904.08779, without warping), and patches of the features moved up and down.

The adapter can learn along (`token_weight`). In the paper it waits for stage 2.1b, where the language model's answers
teach it what words sound like, but only as fast as that model learns where to look. A second CTC loss behind the
adapter tells it directly: the rows of the embedding table, which stay as they are, are what it can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from vita_jax.errors import UserError
from vita_jax.models.audio.ctc_head import CtcHead
from vita_jax.models.audio.encoder import AudioEncoder
from vita_jax.models.connectors.audio_adapters import AudioAdapter
from vita_jax.models.vita import Vita
from vita_jax.ops.ctc import ctc_feasible, ctc_loss
from vita_jax.ops.masks import padding_mask
from vita_jax.training.objectives.base import Batch, LossSums, Objective, Params

# SpecAugment: how many stripes, and how wide they are at most.
TIME_MASKS, TIME_MASK_FRAMES = 2, 20
FREQUENCY_MASKS, FREQUENCY_MASK_BINS = 2, 12
# A patch of `feature_noise`: frames of 10 ms, mel bins.
PATCH_FRAMES, PATCH_BINS = 3, 6

CTC_KEYS = ("features", "lengths", "targets", "target_lengths", "frame_targets")
TOKEN_KEYS = ("token_targets", "token_lengths")
# Beside the parameters: the number of the step, and the row of the blank in front of the embedding table.
CTC_STATE = "ctc_state"
# Of the products of the adapter's tokens with the table: the larger, the smaller the tokens that tell words apart.
SHARPNESS = 3.0


def spec_augment(features: jax.Array, lengths: jax.Array, key: jax.Array) -> jax.Array:
    """Blanks out stripes of a clip, with the clip's own mean.

    Args:
      features: (b f m) log-mel features.
      lengths: (b,) int frames of each clip.
      key: draws the stripes, others for every clip.

    Returns:
      (b f m).
    """
    b, f, m = features.shape
    real = padding_mask(lengths, f)[..., None]
    mean = jnp.sum(jnp.where(real, features, 0.0), axis=(1, 2), keepdims=True) / (jnp.maximum(lengths, 1) * m).reshape(
        b, 1, 1
    )
    time_key, frequency_key = jax.random.split(key)
    in_time = _stripes(time_key, b, lengths, f, TIME_MASKS, TIME_MASK_FRAMES)
    in_frequency = _stripes(frequency_key, b, jnp.full((b,), m), m, FREQUENCY_MASKS, FREQUENCY_MASK_BINS)
    return jnp.where(in_time[:, :, None] | in_frequency[:, None, :], mean, features)


def _stripes(key: jax.Array, rows: int, lengths: jax.Array, size: int, count: int, widest: int) -> jax.Array:
    """(rows size) bool, True within one of `count` stripes per row, each 0 .. widest wide and a fifth at most."""
    width_key, start_key = jax.random.split(key)
    widest_here = jnp.minimum(widest, lengths // 5)[:, None]
    width = jnp.floor(jax.random.uniform(width_key, (rows, count)) * (widest_here + 1))
    start = jnp.floor(jax.random.uniform(start_key, (rows, count)) * (lengths[:, None] - width + 1))
    place = jnp.arange(size)[None, None]
    return jnp.any((place >= start[..., None]) & (place < (start + width)[..., None]), axis=1)


def move_patches(features: jax.Array, strength: float, key: jax.Array) -> jax.Array:
    """Moves patches of the features up and down, each by a normal number.

    Args:
      features: (b f m) log-mel features.
      strength: the standard deviation in the worst row; every row's own is drawn evenly below it.
      key: draws both.

    Returns:
      (b f m).
    """
    b, f, m = features.shape
    row_key, patch_key = jax.random.split(key)
    moves = jax.random.normal(patch_key, (b, -(-f // PATCH_FRAMES), -(-m // PATCH_BINS)))
    moves *= strength * jax.random.uniform(row_key, (b, 1, 1))
    return features + repeat(moves, "b f m -> b (f i) (m j)", i=PATCH_FRAMES, j=PATCH_BINS)[:, :f, :m]


def recognition_logits(
    model: Vita, params: Params, features: jax.Array, lengths: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scores of the characters, 25 a second.

    Args:
      model: the composition; only its speech encoder and CTC head run.
      params: nested parameters.
      features: (b f m) log-mel features; lengths: (b,) int frames.
      key: of dropout and chunks, in training; None runs the encoder as its config says.

    Returns:
      logits (b s v) float32, and (b,) int32 how many of the s are real.

    Raises:
      UserError: the model has no audio tower or no CTC head.
    """
    hidden, valid = _encoded(model, params, features, lengths, key)
    return _head(model, params, hidden), jnp.sum(valid, axis=1, dtype=jnp.int32)


def _encoded(
    model: Vita, params: Params, features: jax.Array, lengths: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The speech encoder's frames (b s d), and which are real (b s)."""
    if model.config.audio is None or not model.config.ctc_vocab_size:
        raise UserError("recognition needs a speech encoder with a CTC head; set the model's audio and ctc_vocab_size")
    return AudioEncoder(model.config.audio.encoder, dtype=model.dtype).apply(
        {"params": params["audio"]["encoder"]},
        features,
        lengths,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )


def _head(model: Vita, params: Params, hidden: jax.Array) -> jax.Array:
    return CtcHead(model.config.ctc_vocab_size, dtype=model.dtype).apply({"params": params["ctc_head"]}, hidden)


def token_ctc(
    model: Vita, params: Params, hidden: jax.Array, valid: jax.Array, targets: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """CTC of the adapter's tokens against the embedding table of the language model.

    Args:
      params: nested, with those of `ctc_extra_params`.
      hidden, valid: (b s d), (b s) of the encoder.
      targets, lengths: (b u), (b,) int32 tokens of what is said.

    Returns:
      Summed loss and number of tokens, without rows that are too short for their tokens.
    """
    adapter = AudioAdapter(model.config.audio.adapter, dtype=model.dtype)
    tokens, heard = adapter.apply({"params": params["audio"]["adapter"]}, hidden, valid)
    table = jax.lax.stop_gradient(params["language"]["embed_tokens"]["embedding"])
    rows = jnp.concatenate([params[CTC_STATE]["blank"], table]).astype(tokens.dtype)
    logits = SHARPNESS * jnp.einsum("bpd,vd->bpv", tokens, rows)
    frames, labels = jnp.sum(heard, axis=1, dtype=jnp.int32), targets + 1  # row 0 is the blank's
    feasible = ctc_feasible(frames, labels, lengths)
    count = jnp.sum(jnp.where(feasible, lengths, 0), dtype=jnp.float32)
    return jnp.sum(ctc_loss(logits, frames, labels, lengths)), count


def ctc_extra_params(model: Vita, key: jax.Array) -> dict[str, Any]:
    """The number of the step, which the flat start counts, and with `token_weight` the row of the blank."""
    state = {"step": jnp.zeros(())}
    if model.config.ctc_training.token_weight:
        language = model.config.language
        init = nn.with_logical_partitioning(nn.initializers.normal(language.initializer_range), (None, "embed"))
        state["blank"] = init(key, (1, language.hidden_size), jnp.float32)
    return {CTC_STATE: state}


def ctc_objective_loss(model: Vita, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """CTC loss of the rows whose transcript fits, and at first the flat start.

    Args:
      model: the composition; only its speech encoder and CTC head run.
      params: nested parameters with those of `ctc_extra_params`.
      batch: `features` (b f m), `lengths` (b), `targets` (b u), `target_lengths` (b), `frame_targets` (b s); int32 but
        for the features; with `token_weight` also `token_targets` (b u) and `token_lengths` (b).
      key: of dropout, chunks, blanked stripes and moved patches.

    Returns:
      Sums over characters. Metrics: `ctc`, the CTC loss per character; `infeasible`, share of the rows whose transcript
      is longer than what the encoder hears; they are left out; `token_ctc`, the loss of the adapter per token.
    """
    training = model.config.ctc_training
    augment_key, noise_key, encoder_key = jax.random.split(key, 3)
    features = batch["features"]
    if training.spec_augment:
        features = spec_augment(features, batch["lengths"], augment_key)
    if training.feature_noise:
        features = move_patches(features, training.feature_noise, noise_key)
    hidden, valid = _encoded(model, params, features, batch["lengths"], encoder_key)
    logits, frames = _head(model, params, hidden), jnp.sum(valid, axis=1, dtype=jnp.int32)
    feasible = ctc_feasible(frames, batch["targets"], batch["target_lengths"])
    ctc = jnp.sum(ctc_loss(logits, frames, batch["targets"], batch["target_lengths"]))
    characters = jnp.sum(jnp.where(feasible, batch["target_lengths"], 0), dtype=jnp.float32)
    metrics = {"ctc": (ctc, characters), "infeasible": (len(frames) - jnp.sum(feasible), jnp.float32(len(frames)))}
    total, step = ctc, params[CTC_STATE]["step"]
    if training.token_weight:
        spoken, tokens = token_ctc(model, params, hidden, valid, *(batch[name] for name in TOKEN_KEYS))
        # Weighed per unit of either kind.
        total += training.token_weight * spoken * characters / jnp.maximum(tokens, 1.0)
        metrics["token_ctc"] = (spoken, tokens)
    if training.flat_start_steps:
        weight = jnp.maximum(1.0 - step / training.flat_start_steps, 0.0)
        total = (1.0 - weight) * total + weight * characters * _flat_loss(logits, batch["frame_targets"])
    return LossSums(total, characters, metrics, {f"{CTC_STATE}/step": step + 1})


def _flat_loss(logits: jax.Array, frame_targets: jax.Array) -> jax.Array:
    """Mean cross entropy of the frames that have a character: logits (b s v), frame_targets (b s) -> ()."""
    wanted = frame_targets >= 0
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(scores, jnp.maximum(frame_targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(wanted, picked, 0.0)) / jnp.maximum(jnp.sum(wanted), 1)


def _encoder_frames(batch: Mapping[str, np.ndarray]) -> int:
    """Frames of 40 ms."""
    return int(np.sum(batch["lengths"])) // 4


CTC = Objective(
    ctc_objective_loss,
    CTC_KEYS,
    _encoder_frames,
    optional_keys=TOKEN_KEYS,
    extra_params=ctc_extra_params,
    extra_names=(CTC_STATE,),
)
