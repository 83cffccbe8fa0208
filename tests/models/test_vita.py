"""The composition: the gather, packing with tiles, gradients, tables. A model of a few hundred parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.conversion.tables import export_params, import_params
from vita_jax.data.splice import FeatureLayout, FeatureSpan, expand_placeholders, pad_rows
from vita_jax.errors import UserError
from vita_jax.models.audio.encoder import AudioEncoderConfig
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.vision.frame_pooling import pool_tokens
from vita_jax.models.vision.internvit import InternViTConfig
from vita_jax.models.vita import Vita, VitaConfig, VitaInputs, normalise_tiles, splice, text_inputs, vita_1_5
from vita_jax.models.vita_weights import weight_table
from vita_jax.ops.losses import next_token_loss

SIDE, TOKENS = 32, 16
CONFIG = VitaConfig(
    vision=InternViTConfig(8, 1, 2, 8, image_size=SIDE, patch_size=4, embedding_init_stddev=0.02),
    projector=ProjectorConfig("mlp2x_gelu", input_size=32, output_size=12),
    language=DecoderConfig(
        vocab_size=29, hidden_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, intermediate_size=16
    ),
)
MODEL, LAYOUT = Vita(CONFIG), FeatureLayout(TOKENS)
IMAGE, AUDIO = -200, -500
AUDIO_TOWER = AudioTowerConfig(
    AudioEncoderConfig(7, 8, 1, 2, 8, cmvn="identity"), AudioAdapterConfig(input_size=8, output_size=12)
)
HEARING = replace(CONFIG, audio=AUDIO_TOWER)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict:
    variables = jax.jit(MODEL.init)(jax.random.key(0), text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, nn.unbox(variables)["params"])


def make_tiles(b: int, t: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (b, t, SIDE, SIDE, 3), dtype=np.uint8)


def one_row(ids: list[int], slots: list[int]) -> dict[str, np.ndarray]:
    row = pad_rows([expand_placeholders(ids, None, [LAYOUT.tile_span(slot) for slot in slots])])
    row.pop("labels")
    return row


@jax.jit
def forward(params: dict, batch: VitaInputs) -> jax.Array:
    return MODEL.apply({"params": params}, batch)


@jax.jit
def embed_inputs(params: dict, batch: VitaInputs) -> jax.Array:
    return MODEL.apply({"params": params}, batch, method="embed_inputs")


@partial(jax.jit, static_argnums=2)
def encode_tiles(params: dict, tiles: np.ndarray, model: Vita = MODEL) -> jax.Array:
    return model.apply({"params": params}, tiles, method="encode_tiles")


def test_splice_takes_each_feature_from_its_own_row():
    text = jnp.zeros((2, 4, 1))
    features = jnp.arange(1.0, 7).reshape(2, 3, 1)
    got = splice(text, features, jnp.array([[-1, 2, 0, -1], [1, -1, -1, 0]]))
    np.testing.assert_array_equal(got[..., 0], [[0, 3, 1, 0], [5, 0, 0, 4]])
    np.testing.assert_array_equal(splice(text, features[:, :0], jnp.full((2, 4), -1)), text)


def test_features_land_at_their_placeholders(params):
    tiles = make_tiles(1, 2)
    batch = VitaInputs(tiles=tiles, **one_row([3, IMAGE, 4, IMAGE], [1, 0]))
    embeds, features = embed_inputs(params, batch)[0], encode_tiles(params, tiles)[0]
    table = params["language"]["embed_tokens"]["embedding"]
    want = jnp.concatenate([table[3][None], features[TOKENS:], table[4][None], features[:TOKENS]])
    np.testing.assert_allclose(embeds, want, atol=1e-6)


def test_extra_features_follow_the_tiles(params):
    tiles = make_tiles(1, 1)
    extra = jnp.ones((1, 3, 12)) * jnp.arange(3)[None, :, None]
    spans = [FeatureSpan(LAYOUT.extra_start(1) + 1, 2)]
    row = pad_rows([expand_placeholders([5, -500], None, (), spans)])
    row.pop("labels")
    batch = VitaInputs(tiles=tiles, extra_features=extra, **row)
    embeds = embed_inputs(params, batch)[0]
    np.testing.assert_allclose(embeds[1:], extra[0, 1:], atol=1e-6)


@pytest.fixture(scope="module")
def hearing_params() -> dict:
    inputs = text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE)
    return nn.unbox(jax.jit(Vita(HEARING).init)(jax.random.key(0), inputs))["params"]


def test_an_audio_tower_adds_parameters_and_changes_none(params, hearing_params):
    assert set(hearing_params) == {*params, "audio"}
    unscaled = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, {name: hearing_params[name] for name in params})
    jax.tree.map(np.testing.assert_array_equal, unscaled, params)
    tensors = export_params(weight_table(HEARING), jax.tree.map(np.asarray, hearing_params))
    assert "model.audio_encoder.encoder.enc.1.encoders.0.self_attn.pos_bias_u" in tensors
    jax.tree.map(np.testing.assert_array_equal, import_params(weight_table(HEARING), tensors), hearing_params)


def test_clips_land_at_their_placeholders(hearing_params):
    """A tile and two clips of different lengths; what stands behind a clip's end is never indexed."""
    frames, lengths = 30, np.array([[30, 15]], np.int32)
    clips = np.random.default_rng(0).normal(size=(1, 2, frames, 7)).astype(np.float32)
    capacity, counts = AUDIO_TOWER.num_tokens(frames), AUDIO_TOWER.num_tokens(lengths[0])
    assert (capacity, *counts) == (3, 3, 2)
    spans = [LAYOUT.clip_span(1, clip, capacity, int(counts[clip])) for clip in (1, 0)]
    row = pad_rows([expand_placeholders([3, AUDIO, IMAGE, AUDIO], None, [LAYOUT.tile_span(0)], spans)])
    row.pop("labels")

    @jax.jit
    def run(clips: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = VitaInputs(tiles=make_tiles(1, 1), audio=clips, audio_lengths=lengths, **row)
        variables, model = {"params": hearing_params}, Vita(HEARING)
        table = model.apply(variables, clips, lengths, method="encode_audio")
        return model.apply(variables, batch, method="embed_inputs"), table

    embeds, table = run(clips)
    assert table.shape == (1, 2 * capacity, 12)
    np.testing.assert_allclose(embeds[0, 1:3], table[0, capacity : capacity + 2], atol=1e-6)
    np.testing.assert_allclose(embeds[0, 3 + TOKENS :], table[0, :capacity], atol=1e-6)
    behind = clips.copy()
    behind[0, 1, 15:] = 50.0
    np.testing.assert_allclose(run(behind)[0], embeds, atol=1e-5)
    with pytest.raises(UserError, match="4 features of a clip were asked for, but its slot holds 3"):
        LAYOUT.clip_span(1, 0, capacity, 4)


def test_audio_needs_a_tower(params):
    batch = text_inputs(jnp.array([[3, 1]]), image_size=SIDE)
    batch = replace(batch, audio=jnp.zeros((1, 1, 9, 7)), audio_lengths=jnp.array([[9]]))
    with pytest.raises(UserError, match="the model has no audio tower"):
        forward(params, batch)
    with pytest.raises(UserError, match="audio.adapter.output_size is 10"):
        replace(CONFIG, audio=replace(AUDIO_TOWER, adapter=replace(AUDIO_TOWER.adapter, output_size=10)))


def test_packed_rows_equal_separate_ones(params):
    """Two conversations in one row, their tiles in one list of slots."""
    tiles = make_tiles(1, 3)
    first, second = one_row([3, IMAGE, 4], [0]), one_row([IMAGE, 5, IMAGE, 6], [1, 2])
    packed = {name: np.concatenate([first[name], second[name]], axis=1) for name in first}
    packed["segment_ids"][:, first["tokens"].shape[1] :] = 2
    together = forward(params, VitaInputs(tiles=tiles, **packed))
    separate = [forward(params, VitaInputs(tiles=tiles, **row)) for row in (first, second)]
    np.testing.assert_allclose(together, jnp.concatenate(separate, axis=1), atol=1e-5)


def test_gradient_of_unused_tiles_is_zero(params):
    tiles = jnp.asarray(make_tiles(1, 3), jnp.float32) / 255
    row = one_row([3, IMAGE, 4, 5], [1])

    def loss(tiles):
        return jnp.sum(forward(params, VitaInputs(tiles=tiles, **row))[:, -1] ** 3)

    grad = jnp.abs(jax.grad(loss)(tiles)).sum(axis=(0, 2, 3, 4))
    assert grad[1] > 0
    np.testing.assert_array_equal(grad[jnp.array([0, 2])], [0, 0])


def test_rows_without_tiles_are_the_bare_language_model(params):
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    batch = text_inputs(tokens, image_size=SIDE)
    decoder = MODEL.decoder
    embeds = decoder.apply({"params": params["language"]}, tokens, method="embed")
    hidden, _ = decoder.apply({"params": params["language"]}, embeds, batch.positions, batch.segment_ids)
    np.testing.assert_allclose(forward(params, batch), hidden, atol=1e-6)
    unused = replace(batch, tiles=make_tiles(1, 1))
    np.testing.assert_allclose(forward(params, unused), hidden, atol=1e-6)


def test_uint8_tiles_are_normalised_inside(params):
    tiles = make_tiles(1, 1)
    normalised = (tiles / 255 - np.array(CONFIG.image_mean)) / np.array(CONFIG.image_std)
    row = one_row([IMAGE, 2], [0])
    inside = normalise_tiles(jnp.asarray(tiles), CONFIG.image_mean, CONFIG.image_std)
    np.testing.assert_allclose(inside, normalised, atol=1e-6)
    got, want = (forward(params, VitaInputs(tiles=x, **row)) for x in (tiles, inside))
    np.testing.assert_allclose(got, want, atol=1e-3)  # last bits of a pixel grow in the small tower's norms


def test_pooled_copies_are_where_the_layout_says(params):
    config = replace(CONFIG, pooled_grids=(3, 2))
    tiles, layout = make_tiles(1, 2), FeatureLayout(TOKENS, (3, 2))
    plain = encode_tiles(params, tiles).reshape(2, TOKENS, 12)
    table = encode_tiles(params, tiles, Vita(config))[0]
    assert table.shape[0] == layout.extra_start(2)
    for slot in range(2):
        for num_tokens, want in ((16, plain[slot]), (9, pool_tokens(plain[slot], 3)), (4, pool_tokens(plain[slot], 2))):
            span = layout.tile_span(slot, num_tokens)
            np.testing.assert_allclose(table[span.start : span.start + span.count], want, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_forward_and_loss(params):
    batch = VitaInputs(tiles=make_tiles(1, 1), **one_row([3, IMAGE, 4, 5], [0]))
    labels = jnp.where(batch.feature_index < 0, batch.tokens, -100)

    def loss(params, dtype):
        hidden = Vita(CONFIG, dtype=dtype).apply({"params": params}, batch)
        assert hidden.dtype == dtype
        total, count = next_token_loss(hidden, params["language"]["lm_head"]["kernel"], labels, batch.segment_ids)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, jnp.bfloat16)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(params, jnp.float32), rtol=0.05)
    assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_weights_round_trip_under_the_released_names(params):
    table, params = weight_table(CONFIG), jax.tree.map(np.asarray, params)
    tensors = export_params(table, params)
    for name in (
        "model.vision_tower.vision_tower.encoder.layers.0.attn.qkv.weight",
        "model.mm_projector.2.bias",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ):
        assert name in tensors
    jax.tree.map(np.testing.assert_array_equal, import_params(table, tensors), params)
    with_audio = tensors | {"model.audio_encoder.adpter.project.bias": np.zeros(3, np.float32)}
    import_params(table, with_audio)
    with pytest.raises(UserError, match="model.other"):
        import_params(table, tensors | {"model.other": np.zeros(3, np.float32)})


def test_parts_must_fit():
    with pytest.raises(UserError, match=r"projector.output_size is 12, .* width 24"):
        replace(CONFIG, language=replace(CONFIG.language, hidden_size=24))
    assert CONFIG.tokens_per_tile == TOKENS
    assert vita_1_5().tokens_per_tile == 256
