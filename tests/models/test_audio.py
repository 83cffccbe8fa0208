"""Properties of the speech encoder, its adapters and the tower; the numbers themselves are checked by tests/parity."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.conversion.tables import Table, export_params, flatten, import_params
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.audio import encoder_weights, tower_weights
from vita_jax.models.audio.cmvn import Cmvn, cmvn_from_statistics, parse_json_cmvn, parse_kaldi_cmvn
from vita_jax.models.audio.encoder import AudioEncoder, AudioEncoderConfig, Block, make_cache, whale_350m
from vita_jax.models.audio.tower import (
    AudioTower,
    AudioTowerConfig,
    audio_small,
    audio_vita_1_0,
    audio_vita_1_5,
    start_stream,
)
from vita_jax.models.connectors import audio_adapters, audio_adapters_weights
from vita_jax.models.connectors.audio_adapters import (
    RUNNING_STATS,
    AudioAdapter,
    AudioAdapterConfig,
    with_running_stats,
)
from vita_jax.ops.filter_bank import audio_tokens, encoder_length

TINY = AudioEncoderConfig(
    input_dim=11, hidden_size=12, num_layers=2, num_heads=3, intermediate_size=20, cmvn="identity", dropout=0.3
)
ADAPTER = AudioAdapterConfig(input_size=12, output_size=10)
FRAMES = 55  # 13 encoder frames
CHUNK = 2
STREAMED = replace(TINY, chunk_size=CHUNK, left_chunks=2)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def features(frames: int = FRAMES, batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, frames, 11)).astype(np.float32)


def init(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Random parameters of the model's shapes, drawn by numpy: compiling the real initialisation takes seconds."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, x: np.abs(x) if path[-1].key == "running_var" else x, params)


def init_encoder(config: AudioEncoderConfig) -> dict[str, Any]:
    return init(AudioEncoder(config), features(7, 1), jnp.array([7]))


@partial(jax.jit, static_argnums=0, static_argnames=("deterministic", "capture"))
def encode(config: AudioEncoderConfig, params: Any, x: Any, lengths: Any, *, seed: int = 0, **options: Any) -> Any:
    return AudioEncoder(config).apply({"params": params}, x, lengths, rngs={"dropout": jax.random.key(seed)}, **options)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return init_encoder(TINY)


# ---------------------------------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------------------------------


def test_padding_does_not_leak(params):
    """What stands behind a clip, and how much of it, changes nothing of the clip."""
    x, length = features(), 34
    padded = x.copy()
    padded[:, length:] = 1e3
    for config in (TINY, replace(TINY, chunk_size=3, left_chunks=1)):
        hidden, valid = encode(config, params, padded, jnp.array([length, FRAMES]))
        alone, _ = encode(config, params, x[:1, :length], jnp.array([length]))
        count = encoder_length(length)
        np.testing.assert_array_equal(valid.sum(axis=1), [count, encoder_length(FRAMES)])
        np.testing.assert_allclose(hidden[0, :count], alone[0], atol=1e-5)
        assert np.isfinite(hidden).all()


def test_an_empty_slot_is_finite_and_has_no_gradient(params):
    def loss(x: jax.Array) -> jax.Array:
        hidden, valid = encode(TINY, params, x, jnp.array([0, FRAMES]))
        return jnp.sum(jnp.where(valid[..., None], hidden, 0.0) ** 2)

    grad = jax.grad(loss)(jnp.asarray(features()))
    assert np.isfinite(grad).all() and np.any(grad[1])
    np.testing.assert_array_equal(grad[0], 0)


@pytest.mark.parametrize(("chunk", "left"), [(3, 1), (2, -1), (1, 0), (20, 0)])
def test_a_chunk_sees_no_later_chunk_and_no_earlier_one_than_its_context(params, chunk, left):
    config = replace(TINY, chunk_size=chunk, left_chunks=left, num_layers=1)
    params = {**params, "transformer": {**params["transformer"], "layers": first_layer(params)}}
    size = encoder_length(FRAMES)

    def of_embedded(x: jax.Array) -> jax.Array:
        """Sum over features and batch of each output frame, of the transformer alone: convolutions look ahead."""
        mask = captured["mask"]
        out, *_ = AudioEncoder(config).apply(
            {"params": params}, x, mask, method=lambda m, x, mask: m.transformer(x, jnp.arange(size)[None], mask)
        )
        return jnp.sum(out**2, axis=(0, 2))

    *_, captured = encode(config, params, features(), jnp.array([FRAMES, FRAMES]), capture=True)
    touched = np.abs(jax.jacobian(of_embedded)(captured["subsample"])).sum(axis=(1, 3)) > 1e-9
    query, key = np.arange(size)[:, None] // chunk, np.arange(size)[None] // chunk
    np.testing.assert_array_equal(touched, (key <= query) & ((left < 0) | (key >= query - left)))


def first_layer(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[:1], params["transformer"]["layers"])


def test_scanned_layers_equal_a_loop(params):
    lengths = jnp.array([40, FRAMES])
    hidden, valid, captured = encode(TINY, params, features(), lengths, capture=True)
    x = captured["scaled"]
    for i in range(TINY.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["transformer"]["layers"])
        x, _ = Block(TINY).apply({"params": layer}, x, None, captured["pos_emb"], captured["mask"])
        np.testing.assert_allclose(captured["output"][i], x, atol=1e-5)
    assert hidden.shape == (2, 13, 12) and valid.shape == (2, 13)


def test_subsampling_is_two_convolutions_and_differentiates_like_them(params):
    x, weights = jnp.asarray(features()), params["subsampling"]

    def conv(x: jax.Array, layer: dict[str, Any]) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "VALID", dimension_numbers=dims) + layer["bias"]

    def want(x: jax.Array) -> jax.Array:
        y = jax.nn.relu(conv(jax.nn.relu(conv(x[..., None], weights["conv1"])), weights["conv2"]))
        return jnp.einsum("bsfc,fcd->bsd", y, weights["out"]["kernel"]) + weights["out"]["bias"]

    def got(x: jax.Array) -> jax.Array:
        return AudioEncoder(TINY).apply({"params": params}, x, method=lambda m, x: m.subsampling(x)[0])

    np.testing.assert_allclose(got(x), want(x), atol=1e-5)
    grads = [jax.grad(lambda x, f=f: jnp.sum(f(x) ** 3))(x) for f in (got, want)]
    np.testing.assert_allclose(*grads, atol=1e-3, rtol=1e-4)


def test_remat_changes_nothing(params):
    def grads(config: AudioEncoderConfig) -> Any:
        return jax.grad(lambda p: jnp.sum(encode(config, p, features(), jnp.array([30, FRAMES]))[0] ** 2))(params)

    plain, remat = grads(TINY), grads(replace(TINY, remat="full"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), plain, remat)
    assert not any(np.any(leaf) for leaf in plain["cmvn"].values()), "the statistics are no weights"


def test_dropout_and_dynamic_chunks_act_in_training_only(params):
    lengths = jnp.array([FRAMES, FRAMES])
    plain, _ = encode(replace(TINY, dropout=0.0, positional_dropout=0.0), params, features(), lengths)
    dynamic = replace(TINY, dropout=0.0, positional_dropout=0.0, dynamic_chunks=True)
    for config in (TINY, dynamic):
        np.testing.assert_allclose(encode(config, params, features(), lengths)[0], plain, atol=1e-6)
        drawn = [encode(config, params, features(), lengths, seed=s, deterministic=False)[0] for s in range(6)]
        assert len({np.asarray(x).tobytes() for x in drawn}) > 1
        np.testing.assert_array_equal(
            drawn[0], encode(config, params, features(), lengths, seed=0, deterministic=False)[0]
        )


def test_bfloat16_is_close(params):
    lengths = jnp.array([40, FRAMES])
    hidden, _ = jax.jit(AudioEncoder(TINY, jnp.bfloat16).apply)({"params": params}, features(), lengths)
    assert hidden.dtype == jnp.bfloat16
    want, valid = encode(TINY, params, features(), lengths)
    np.testing.assert_allclose(hidden.astype(jnp.float32)[valid], want[valid], atol=0.25)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming
# ---------------------------------------------------------------------------------------------------------------------


def stream(config: AudioEncoderConfig, params: Any, x: np.ndarray) -> tuple[np.ndarray, Any]:
    """x: (b 4c*n f), with 3 frames of zeros before it, step by step."""
    x = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    step = jax.jit(partial(AudioEncoder(config).apply, method="stream_step"))
    cache, blocks, size = make_cache(config, len(x)), [], 4 * config.chunk_size
    for start in range(0, x.shape[1] - 3, size):
        hidden, cache = step({"params": params}, x[:, start : start + size + 3], cache)
        blocks.append(hidden)
    return np.concatenate(blocks, axis=1), cache


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_stream_equals_the_chunk_masked_full_pass(params, left):
    """Far beyond the left context, where the original's positions go wrong."""
    config = replace(STREAMED, left_chunks=left)
    x = features(4 * CHUNK * 6)
    streamed, _ = stream(config, params, x)
    whole = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    full, _ = encode(config, params, whole, np.full(2, whole.shape[1]))
    np.testing.assert_allclose(streamed, full, atol=1e-5)
    lagging, _ = stream(replace(config, stream_positions="lagging"), params, x)
    same = (left + 1) * CHUNK if left else CHUNK
    np.testing.assert_allclose(lagging[:, :same], full[:, :same], atol=1e-5)
    assert np.abs(lagging[:, same:] - full[:, same:]).max() > 1e-3


