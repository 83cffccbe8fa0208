"""What the voice is trained on: stages 3.1 and 3.2 of VITA-1.5 (arXiv 2501.01957, section 3.3.3).

codec: reconstruction of crops, and once it has warmed up also against discriminators (`ticodec/train.py`). Both sides
are one loss: the codec sees frozen discriminators, these see a detached wave, so one optimiser step trains both. The
discriminators, the averages behind the codebooks and the count of steps are thrown away at the end of the stage.
speech_decoder: the NAR and AR decoders learn, by teacher forcing, the codec's tokens of spoken sentences from the
language model's embeddings of their text. Codec and language model are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vita_jax.errors import UserError
from vita_jax.models.codec.codebook_training import CodebookState, CodebookTraining, follow, fresh_state, perplexity
from vita_jax.models.codec.codec import Codec, Reconstruction
from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.discriminators import Discriminators, Judgement
from vita_jax.models.codec.global_encoder import UPDATES
from vita_jax.models.codec.losses import (
    CodecTraining,
    adversarial_loss,
    codec_losses,
    discriminator_loss,
    feature_matching_loss,
    mel_distance,
)
from vita_jax.models.codec.quantizer import INPUTS
from vita_jax.models.speech.nar_decoder import initial_distribution_loss, text_rows
from vita_jax.models.speech.speech_decoder import SpeechBatch, SpeechDecoder, speech_labels, speech_loss
from vita_jax.models.vita import Vita
from vita_jax.nn.layers import Embed
from vita_jax.training.objectives.base import Batch, LossSums, Objective, Params

DISCRIMINATORS, CODEC_STATE = "discriminators", "codec_state"
# Weight of the NAR decoder's own guess of the tokens, where it has a head for it.
INITIAL_WEIGHT = 0.2

SPEECH_OBJECTIVES = ("codec", "speech_decoder")  # their batches come from `vita_jax.data.speech_pairs`

Scores = dict[str, jax.Array]


# ---------------------------------------------------------------------------------------------------------------------
# 3.1 codec
# ---------------------------------------------------------------------------------------------------------------------


def codec_config(model: Vita) -> CodecConfig:
    """The model's codec. Raises `UserError` if it has none."""
    if model.config.codec is None:
        raise UserError("this objective needs a codec; set the model config's `codec`")
    return model.config.codec


def codec_extra_params(model: Vita, key: jax.Array) -> dict[str, Any]:
    """The discriminators, and under `codec_state` the step and each codebook's averages."""
    config, training = codec_config(model), model.config.codec_training
    extra: dict[str, Any] = {CODEC_STATE: {"step": jnp.zeros(())}}
    if training.codebooks is not None:
        for name, width in _codebook_widths(config).items():
            state = fresh_state(config.num_codes, width)
            extra[CODEC_STATE][name] = {"counts": state.counts, "sums": state.sums}
    if training.discriminators is not None:
        # The lowest of the strided layers needs a few samples; parameters do not depend on how many there are.
        wave = jnp.zeros((1, 2 * max(training.discriminators.stft_sizes, default=1024)))
        extra[DISCRIMINATORS] = Discriminators(training.discriminators).init(key, wave)["params"]
    return extra


def _codebook_widths(config: CodecConfig) -> dict[str, int]:
    """Codebook -> width of its entries."""
    width, global_width = config.latent_dim // config.num_code_groups, config.global_dim // config.num_global_codes
    frames = [f"codebook_{i}_{j}" for i in range(config.num_residual_layers) for j in range(config.num_code_groups)]
    return {name: width for name in frames} | {
        f"global_codebook_{j}": global_width for j in range(config.num_global_codes)
    }


