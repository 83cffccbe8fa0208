"""LLaVA: the gather, packing, generation, and checkpoints in all layouts. A model of a few thousand parameters."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exchange.public import random_tensors
from vita_jax.conversion.tables import Table, export_params, flatten, import_params
from vita_jax.conversion.views import View
from vita_jax.data.splice import FeatureLayout, expand_placeholders, pad_rows
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.inference.generate import generate
from vita_jax.models.connectors import projectors_weights
from vita_jax.models.connectors.perceiver_resampler import KINDS, PerceiverResampler, ResamplerConfig
from vita_jax.models.connectors.projectors import Projector, ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.llava import (
    Llava,
    LlavaConfig,
    llava_small,
    llava_v1_5_7b,
    llava_v1_5_13b,
    llava_v1_7b,
    llava_v1_13b,
)
from vita_jax.models.llava_weights import (
    LAYOUTS,
    config_from_hf,
    config_to_hf,
    has_tower,
    layout_of,
    plain_name,
    projector_sources,
    weight_table,
)
from vita_jax.models.vision import clip_weights
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.models.vita import VitaInputs, text_inputs

SIDE, TOKENS, IMAGE = 16, 4, -200
CONFIG = LlavaConfig(
    vision=ViTConfig(8, 2, 2, 12, SIDE, 8, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    projector=ProjectorConfig("mlp2x_gelu", 8, 12),
    language=DecoderConfig(29, 12, 2, 2, 2, 6, 16, rope_theta=1e4, rms_norm_eps=1e-5, qkv_bias=False),
)
LINEAR = replace(CONFIG, projector=ProjectorConfig("linear", 8, 12))
RESAMPLER = ResamplerConfig(8, num_layers=2, num_heads=2, head_dim=3, num_latents=3)
MODEL, LAYOUT = Llava(CONFIG), FeatureLayout(TOKENS)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict:
    variables = jax.jit(MODEL.init)(jax.random.key(0), text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, nn.unbox(variables)["params"])


def make_images(t: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, t, SIDE, SIDE, 3), dtype=np.uint8)


def one_row(ids: list[int], slots: list[int]) -> dict[str, np.ndarray]:
    row = pad_rows([expand_placeholders(ids, None, [LAYOUT.tile_span(slot) for slot in slots])])
    row.pop("labels")
    return row


@jax.jit
def forward(params: dict, batch: VitaInputs) -> jax.Array:
    return MODEL.apply({"params": params}, batch)


def test_features_of_the_hidden_state_before_the_last_layer_land_at_their_placeholders(params):
    images, table = make_images(2), params["language"]["embed_tokens"]["embedding"]
    batch = VitaInputs(tiles=images, **one_row([3, IMAGE, 4, IMAGE], [1, 0]))
    embed = jax.jit(lambda params: MODEL.apply({"params": params}, batch, method="embed_inputs")[0])
    features = MODEL.apply({"params": params}, images, method="encode_tiles")[0]
    want = jnp.concatenate([table[3][None], features[TOKENS:], table[4][None], features[:TOKENS]])
    np.testing.assert_allclose(embed(params), want, atol=1e-6 * np.abs(want).max())

    def scaled(layer: int) -> dict:
        last = jax.tree.map(lambda x: x.at[layer].multiply(3.0), params["vision"]["encoder"])
        return {**params, "vision": {**params["vision"], "encoder": last}}

    np.testing.assert_array_equal(embed(scaled(1)), embed(params))
    assert np.abs(embed(scaled(0)) - embed(params)).max() > 0.01


def test_the_class_token_may_stay(params):
    model = Llava(replace(CONFIG, select_feature="cls_patch"))
    with_class = model.apply({"params": params}, make_images(1), method="encode_tiles")
    assert with_class.shape[1] == model.config.tokens_per_tile == TOKENS + 1
    without = MODEL.apply({"params": params}, make_images(1), method="encode_tiles")
    np.testing.assert_allclose(with_class[:, 1:], without, atol=1e-6)


def test_a_resampler_stands_between_tower_and_projector(params):
    """Picture by picture; what it reads is what the projector reads without it."""
    model, images = Llava(replace(LINEAR, resampler=RESAMPLER)), make_images(2)
    assert model.config.tokens_per_tile == 3 and model.config.tower_tokens == TOKENS
    empty = text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE)
    drawn = nn.unbox(jax.jit(model.init)(jax.random.key(1), empty))["params"]
    own = {name: drawn[name] for name in ("resampler", "projector")}
    table = model.apply({"params": {**params, **own}}, images, method="encode_tiles")
    features = MODEL.apply({"params": params}, images[0], method="tower_features")
    tokens, _ = PerceiverResampler(RESAMPLER).apply({"params": own["resampler"]}, features[None, :, None])
    want = Projector(LINEAR.projector).apply({"params": own["projector"]}, tokens[0])
    assert table.shape == (1, 6, 12)
    np.testing.assert_allclose(table[0], want.reshape(6, 12), atol=1e-5)
    nothing = model.apply({"params": {**params, **own}}, images[:, :0], method="encode_tiles")
    assert nothing.shape == (1, 0, 12)


def test_packed_rows_equal_separate_ones(params):
    images = make_images(3)
    first, second = one_row([3, IMAGE, 4], [0]), one_row([IMAGE, 5, IMAGE, 6], [1, 2])
    packed = {name: np.concatenate([first[name], second[name]], axis=1) for name in first}
    packed["segment_ids"][:, first["tokens"].shape[1] :] = 2
    together = forward(params, VitaInputs(tiles=images, **packed))
    separate = [forward(params, VitaInputs(tiles=images, **row)) for row in (first, second)]
    np.testing.assert_allclose(together, jnp.concatenate(separate, axis=1), atol=1e-5)


def test_rows_without_images_are_the_bare_language_model(params):
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    batch, language = text_inputs(tokens, image_size=SIDE), {"params": params["language"]}
    embeds = MODEL.decoder.apply(language, tokens, method="embed")
    hidden, _ = MODEL.decoder.apply(language, embeds, batch.positions, batch.segment_ids)
    np.testing.assert_allclose(forward(params, batch), hidden, atol=1e-6)
    with pytest.raises(UserError, match="LLaVA has no audio tower"):
        forward(params, replace(batch, audio=jnp.zeros((1, 1, 9, 7)), audio_lengths=jnp.array([[9]])))


def test_generated_tokens_are_the_most_likely_ones_of_full_passes(params):
    images, ids = make_images(1), [3, IMAGE, 4, 5]
    batch = VitaInputs(tiles=images, **one_row(ids, [0]))
    tokens = generate(MODEL, params, batch, max_new_tokens=3).tokens[0].tolist()
    row = VitaInputs(tiles=images, **one_row(ids + tokens[:-1], [0]))
    logits = MODEL.apply({"params": params}, forward(params, row)[:, -3:], method="logits")
    assert tokens == jnp.argmax(logits[0], axis=-1).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_round_trips_bit_for_bit(params, layout):
    table = weight_table(CONFIG, layout)
    tensors = random_tensors(table)
    assert layout_of(tensors) == layout and has_tower(tensors, layout)
    taken_in = import_params(table, tensors)
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert {path: leaf.shape for path, leaf in flatten(taken_in).items()} == shapes
    back = export_params(table, taken_in)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].view(np.uint16), tensor.view(np.uint16))
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3)}
    import_params(table, tensors | old)


def test_names_of_the_layouts():
    names = {layout: set(weight_table(CONFIG, layout).torch_names) for layout in LAYOUTS}
    for layout, name in (
        ("original", "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"),
        ("original", "model.mm_projector.2.bias"),
        ("hf", "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"),
        ("hf", "multi_modal_projector.linear_1.weight"),
        ("hf", "language_model.lm_head.weight"),
        ("hf_5", "vision_tower.embeddings.class_embedding"),
        ("hf_memory", "model.language_model.layers.0.mlp.gate_proj.weight"),
        ("hf_memory", "lm_head.weight"),
    ):
        assert name in names[layout]
    assert "model.mm_projector.weight" in weight_table(LINEAR).torch_names
    with pytest.raises(UnsupportedOption, match="'linear', only 'mlp2x_gelu'; use the original layout"):
        weight_table(LINEAR, "hf")
    with pytest.raises(UserError, match="layout 'torch' is unknown"):
        weight_table(CONFIG, "torch")
    with pytest.raises(UserError, match="not those of a LLaVA"):
        layout_of(["model.layers.0.mlp.up_proj.weight"])


def test_a_checkpoint_without_its_tower_is_filled_from_clips_own_files(params):
    tensors = random_tensors(weight_table(CONFIG, tower=False))
    clip = random_tensors(clip_weights.weight_table(CONFIG.vision), seed=1)
    assert not has_tower(tensors) and "vision_model.post_layernorm.bias" in clip
    own = import_params(weight_table(CONFIG, tower=False), tensors)
    vision = import_params(clip_weights.weight_table(CONFIG.vision), clip)
    assert set(flatten({**own, "vision": vision})) == set(flatten(params))


def test_what_the_stages_leave_behind():
    table = projectors_weights.weight_table(CONFIG.projector)
    saved = random_tensors(table.prefixed(torch="model.mm_projector."))
    saved["model.embed_tokens.weight"] = np.zeros((2, 2))
    projector = import_params(table, View(saved, projector_sources(saved)))
    assert projector["layers_0"]["kernel"].shape == (8, 12)
    assert plain_name("base_model.model.model.mm_projector.0.bias") == "model.mm_projector.0.bias"
    assert plain_name("base_model.model.lm_head.weight") == "model.lm_head.weight"


def test_configs_go_out_and_come_back():
    for config in (CONFIG, replace(CONFIG, select_feature="cls_patch", select_layer=-1)):
        language = replace(config.language, max_positions=2048)
        config = replace(config, language=language)
        for layout in LAYOUTS:
            assert config_from_hf(config_to_hf(config, layout)) == config
    assert config_from_hf(config_to_hf(LINEAR)) == LINEAR


def test_configs_of_published_files():
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
    found = config_from_hf({"model_type": "llava", "text_config": text, "vision_config": vision})
    want = llava_v1_5_7b()
    assert found == replace(want, language=replace(want.language, vocab_size=32064, remat="none"))
    fields = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}
    v1 = llava_v1_7b()
    assert config_from_hf(fields) == replace(v1, language=replace(v1.language, remat="none"))
    for change, word in (
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "v1.6"),
        ({"mm_projector_type": "ldp"}, "none of LLaVA's"),
        ({"attention_bias": True}, "attention_bias"),
    ):
        with pytest.raises(UnsupportedOption, match=word):
            config_from_hf(fields | change)
    with pytest.raises(UserError, match="'eva' is not known by name"):
        config_from_hf(fields | {"mm_vision_tower": "eva"})


def test_parts_must_fit():
    with pytest.raises(UserError, match=r"projector.output_size is 12, .* width 24"):
        replace(CONFIG, language=replace(CONFIG.language, hidden_size=24))
    with pytest.raises(UserError, match="select_layer 4"):
        replace(CONFIG, select_layer=4)
    with pytest.raises(UserError, match="select_feature 'cls'"):
        replace(CONFIG, select_feature="cls")
    with pytest.raises(UnsupportedOption, match="'minigpt' is none of LLaVA's"):
        replace(CONFIG, projector=ProjectorConfig("minigpt", 8, 12))
    with pytest.raises(UserError, match="projector.output_size is 12, .* width 8"):
        replace(CONFIG, projector=ProjectorConfig("identity", 8, 12))
    with pytest.raises(UserError, match="resampler.hidden_size is 9, .* width 8"):
        replace(CONFIG, resampler=replace(RESAMPLER, hidden_size=9))
    with pytest.raises(UserError, match="resampler.max_frames is 8, but a picture of LLaVA is one frame"):
        replace(CONFIG, resampler=replace(RESAMPLER, max_frames=8))
    for kind, layout in zip(KINDS, LAYOUTS, strict=False):
        with pytest.raises(UnsupportedOption, match=f"'{kind}'.*: no layout of LLaVA's checkpoints has names"):
            weight_table(replace(CONFIG, resampler=replace(RESAMPLER, kind=kind)), layout)
    assert (llava_v1_7b().tokens_per_tile, llava_v1_5_7b().tokens_per_tile) == (256, 576)


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [
        # vision 303,179,776 or 303,507,456; projector 4,198,400 to 31,467,520; language 6,738,415,616 or 13,015,864,320
        (llava_v1_7b, 303_179_776 + 4_198_400 + 6_738_415_616),
        (llava_v1_13b, 303_179_776 + 5_248_000 + 13_015_864_320),
        (llava_v1_5_7b, 303_507_456 + 20_979_712 + 6_738_415_616),
        (llava_v1_5_13b, 303_507_456 + 31_467_520 + 13_015_864_320),
        (llava_small, None),
    ],
)
def test_tables_fit_the_presets(preset, num_parameters):
    config = preset()
    inputs = text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=config.vision.image_size)
    variables = jax.eval_shape(Llava(config).init, jax.random.key(0), inputs)
    shapes = {path: leaf.shape for path, leaf in flatten(nn.unbox(variables)["params"]).items()}
    table: Table = weight_table(config)
    assert shapes == {rule.path: (*rule.stack, *rule.param_shape) for rule in table.rules}
    assert num_parameters in (None, sum(int(np.prod(shape)) for shape in shapes.values()))