@pytest.mark.parametrize("positions", ["exact", "lagging"])
def test_a_stream_by_distances_equals_the_chunk_masked_full_pass(params, positions):
    """Distances are the same wherever the counting of positions begins, so even "lagging" ones are right."""
    config = replace(STREAMED, positions="relative", stream_positions=positions)
    x = features(4 * CHUNK * 6)
    streamed, _ = stream(config, params, x)
    whole = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    full, _ = encode(config, params, whole, np.full(2, whole.shape[1]))
    np.testing.assert_allclose(streamed, full, atol=1e-5)


def test_only_distances_tell_where_a_frame_stands(params):
    """Two equal frames with different neighbours: the released positions cannot tell them apart, distances can."""
    x = np.repeat(features(7, 1)[:, ::-1][:, :1], 4 * 9 + 3, axis=1)
    x[:, 20:24] += 3.0  # something that only the frames before it and behind it are near to
    for positions, alike in (("rel-enc", True), ("relative", False)):
        hidden, _ = encode(replace(TINY, positions=positions), params, x, np.array([x.shape[1]]))
        first, last = hidden[0, 0], hidden[0, -1]
        assert (np.abs(first - last).max() < 1e-4) == alike


def test_streams_of_a_batch_may_start_at_different_times(params):
    x = features(4 * CHUNK * 4)
    want, _ = stream(STREAMED, params, x)
    _, cache = stream(STREAMED, params, x[:, : 4 * CHUNK])
    cache = replace(cache, step=cache.step.at[1].set(0))  # the second one starts again
    window = np.stack([x[0, 4 * CHUNK - 3 : 8 * CHUNK], np.pad(x[1, : 4 * CHUNK], ((3, 0), (0, 0)))])
    hidden, cache = AudioEncoder(STREAMED).apply({"params": params}, window, cache, method="stream_step")
    np.testing.assert_allclose(hidden[0], want[0, CHUNK : 2 * CHUNK], atol=1e-5)
    np.testing.assert_allclose(hidden[1], want[1, :CHUNK], atol=1e-5)
    np.testing.assert_array_equal(cache.step, [2, 1])


