"""The CTC objective, and what the recogniser makes of sound afterwards."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.tiny import stage
from vita_jax.data.ctc_vocabulary import build_ctc_vocabulary
from vita_jax.errors import UserError
from vita_jax.evaluation.scoring import character_errors, edit_distance, error_rate
from vita_jax.inference.transcription import chunked, transcribe
from vita_jax.models.audio.ctc_head import CtcTraining
from vita_jax.models.audio.tower import audio_small
from vita_jax.models.connectors.audio_adapters import AudioAdapter
from vita_jax.models.vita import Vita, vita_small
from vita_jax.ops.ctc import ctc_loss
from vita_jax.ops.filter_bank import log_mel
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.objectives.recognition import (
    FREQUENCY_MASK_BINS,
    FREQUENCY_MASKS,
    PATCH_BINS,
    PATCH_FRAMES,
    SHARPNESS,
    TIME_MASK_FRAMES,
    TIME_MASKS,
    ctc_objective_loss,
    move_patches,
    recognition_logits,
    spec_augment,
)
from vita_jax.training.plan import model_of_stage

VOCABULARY = build_ctc_vocabulary(["abcd"], size=6)
WORDS = ("ab", "cd", "dca", "b")
AT_START = {"ctc_state": {"step": jnp.zeros(())}}


@pytest.fixture(scope="module")
def model():
    tower = audio_small(32, width=24, num_layers=2)
    encoder = dataclasses.replace(tower.encoder, dynamic_chunks=True, dropout=0.0, positional_dropout=0.0)
    small = vita_small(32, 1, 24, 64)
    return Vita(dataclasses.replace(small, audio=dataclasses.replace(tower, encoder=encoder), ctc_vocab_size=6))


@pytest.fixture(scope="module")
def params(model):
    return nn.unbox(init_params(model, OBJECTIVES["ctc"], jax.random.key(0)))


def tones(word: str) -> np.ndarray:
    """A word as sound: 0.24 s of its own tone per letter."""
    time = np.arange(3840) / 16_000
    return np.concatenate([0.3 * np.sin(2 * np.pi * 400 * 2 ** ("abcd".index(c)) * time) for c in word]).astype("f")


def batch_of(words, targets=None):
    clips = [log_mel(tones(word)) for word in words]
    features = np.zeros((len(words), 80, 80), np.float32)
    rows = np.zeros((len(words), 19), np.int32)
    spread = np.full((len(words), 19), -1, np.int32)
    targets = [VOCABULARY.encode(word) for word in words] if targets is None else targets
    for i, (clip, ids) in enumerate(zip(clips, targets, strict=True)):
        features[i, : len(clip)] = clip
        rows[i, : len(ids)] = ids
        count = (len(clip) - 3) // 4
        spread[i, :count] = np.asarray(ids)[np.arange(count) * len(ids) // count]
    lengths = np.array([len(clip) for clip in clips], np.int32)
    return {
        "features": jnp.asarray(features),
        "lengths": jnp.asarray(lengths),
        "targets": jnp.asarray(rows),
        "target_lengths": jnp.asarray([len(ids) for ids in targets], jnp.int32),
        "frame_targets": jnp.asarray(spread),
    }


@pytest.mark.slow
def test_the_recogniser_learns_and_hears_whole_and_in_chunks(model, params):
    # Blanked stripes are for longer trainings than this one.
    model = Vita(dataclasses.replace(model.config, ctc_training=CtcTraining(spec_augment=False)))
    batch = batch_of(WORDS)
    optimizer = optax.adam(5e-3)
    parts = {name: params[name] for name in ("audio", "ctc_head")}

    @jax.jit
    def step(parts, state, key):
        def loss(parts):
            sums = ctc_objective_loss(model, {**parts, **AT_START}, batch, key)
            return sums.loss / sums.count

        value, grads = jax.value_and_grad(loss)(parts)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(parts, updates), state, value

    state = optimizer.init(parts)
    losses = []
    for number in range(200):
        parts, state, value = step(parts, state, jax.random.key(number))
        losses.append(float(value))
    assert np.mean(losses[-10:]) < 0.1 * losses[0]
    waves = [tones(word) for word in WORDS]
    assert transcribe(model, parts, VOCABULARY, waves) == list(WORDS)
    in_chunks = Vita(chunked(model.config, 4, 2))
    assert transcribe(in_chunks, parts, VOCABULARY, waves) == list(WORDS)


def test_infeasible_targets_are_counted_and_dropped(model, params):
    key = jax.random.key(0)
    too_long = VOCABULARY.encode("abcdabcdabcdabcdab")
    one = ctc_objective_loss(
        model, {**params, **AT_START}, batch_of(WORDS[:2], [VOCABULARY.encode("ab"), too_long]), key
    )
    assert float(one.count) == 3.0  # the gap and two letters
    assert [float(x) for x in one.metrics["infeasible"]] == [1.0, 2.0]
    assert np.isfinite(float(one.loss))


@pytest.mark.slow
def test_the_flat_start_asks_for_evenly_spread_characters_and_fades(model, params):
    training = CtcTraining(flat_start_steps=4, spec_augment=False)
    flat = Vita(dataclasses.replace(model.config, ctc_training=training))
    batch = batch_of(WORDS)

    def at(step):
        sums = ctc_objective_loss(flat, {**params, "ctc_state": {"step": jnp.float32(step)}}, batch, jax.random.key(0))
        return {name: float(value / count) for name, (value, count) in sums.metrics.items()}, sums

    first, sums = at(0)
    logits, _ = recognition_logits(
        flat, params, batch["features"], batch["lengths"], jax.random.split(jax.random.key(0))[1]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["frame_targets"], 0))
    expected = float(jnp.mean(losses[batch["frame_targets"] >= 0]))
    assert float(sums.loss / sums.count) == pytest.approx(expected, rel=1e-5)
    assert float(sums.updates["ctc_state/step"]) == 1.0
    half, sums = at(2)
    assert float(sums.loss / sums.count) == pytest.approx(0.5 * expected + 0.5 * half["ctc"], rel=1e-5)
    late, sums = at(7)
    assert float(sums.loss / sums.count) == pytest.approx(late["ctc"], rel=1e-6)
    assert first["ctc"] == half["ctc"] == late["ctc"]


def test_augmentation_blanks_bounded_stripes_only():
    features = jnp.asarray(np.random.default_rng(0).normal(size=(6, 100, 80)), jnp.float32) + 5
    lengths = jnp.asarray([100, 80, 60, 40, 20, 10])
    got = spec_augment(features, lengths, jax.random.key(1))
    changed = np.asarray(got != features)
    assert changed.any()
    for row, length in zip(changed, lengths, strict=True):
        whole_frames, whole_bins = row[: int(length)].all(axis=1), row.all(axis=0)
        assert whole_frames.sum() <= TIME_MASKS * min(TIME_MASK_FRAMES, int(length) // 5)
        assert whole_bins.sum() <= FREQUENCY_MASKS * FREQUENCY_MASK_BINS
        assert not row[: int(length)][~whole_frames][:, ~whole_bins].any()


def test_patches_move_as_one_and_as_far_as_asked():
    features = jnp.asarray(np.random.default_rng(0).normal(size=(200, 20, 16)), jnp.float32)
    moved = np.asarray(move_patches(features, 0.6, jax.random.key(1)) - features)
    patch = moved[:, :PATCH_FRAMES, :PATCH_BINS]
    np.testing.assert_allclose(patch, np.broadcast_to(patch[:, :1, :1], patch.shape), atol=1e-5)
    assert np.all(np.abs(moved[:, PATCH_FRAMES] - moved[:, 0]).max(axis=1) > 0)
    # Rows draw their strength evenly from 0 to 0.6: the mean square is 0.6 ** 2 / 3.
    strengths = moved.reshape(200, -1).std(axis=1)
    assert strengths.min() < 0.1 < 0.5 < strengths.max()
    np.testing.assert_allclose(np.mean(moved**2), 0.12, rtol=0.15)
    with pytest.raises(UserError, match="feature_noise"):
        CtcTraining(feature_noise=-1.0)


def test_training_moves_patches(model, params):
    def loss(noise):
        noisy = dataclasses.replace(model.config, ctc_training=CtcTraining(spec_augment=False, feature_noise=noise))
        return float(ctc_objective_loss(Vita(noisy), {**params, **AT_START}, batch_of(WORDS), jax.random.key(1)).loss)

    assert loss(0.0) == loss(0.0) != loss(2.0)


def test_a_model_without_recogniser_says_what_to_set(model, params):
    deaf = Vita(vita_small(32, 1, 24, 64))
    with pytest.raises(UserError, match="ctc_vocab_size"):
        ctc_objective_loss(deaf, params, batch_of(WORDS), jax.random.key(0))
    with pytest.raises(UserError, match="no speech encoder"):
        chunked(deaf.config, 4, 2)
    with pytest.raises(UserError, match="ctc_vocab_size"):
        dataclasses.replace(deaf.config, ctc_vocab_size=6)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_errors_add_up_over_clips():
    errors = [character_errors("How many?", "how many"), character_errors("一个", "一 共")]
    assert errors == [(0, 8), (1, 2)]
    assert error_rate(errors) == 0.1


TOKENS = [[7, 9], [11], [5, 5, 60], [3] * 12]  # of WORDS; the last row is too short for them


@pytest.fixture(scope="module")
def heard(model):
    """A model whose adapter learns along, its parameters, and a batch with tokens."""
    training = CtcTraining(spec_augment=False, token_weight=0.5)
    model = Vita(dataclasses.replace(model.config, ctc_training=training))
    targets = np.zeros((len(WORDS), 12), np.int32)
    for row, ids in zip(targets, TOKENS, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.asarray([len(ids) for ids in TOKENS], jnp.int32)
    batch = batch_of(WORDS) | {"token_targets": jnp.asarray(targets), "token_lengths": lengths}
    return model, nn.unbox(init_params(model, OBJECTIVES["ctc"], jax.random.key(0))), batch


def test_the_adapter_is_to_say_tokens_as_the_embedding_table_has_them(heard):
    model, params, batch = heard
    sums = ctc_objective_loss(model, params, batch, jax.random.key(0))
    plain = Vita(dataclasses.replace(model.config, ctc_training=CtcTraining(spec_augment=False)))
    without = ctc_objective_loss(plain, params, batch, jax.random.key(0))
    # Every clip by itself, with the chunks that the batch had.
    encoder_key = jax.random.split(jax.random.key(0), 3)[2]
    hidden, valid = plain.apply(
        {"params": params},
        batch["features"],
        batch["lengths"],
        False,
        rngs={"dropout": encoder_key},
        method=lambda model, *args: model.audio.encoder(*args),
    )
    embeds, _ = AudioAdapter(model.config.audio.adapter).apply({"params": params["audio"]["adapter"]}, hidden, valid)
    rows = np.concatenate([params["ctc_state"]["blank"], params["language"]["embed_tokens"]["embedding"]])
    expected = 0.0
    for row, ids in enumerate(TOKENS[:3]):
        count = -(-int(valid[row].sum()) // 2)
        logits = SHARPNESS * np.asarray(embeds[row, :count]) @ rows.T
        labels = jnp.asarray([ids]) + 1
        expected += float(ctc_loss(jnp.asarray(logits)[None], jnp.asarray([count]), labels, jnp.asarray([len(ids)]))[0])
    loss, number = (float(x) for x in sums.metrics["token_ctc"])
    assert number == 6
    assert loss == pytest.approx(expected, rel=1e-4)
    added = 0.5 * loss / number
    assert float(sums.loss / sums.count) == pytest.approx(float(without.loss / without.count) + added, rel=1e-5)


def test_what_learns_to_say_tokens(heard):
    model, params, batch = heard

    def loss(params):
        return ctc_objective_loss(model, params, batch, jax.random.key(0)).metrics["token_ctc"][0]

    gradient = jax.grad(loss)(params)
    assert not np.any(gradient["language"]["embed_tokens"]["embedding"])
    assert not np.any(gradient["ctc_head"]["ctc_lo"]["kernel"])
    assert np.any(gradient["ctc_state"]["blank"])
    assert np.any(gradient["audio"]["adapter"]["project"]["kernel"])
    assert np.any(jax.tree.leaves(gradient["audio"]["encoder"])[-1])
    with pytest.raises(UserError, match="token_weight"):
        CtcTraining(token_weight=-0.5)


def test_a_stage_can_hear_clips_as_a_whole(model):
    whole, drawn = (stage("hearing", whole_clips=choice, clip_frames=80, row_clips=1) for choice in (True, False))
    assert model.config.audio.encoder.dynamic_chunks
    assert model_of_stage(model, drawn) is model
    heard_whole = model_of_stage(model, whole).config
    assert not heard_whole.audio.encoder.dynamic_chunks
    assert dataclasses.replace(heard_whole, audio=model.config.audio) == model.config