def codec_loss(model: Vita, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Reconstruction of crops, and the discriminators' own loss.

    Args:
      model: the composition; only its codec runs.
      params: nested parameters with those of `codec_extra_params`.
      batch: `waves`, `other_waves` (b n) float32 in -1 .. 1, n a multiple of the hop, b at least 2: crops, and second
        crops of the same utterances.
      key: draws the vectors that dead entries of the codebooks are put onto.

    Returns:
      Sums over crops. Metrics: `mel`, mean distance of log-mel spectra at the first resolution of the losses;
      `perplexity`, entries of the first codebook in use (those of the batch, or averaged where `codec_state` counts
      them); `quantizer`; `discriminator`, `adversarial`, `feature_matching` once they count (0 before). The first and
      `quantizer` are of frames as far quantised as training is (`CodebookTraining.ease_in`).
    """
    config, training = codec_config(model), model.config.codec_training
    waves = batch["waves"]
    if waves.shape[1] % config.hop:
        raise UserError(f"crops of {waves.shape[1]} samples must be a multiple of the codec's hop, {config.hop}")
    state = params[CODEC_STATE]
    share = 1.0 if training.codebooks is None else training.codebooks.share(state["step"])
    reconstruction, kept = Codec(config).apply(
        {"params": params["codec"]}, waves, batch["other_waves"], share=share, mutable=[UPDATES, INPUTS]
    )
    updates: dict[str, Any] = {"codec": dict(kept.get(UPDATES, {}))}
    updates[CODEC_STATE] = {"step": state["step"] + 1}
    asked = kept[INPUTS]["quantizer"]
    if training.codebooks is not None:
        books, averages = _follow_inputs(state, asked, key, training.codebooks)
        updates["codec"]["quantizer"] = books
        updates[CODEC_STATE] |= averages
    scores = codec_losses(waves, reconstruction, [], [], config.sampling_rate, training.losses)
    total = scores["loss"]
    versus: Scores = {}
    if training.discriminators is not None:
        versus, new = _against_discriminators(training, params[DISCRIMINATORS], state["step"], waves, reconstruction)
        updates[DISCRIMINATORS] = new
        total = total + sum(versus.values())
    size, hop, _ = training.losses.mel[0]
    metrics = {
        "mel": mel_distance(waves, reconstruction.wave, config.sampling_rate, size, hop, training.losses.num_mels),
        "perplexity": perplexity(_usage(updates[CODEC_STATE], asked, config)),
        "quantizer": reconstruction.quantizer_loss,
        **versus,
    }
    rows = jnp.float32(len(waves))
    flat = traverse_util.flatten_dict(updates, sep="/")
    return LossSums(
        total * rows,
        rows,
        {name: (value * rows, rows) for name, value in metrics.items()},
        {path: jax.lax.stop_gradient(value) for path, value in flat.items()},
    )


def _follow_inputs(
    state: Mapping[str, Any], asked: Mapping[str, Any], key: jax.Array, config: CodebookTraining
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The new codebooks, and their new averages."""
    books, averages = {}, {}
    for number, (name, (vectors, codes)) in enumerate(asked.items()):
        before = CodebookState(state[name]["counts"], state[name]["sums"])
        after, books[name] = follow(before, vectors, codes, jax.random.fold_in(key, number), config)
        averages[name] = {"counts": after.counts, "sums": after.sums}
    return books, averages


def _usage(state: Mapping[str, Any], asked: Mapping[str, Any], config: CodecConfig) -> jax.Array:
    """How often each entry of the first codebook is chosen: (n,)."""
    name = "codebook_0_0"
    if name in state:
        return state[name]["counts"]
    return jnp.bincount(asked[name][1].reshape(-1), length=config.num_codes).astype(jnp.float32)


def _against_discriminators(
    training: CodecTraining, params: Params, step: jax.Array, waves: jax.Array, reconstruction: Reconstruction
) -> tuple[Scores, dict[str, Any]]:
    """The terms of both sides, zeros in the first `adversarial_start` steps, and the discriminators' statistics."""
    judge = partial(Discriminators(training.discriminators).apply, mutable=[UPDATES])

    def compare(params: Params, decoded: jax.Array) -> tuple[Scores, dict[str, Any]]:
        both, kept = judge({"params": params}, jnp.concatenate([waves, jax.lax.stop_gradient(decoded)]))
        real, fake = _halves(both)
        # The codec's side: the same discriminators as constants, through which the gradient reaches the wave.
        seen, _ = judge({"params": jax.lax.stop_gradient(params)}, decoded)
        scores = {
            "discriminator": discriminator_loss(real, fake),
            "adversarial": adversarial_loss(seen),
            "feature_matching": training.losses.feature_matching * feature_matching_loss(real, seen),
        }
        return scores, dict(kept.get(UPDATES, {}))

    if training.adversarial_start == 0:
        return compare(params, reconstruction.wave)
    shapes = jax.eval_shape(compare, params, reconstruction.wave)

    def wait(params: Params, decoded: jax.Array) -> tuple[Scores, dict[str, Any]]:
        statistics = jax.tree.map_with_path(lambda path, _: _at(params, path), shapes[1])
        return {name: jnp.zeros(()) for name in shapes[0]}, statistics

    return jax.lax.cond(step >= training.adversarial_start, compare, wait, params, reconstruction.wave)


def _at(tree: Any, path: Sequence[Any]) -> Any:
    for entry in path:
        tree = tree[entry.key]
    return tree


def _halves(judgements: Sequence[Judgement]) -> tuple[list[Judgement], list[Judgement]]:
    """Judgements of two batches one behind the other, apart; rows of a batch stay together in every discriminator."""

    def half(judgement: Judgement, which: int) -> Judgement:
        return jax.tree.map(lambda x: jnp.split(x, 2)[which], judgement)

    return [half(j, 0) for j in judgements], [half(j, 1) for j in judgements]


# ---------------------------------------------------------------------------------------------------------------------
# 3.2 speech decoders
# ---------------------------------------------------------------------------------------------------------------------


def text_features(model: Vita, language_params: Params, tokens: jax.Array) -> jax.Array:
    """The language model's input embeddings of (b s) tokens as rows of the speech decoders, (b s*r w), r = d / w.

    Raises:
      UserError: the model has no speech decoders.
    """
    if model.config.speech is None:
        raise UserError("this objective needs speech decoders; set the model config's `speech`")
    c = model.config.language
    embed = Embed(c.vocab_size, c.hidden_size, dtype=model.dtype)
    embeds = embed.apply({"params": language_params["embed_tokens"]}, tokens)
    return text_rows(embeds, model.config.speech.hidden_size)


def speech_decoder_loss(model: Vita, params: Params, batch: Batch, key: jax.Array) -> LossSums:
    """Cross entropy of the codec's tokens and of their end, behind the text.

    Args:
      model: the composition.
      params: nested parameters.
      batch: `text_tokens` (b s) int32 ids of the language model, `text_lengths` (b,) int32; `waves` (b n) float32 of
        the sentences spoken, n a multiple of the hop, or their `codes` (b f) int32; `frames` (b,) int32 of each.
      key: not used.

    Returns:
      Sums over speech tokens and ends; metric `accuracy`. With an `initial_head` also its loss, times
      `INITIAL_WEIGHT`, and the metric `initial`.
    """
    codec, config = codec_config(model), model.config.speech
    features = text_features(model, params["language"], batch["text_tokens"])
    rows = features.shape[1] // batch["text_tokens"].shape[1]
    codes = batch["codes"] if "codes" in batch else _codes_of(codec, params["codec"], batch)
    speech = SpeechBatch(jax.lax.stop_gradient(features), batch["text_lengths"] * rows, codes, batch["frames"])
    decoder, variables = SpeechDecoder(config, dtype=model.dtype), {"params": params["speech"]}
    hidden = decoder.apply(variables, speech)[:, -codes.shape[1] - 1 :]
    logits = decoder.apply(variables, hidden, method=SpeechDecoder.logits)
    labels = speech_labels(speech.codes, speech.code_lengths, config)
    loss, count = speech_loss(logits, labels, config)
    right = jnp.sum((jnp.argmax(logits, axis=-1) == labels) & (labels != config.pad), dtype=jnp.float32)
    metrics = {"accuracy": (right, count)}
    if config.initial_head:
        guesses = decoder.apply(variables, speech.features, speech.feature_lengths, method=SpeechDecoder.initial_logits)
        initial, number = initial_distribution_loss(guesses, speech.feature_lengths, speech.codes, speech.code_lengths)
        loss, metrics["initial"] = loss + INITIAL_WEIGHT * initial, (initial, number)
    return LossSums(loss, count, metrics)


def _codes_of(config: CodecConfig, params: Params, batch: Batch) -> jax.Array:
    """(b f) int32."""
    variables = {"params": jax.lax.stop_gradient(params)}
    codes, _ = Codec(config).apply(variables, batch["waves"], batch["frames"], method=Codec.encode)
    return codes[..., 0]


def _samples(batch: Mapping[str, np.ndarray]) -> int:
    return int(batch["waves"].size)


def _speech_tokens(batch: Mapping[str, np.ndarray]) -> int:
    return int(np.sum(batch["frames"]))


CODEC = Objective(
    codec_loss,
    ("waves", "other_waves"),
    _samples,
    extra_params=codec_extra_params,
    extra_names=(DISCRIMINATORS, CODEC_STATE),
)
SPEECH_DECODER = Objective(
    speech_decoder_loss, ("text_tokens", "text_lengths", "frames"), _speech_tokens, optional_keys=("waves", "codes")
)