def test_only_bounded_causal_encoders_stream(params):
    for config in (TINY, replace(TINY, chunk_size=4), replace(STREAMED, positions="abs-enc")):
        with pytest.raises(UserError, match="audio stream"):
            make_cache(config, 1)
    with pytest.raises(UserError, match="a chunk of 2 needs 11 frames, not 12"):
        AudioEncoder(STREAMED).apply({"params": params}, features(12), make_cache(STREAMED, 2), method="stream_step")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

ADAPTERS = [
    ADAPTER,
    replace(ADAPTER, kernel_size=3, norm="batch", activation="relu"),
    replace(ADAPTER, two_convs=True),
    replace(ADAPTER, causal=True),
    replace(ADAPTER, causal=True, two_convs=True, kernel_size=4),
    replace(ADAPTER, kind="cnn"),
    replace(ADAPTER, kind="linear"),
]


@pytest.mark.parametrize("config", ADAPTERS, ids=str)
@pytest.mark.parametrize("length", [8, 9])
def test_adapter_lengths_masks_and_tables(config, length):
    x = jax.random.normal(jax.random.key(0), (2, length, 12))
    valid = jnp.arange(length) < jnp.array([[length], [5]])
    model, table = AudioAdapter(config), audio_adapters_weights.weight_table(config)
    params = init(model, x, valid)
    fits(table, params)
    y, out_valid = model.apply({"params": params}, x, valid)
    assert y.shape == (2, config.num_tokens(length), 10)
    np.testing.assert_array_equal(out_valid.sum(axis=1), config.num_tokens(np.array([length, 5])))
    changed, _ = model.apply({"params": params}, x.at[1, 5:].add(100.0), valid)
    np.testing.assert_allclose(changed[out_valid], y[out_valid], atol=1e-5)


