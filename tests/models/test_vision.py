"""Properties of the vision towers, projectors and frame pooling; the numbers themselves are checked by tests/parity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.conversion.tables import export_params, flatten, import_params
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.connectors import projectors_weights
from vita_jax.models.connectors.projectors import Projector, ProjectorConfig, depthwise_3x3
from vita_jax.models.vision import clip_weights, internvit_weights, siglip_weights
from vita_jax.models.vision.clip import ClipVision, clip_vit_large_336px
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vision.frame_pooling import frame_lengths, pool_frames, pool_tokens, slow_fast_plan
from vita_jax.models.vision.internvit import (
    Block,
    InternViT,
    InternViTConfig,
    drop_path,
    internvit_6b_448px,
    internvit_300m_448px,
    interpolate_positions,
    vita_tower_features,
)
from vita_jax.models.vision.siglip import SiglipVision, s2_features, siglip_so400m_384px
from vita_jax.ops.pixel_shuffle import pixel_shuffle
from vita_jax.ops.resize import area_matrix, bicubic_matrix, bilinear_matrix, resize_grid

TINY = InternViTConfig(24, 3, 3, 40, 16, 4)
PIXELS = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def init(model: nn.Module, *inputs: jax.Array) -> dict[str, Any]:
    """Random parameters of the model's shapes, drawn by numpy: compiling the real initialisation takes seconds."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)).get("params", {})
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)


def run(model: nn.Module, params: dict[str, Any], *inputs: jax.Array, **options: Any) -> Any:
    rngs = options.pop("rngs", None)
    return jax.jit(lambda p, x, r: model.apply({"params": p}, *x, rngs=r, **options))(params, inputs, rngs)


@pytest.mark.parametrize("qk_normalization", [False, True])
def test_scanned_layers_equal_a_loop(qk_normalization: bool) -> None:
    config = replace(
        TINY, qk_normalization=qk_normalization, norm_type="rms_norm" if qk_normalization else "layer_norm"
    )
    params = init(InternViT(config), PIXELS)
    last, captured = run(InternViT(config), params, PIXELS, capture=True)
    x = captured["hidden_states"][0]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x, _ = run(Block(config), layer, x, jnp.zeros(()))
        np.testing.assert_allclose(captured["hidden_states"][i + 1], x, atol=1e-5)
    np.testing.assert_allclose(last, x, atol=1e-5)


def test_remat_changes_nothing() -> None:
    params = init(InternViT(TINY), PIXELS)

    def loss(config: InternViTConfig) -> Any:
        squares = jax.value_and_grad(lambda p: jnp.sum(InternViT(config).apply({"params": p}, PIXELS) ** 2))
        return jax.jit(squares)(params)

    (plain, plain_grads), (remat, remat_grads) = loss(TINY), loss(replace(TINY, remat="full"))
    np.testing.assert_allclose(plain, remat, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain_grads, remat_grads)


def test_drop_path_is_off_when_deterministic_and_per_sample_otherwise() -> None:
    config = replace(TINY, drop_path_rate=0.5)
    model = InternViT(config)
    params = init(model, PIXELS)
    plain = run(InternViT(TINY), params, PIXELS)
    np.testing.assert_array_equal(run(model, params, PIXELS), plain)
    apply = jax.jit(lambda key: model.apply({"params": params}, PIXELS, deterministic=False, rngs={"dropout": key}))
    noisy = [apply(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])
    # Without a rate no rng is asked for.
    np.testing.assert_array_equal(run(InternViT(TINY), params, PIXELS, deterministic=False), plain)


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0.0, 4 / 3], rtol=1e-6)
    assert (y == y[:, :1, :1]).all()
    assert abs(y.mean() - 1.0) < 0.03
    np.testing.assert_array_equal(drop_path(x, jnp.float32(0.0), jax.random.key(0)), x)


def test_positions_stay_at_the_native_size() -> None:
    table = jax.random.normal(jax.random.key(0), (1, 17, 8))
    assert interpolate_positions(table, 4, (4, 4)) is table
    resized = interpolate_positions(table, 4, (3, 7))
    assert resized.shape == (1, 22, 8)
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([bicubic_matrix, bilinear_matrix, area_matrix]))
def test_resize_matrices_keep_constants_and_are_symmetric(n_in: int, n_out: int, matrix: Any) -> None:
    weights = matrix(n_in, n_out)
    assert weights.shape == (n_out, n_in)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-5)
    if n_in == n_out:
        np.testing.assert_allclose(weights, np.eye(n_in), atol=1e-6)


def test_other_image_sizes_and_incomplete_patches() -> None:
    model = InternViT(TINY)
    params = init(model, PIXELS)
    wide = jax.random.normal(jax.random.key(2), (1, 11, 22, 3))
    out = run(model, params, wide)
    assert out.shape == (1, 1 + 2 * 5, 24)
    np.testing.assert_array_equal(out, run(model, params, wide[:, :8, :20]))


