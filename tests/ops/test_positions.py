"""Sinusoidal positions, and scores by distance made of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from vita_jax.ops.positions import relative_weights, sinusoidal_positions


def test_relative_weights_give_the_scores_of_distances():
    rng = np.random.default_rng(0)
    width, queries, keys = 12, jnp.arange(3, 20), jnp.arange(0, 30)
    weights = jnp.asarray(rng.normal(size=(len(queries), width)), jnp.float32)
    rotated = relative_weights(weights, sinusoidal_positions(queries, width))
    scores = rotated @ sinusoidal_positions(keys, width).T
    distances = sinusoidal_positions(queries[:, None] - keys[None], width)
    np.testing.assert_allclose(scores, jnp.einsum("qd,qkd->qk", weights, distances), atol=2e-5)


def test_scores_by_distance_do_not_change_when_everything_moves():
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)

    def scores(offset):
        rotated = relative_weights(weights, sinusoidal_positions(jnp.arange(5) + offset, 8))
        return rotated @ sinusoidal_positions(jnp.arange(9) + offset, 8).T

    np.testing.assert_allclose(scores(0), scores(400), atol=2e-4)