@pytest.mark.parametrize("config", [c for c in ADAPTERS if c.causal or c.kind != "subsampling"], ids=str)
def test_adapter_streams_equal_the_whole(config):
    x = jax.random.normal(jax.random.key(0), (2, 12, 12))
    model = AudioAdapter(config)
    params = init(model, x, jnp.ones((2, 12), bool))
    want, _ = model.apply({"params": params}, x, jnp.ones((2, 12), bool))
    for sizes in ((4, 4, 4), (2, 8, 2)):
        cache, blocks, start = audio_adapters.make_cache(config, 2), [], 0
        for size in sizes:
            block = x[:, start : start + size]
            y, cache = model.apply({"params": params}, block, cache, method="stream_step")
            blocks.append(y)
            start += size
        np.testing.assert_allclose(jnp.concatenate(blocks, axis=1), want, atol=1e-5)


@pytest.mark.parametrize("length", [1, 6, 11, 12])
def test_adapters_that_look_ahead_stream_with_a_delay(length):
    config = replace(ADAPTER, kernel_size=5)
    model, x = AudioAdapter(config), jax.random.normal(jax.random.key(0), (2, length, 12))
    params = init(model, x, jnp.ones((2, length), bool))
    want, _ = model.apply({"params": params}, x, jnp.ones((2, length), bool))
    padded = jnp.pad(x, ((0, 0), (0, -length % 4), (0, 0)))
    cache, pieces = audio_adapters.make_cache(config, 2), []
    for start in range(0, padded.shape[1], 4):
        y, cache = model.apply({"params": params}, padded[:, start : start + 4], cache, method="stream_step")
        pieces.append(y)
    silence = jnp.zeros((2, 2 * config.stream_delay, 12))
    pieces.append(model.apply({"params": params}, silence, cache, method="stream_step")[0])
    got = jnp.concatenate(pieces, axis=1)[:, config.stream_delay :][:, : config.num_tokens(length)]
    assert config.stream_delay == 2
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_adapters_that_cannot_stream():
    for config in (replace(ADAPTER, kernel_size=4), replace(ADAPTER, two_convs=True)):
        with pytest.raises(UserError, match="causal=True"):
            audio_adapters.make_cache(config, 1)
    model = AudioAdapter(replace(ADAPTER, causal=True))
    x = jnp.zeros((1, 3, 12))
    cache = audio_adapters.make_cache(model.config, 1)
    with pytest.raises(UserError, match="chunk of 3 frames cannot be halved"):
        model.init(jax.random.key(0), x, cache, method="stream_step")


