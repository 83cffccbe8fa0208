"""Adapters: what they change, merging, the layout of peft, and errors. Dense and mixture-of-experts decoders."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.conversion.tables import export_params, flatten, import_params, unflatten
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models import lora
from vita_jax.models.language.decoder import Decoder, DecoderConfig
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.models.lora import LoraConfig
from vita_jax.models.lora_weights import (
    export_adapters,
    import_adapters,
    scale_from_peft,
    sites_of_names,
    wrapped_table,
)
from vita_jax.models.vita import vita_1_5
from vita_jax.models.vita_weights import weight_table as vita_table

pytestmark = pytest.mark.slow

DENSE = DecoderConfig(
    vocab_size=19, hidden_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, intermediate_size=10
)
SPARSE = replace(DENSE, num_experts=3, qkv_bias=False)
LORA = LoraConfig(rank=2, alpha=6.0)
EVERYTHING = replace(LORA, targets=(lora.LANGUAGE_MODEL, lora.ROUTER))
KINDS = {"dense": (DENSE, LORA), "sparse": (SPARSE, EVERYTHING)}


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def compiled(config: DecoderConfig) -> Callable:
    def run(params):
        embeds = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
        positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
        return Decoder(config).apply({"params": params}, embeds, positions, jnp.ones((2, 5), jnp.int32))[0]

    return jax.jit(run)


@functools.cache
def model(kind: str) -> tuple[dict, dict]:
    """Parameters, and adapters that are no longer zero."""
    config, settings = KINDS[kind]
    row = jnp.ones((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), jnp.ones((1, 2, 12)), row, row))["params"]
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)
    adapters = lora.init_adapters(weight_table(config), settings, jax.random.key(2))
    noise = np.random.default_rng(0)
    drawn = {
        path: jnp.asarray(noise.normal(size=leaf.shape) * 0.2, jnp.float32) if path.endswith("lora_b") else leaf
        for path, leaf in flatten(adapters).items()
    }
    return params, unflatten(iter(drawn.items()))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind):
    (config, _), (params, adapters) = KINDS[kind], model(kind)
    run = compiled(config)
    base, apart, merged = (run(tree) for tree in (params, lora.attach(params, adapters), lora.merge(params, adapters)))
    np.testing.assert_allclose(apart, merged, atol=1e-4)
    assert float(jnp.abs(apart - base).max()) > 0.05
    fresh = lora.init_adapters(weight_table(config), KINDS[kind][1], jax.random.key(3))
    np.testing.assert_array_equal(run(lora.attach(params, fresh)), base)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_undone(kind):
    params, adapters = model(kind)
    merged = lora.merge(params, adapters)
    changed = {path for path, leaf in flatten(merged).items() if (leaf != flatten(params)[path]).any()}
    assert changed == {f"{site}/kernel" for site in {path.rpartition("/")[0] for path in flatten(adapters)}}
    back = lora.unmerge(merged, adapters)
    jax.tree.map(close, back, params)
    base, apart = lora.detach(lora.attach(params, adapters))
    jax.tree.map(np.testing.assert_array_equal, (base, apart), (params, adapters))
    with pytest.raises(UserError, match="has adapters already"):
        lora.attach(lora.attach(params, adapters), adapters)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_are_those_through_the_merged_kernels():
    params, adapters = model("dense")
    run = compiled(DENSE)

    def loss(adapters, join):
        return jnp.sum(jnp.sin(run(join(params, adapters))))

    apart, merged = (jax.grad(loss)(adapters, join) for join in (lora.attach, lora.merge))
    for path, want in flatten(merged).items():
        if not path.endswith("lora_scale"):  # a constant, never trained
            np.testing.assert_allclose(flatten(apart)[path], want, atol=1e-3, rtol=1e-3)


def test_targets_and_their_shapes():
    sites = {site.path: site for site in lora.find_sites(weight_table(SPARSE), EVERYTHING.targets)}
    names = {path.rpartition("/")[2] for path in sites}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "router"}
    o_proj, down = sites["layers/attention/o_proj"], sites["layers/moe/down_proj"]
    assert (o_proj.stack, o_proj.inputs, o_proj.outputs) == ((2,), (2, 6), (12,))
    assert (down.stack, down.inputs, down.outputs) == ((2, 3), (10,), (12,))
    leaves = flatten(lora.init_adapters(weight_table(SPARSE), EVERYTHING, jax.random.key(0)))
    assert leaves["layers/moe/down_proj/lora_a"].shape == (2, 3, 10, 2)
    assert leaves["layers/moe/down_proj/lora_b"].shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(leaves["layers/moe/down_proj/lora_scale"], np.full((2, 3), 3.0))
    assert float(jnp.abs(leaves["layers/attention/o_proj/lora_a"]).max()) <= 12**-0.5
    axes = lora.adapter_axes(o_proj, ("layers", "q_heads", "head_dim", "embed"))
    assert axes["layers/attention/o_proj/lora_a"] == ("layers", "q_heads", "head_dim", None)
    assert axes["layers/attention/o_proj/lora_b"] == ("layers", None, "embed")


def test_default_targets_of_the_whole_model_are_the_language_model_without_its_head():
    sites = [site.path for site in lora.find_sites(vita_table(vita_1_5()), LoraConfig().targets)]
    assert len(sites) == 7 and all(path.startswith("language/layers/") for path in sites)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_round_trip_is_bit_exact(kind):
    (config, settings), (_, adapters) = KINDS[kind], model(kind)
    table, adapters = weight_table(config), jax.tree.map(np.asarray, adapters)
    tensors, fields = export_adapters(table, adapters)
    q_proj = "base_model.model.model.layers.1.self_attn.q_proj"
    assert tensors[f"{q_proj}.lora_A.weight"].shape == (2, 12) and tensors[f"{q_proj}.lora_B.weight"].shape == (12, 2)
    assert (fields["r"], fields["lora_alpha"]) == (settings.rank, settings.alpha)
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    linear = {name.removesuffix(".weight") for name in table.torch_names}
    assert {name for name in linear if re.fullmatch(fields["target_modules"], name)} == names
    jax.tree.map(np.testing.assert_array_equal, import_adapters(table, tensors, fields), adapters)
    if kind == "sparse":
        assert "base_model.model.model.layers.0.block_sparse_moe.experts.2.w2.lora_A.weight" in tensors


def test_update_in_torch_layout():
    """B @ A added to the (out, in) weight, as peft does."""
    params, adapters = jax.tree.map(np.asarray, model("dense"))
    table = weight_table(DENSE)
    tensors, before = export_adapters(table, adapters)[0], export_params(table, params)
    after = export_params(table, lora.merge(params, adapters))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 3.0 * b @ a, atol=1e-5)


def test_state_of_a_wrapped_model():
    params, adapters = jax.tree.map(np.asarray, model("dense"))
    table = weight_table(DENSE)
    tensors, fields = export_adapters(table, adapters)
    named = {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    wrapped = wrapped_table(table, sites_of_names(table, named, "default"))
    state = export_params(wrapped, params)
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias" in state
    assert "base_model.model.lm_head.weight" in state
    jax.tree.map(np.testing.assert_array_equal, import_params(wrapped, state), params)
    jax.tree.map(np.testing.assert_array_equal, import_adapters(table, named, fields, "default"), adapters)


def test_errors_name_what_is_wrong():
    params, adapters = model("dense")
    table = weight_table(DENSE)
    with pytest.raises(UserError, match="'layers/conv' matches no linear layer"):
        lora.find_sites(table, ("layers/conv",))
    with pytest.raises(UserError, match="not a regular expression"):
        lora.find_sites(table, ("(",))
    with pytest.raises(UserError, match="rank 0 must be at least 1"):
        LoraConfig(rank=0)
    wide = lora.init_adapters(weight_table(replace(DENSE, hidden_size=14)), LORA, jax.random.key(0))
    with pytest.raises(UserError, match="made for another model"):
        lora.merge(params, wide)
    with pytest.raises(UserError, match="the model has no layers/moe"):
        lora.attach(params, model("sparse")[1])
    tensors, fields = export_adapters(table, adapters)
    with pytest.raises(UserError, match="no adapter fits"):
        import_adapters(table, {"other.lora_A.weight": np.zeros((2, 3))}, fields)
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    with pytest.raises(UserError, match="missing: base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"):
        import_adapters(table, tensors, fields)
    with pytest.raises(UnsupportedOption, match="use_dora"):
        scale_from_peft(fields | {"use_dora": True})
    with pytest.raises(UserError, match="lacks the field 'r'"):
        scale_from_peft({"lora_alpha": 16})
    assert scale_from_peft({"r": 4, "lora_alpha": 16, "use_rslora": True}) == 8.0
