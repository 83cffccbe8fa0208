"""Int8 weights of dense and mixture-of-experts decoders: which, how exact, what they compute, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from tests.exchange.public import random_tensors
from tests.training.llava import llava_config
from vita_jax.conversion.tables import export_params, flatten, import_params, unflatten
from vita_jax.errors import UserError
from vita_jax.models import int8, llava_weights, lora
from vita_jax.models.int8 import change_params, int8_weights, num_weights, weight_bytes
from vita_jax.models.language.decoder import Decoder, DecoderConfig, make_cache
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.models.llava import Llava
from vita_jax.models.lora import LoraConfig, find_sites, init_adapters
from vita_jax.models.vita import VitaInputs
from vita_jax.nn.layers import Dense
from vita_jax.ops.expert_parallel import ExpertAxes, apply_sharded_experts
from vita_jax.ops.experts import ExpertLinear, Experts

DENSE = DecoderConfig(
    vocab_size=19, hidden_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, intermediate_size=10
)
CONFIGS = {"dense": DENSE, "sparse": replace(DENSE, num_experts=3, qkv_bias=False)}
EPSILON = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def model(kind: str) -> tuple[dict, dict]:
    """Parameters as floats, and ready for inference."""
    config = CONFIGS[kind]
    row = jnp.ones((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), jnp.ones((1, 2, 12)), row, row))["params"]
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)
    return params, change_params(params, int8_weights(weight_table(config)))


def restored(kind: str) -> dict[str, np.ndarray]:
    """Path -> float64, with integers multiplied by their scales again."""
    leaves, sites = flatten(model(kind)[1]), kernels(kind)
    made = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items() if not path.endswith("_scale")}
    for path, site in sites.items():
        scale = np.asarray(leaves[f"{path}_scale"], np.float64)
        made[path] *= np.expand_dims(scale, tuple(len(site.stack) + i for i in range(len(site.inputs))))
    return made


def kernels(kind: str) -> dict[str, lora.Site]:
    table = weight_table(CONFIGS[kind])
    return {f"{site.path}/kernel": site for site in find_sites(table, (r"_proj$", r"^lm_head$"))}


@pytest.mark.parametrize("kind", CONFIGS)
def test_kernels_become_integers_and_nothing_else(kind):
    floats, integers = (flatten(tree) for tree in model(kind))
    sites = kernels(kind)
    assert len(sites) == 8 and "layers/moe/router/kernel" not in sites
    assert integers.keys() == floats.keys() | {f"{path}_scale" for path in sites}
    for path, leaf in floats.items():
        if path in sites:
            assert integers[path].dtype == np.int8 and integers[path].shape == leaf.shape
            assert integers[f"{path}_scale"].shape == (*sites[path].stack, *sites[path].outputs)
        else:
            np.testing.assert_array_equal(integers[path], leaf)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_is_within_half_a_scale(kind):
    """A scale is the largest value of an output over 127.5, so that value is not further off than half of it either."""
    floats, integers, again = flatten(model(kind)[0]), flatten(model(kind)[1]), restored(kind)
    for path, site in kernels(kind).items():
        weights = np.asarray(floats[path], np.float64)
        inputs = tuple(len(site.stack) + i for i in range(len(site.inputs)))
        largest, scale = np.abs(weights).max(axis=inputs), np.asarray(integers[f"{path}_scale"], np.float64)
        np.testing.assert_allclose(scale, largest / 127.5, rtol=1e-6)
        error = np.abs(again[path] - weights).max(axis=inputs)
        assert (error <= scale * (0.5 + 128 * EPSILON)).all() and error.max() > 0
        assert np.abs(integers[path].astype(int)).max(axis=inputs).min() >= 127


@pytest.mark.parametrize("kind", CONFIGS)
def test_parts_of_a_kernel_give_what_the_whole_gives(kind, monkeypatch):
    """Five columns of the output head at a time, and fewer of what is larger."""
    floats, whole = model(kind)
    monkeypatch.setattr(int8, "QUANTIZED_VALUES", 5 * DENSE.hidden_size)
    parts = change_params(floats, int8_weights(weight_table(CONFIGS[kind])))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_a_layer_is_within_the_bound_of_its_product():
    """|y - y8| <= half a scale times sum |x|: q_proj of the second layer, its bias with it."""
    floats, integers = (jax.tree.map(lambda x: x[1], tree["layers"]["attention"]["q_proj"]) for tree in model("dense"))
    layer = Dense((2, 6), ("embed", "q_heads", "head_dim"))
    x = np.random.default_rng(0).normal(size=(3, 5, 12)).astype(np.float32)
    got, want = (layer.apply({"params": params}, x) for params in (integers, floats))
    bound = np.abs(x).sum(axis=-1)[..., None, None] * integers["kernel_scale"] * 0.5 * (1 + 1e-4)
    error = np.abs(np.asarray(got) - np.asarray(want))
    assert (error <= bound).all() and error.max() > bound.max() / 50


def test_products_are_those_of_the_library():
    kernel = np.random.default_rng(3).normal(size=(12, 2, 6)).astype(np.float32)
    made = qwix.quantize(jnp.asarray(kernel), jnp.int8, channelwise_axes=(1, 2))
    table = weight_table(replace(DENSE, num_layers=1))
    change = int8_weights(table)
    ours = change("layers/attention/q_proj/kernel", kernel[None])
    np.testing.assert_array_equal(ours["layers/attention/q_proj/kernel"][0], made.qvalue)
    scale = ours["layers/attention/q_proj/kernel_scale"][0]
    np.testing.assert_array_equal(scale, made.scale[0])
    x = np.random.default_rng(4).normal(size=(5, 12)).astype(np.float32)
    got = Dense((2, 6), (None,) * 3, use_bias=False).apply(
        {"params": {"kernel": made.qvalue, "kernel_scale": jnp.asarray(scale)}}, x
    )
    np.testing.assert_allclose(got, qwix.dot_general(x, made, (((1,), (0,)), ((), ()))), rtol=1e-5, atol=1e-6)


@partial(jax.jit, static_argnames="config")
def run(params, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Logits of two rows at once, and of the same rows block by block from a cache."""
    decoder = Decoder(config)
    embeds = jax.random.normal(jax.random.key(1), (2, 7, config.hidden_size))
    positions, segments = jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.ones((2, 7), jnp.int32)
    hidden, _ = decoder.apply({"params": params}, embeds, positions, segments)
    cache, pieces = make_cache(config, 2, 8), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        piece, cache = decoder.apply({"params": params}, embeds[:, part], positions[:, part], segments[:, part], cache)
        pieces.append(piece)
    stacked = jnp.stack([hidden, jnp.concatenate(pieces, axis=1)])
    return decoder.apply({"params": params}, stacked.reshape(4, 7, -1), method="logits")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("implementation", ["ragged", "dense"])
