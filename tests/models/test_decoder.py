"""Properties of the decoder: causality, cache, scan, padding, packing, remat, and the loss on top of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.conversion.tables import export_params, import_params
from vita_jax.errors import UserError
from vita_jax.models.language.decoder import REMAT_POLICIES, Block, Decoder, DecoderConfig, make_cache, qwen2_7b
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.ops.losses import next_token_loss, next_token_scores, shift_labels
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.rope import apply_rotary, rotary_tables

CONFIG = DecoderConfig(
    vocab_size=31, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=20
)
BATCH, LENGTH = 2, 9


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict:
    variables = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), *inputs())
    scaled = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, nn.unbox(variables)["params"])
    return scaled  # larger than at initialisation, so that attention is far from uniform


def inputs(seed: int = 1, batch: int = BATCH, length: int = LENGTH) -> tuple[jax.Array, jax.Array, jax.Array]:
    embeds = jax.random.normal(jax.random.key(seed), (batch, length, CONFIG.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return embeds, positions, jnp.ones((batch, length), jnp.int32)


@functools.cache
def compiled(config: DecoderConfig = CONFIG, dtype=jnp.float32) -> Callable:
    return jax.jit(Decoder(config, dtype=dtype).apply)


def run(params: dict, *args: jax.Array, config: DecoderConfig = CONFIG, dtype=jnp.float32) -> jax.Array:
    return compiled(config, dtype)({"params": params}, *args)[0]


def test_later_tokens_change_nothing_before_them(params):
    embeds, positions, segments = inputs()
    changed = embeds.at[:, 5].add(1.0)
    before, after = run(params, embeds, positions, segments), run(params, changed, positions, segments)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).min(axis=-1).max()) > 0


@pytest.mark.parametrize("split", [(4, 5), (3, 1, 1, 1, 1, 1, 1)])
def test_prefill_and_decode_equal_the_full_forward(params, split):
    embeds, positions, segments = inputs()
    cache = make_cache(CONFIG, BATCH, LENGTH + 2)
    step = compiled()
    pieces, start = [], 0
    for size in split:
        at = slice(start, start + size)
        hidden, cache = step({"params": params}, embeds[:, at], positions[:, at], segments[:, at], cache)
        pieces.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), run(params, *inputs()), atol=1e-5)
    assert int(cache.end) == LENGTH
    np.testing.assert_array_equal(cache.next_position, [LENGTH, LENGTH])


def test_rows_of_different_lengths_share_a_cache(params):
    """Row 1 is two shorter; its padding leaves holes that nothing may see."""
    embeds, positions, segments = inputs()
    lengths = np.array([5, 3])
    real = (jnp.arange(5) < lengths[:, None]).astype(jnp.int32)
    noisy = jnp.where(real[..., None] > 0, embeds[:, :5], 1e3)
    cache = make_cache(CONFIG, BATCH, 12)
    step = compiled()
    _, cache = step({"params": params}, noisy, positions[:, :5], real, cache)
    np.testing.assert_array_equal(cache.next_position, lengths)
    for i in range(3):
        new = jnp.stack([embeds[row, lengths[row] + i] for row in range(BATCH)])[:, None]
        hidden, cache = step({"params": params}, new, cache.next_position[:, None], cache.segment[:, None], cache)
    full = run(params, embeds, positions, segments)
    want = jnp.stack([full[row, lengths[row] + 2] for row in range(BATCH)])
    np.testing.assert_allclose(hidden[:, 0], want, atol=1e-5)


def test_padding_of_a_block_is_overwritten(params):
    """A block padded to a round size costs no slots: the next one starts where its longest row ended."""
    embeds, positions, segments = inputs()
    cache = make_cache(CONFIG, BATCH, LENGTH)
    step = compiled()
    padded = jnp.where(jnp.arange(8) < 5, segments[:, :8], 0)
    _, cache = step({"params": params}, embeds[:, :8], positions[:, :8], padded, cache)
    assert int(cache.end) == 5
    hidden, cache = step({"params": params}, embeds[:, 5:], positions[:, 5:], segments[:, 5:], cache)
    np.testing.assert_allclose(hidden, run(params, embeds, positions, segments)[:, 5:], atol=1e-5)


def test_scanned_equals_unrolled(params):
    embeds, positions, segments = inputs()
    rotary = rotary_tables(positions, CONFIG.head_dim, CONFIG.rope_theta)
    mask = make_attention_mask(segments, segments)
    block, carry = jax.jit(Block(CONFIG).apply), (embeds, None)
    for layer in range(CONFIG.num_layers):
        one = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
        carry, _ = block({"params": one}, carry, jnp.int32(layer), rotary, mask, None)
    x = carry[0]
    unrolled = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * params["norm"]["scale"]
    np.testing.assert_allclose(run(params, embeds, positions, segments), unrolled, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_leak(params, side):
    embeds, positions, _ = inputs()
    at = slice(3, LENGTH) if side == "left" else slice(0, LENGTH - 3)
    segments = jnp.zeros((BATCH, LENGTH), jnp.int32).at[:, at].set(1)
    noisy = jnp.where(segments[..., None] > 0, embeds, 1e4)
    alone = run(params, embeds[:, at], positions[:, at], segments[:, at])
    padded = run(params, noisy, positions, segments)
    np.testing.assert_allclose(padded[:, at], alone, atol=1e-5)
    assert bool(jnp.isfinite(padded).all())


def test_packed_segments_equal_separate_rows(params):
    embeds, positions, _ = inputs(batch=1)
    sizes = [4, 3, 2]
    segments = jnp.asarray(np.repeat([1, 2, 7], sizes))[None]
    restarted = jnp.concatenate([jnp.arange(size) for size in sizes])[None]
    packed = run(params, embeds, restarted, segments)
    start = 0
    for size in sizes:
        at = slice(start, start + size)
        alone = run(params, embeds[:, at], positions[:, :size], jnp.ones((1, size), jnp.int32))
        np.testing.assert_allclose(packed[:, at], alone, atol=1e-5)
        start += size


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"none"}))
def test_remat_changes_neither_values_nor_gradients(params, remat):
    embeds, positions, segments = inputs()

    def loss(params, config):
        return jnp.sum(jnp.sin(run(params, embeds, positions, segments, config=config)))

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_grad = value_and_grad(params, CONFIG)
    value, grad = value_and_grad(params, replace(CONFIG, remat=remat))
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grad, plain_grad)


def test_bfloat16_is_close_to_float32(params):
    embeds, positions, segments = inputs()
    full = run(params, embeds, positions, segments)
    half = run(params, embeds, positions, segments, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert float(jnp.abs(full - half.astype(jnp.float32)).mean()) < 0.05


def test_rotation_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(query_position: int, key_position: int) -> jax.Array:
        tables = [rotary_tables(jnp.array([[p]]), 8, 1e4) for p in (query_position, key_position)]
        return jnp.sum(apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1]))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-3


@pytest.mark.parametrize("chunk_size", [2, 4, 5, 100])
def test_chunked_loss_equals_the_plain_one(params, chunk_size):
    hidden = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, CONFIG.hidden_size))
    kernel = params["lm_head"]["kernel"]
    labels = jax.random.randint(jax.random.key(3), (BATCH, LENGTH), 0, CONFIG.vocab_size)
    labels = labels.at[0, :4].set(-100).at[1, 6].set(-100)

    def plain(hidden, kernel):
        log_probs = jax.nn.log_softmax((hidden @ kernel)[:, :-1])
        picked = jnp.take_along_axis(log_probs, jnp.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(labels[:, 1:] >= 0, picked, 0.0))

    def chunked(hidden, kernel):
        return next_token_loss(hidden, kernel, labels, chunk_size=chunk_size)

    (loss, count), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, kernel)
    want, want_grads = jax.value_and_grad(plain, (0, 1))(hidden, kernel)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert int(count) == int((labels[:, 1:] >= 0).sum())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, want_grads)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_correct_tokens_are_counted(chunk_size):
    kernel = jnp.eye(5)
    labels = jnp.array([[0, 1, 2, 3, 4, 0]])
    predicted = jnp.array([[1, 2, 0, 4, 3, 0]])  # positions 0, 1 and 3 name the token that follows
    scores = next_token_scores(jax.nn.one_hot(predicted, 5), kernel, labels, chunk_size=chunk_size)
    assert [int(score) for score in scores[1:]] == [5, 3]


@pytest.mark.parametrize("answers", [(), ((0, 3),), ((0, 30), (1, 2), (1, 17), (1, 38))])
def test_few_labels_give_the_same_loss_and_gradients(answers):
    keys = jax.random.split(jax.random.key(3), 3)
    hidden, kernel = jax.random.normal(keys[0], (2, 40, 8)), jax.random.normal(keys[1], (8, 17))
    labels = jnp.full((2, 40), -100)
    for row, at in answers:
        labels = labels.at[row, at].set((5 * at + row) % 17)

    def mean(hidden, kernel, chunk_size):
        total, count, correct = next_token_scores(hidden, kernel, labels, chunk_size=chunk_size)
        return total, (count, correct)

    results = [
        jax.jit(jax.value_and_grad(functools.partial(mean, chunk_size=size), (0, 1), has_aux=True))(hidden, kernel)
        for size in (40, 8)
    ]
    assert float(results[0][0][1][0]) == len(answers)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_chunks_without_labels_are_never_multiplied():
    """A row of infinities behind the labels would make the loss infinite if it were looked at."""
    hidden = jnp.ones((1, 40, 4)).at[:, 8:].set(jnp.inf)
    labels = jnp.full((1, 40), -100).at[0, 3].set(2)
    total, count, _ = next_token_scores(hidden, jnp.ones((4, 5)), labels, chunk_size=8)
    np.testing.assert_allclose([total, count], [np.log(5), 1], rtol=1e-6)
    gradient = jax.grad(lambda kernel: next_token_scores(hidden, kernel, labels, chunk_size=8)[0])(jnp.ones((4, 5)))
    assert bool(jnp.isfinite(gradient).all())


def test_logits_of_a_whole_row_never_exist():
    batch, length, chunk, vocab = 2, 64, 8, 501

    def loss(hidden, kernel, labels):
        return next_token_loss(hidden, kernel, labels, chunk_size=chunk)[0]

    shapes = [(batch, length, 4), (4, vocab), (batch, length)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    temporaries = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < batch * length * vocab * 4


def test_labels_do_not_cross_segments():
    labels = jnp.array([[1, 2, 3, 4, 5, 6]])
    segments = jnp.array([[1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(shift_labels(labels, segments), [[2, -100, 4, -100, -100, -100]])
    np.testing.assert_array_equal(shift_labels(labels), [[2, 3, 4, 5, 6, -100]])


def test_mask_of_packed_and_padded_row():
    mask = make_attention_mask(jnp.array([[1, 1, 2, 0]]), jnp.array([[1, 1, 2, 0]]))
    np.testing.assert_array_equal(mask[0, 0].astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])


def test_weights_round_trip_bit_for_bit(params):
    table = weight_table(CONFIG)
    params = jax.tree.map(np.asarray, params)
    tensors = export_params(table, params)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (12, 16)
    jax.tree.map(np.testing.assert_array_equal, import_params(table, tensors), params)


def test_every_parameter_has_logical_axes():
    boxed = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), *inputs())["params"]
    named = nn.get_partition_spec(boxed)["layers"]["attention"]["q_proj"]["kernel"]
    assert tuple(named) == ("layers", "embed", "q_heads", "head_dim")
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert all(isinstance(x, nn.Partitioned) and len(x.names) == x.value.ndim for x in leaves)


def test_full_size_has_the_published_number_of_parameters():
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in [((1, 2, 3584), jnp.float32), ((1, 2), jnp.int32)]]
    shapes = jax.eval_shape(Decoder(qwen2_7b()).init, jax.random.key(0), args[0], args[1], args[1])
    assert sum(x.size for x in jax.tree.leaves(nn.unbox(shapes))) == 7_615_616_512


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_kv_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
        ({"remat": "some"}, "none, full, attention, dots, offload"),
        ({"attention": "flash"}, "attention 'flash' is unknown"),
    ],
)
def test_bad_configs_say_what_is_wrong(change, word):
    with pytest.raises(UserError, match=word):
        replace(CONFIG, **change)
