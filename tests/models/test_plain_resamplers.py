"""The resamplers and the blocks of Flamingo's ablations, and the sizes of its presets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.connectors import perceiver_resampler_weights
from vita_jax.models.connectors.perceiver_resampler import KINDS, ResamplerConfig
from vita_jax.models.connectors.plain_resamplers import RESAMPLERS, make_resampler
from vita_jax.models.flamingo import Flamingo, FlamingoConfig, flamingo_3b, flamingo_4b, flamingo_llama_7b, text_inputs
from vita_jax.models.language import gated_cross_attention_weights
from vita_jax.models.language.gated_cross_attention import GatedBlock, GatedCrossAttentionConfig
from vita_jax.ops.activations import activation

CONFIG = ResamplerConfig(8, num_layers=2, num_heads=2, head_dim=4, num_latents=3, max_frames=4)
X = np.random.default_rng(0).normal(size=(1, 2, 2, 5, 8)).astype(np.float32)  # two pictures of two frames


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def test_every_kind_has_its_module():
    assert tuple(RESAMPLERS) == KINDS
    with pytest.raises(UserError, match="kind 'conv' is unknown"):
        replace(CONFIG, kind="conv")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_resampled_by_themselves_and_frames_told_apart(kind):
    model = make_resampler(replace(CONFIG, kind=kind))
    variables = nn.unbox(model.init(jax.random.key(0), X))
    run = jax.jit(lambda x: model.apply(variables, x)[0])
    y = run(X)
    assert y.shape == (1, 2, 3, 8)
    np.testing.assert_allclose(run(X[:, ::-1])[:, ::-1], y, atol=1e-5)  # no embedding of pictures
    assert np.abs(run(X[:, :, ::-1]) - y).max() > 1e-3
    # Any number of frames up to that of the embeddings, with the same parameters.
    assert run(np.concatenate([X, X], axis=2)).shape == (1, 2, 3, 8)
    with pytest.raises(UserError, match="6 frames were given, but the resampler has time embeddings for 4"):
        run(np.concatenate([X] * 3, axis=2))


def layer(params: dict, number: int) -> dict:
    return jax.tree.map(lambda leaf: leaf[number], params["layers"])


def norm(x: jax.Array, params: dict) -> jax.Array:
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * params["scale"] + params["bias"]


def feed_forward(x: jax.Array, params: dict) -> jax.Array:
    hidden = norm(x, params["norm"]) @ params["up"]["kernel"]
    return activation("gelu")(hidden) @ params["down"]["kernel"]


def test_the_mlp_is_layers_on_tokens_and_means_of_tokens():
    config = replace(CONFIG, kind="mlp", max_frames=0)
    model = make_resampler(config)
    params = nn.unbox(model.init(jax.random.key(1), X))["params"]
    x = jnp.asarray(X)
    for number in range(2):
        x = x + feed_forward(x, layer(params, number)["feed_forward"])
    mixed = jnp.einsum("btfvd,vm->btmd", x, params["mix"]["kernel"]) / x.shape[2]
    np.testing.assert_allclose(model.apply({"params": params}, X)[0], norm(mixed, params["norm"]), atol=1e-5)


def test_the_transformer_is_attention_of_all_to_all():
    config = replace(CONFIG, kind="transformer", max_frames=0)
    model = make_resampler(config)
    params = nn.unbox(model.init(jax.random.key(1), X))["params"]
    tokens = jnp.asarray(X[0, 0]).reshape(10, 8)
    x = jnp.concatenate([params["latents"], tokens])
    for number in range(2):
        own = layer(params, number)
        y = norm(x, own["norm"])
        q, k, v = (jnp.einsum("sd,dnh->snh", y, own[f"{name}_proj"]["kernel"]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("snh,tnh->nst", q, k) / 2, axis=-1)
        x = x + jnp.einsum("nst,tnh,nhd->sd", weights, v, own["o_proj"]["kernel"])
        x = x + feed_forward(x, own["feed_forward"])
    np.testing.assert_allclose(model.apply({"params": params}, X)[0][0, 0], norm(x[:3], params["norm"]), atol=1e-5)


def test_without_gates_both_branches_are_added_as_they_are():
    """As if the gates stood at infinity, where tanh is 1."""
    config = GatedCrossAttentionConfig(12, 8, num_heads=2, head_dim=4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 12)).astype(np.float32)
    media = rng.normal(size=(1, 2, 3, 2, 2, 4)).astype(np.float32)
    times = jnp.array([[0, 1, 1, 2, 2]])
    params = nn.unbox(GatedBlock(config).init(jax.random.key(0), x, media, times))["params"]
    ungated = GatedBlock(replace(config, gated=False))
    bare = {name: leaf for name, leaf in params.items() if not name.endswith("_gate")}
    drawn = jax.eval_shape(ungated.init, jax.random.key(0), x, media, times)["params"]
    assert set(drawn) == set(bare)
    open_gates = {**params, "attn_gate": jnp.asarray(50.0), "ff_gate": jnp.asarray(50.0)}
    want = GatedBlock(config).apply({"params": open_gates}, x, media, times)[0]
    np.testing.assert_allclose(ungated.apply({"params": bare}, x, media, times)[0], want, atol=1e-6)


def test_what_no_checkpoint_has_is_not_exported():
    with pytest.raises(UnsupportedOption, match="kind 'mlp': open_flamingo's checkpoints hold Perceivers"):
        perceiver_resampler_weights.weight_table(replace(CONFIG, kind="mlp"))
    with pytest.raises(UnsupportedOption, match="gated=false: open_flamingo's checkpoints have gates"):
        gated_cross_attention_weights.weight_table(GatedCrossAttentionConfig(12, 8, gated=False))


@pytest.mark.parametrize(
    ("preset", "blocks", "gated"),
    [(flamingo_3b, 24, 881_000_496), (flamingo_4b, 16, 897_744_928), (flamingo_llama_7b, 8, 1_115_815_952)],
)
def test_presets_have_the_published_numbers_of_parameters(preset, blocks, gated):
    """arXiv 2308.01390: gated blocks of 3B, 4B and 9B, and the resampler of all three."""
    config: FlamingoConfig = preset()
    init = partial(Flamingo(config).init, jax.random.key(0))
    params = nn.unbox(jax.eval_shape(init, text_inputs(jnp.zeros((1, 2), jnp.int32))))["params"]

    def count(name: str) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params[name]))

    assert (config.num_blocks, count("cross_attention"), count("resampler")) == (blocks, gated, 63_019_008)
    assert config.language.vocab_size == 32_003