def test_a_decoder_computes_what_its_integers_say(kind, implementation):
    """As one with the floats that the integers stand for, in one pass and with a cache; and not as the original."""
    config = replace(CONFIGS[kind], expert_implementation=implementation)
    floats, integers = model(kind)
    stand_for = unflatten((path, jnp.asarray(leaf, jnp.float32)) for path, leaf in restored(kind).items())
    got, want, original = (run(params, config) for params in (integers, stand_for, floats))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[:2], got[2:], rtol=1e-4, atol=1e-4)
    assert 1e-3 < float(jnp.abs(got - original).max()) < 0.1 * float(jnp.abs(original).max())


def test_bytes_are_counted_as_they_are_and_as_floats():
    floats, integers = model("sparse")
    size = sum(leaf.size for leaf in jax.tree.leaves(floats))
    assert weight_bytes(floats) == (4 * size, 4 * size) and num_weights(integers) == num_weights(floats) == size
    now, before = weight_bytes(integers)
    kernel = sum(flatten(floats)[path].size for path in kernels("sparse"))
    scales = sum(leaf.size for path, leaf in flatten(integers).items() if path.endswith("_scale"))
    assert before == 4 * size and now == 4 * (size - kernel + scales) + kernel
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), floats)
    assert weight_bytes(change_params(half, int8_weights(weight_table(CONFIGS["sparse"]))))[1] == 2 * size


def test_what_does_not_go_with_integers_is_refused():
    floats, integers = model("dense")
    table = weight_table(DENSE)
    adapters = init_adapters(table, LoraConfig(rank=2), jax.random.key(0))
    with pytest.raises(UserError, match=r"LoRA adapters .* are not merged; .*convert export"):
        change_params(lora.attach(floats, adapters), int8_weights(table))
    for join in (lora.attach, lora.merge):
        with pytest.raises(UserError, match="is int8, for inference"):
            join(integers, adapters)
    with pytest.raises(UserError, match="kernel_scale"):
        dict(export_params(table, integers))
    leaves = flatten(integers)
    del leaves["lm_head/kernel_scale"]
    with pytest.raises(UserError, match="lm_head/kernel is int8 but has no kernel_scale"):
        Decoder(DENSE).apply({"params": unflatten(iter(leaves.items()))}, jnp.ones((1, 12)), method="logits")
    layer = ExpertLinear(jnp.ones((2, 4, 4)), scale=jnp.ones((2, 4)))
    mesh = jax.sharding.get_abstract_mesh()
    with pytest.raises(UserError, match="experts in int8 run on one device"):
        apply_sharded_experts(
            jnp.ones((1, 2, 4)),
            jnp.ones((1, 2, 2)),
            Experts(layer, layer, layer),
            mesh,
            ExpertAxes(),
            experts_per_token=1,
        )


def test_of_a_llava_the_language_model_alone_becomes_integers():
    """And what is said of a picture is what the integers stand for."""
    config = llava_config()
    table = llava_weights.weight_table(config)
    tensors = {name: 0.5 * array for name, array in random_tensors(table, "float32").items()}
    params = import_params(table, tensors)
    integers = flatten(change_params(params, int8_weights(table)))
    small = {path for path, leaf in integers.items() if leaf.dtype == np.int8}
    layers = [f"attention/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    assert small == {"language/lm_head/kernel", *(f"language/layers/{layer}/kernel" for layer in layers)}
    stand_for = dict(flatten(params))
    for site in find_sites(table, (lora.LANGUAGE_MODEL, r"^language/lm_head$")):
        path, inputs = f"{site.path}/kernel", tuple(len(site.stack) + i for i in range(len(site.inputs)))
        stand_for[path] = integers[path] * np.expand_dims(integers[f"{path}_scale"], inputs)
    picture = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8, 3), dtype=np.uint8)
    row = {"tokens": [[3, 0, 0, 0, 0, 5]], "positions": [list(range(6))], "segment_ids": [[1] * 6]}
    row = {name: np.array(value, np.int32) for name, value in row.items()}
    batch = VitaInputs(tiles=picture, feature_index=np.array([[-1, 0, 1, 2, 3, -1]], np.int32), **row)

    @jax.jit
    def logits(params: dict) -> jax.Array:
        hidden = Llava(config).apply({"params": params}, batch)
        return Llava(config).apply({"params": params}, hidden, method="logits")

    got, want = (logits(unflatten(iter(leaves.items()))) for leaves in (integers, stand_for))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(got - logits(params)).max() > 1e-3


def test_a_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 'vita_jax\[int8\]'"):
        int8_weights(weight_table(DENSE))