def test_batch_norm_leaves_running_statistics():
    config = replace(ADAPTER, norm="batch")
    model, x = AudioAdapter(config), jax.random.normal(jax.random.key(0), (2, 8, 12))
    valid = jnp.ones((2, 8), bool)
    params = init(model, x, valid)
    _, left = model.apply({"params": params}, x, valid, train=True, mutable=[RUNNING_STATS])
    merged = with_running_stats(params, left[RUNNING_STATS])
    assert set(flatten(merged)) == set(flatten(params))
    changed = {path for path, x in flatten(merged).items() if not np.array_equal(x, flatten(params)[path])}
    assert changed == {"bn2/running_mean", "bn2/running_var"}


# ---------------------------------------------------------------------------------------------------------------------
# Tower
# ---------------------------------------------------------------------------------------------------------------------

TOWER = AudioTowerConfig(TINY, ADAPTER, num_prompt_tokens=3)


def test_tower_lengths_and_prompts():
    x, lengths = features(), jnp.array([30, FRAMES])
    params = init(AudioTower(TOWER), x, lengths)
    got = jax.jit(AudioTower(TOWER).apply)({"params": params}, x, lengths)
    assert got.embeds.shape == (2, TOWER.num_tokens(FRAMES), 10)
    np.testing.assert_array_equal(got.embeds[:, :3], np.broadcast_to(params["prompt"], (2, 3, 10)))
    np.testing.assert_array_equal(got.valid.sum(axis=1), audio_tokens(np.array([30, FRAMES])))
    fits(tower_weights.weight_table(TOWER), params)


def test_tower_streams():
    """Encoder and causal adapter together: two chunks of 8 frames become 1 token each."""
    config = AudioTowerConfig(STREAMED, replace(ADAPTER, causal=True))
    x = features(8 * 5)
    whole = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    model, lengths = AudioTower(config), np.full(2, whole.shape[1])
    params = init(model, whole, lengths)
    step = jax.jit(partial(model.apply, method="stream_step"))
    state, blocks = start_stream(config, 2), []
    for start in range(0, x.shape[1], 8):
        tokens, state = step({"params": params}, whole[:, start : start + 11], state)
        blocks.append(tokens)
    want = jax.jit(model.apply)({"params": params}, whole, lengths).embeds
    np.testing.assert_allclose(jnp.concatenate(blocks, axis=1), want, atol=1e-5)


def test_serving_names():
    config = AudioTowerConfig(replace(TINY, cmvn="none"), ADAPTER)
    table = tower_weights.serving_weight_table(config)
    assert "audio_tower.encoder.layers.1.attn.linear_pos.weight" in table.torch_names
    fits(table, init(AudioTower(config), features(), jnp.array([FRAMES, FRAMES])))
    with pytest.raises(UserError, match="no name for encoder.global_cmvn.mean"):
        tower_weights.serving_weight_table(TOWER)


def fits(table: Table, params: dict[str, Any]) -> None:
    """The table covers exactly the parameters that the model makes, and round-trips them."""
    back = flatten(import_params(table, export_params(table, params)))
    assert set(back) == set(flatten(params))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(back[path], leaf)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "abs-enc", "concat_after": True, "normalize_before": False},
        {"feed_forward": "conv1d", "feed_forward_kernel": 3},
        {"feed_forward": "conv1d-linear", "feed_forward_kernel": 4},
    ],
)
def test_encoder_tables_cover_the_parameters(options):
    config = replace(TINY, **options)
    params = init_encoder(config)
    fits(encoder_weights.weight_table(config), params)
    hidden, _ = encode(config, params, features(), jnp.array([20, FRAMES]))
    assert np.isfinite(hidden).all()