def test_bfloat16_runs_close_to_float32() -> None:
    config = replace(TINY, embedding_init_stddev=0.02)
    params = init(InternViT(config), PIXELS)
    want = run(InternViT(config), params, PIXELS)
    got = run(InternViT(config, jnp.bfloat16), params, PIXELS)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)
    features = vita_tower_features(got)
    assert features.dtype == jnp.bfloat16
    projector = Projector(ProjectorConfig("mlp2x_gelu", 96, 32), jnp.bfloat16)
    assert run(projector, init(projector, features), features).dtype == jnp.bfloat16


def test_fresh_initialisation() -> None:
    def fresh(config: InternViTConfig) -> dict[str, Any]:
        key = jax.random.key(0, impl="rbg")  # compiles faster than the default
        return nn.unbox(jax.jit(InternViT(config).init)(key, jnp.zeros((1, 112, 112, 3))))["params"]

    config = InternViTConfig(64, 2, 4, 256, 112, 14, layer_scale_init=0.1)
    params = fresh(config)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    positions = params["embeddings"]["position_embedding"]
    assert positions.std() == pytest.approx(1.0, abs=0.05)
    for path, fan_in in {
        "embeddings/patch_embed/kernel": 3 * 14 * 14,
        "embeddings/patch_embed/bias": 3 * 14 * 14,
        "layers/attention/qkv/kernel": 64,
        "layers/attention/o_proj/kernel": 64,
        "layers/mlp/fc1/bias": 64,
        "layers/mlp/fc2/kernel": 256,
    }.items():
        leaf, bound = flatten(params)[path], fan_in**-0.5
        assert float(jnp.abs(leaf).max()) <= bound
        assert leaf.std() == pytest.approx(bound / 3**0.5, rel=0.25), path
    assert not np.array_equal(params["layers"]["mlp"]["fc1"]["kernel"][0], params["layers"]["mlp"]["fc1"]["kernel"][1])
    np.testing.assert_array_equal(params["layers"]["ls1"], np.full((2, 64), 0.1, np.float32))
    np.testing.assert_array_equal(params["layers"]["norm1"]["scale"], np.ones((2, 64), np.float32))
    small = fresh(replace(config, embedding_init_stddev=0.02))
    assert small["embeddings"]["position_embedding"].std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("config", "count"), [(internvit_300m_448px(), 304_012_288), (internvit_6b_448px(), 5_536_496_000)]
)
def test_presets_have_the_published_parameter_count(config: InternViTConfig, count: int) -> None:
    shapes = jax.eval_shape(InternViT(config).init, jax.random.key(0), jnp.zeros((1, 448, 448, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert (config.tokens_per_tile, config.output_size) == (256, 4 * config.hidden_size)


def _fits(table: Any, params: dict[str, Any]) -> None:
    """The table covers exactly the parameters that the model makes, and round-trips them."""
    back = flatten(import_params(table, export_params(table, params)))
    assert set(back) == set(flatten(params))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(back[path], leaf)


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_internvit_table_covers_the_parameters(norm_type: str, qkv_bias: bool) -> None:
    config = replace(TINY, norm_type=norm_type, qkv_bias=qkv_bias, qk_normalization=not qkv_bias)
    _fits(internvit_weights.weight_table(config), init(InternViT(config), PIXELS))


@pytest.mark.parametrize(("model", "weights"), [(ClipVision, clip_weights), (SiglipVision, siglip_weights)])
def test_other_towers(model: Any, weights: Any) -> None:
    config = ViTConfig(24, 3, 3, 40, 16, 4, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    params = init(model(config), PIXELS)
    _fits(weights.weight_table(config), params)
    out = run(model(config), params, PIXELS, capture=True)
    for layer in (-2, 0, 3):
        selected = run(model(config), params, PIXELS, select_layer=layer)["selected"]
        np.testing.assert_allclose(selected, out["hidden_states"][layer], atol=1e-6)
    with pytest.raises(UserError, match="layer 4 cannot be selected from 4 hidden states"):
        run(model(config), params, PIXELS, select_layer=4)
    with pytest.raises(UserError, match="images are 12x16, but this tower reads 16x16"):
        run(model(config), params, PIXELS[:, :12])


def test_other_presets_have_the_published_shape() -> None:
    assert clip_vit_large_336px().num_patches == 576
    assert siglip_so400m_384px().num_patches == 729


def test_pixel_shuffle_order_and_halving() -> None:
    hidden = jnp.arange(2 * 17, dtype=jnp.float32).reshape(1, 17, 2)
    features = vita_tower_features(hidden)
    assert features.shape == (1, 4, 8)
    # patches 0, 1 (first row) and 4, 5 (second row) make the first token; patch k is hidden row k + 1
    np.testing.assert_array_equal(features[0, 0], 0.5 * hidden[0, np.asarray([1, 2, 5, 6])].reshape(-1))
    with pytest.raises(UserError, match="not a square"):
        vita_tower_features(hidden[:, :-1])
    with pytest.raises(UserError, match="3x4"):
        pixel_shuffle(jnp.zeros((1, 3, 4, 2)))


@pytest.mark.parametrize(
    ("kind", "tokens_in", "tokens_out"),
    [
        ("linear", 7, 7),
        ("identity", 7, 7),
        ("mlp1x_gelu", 7, 7),
        ("mlp4x_gelu", 7, 7),
        ("spp_v1", 25, 4),
        ("spp_v2", 16, 4),
        ("spp_v3", 9, 1),
        ("spp", 7, 7),
        ("vanilla", 8, 2),
        ("minigpt", 8, 2),
        ("ldp", 25, 9),
    ],
)
def test_projectors(kind: str, tokens_in: int, tokens_out: int) -> None:
    config = ProjectorConfig(kind, 12, 12 if kind in ("identity", "spp") else 20)
    x = jax.random.normal(jax.random.key(0), (2, tokens_in, 12))
    params = init(Projector(config), x)
    assert run(Projector(config), params, x).shape == (2, tokens_out, config.output_size)
    _fits(projectors_weights.weight_table(config), params)


def test_projector_errors() -> None:
    for kind in ("mlp_gelu", "mlp2x", "qformer", ""):
        with pytest.raises(UserError, match="projector type"):
            ProjectorConfig(kind)
    for kind, message in (("vanilla", "joins 4 tokens, but there are 7"), ("ldp", "7 tokens are not a square grid")):
        with pytest.raises(UserError, match=message):
            Projector(ProjectorConfig(kind, 4, 8)).init(jax.random.key(0), jnp.zeros((1, 7, 4)))
    assert ProjectorConfig("ldp", 4096, 3584).squeeze_size == 896
    assert ProjectorConfig("ldp", 8, 8).squeeze_size == 8
    with pytest.raises(UserError, match="hidden_size is 9, but projector type 'vanilla' has no such width"):
        ProjectorConfig("vanilla", 4, 8, 9)
    with pytest.raises(UserError, match="hidden_size 0 must be at least 1"):
        ProjectorConfig("linear", 4, 8, 0)


def test_projectors_with_a_width_of_their_own() -> None:
    """An mlp is wider inside; a linear projector is the product of two matrices and still linear."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    for kind, names in (("linear", ("linear_in", "linear_out")), ("mlp3x_gelu", ("layers_0", "layers_2", "layers_4"))):
        config = ProjectorConfig(kind, 12, 20, 31)
        params = init(Projector(config), x)
        sizes = (12, *(31,) * (len(names) - 1), 20)
        shapes = {name: params[name]["kernel"].shape for name in params}
        assert shapes == {name: sizes[i : i + 2] for i, name in enumerate(names)}
        assert run(Projector(config), params, x).shape == (2, 5, 20)
        with pytest.raises(UnsupportedOption, match="public checkpoints have no projectors with a width of their own"):
            projectors_weights.weight_table(config)
    config = ProjectorConfig("linear", 12, 20, 31)
    params = init(Projector(config), x)
    (first, a), (second, b) = ((params[name]["kernel"], params[name]["bias"]) for name in ("linear_in", "linear_out"))
    want = x @ (first @ second) + a @ second + b
    np.testing.assert_allclose(run(Projector(config), params, x), want, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_equals_a_convolution(stride: int) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 4))
    want = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    np.testing.assert_allclose(depthwise_3x3(x, kernel, stride), want, atol=1e-5)


def test_s2_stitches_tiles_in_place() -> None:
    """With a tower that only averages patches, every scale must give the same map as the image averaged directly."""

    def tower(x: jax.Array) -> jax.Array:
        return jnp.mean(x.reshape(x.shape[0], 2, 2, 2, 2, 3), axis=(2, 4)).reshape(x.shape[0], 4, 3)

    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    features = s2_features(tower, image, (8, 4))
    direct = resize_grid(image, (2, 2), area_matrix).reshape(2, 4, 3)
    np.testing.assert_allclose(features[..., 3:], direct, atol=1e-6)
    np.testing.assert_allclose(features[..., :3], tower(resize_grid(image, (4, 4))), atol=1e-6)
    with pytest.raises(UserError, match="6 is not a multiple"):
        s2_features(tower, image, (4, 6))


def test_frame_pooling() -> None:
    assert frame_lengths([0, 5, 5, 5, 5, 5, 7, 0, 0]) == [256, 144, 49, 49, 49, 144, 144, 256, 256]
    x = jax.random.normal(jax.random.key(0), (3, 16, 2))
    np.testing.assert_allclose(
        pool_tokens(x, 2), x.reshape(3, 2, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(3, 4, 2), atol=1e-6
    )
    pooled = pool_frames(x, [16, 4, 1])
    assert pooled.shape == (21, 2)
    np.testing.assert_array_equal(pooled[:16], x[0])
    with pytest.raises(UserError, match="no plan for 65 frames"):
        slow_fast_plan(65, "slow_fast_pooling0")
    with pytest.raises(UserError, match="'fast_slow' is unknown"):
        slow_fast_plan(3, "fast_slow")


@pytest.mark.parametrize("field", [{"num_heads": 5}, {"norm_type": "batch"}, {"drop_path_rate": 1.0}, {"remat": "all"}])
def test_impossible_configurations(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        replace(TINY, **field)
