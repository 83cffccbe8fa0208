"""Codebooks that follow their inputs, and utterances of different lengths in one batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.voice import CODEC
from vita_jax.errors import UserError
from vita_jax.models.codec.codebook_training import CodebookTraining, follow, fresh_state, perplexity
from vita_jax.models.codec.codec import Codec
from vita_jax.models.codec.quantizer import nearest_codes
from vita_jax.parallel.rules import unbox

pytestmark = pytest.mark.slow


def test_the_first_step_takes_the_entries_from_the_data():
    vectors = jax.random.normal(jax.random.key(0), (3, 5, 2))
    state = fresh_state(8, 2)
    codes = nearest_codes(vectors, jnp.zeros((8, 2)))
    _, codebook = follow(state, vectors, codes, jax.random.key(1), CodebookTraining())
    distances = np.abs(np.asarray(codebook)[:, None] - np.asarray(vectors).reshape(1, -1, 2)).max(-1)
    # Among equal entries the first is chosen by all vectors, and takes their mean.
    assert np.all(distances.min(axis=1)[1:] < 1e-6)
    np.testing.assert_allclose(codebook[0], np.mean(vectors, axis=(0, 1)), atol=1e-6)
    assert len(np.unique(np.asarray(codebook), axis=0)) == 8


def test_entries_become_the_means_of_their_clusters_and_all_are_used():
    centres = np.asarray([[0, 0], [4, 0], [0, 4], [4, 4]], np.float32)
    rng = np.random.default_rng(0)
    state, codebook = fresh_state(4, 2), jnp.zeros((4, 2))
    step = jax.jit(lambda s, v, c, k: follow(s, v, c, k, CodebookTraining(decay=0.8)))
    for number in range(60):
        vectors = jnp.asarray(centres[rng.integers(4, size=64)] + 0.1 * rng.normal(size=(64, 2)), jnp.float32)
        state, codebook = step(state, vectors, nearest_codes(vectors, codebook), jax.random.key(number))
    errors = np.abs(np.asarray(codebook)[:, None] - centres[None]).max(-1)
    assert sorted(errors.argmin(axis=1)) == [0, 1, 2, 3] and errors.min(axis=1).max() < 0.2
    assert float(perplexity(state.counts)) > 3.5


def test_perplexity_counts_entries():
    assert float(perplexity(jnp.asarray([2.0, 2.0, 0.0, 2.0]))) == pytest.approx(3)
    assert float(perplexity(jnp.zeros(4))) == 1
    with pytest.raises(UserError, match="decay 1"):
        CodebookTraining(decay=1.0)


def test_padded_rows_encode_as_they_do_alone():
    codec = Codec(CODEC)
    wave = jax.random.normal(jax.random.key(0), (3, 9 * CODEC.hop))
    params = unbox(jax.jit(codec.init)(jax.random.key(1), wave, wave))["params"]
    params["quantizer"] = jax.tree.map(lambda x: 5 * x, params["quantizer"])
    # The latent is nearly constant at first; with a wider last layer it says something about the wave.
    params["encoder"]["conv_post"]["kernel"] *= 50

    def encoded(wave, lengths):
        latent, vector = codec.apply(
            {"params": params}, wave, method=lambda codec, wave: codec.encoder(wave, lengths=lengths)
        )
        return latent, vector, *codec.apply({"params": params}, wave, lengths, method=Codec.encode)

    lengths = [4, 9, 7]
    latents, vectors, codes, voices = encoded(wave, jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        latent, vector, code, voice = encoded(wave[row : row + 1, : length * CODEC.hop], None)
        assert np.std(latent[0]) > 0.1
        np.testing.assert_allclose(latents[row, :length], latent[0], atol=1e-4)
        np.testing.assert_allclose(vectors[row], vector[0], atol=1e-5)
        np.testing.assert_array_equal(codes[row, :length], code[0])
        np.testing.assert_array_equal(voices[row], voice[0])


def test_chosen_entries_take_the_place_of_what_was_encoded_little_by_little():
    codec, config = Codec(CODEC), CodebookTraining(ease_in=40)
    wave = jax.random.normal(jax.random.key(0), (2, 9 * CODEC.hop))
    params = unbox(jax.jit(codec.init)(jax.random.key(1), wave, wave))["params"]
    params["quantizer"] = jax.tree.map(lambda x: 20 * x, params["quantizer"])

    @jax.jit
    def copy(share):
        return codec.apply({"params": params}, wave, wave, share=share, mutable=["updates"])[0]

    (latent, vector), _ = codec.apply(
        {"params": params}, wave, True, mutable=["updates"], method=lambda m, *a: m.encoder(*a)
    )
    continuous = codec.apply({"params": params}, latent, vector, method=lambda m, *a: m.generator(*a))
    shares = [config.share(jnp.float32(step)) for step in (0, 10, 40, 400)]
    assert [float(share) for share in shares] == [0, 0.25, 1, 1] and float(CodebookTraining().share(jnp.zeros(()))) == 1
    none, quarter, whole, _ = (copy(share) for share in shares)
    plain = codec.apply({"params": params}, wave, wave, mutable=["updates"])[0]
    np.testing.assert_allclose(none.wave, continuous, atol=1e-6)
    np.testing.assert_allclose(whole.wave, plain.wave, atol=1e-6)
    assert np.abs(none.wave - plain.wave).max() > 1e-3
    np.testing.assert_allclose(quarter.quantizer_loss, 0.25 * plain.quantizer_loss, rtol=1e-6)
    assert float(none.quantizer_loss) == 0
    with pytest.raises(UserError, match="ease_in -1"):
        CodebookTraining(ease_in=-1)
