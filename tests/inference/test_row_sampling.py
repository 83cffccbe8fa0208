"""Rows with samplers of their own draw what each sampler draws alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.inference.row_sampling import Penalties, draw_rows, filtered, penalised, row_sampling
from vita_jax.inference.sampling import Filtered, Greedy, Temperature, TopK, TopP

SAMPLERS = [
    Greedy(),
    Temperature(0.7),
    TopK(3, 1.3),
    TopP(0.6, 0.9),
    Filtered(0.8, 4, 0.7),
    Filtered(1.0, 0, 0.0),
    TopK(99),
]
VOCABULARY = 40


def stacked(settings):
    return jax.tree.map(lambda *x: jnp.stack(x), *settings)


def test_every_row_draws_what_its_sampler_draws_alone():
    rows, draw = stacked([row_sampling(sampler) for sampler in SAMPLERS]), jax.jit(draw_rows)
    counts = jnp.zeros((len(SAMPLERS), VOCABULARY), jnp.int32)
    different = set()
    for seed in range(40):
        logits = 2 * jax.random.normal(jax.random.key(1000 + seed), (len(SAMPLERS), VOCABULARY))
        keys = jax.random.split(jax.random.key(seed), len(SAMPLERS))
        got = draw(logits, rows, keys, counts).tolist()
        alone = [int(sampler(logits[i : i + 1], keys[i])[0]) for i, sampler in enumerate(SAMPLERS)]
        assert got == alone
        different |= {i for i, row in enumerate(logits) if got[i] != int(jnp.argmax(row))}
    assert different == set(range(1, len(SAMPLERS)))  # all but the greedy one do draw


def test_tokens_as_probable_as_the_last_kept_one_stay():
    logits = jnp.array([[0.0, 1.0, 1.0, 2.0]])
    kept = [jnp.isfinite(filtered(logits, stacked([row_sampling(s)]))).tolist() for s in (TopK(2), Filtered(1, 2, 0))]
    assert kept == [[[False, True, True, True]], [[False, True, False, True]]]


def test_penalties_lower_what_the_answer_has():
    logits = jnp.array([[2.0, -2.0, 2.0, 0.5]])
    counts = jnp.array([[2, 1, 0, 1]])
    settings = stacked([row_sampling(Greedy(), Penalties(2.0, 0.25, 0.5))])
    np.testing.assert_allclose(penalised(logits, counts, settings), [[-0.25, -4.75, 2.0, -0.5]])
    unchanged = stacked([row_sampling(Greedy())])
    np.testing.assert_array_equal(penalised(logits, counts, unchanged), logits)


def test_bad_settings():
    with pytest.raises(UserError, match="repetition penalty 0"):
        Penalties(repetition=0)
    with pytest.raises(UnsupportedOption, match="no settings that rows could share"):
        row_sampling(lambda logits, key: jnp.argmax(logits, -1))
