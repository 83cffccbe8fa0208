"""New rows of the embedding table and the output head: numbers, what must not change, and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.models.language.vocabulary import enlarge_rows, enlarge_vocabulary, padded_rows

OLD, FIRST, WIDTH, ROWS = 7, 5, 3, 12
SOURCES = ((0,), (1, 2), (4, 4, 0))


def table(dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(OLD, WIDTH)), dtype)


def test_rows_are_means_of_their_sources():
    old = table()
    new = enlarge_rows(old, SOURCES, FIRST, ROWS)
    assert new.shape == (ROWS, WIDTH)
    np.testing.assert_array_equal(new[:FIRST], old[:FIRST])
    np.testing.assert_array_equal(new[FIRST], old[0])
    np.testing.assert_allclose(new[FIRST + 1], (old[1] + old[2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(new[FIRST + 2], (2 * old[4] + old[0]) / 3, rtol=1e-6)
    np.testing.assert_allclose(new[FIRST + 3 :], np.tile(old[:FIRST].mean(axis=0), (4, 1)), rtol=1e-5)


def test_padding_that_stays_keeps_its_values():
    new = enlarge_rows(table(), SOURCES[:1], FIRST, OLD)
    np.testing.assert_array_equal(new[FIRST + 1 :], table()[FIRST + 1 :])
    np.testing.assert_array_equal(enlarge_rows(table(), (), FIRST, OLD), table())


def test_many_pieces_go_in_groups():
    sources = [[i % FIRST, (i * i) % FIRST] for i in range(2500)]
    new = enlarge_rows(table(), sources, FIRST, FIRST + len(sources))
    want = np.asarray(table())[np.array(sources)].mean(axis=1)
    np.testing.assert_allclose(new[FIRST:], want, rtol=1e-5, atol=1e-6)


def test_other_initialisations():
    old = table()
    average = enlarge_rows(old, SOURCES, FIRST, ROWS, "average")
    np.testing.assert_allclose(average[FIRST:], np.tile(old[:FIRST].mean(axis=0), (7, 1)), rtol=1e-5)
    sources = [(0,)] * 4000
    drawn = enlarge_rows(old, sources, FIRST, FIRST + 4000, "random", jax.random.key(0))[FIRST:]
    np.testing.assert_allclose(drawn.mean(axis=0), old[:FIRST].mean(axis=0), atol=0.08)
    np.testing.assert_allclose(drawn.std(axis=0), old[:FIRST].std(axis=0), rtol=0.08)


def test_dtype_is_kept():
    assert enlarge_rows(table(jnp.bfloat16), SOURCES, FIRST, ROWS).dtype == jnp.bfloat16


@pytest.mark.parametrize("initialisation", ["pieces", "random"])
def test_both_ends_of_a_model(initialisation):
    head = jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, OLD)), jnp.float32)
    language = {
        "embed_tokens": {"embedding": table()},
        "lm_head": {"kernel": head},
        "norm": {"scale": jnp.ones(WIDTH)},
    }
    new = enlarge_vocabulary(language, SOURCES, FIRST, ROWS, initialisation, jax.random.key(0))
    assert new["norm"] is language["norm"] and set(new) == set(language)
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(4, WIDTH)), jnp.float32)
    logits, before = hidden @ new["lm_head"]["kernel"], hidden @ head
    assert logits.shape == (4, ROWS)
    np.testing.assert_allclose(logits[:, :FIRST], before[:, :FIRST], rtol=1e-5, atol=1e-6)
    if initialisation == "pieces":
        np.testing.assert_allclose(logits[:, FIRST + 1], before[:, 1:3].mean(axis=1), rtol=1e-4, atol=1e-6)
    else:
        assert float(jnp.abs(new["embed_tokens"]["embedding"][FIRST] - new["lm_head"]["kernel"][:, FIRST]).max()) > 0.01


def test_rows_of_vita_1_0():
    assert padded_rows(51747, 16) == 51760
    assert padded_rows(33, 1) == 33 and padded_rows(32, 16) == 32 and padded_rows(33, 16, at_least=128) == 128


def test_errors_name_what_is_wrong():
    with pytest.raises(UserError, match="8 rows are too few: 7 are there, and 3 new ones start at row 6"):
        enlarge_rows(table(), SOURCES, 6, 8)
    with pytest.raises(UserError, match="first new row 8 must be between 1 and the 7 rows"):
        enlarge_rows(table(), SOURCES, 8, 20)
    for sources in (((),), ((0, 5),), ((-1,),)):
        with pytest.raises(UserError, match="new piece 0 comes from rows.*0 to 4"):
            enlarge_rows(table(), sources, FIRST, ROWS)
    with pytest.raises(UserError, match="'mean' is unknown; expected one of pieces, average, random"):
        enlarge_rows(table(), SOURCES, FIRST, ROWS, "mean")
    with pytest.raises(UserError, match="needs a random key"):
        enlarge_rows(table(), SOURCES, FIRST, ROWS, "random")
    with pytest.raises(UserError, match="multiple of rows 0"):
        padded_rows(5, 0)
    adapted = {"embed_tokens": {"embedding": table()}, "lm_head": {"kernel": table().T, "lora_a": table()}}
    with pytest.raises(UserError, match="lm_head has lora_a beside kernel; merge the adapters"):
        enlarge_vocabulary(adapted, SOURCES, FIRST, ROWS)
