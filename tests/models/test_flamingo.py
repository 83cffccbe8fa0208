"""Flamingo: equal to its language model at first, who sees which picture, the cache, and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exchange.public import random_tensors
from vita_jax.conversion.tables import flatten, import_params
from vita_jax.conversion.views import View, joined
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.inference.generate_flamingo import generate_flamingo
from vita_jax.models.connectors.perceiver_resampler import PerceiverResampler, ResamplerConfig
from vita_jax.models.flamingo import Flamingo, FlamingoConfig, FlamingoInputs, flamingo_llama_7b, text_inputs
from vita_jax.models.flamingo_weights import export_tensors, trained_table, view, weight_table
from vita_jax.models.language import decoder_weights
from vita_jax.models.language.decoder import Block, Decoder, DecoderConfig
from vita_jax.models.language.gated_cross_attention import GatedBlock, GatedCrossAttentionConfig
from vita_jax.models.language.gated_decoder import block_numbers, num_blocks
from vita_jax.models.language.llama import llama_7b
from vita_jax.models.vision import clip_weights
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.media import media_times
from vita_jax.ops.rope import rotary_tables
from vita_jax.training.objectives.flamingo import TRAINED, flamingo_loss, rows_that_train

SIDE, TAG = 16, 28
LANGUAGE = DecoderConfig(29, 12, 5, 2, 1, 6, 16, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False)
CONFIG = FlamingoConfig(
    vision=ViTConfig(8, 2, 2, 12, SIDE, 8, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_size=6),
    resampler=ResamplerConfig(8, num_layers=2, num_heads=3, head_dim=4, num_latents=3),
    language=LANGUAGE,
    cross_attention=GatedCrossAttentionConfig(12, 8, num_heads=3, head_dim=4),
    cross_attention_every=2,
)
MODEL = Flamingo(CONFIG)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def fresh() -> dict:
    inputs = text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE)
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), inputs))["params"]


@pytest.fixture(scope="module")
def params(fresh) -> dict:
    """With open gates, and weights that make a difference."""
    grown = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, fresh)
    gates = {name: jnp.array([0.8, -0.6]) for name in ("attn_gate", "ff_gate")}
    return {**grown, "cross_attention": {**grown["cross_attention"], **gates}}


def make_images(t: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, t, 1, SIDE, SIDE, 3), dtype=np.uint8)


def make_inputs(tokens: list[int], images: np.ndarray, segments: list[int] | None = None, **options) -> FlamingoInputs:
    ids = jnp.array([tokens], jnp.int32)
    segment_ids = jnp.ones_like(ids) if segments is None else jnp.array([segments], jnp.int32)
    positions = jnp.arange(len(tokens))[None]
    if segments is not None:
        positions = positions - jnp.array([[segments.index(segment) for segment in segments]])
    times = media_times(ids == TAG, segment_ids, **options)
    return FlamingoInputs(ids, positions, segment_ids, times, images)


def member(stacked: dict, number: int) -> dict:
    """The variables of one layer, or block, of a stack."""
    return {"params": jax.tree.map(lambda leaf: leaf[number], stacked)}


@partial(jax.jit, static_argnames="model")
def forward(params: dict, inputs: FlamingoInputs, model: Flamingo = MODEL) -> jax.Array:
    return model.apply({"params": params}, inputs)


def test_a_fresh_model_is_its_language_model_bit_for_bit(fresh):
    """All gates are 0, so pictures and blocks change nothing; the layers are even those of the bare decoder."""
    inputs = make_inputs([3, TAG, 4, 5, TAG, 6], make_images(2))
    gates = fresh["cross_attention"]["attn_gate"]
    np.testing.assert_array_equal(gates, np.zeros(2))

    @jax.jit
    def language(params: dict) -> jax.Array:
        embeds = Decoder(LANGUAGE).apply({"params": params}, inputs.tokens, method="embed")
        return Decoder(LANGUAGE).apply({"params": params}, embeds, inputs.positions, inputs.segment_ids)[0]

    np.testing.assert_array_equal(forward(fresh, inputs), language(fresh["language"]))


def test_gates_open_the_way_for_pictures(fresh, params):
    inputs = make_inputs([3, TAG, 4], make_images(1))
    other = replace(inputs, images=make_images(1, seed=1))
    assert np.abs(forward(params, inputs) - forward(params, other)).max() > 0.01

    def loss(gate: jax.Array) -> jax.Array:
        cross = {**fresh["cross_attention"], "attn_gate": gate}
        return jnp.sum(forward({**fresh, "cross_attention": cross}, inputs) ** 3)

    assert np.abs(jax.grad(loss)(jnp.zeros(2))).min() > 0


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_blocks_stand_before_every_nth_layer(every):
    numbers = [i for i in range(LANGUAGE.num_layers) if (i + 1) % every == 0]
    assert list(block_numbers(LANGUAGE.num_layers, every)) == numbers
    assert num_blocks(LANGUAGE.num_layers, every) == len(numbers)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_groups_walk_the_layers_in_order(params, every):
    """Against a loop over layers and blocks; rematerialisation changes nothing."""
    config = replace(CONFIG, cross_attention_every=every)
    blocks = jax.tree.map(lambda x: jnp.stack([x[i % 2] for i in range(config.num_blocks)]), params["cross_attention"])
    params = {**params, "cross_attention": blocks}
    inputs, model = make_inputs([3, TAG, 4, 5], make_images(1)), Flamingo(config)

    @jax.jit
    def run(params: dict) -> tuple[dict, jax.Array]:
        variables = {"params": params}
        media = model.apply(variables, inputs.images, method="encode_media")
        kv = model.apply(variables, media, method="media_keys_values")
        text = (inputs.tokens, inputs.positions, inputs.segment_ids, kv, inputs.media_times)
        return model.apply(variables, *text, capture=True, method="hidden_states")[2], kv

    @jax.jit
    def loop(params: dict, kv: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        mask = make_attention_mask(inputs.segment_ids, inputs.segment_ids)
        rotary = rotary_tables(inputs.positions, LANGUAGE.head_dim, LANGUAGE.rope_theta)
        x, hidden, gated = params["language"]["embed_tokens"]["embedding"][inputs.tokens], [], []
        for i in range(LANGUAGE.num_layers):
            if (i + 1) % every == 0:
                block, number = member(params["cross_attention"], len(gated)), len(gated)
                x, _ = GatedBlock(config.cross_attention).apply(block, x, kv[number], inputs.media_times)
                gated.append(x)
            layer = member(params["language"]["layers"], i)
            x = Block(LANGUAGE).apply(layer, (x, None), i, rotary, mask, None)[0][0]
            hidden.append(x)
        return hidden, gated

    captured, kv = run(params)
    hidden, gated = loop(params, kv)
    np.testing.assert_allclose(captured["hidden"], jnp.stack(hidden), atol=1e-5)
    np.testing.assert_allclose(captured["gated"], jnp.stack(gated), atol=1e-5)
    remat = Flamingo(replace(config, language=replace(LANGUAGE, remat="full")))

    def loss(params: dict, model: Flamingo) -> jax.Array:
        return jnp.mean(forward(params, inputs, model) ** 3)

    grads, remat_grads = (jax.grad(loss)(params, which) for which in (model, remat))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), grads, remat_grads)


def test_text_before_any_picture_sees_none_and_the_rest_sees_its_own(params):
    """The gradient of a position by the pictures: of one chunk only by its own picture."""
    pixels = jnp.asarray(make_images(3), jnp.float32) / 128 - 1
    inputs = make_inputs([3, 4, TAG, 5, TAG, TAG, 6], pixels)

    @jax.jit
    def influence(inputs: FlamingoInputs) -> jax.Array:
        """Whether the first block brings something of a picture to a position: (s t)."""

        def values(pixels: jax.Array) -> jax.Array:
            variables = {"params": params}
            media = MODEL.apply(variables, pixels, method="encode_media")
            kv = MODEL.apply(variables, media, method="media_keys_values")
            x = params["language"]["embed_tokens"]["embedding"][inputs.tokens]
            block = GatedBlock(CONFIG.cross_attention)
            y, _ = block.apply(member(params["cross_attention"], 0), x, kv[0], inputs.media_times)
            return jnp.sum(y[0] ** 3, axis=-1)

        return jnp.abs(jax.jacrev(values)(inputs.images)).sum((1, 3, 4, 5, 6)) > 0

    want = [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_array_equal(influence(inputs), want)
    after = make_inputs([3, 4, TAG, 5, TAG, TAG, 6], pixels, attend_next=True)
    want = [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_array_equal(influence(after), want)
    before = forward(params, inputs)[:, :2]
    other = replace(inputs, images=jnp.asarray(make_images(3, seed=1), jnp.float32))
    np.testing.assert_array_equal(forward(params, other)[:, :2], before)
    text = text_inputs(jnp.array([[3, 4]]), image_size=SIDE)
    np.testing.assert_allclose(forward(params, text), before, atol=1e-5)


def test_packed_documents_equal_separate_ones(params):
    images = make_images(3)
    first, second = [3, TAG, 4, 5], [6, TAG, TAG, 7]
    together = forward(params, make_inputs(first + second, images, [1] * 4 + [2] * 4))
    apart = [forward(params, make_inputs(ids, part)) for ids, part in ((first, images[:, :1]), (second, images[:, 1:]))]
    np.testing.assert_allclose(together, jnp.concatenate(apart, axis=1), atol=1e-5)


def test_generated_tokens_are_the_most_likely_ones_of_full_passes(params):
    """Two rows, padded on the left; new text sees the last picture of its row."""
    images = np.concatenate([make_images(2), make_images(2, seed=1)])
    rows = [make_inputs(ids, images[i : i + 1]) for i, ids in enumerate(([3, TAG, 4, TAG, 5], [0, 0, 7, TAG, 8]))]
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    batch = replace(batch, segment_ids=batch.segment_ids.at[1, :2].set(0))
    count = 4
    tokens = np.asarray(generate_flamingo(MODEL, params, batch, max_new_tokens=count).tokens)
    for i, ids in enumerate(([3, TAG, 4, TAG, 5], [7, TAG, 8])):
        whole = make_inputs([*ids, *tokens[i, :-1].tolist()], images[i : i + 1])
        # A tag that is generated has no picture; it is like any other token.
        times = whole.media_times.at[:, len(ids) :].set(whole.media_times[0, len(ids) - 1])
        hidden = forward(params, replace(whole, media_times=times))[:, -count:]
        logits = MODEL.apply({"params": params}, hidden, method="logits")
        assert tokens[i].tolist() == jnp.argmax(logits[0], axis=-1).tolist()


def test_the_resampler_reads_any_number_of_tokens_and_tells_frames_apart():
    config = replace(CONFIG.resampler, max_frames=3, max_media=2)
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 5, 8)).astype(np.float32)
    model = PerceiverResampler(config)
    variables = nn.unbox(model.init(jax.random.key(0), x))
    y, _ = model.apply(variables, x)
    assert y.shape == (1, 2, 3, 8)
    assert np.abs(model.apply(variables, x[:, :, ::-1])[0] - y).max() > 1e-3
    assert np.abs(model.apply(variables, x[:, ::-1])[0][:, ::-1] - y).max() > 1e-3
    still = PerceiverResampler(CONFIG.resampler)
    plain = {"params": {name: leaf for name, leaf in variables["params"].items() if "embedding" not in name}}
    np.testing.assert_allclose(still.apply(plain, x[:, :, ::-1])[0], still.apply(plain, x)[0], atol=1e-5)
    with pytest.raises(UserError, match="4 frames were given, but the resampler has time embeddings for 3"):
        model.apply(variables, np.concatenate([x, x], axis=2))
    with pytest.raises(UserError, match="3 pictures"):
        model.apply(variables, np.concatenate([x, x], axis=1)[:, :3])


def test_gradients_reach_new_embeddings_only(params):
    inputs = make_inputs([3, TAG, 27, 4], make_images(1))  # what is read last teaches nothing
    batch = {f"pairs/{name}": value for name, value in vars(inputs).items()} | {"pairs/labels": inputs.tokens}
    objective = partial(flamingo_loss, MODEL, batch=batch, key=None, weights={"pairs": 0.5}, new_tokens=(27, TAG))
    grads = jax.jit(jax.grad(lambda params: objective(params).loss))(params)
    rows = np.abs(grads["language"]["embed_tokens"]["embedding"]).max(axis=1)
    assert np.flatnonzero(rows).tolist() == [27, TAG]
    whole = objective(params).metrics["pairs_loss"]
    np.testing.assert_allclose(objective(params).loss, 0.5 * whole[0] / whole[1], rtol=1e-6)
    table = jnp.ones((4, 2))
    np.testing.assert_array_equal(rows_that_train(table, (1,)), table)


def published(config: FlamingoConfig) -> dict[str, np.ndarray]:
    """Random tensors under the published names, q, k and v of the tower stacked."""
    table = weight_table(config)
    return dict(joined(random_tensors(table).items(), clip_weights.open_clip_stacks(table.torch_names)))


def same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)


def test_weights_round_trip_bit_for_bit(params):
    tensors = published(CONFIG)
    for name, shape in (
        ("vision_encoder.transformer.resblocks.1.attn.in_proj_weight", (24, 8)),
        ("vision_encoder.proj", (8, 6)),
        ("perceiver.layers.0.0.to_kv.weight", (24, 8)),
        ("lang_encoder.model.layers.3.gated_cross_attn_layer.attn_gate", (1,)),
        ("lang_encoder.model.layers.4.decoder_layer.self_attn.k_proj.weight", (6, 12)),
    ):
        assert tensors[name].shape == shape
    assert not any("layers.0.gated" in name or "layers.4.gated" in name for name in tensors)
    taken_in = import_params(weight_table(CONFIG), view(tensors))
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert {path: leaf.shape for path, leaf in flatten(taken_in).items()} == shapes
    same_bits(dict(export_tensors(CONFIG, taken_in)), tensors)


def test_second_names_of_layers_and_blocks():
    """A file may have both names, or the second one alone, all behind `module.`"""
    tensors = published(CONFIG)
    want = import_params(weight_table(CONFIG), view(tensors))
    second = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1:3] == ["model", "layers"]:
            stack = {"decoder_layer": "old_decoder_blocks", "gated_cross_attn_layer": "gated_cross_attn_layers"}
            name = ".".join(["lang_encoder", stack[parts[4]], parts[3], *parts[5:]])
        second[f"module.{name}"] = tensor
    assert not set(second) & set(tensors)
    plain = {name.removeprefix("module."): tensor for name, tensor in second.items()}
    for file in (second, tensors | plain):
        jax.tree.map(np.testing.assert_array_equal, import_params(weight_table(CONFIG), view(file)), want)
    with pytest.raises(UserError, match="two tensors for perceiver.latents"):
        view(tensors | {"module.perceiver.latents": tensors["perceiver.latents"]})


def test_a_training_checkpoint_is_completed_by_the_files_of_what_was_frozen(params):
    table = trained_table(CONFIG)
    saved = random_tensors(table)
    saved["vision_encoder.class_embedding"] = np.zeros(8)
    trained = import_params(table, view(saved))
    assert all(TRAINED.search(path) for path in flatten(trained))
    own = decoder_weights.weight_table(LANGUAGE)
    language = import_params(own, random_tensors(own))
    clip = clip_weights.open_clip_table(CONFIG.vision)
    stacked = dict(joined(random_tensors(clip).items(), clip_weights.open_clip_stacks(clip.torch_names)))
    vision = import_params(clip, View(stacked, clip_weights.open_clip_sources(stacked)))
    whole = {**trained, "language": {**language, **trained["language"]}, "vision": vision}
    assert set(flatten(whole)) == set(flatten(params))


def test_other_language_models_are_refused():
    with pytest.raises(UnsupportedOption, match="language model is MPT"):
        view({"lang_encoder.transformer.blocks.0.gated_cross_attn_layer.attn_gate": np.zeros(1)})
    with pytest.raises(UnsupportedOption, match="model_type 'mpt' is not offered"):
        decoder_weights.config_from_hf({"model_type": "mpt"})
    with pytest.raises(UnsupportedOption, match="must be dense"):
        replace(CONFIG, language=replace(LANGUAGE, num_experts=2))


def test_parts_must_fit():
    with pytest.raises(UserError, match=r"cross_attention.media_size is 9, .* width 8"):
        replace(CONFIG, cross_attention=replace(CONFIG.cross_attention, media_size=9))
    with pytest.raises(UserError, match="cross_attention_every 6 must be between 1 and the number of layers, 5"):
        replace(CONFIG, cross_attention_every=6)
    with pytest.raises(UserError, match="without_media 'nan'"):
        replace(CONFIG.cross_attention, without_media="nan")


@pytest.mark.parametrize(("every", "trainable"), [(2, 2_425_735_200), (4, 63_019_008 + 8 * 139_476_994 + 32003 * 4096)])
def test_full_size_has_the_published_number_of_parameters(every, trainable):
    config = flamingo_llama_7b(every)
    variables = jax.eval_shape(Flamingo(config).init, jax.random.key(0), text_inputs(jnp.zeros((1, 2), jnp.int32)))
    shapes = {path: leaf.shape for path, leaf in flatten(nn.unbox(variables)["params"]).items()}
    sizes = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    assert sum(size for path, size in sizes.items() if path.startswith("resampler/")) == 63_019_008
    assert sum(size for path, size in sizes.items() if TRAINED.search(path)) == trainable
    assert shapes == {rule.path: (*rule.stack, *rule.param_shape) for rule in weight_table(config).rules}
    assert replace(config.language, vocab_size=32000) == llama_7b()