def released_shapes(llm: int) -> dict[str, tuple[int, ...]]:
    """Every tensor under `model.audio_encoder.` of the released checkpoints."""
    d, wide = 1024, 4096
    shapes: dict[str, tuple[int, ...]] = {f"encoder.global_cmvn.{name}": (80,) for name in ("mean", "istd")}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    layer("encoder.enc.0.core.conv.0", d, 1, 3, 3)
    layer("encoder.enc.0.core.conv.2", d, d, 3, 3)
    layer("encoder.enc.0.core.out.0", d, 19456)
    layer("encoder.enc.1.embed.0", d, d)
    for name in ("embed.1", "after_norm"):
        layer(f"encoder.enc.1.{name}", d)
    for i in range(24):
        block = f"encoder.enc.1.encoders.{i}"
        for name in ("q", "k", "v", "out"):
            layer(f"{block}.self_attn.linear_{name}", d, d)
        shapes[f"{block}.self_attn.linear_pos.weight"] = (d, d)
        for name in ("pos_bias_u", "pos_bias_v"):
            shapes[f"{block}.self_attn.{name}"] = (16, 64)
        layer(f"{block}.feed_forward.w_1", wide, d)
        layer(f"{block}.feed_forward.w_2", d, wide)
        for name in ("norm1", "norm2"):
            layer(f"{block}.{name}", d)
    layer("adpter.conv1d2", 2 * d, d, 5)
    layer("adpter.bn2", 2 * d)
    layer("adpter.project", llm, 2 * d)
    return shapes


@pytest.mark.parametrize(
    ("preset", "llm", "adapter"), [(audio_vita_1_5, 3584, 17_835_520), (audio_vita_1_0, 4096, 18_884_608)]
)
def test_presets_are_the_released_towers(preset, llm, adapter):
    """Names and shapes of the checkpoint against the table, and the table against the model; nothing is allocated."""
    config = preset()
    table = tower_weights.weight_table(config)
    assert {name: rule.torch_shape for rule in table.rules for name in rule.names} == released_shapes(llm)
    variables = jax.eval_shape(AudioTower(config).init, jax.random.key(0), jnp.zeros((1, 7, 80)), jnp.array([7]))
    shapes = {path: leaf.shape for path, leaf in flatten(nn.unbox(variables)["params"]).items()}
    stacked = {rule.path: rule.param_shape if rule.layers is None else (24, *rule.param_shape) for rule in table.rules}
    assert shapes == stacked
    sizes = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    trained = sum(size for path, size in sizes.items() if "/cmvn/" not in path)
    assert sum(size for path, size in sizes.items() if path.startswith("adapter/")) == adapter
    assert trained - adapter == 357_950_464
    assert config.num_tokens(998) == 124


def test_config_of_a_train_yaml():
    part = {"input-layer": "linear", "pos-enc-class": "rel-enc", "positionwise-layer-type": "linear"}
    part |= {"normalize-before": True, "concat-after": False, "dynamic-chunks": False}
    part |= {"dropout-rate": 0.1, "positional-dropout-rate": 0.1, "attention-dropout-rate": 0.0}
    part |= {"attention-dim": 1024, "attention-heads": 16, "linear-units": 4096, "num-blocks": 24}
    names = {name: f"transformer-{name}" for name in (*part, "chunk_size", "left_chunks")}
    transformer = {names[name]: value for name, value in {**part, "chunk_size": -1, "left_chunks": -1}.items()}
    model = {"enc_out_dim": 1024, "llm_embed_dim": 3584, "kernel_size": 5, "adpter_type": "subsampling"}
    values = {
        "input_dim": 80,
        "encoder_conf": {
            "overview_conf": {"encoder-layer-config": "subsampling-transformer"},
            "para_conf": {"transformer": transformer},
        },
        "model_conf": model | {"activation_func": "gelu", "norm": "layer"},
    }
    assert tower_weights.config_from_train(values) == audio_vita_1_5()
    with pytest.raises(UserError, match="lacks the field 'activation_func'"):
        tower_weights.config_from_train(values | {"model_conf": model})
    transformer["transformer-positionwise-layer-type"] = "conv1d"
    with pytest.raises(UnsupportedOption, match="conv1d"):
        tower_weights.config_from_train(values)


