"""CTC against a sum over all alignments, and its decoding."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.ops.ctc import ctc_feasible, ctc_greedy, ctc_loss, reduce_ctc


def collapse(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("target", [(), (1,), (1, 3), (3, 3), (1, 3, 3), (3, 3, 3)])
def test_loss_is_the_sum_over_all_alignments(blank, target):
    frames, vocab = 4, 4
    logits = jax.random.normal(jax.random.key(1), (frames, vocab))
    scores = np.asarray(jax.nn.log_softmax(logits), np.float64)
    paths = [p for p in itertools.product(range(vocab), repeat=frames) if collapse(p, blank) == target]
    total = sum(np.exp(sum(scores[t, label] for t, label in enumerate(path))) for path in paths)
    padded = jnp.asarray([[*target, *(1,) * (4 - len(target))]])
    more_frames = jnp.concatenate([logits, 9 * jnp.ones((2, vocab))])[None]
    args = (more_frames, jnp.array([frames]), padded, jnp.array([len(target)]))
    assert bool(ctc_feasible(*args[1:])[0]) == bool(paths)
    got = ctc_loss(*args, blank=blank, zero_infinity=False)[0]
    np.testing.assert_allclose(got, -np.log(total) if paths else np.inf, rtol=1e-4)
    grad = jax.grad(lambda x: ctc_loss(x, *args[1:], blank=blank)[0])(more_frames)
    assert np.isfinite(grad).all() and bool(np.any(grad)) == bool(paths)
    np.testing.assert_array_equal(grad[:, frames:], 0)


def test_reductions():
    losses, lengths = jnp.array([2.0, 6.0]), jnp.array([0, 3])
    assert [float(reduce_ctc(losses, lengths, how)) for how in ("batch", "sum", "mean")] == [4.0, 8.0, 2.0]
    with pytest.raises(UserError, match="'none' is unknown"):
        reduce_ctc(losses, lengths, "none")


def test_greedy_decoding_merges_and_drops_blanks():
    best = np.array([[1, 1, 0, 1, 2, 2], [0, 3, 3, 3, 0, 1]])
    tokens, lengths = ctc_greedy(jax.nn.one_hot(best, 4), jnp.array([6, 3]))
    np.testing.assert_array_equal(tokens, [[1, 1, 2, -1, -1, -1], [3, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [3, 1])
