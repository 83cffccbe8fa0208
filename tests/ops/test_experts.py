"""Expert dispatch against the dense oracle, the router, and the load-balancing loss against its definition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.ops.experts import ExpertLinear, Experts, Routing, apply_experts, balance, route

TOKENS, WIDTH, HIDDEN, EXPERTS, RANK = 13, 6, 5, 4, 2


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def make_experts(seed: int = 0, rank: int = RANK) -> Experts:
    rng = np.random.default_rng(seed)

    def linear(inputs: int, features: int) -> ExpertLinear:
        shapes = [(inputs, features), (inputs, rank), (rank, features)][: 3 if rank else 1]
        return ExpertLinear(*(jnp.asarray(rng.normal(size=(EXPERTS, *shape)), jnp.float32) for shape in shapes))

    return Experts(linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH))


def make_tokens(seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """x (n d) and logits (n e) that leave expert 2 without a token."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(TOKENS, EXPERTS)) - np.array([0, 0, 50, 0])
    return jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32), jnp.asarray(logits, jnp.float32)


@partial(jax.jit, static_argnames="implementation")
def value_and_grads(x, logits, experts, implementation):
    def run(x, logits, experts):
        out = apply_experts(x, route(logits, 2), experts, implementation=implementation)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(x, logits, experts)
    return out, grads


@pytest.mark.parametrize("rank", [0, RANK])
def test_ragged_equals_dense(rank):
    args = (*make_tokens(), make_experts(rank=rank))
    ragged, dense = (value_and_grads(*args, implementation=name) for name in ("ragged", "dense"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), ragged, dense)
    experts_grad = ragged[1][2]
    assert all(float(jnp.abs(x[2]).max()) == 0 for x in jax.tree.leaves(experts_grad)), "nobody goes to expert 2"
    assert all(float(jnp.abs(x[0]).max()) > 0 for x in jax.tree.leaves(experts_grad))


def test_output_is_the_weighted_sum_of_two_feed_forwards():
    (x, logits), experts = make_tokens(), make_experts(rank=0)
    routing = route(logits, 2)
    out = apply_experts(x, routing, experts)
    for token in range(TOKENS):
        want = 0.0
        for weight, e in zip(routing.weights[token], routing.experts[token], strict=True):
            hidden = jax.nn.silu(x[token] @ experts.gate.kernel[e]) * (x[token] @ experts.up.kernel[e])
            want = want + weight * (hidden @ experts.down.kernel[e])
        np.testing.assert_allclose(out[token], want, atol=1e-4)


def test_weights_are_a_softmax_over_the_chosen():
    _, logits = make_tokens()
    routing = route(logits, 2)
    order = np.argsort(-np.asarray(logits), axis=-1)[:, :2]
    np.testing.assert_array_equal(routing.experts, order)
    chosen = jnp.take_along_axis(logits, jnp.asarray(order), axis=-1)
    np.testing.assert_allclose(routing.weights, jax.nn.softmax(chosen, axis=-1), atol=1e-6)
    half = route(logits.astype(jnp.bfloat16), 2)
    assert half.weights.dtype == jnp.float32


def test_numbering_of_experts_does_not_matter():
    (x, logits), experts = make_tokens(), make_experts()
    order = jnp.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda leaf: leaf[order], experts)
    got = apply_experts(x, route(logits[:, order], 2), permuted)
    np.testing.assert_allclose(got, apply_experts(x, route(logits, 2), experts), atol=1e-4)


def test_every_expert_at_once():
    """k = e, and all tokens at one expert: the edges of the sorting."""
    (x, logits), experts = make_tokens(), make_experts(rank=0)
    alone = Routing(jnp.full((TOKENS, 1), 3), jnp.ones((TOKENS, 1)))
    for routing in (route(logits, EXPERTS), alone):
        ragged, dense = (apply_experts(x, routing, experts, implementation=name) for name in ("ragged", "dense"))
        np.testing.assert_allclose(ragged, dense, atol=1e-4)


def test_unknown_implementation():
    with pytest.raises(UserError, match="expert implementation 'fast' must be one of ragged, dense"):
        apply_experts(*make_tokens()[:1], None, make_experts(), implementation="fast")


def test_balance_is_its_definition():
    rng = np.random.default_rng(3)
    logits, mask = rng.normal(size=(2, 3, 5, EXPERTS)), rng.integers(0, 3, (3, 5))
    rows = [np.exp(row) / np.exp(row).sum() for row in logits[:, mask > 0].reshape(-1, EXPERTS)]
    slots = np.zeros((2, EXPERTS))
    for row in rows:
        for slot, expert in enumerate(np.argsort(-row)[:2]):
            slots[slot, expert] += 1 / len(rows)
    got = balance(jnp.asarray(logits, jnp.float32), 2, jnp.asarray(mask))
    np.testing.assert_allclose(got.loss, EXPERTS * (slots * np.mean(rows, axis=0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.load, slots.sum(axis=0) / 2, rtol=1e-5)
    noisy = np.where(mask[..., None] > 0, logits, 99.0 * rng.normal(size=logits.shape))
    np.testing.assert_allclose(balance(jnp.asarray(noisy, jnp.float32), 2, jnp.asarray(mask)).loss, got.loss, rtol=1e-6)


def test_balance_of_even_and_of_collapsed_routers():
    even = jnp.log(jnp.asarray(np.stack([np.roll([0.4, 0.4, 0.1, 0.1], i) for i in range(4)]), jnp.float32))
    np.testing.assert_allclose(balance(even, 2).loss, 2.0, rtol=1e-6)
    np.testing.assert_allclose(balance(even, 2).load, [0.25] * 4, rtol=1e-6)
    collapsed = jnp.tile(jnp.array([[60.0, 50.0, 0.0, 0.0]]), (4, 1))
    np.testing.assert_allclose(balance(collapsed, 2).loss, 4.0, rtol=1e-3)
    nothing = balance(even, 2, jnp.zeros(4))
    assert float(nothing.loss) == 0 and bool(jnp.isfinite(nothing.load).all())