def test_small_preset_fits():
    config = audio_small(128)
    assert config.adapter.output_size == 128 and config.encoder.hidden_size % config.encoder.num_heads == 0


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation, errors
# ---------------------------------------------------------------------------------------------------------------------


def test_cmvn_files():
    frames = np.random.default_rng(0).normal(3.0, 2.0, (50, 4))
    mean, istd = cmvn_from_statistics(frames.sum(0), (frames**2).sum(0), 50)
    np.testing.assert_allclose(mean, frames.mean(0))
    np.testing.assert_allclose(istd, 1 / frames.std(0))
    sums, squares = (" ".join(map(repr, map(float, x))) for x in (frames.sum(0), (frames**2).sum(0)))
    kaldi = parse_kaldi_cmvn(f" [\n  {sums} 50 \n  {squares} 0 ]\n")
    text = f'{{"mean_stat": [{sums.replace(" ", ",")}], "var_stat": [{squares.replace(" ", ",")}], "frame_num": 50}}'
    for got in (kaldi, parse_json_cmvn(text)):
        np.testing.assert_allclose(got, (mean, istd))
    for parse, bad in (
        (parse_kaldi_cmvn, "\0BFM "),
        (parse_kaldi_cmvn, "[ 1 2 3 ]"),
        (parse_kaldi_cmvn, "[ a b c d ]"),
        (parse_json_cmvn, "{}"),
        (parse_json_cmvn, "["),
    ):
        with pytest.raises(UserError, match="CMVN"):
            parse(bad)
    assert np.isfinite(cmvn_from_statistics([2.0, 2.0], [1.0, 2.0], 2)[1]).all(), "the variance has a floor"


def test_released_statistics_normalise_speech():
    params = Cmvn("released").init(jax.random.key(0), jnp.zeros((1, 80)))
    speech = jnp.full((1, 80), 15.0)
    assert np.abs(Cmvn("released").apply(params, speech)).max() < 1.5


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_heads": 5}, "divisible by num_heads 5"),
        ({"positions": "rotary"}, "positions 'rotary' is unknown"),
        ({"cmvn": "released"}, "input_dim is 11"),
        ({"input_dim": 6}, "input_dim 6"),
        ({"feed_forward": "conv1d", "feed_forward_kernel": 2}, "must be odd"),
        ({"stream_positions": "late"}, "stream_positions"),
        ({"remat": "some"}, "remat"),
    ],
)
def test_impossible_configurations(field, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **field)


def test_errors_name_the_value(params):
    with pytest.raises(UnsupportedOption, match="attention_dropout 0.1"):
        replace(TINY, attention_dropout=0.1)
    with pytest.raises(UserError, match="adapter.input_size is 8, but the encoder has width 12"):
        AudioTowerConfig(TINY, replace(ADAPTER, input_size=8))
    for field in ({"kind": "conv"}, {"norm": "rms"}, {"activation": "silu"}, {"kernel_size": 0}):
        with pytest.raises(UserError, match=f"audio adapter: {next(iter(field))}"):
            replace(ADAPTER, **field)
    for frames in (6, 20007):
        with pytest.raises(UserError, match=f"{frames} frames, but at least 7 and at most 20006"):
            jax.eval_shape(
                lambda x: AudioEncoder(TINY).apply({"params": params}, x, jnp.array([7])), jnp.zeros((1, frames, 11))
            )
    assert whale_350m().subsampled_dim == 19
