"""The decoder with a mixture of experts: cache, padding, tables, layouts."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vita_jax.conversion.tables import export_params, flatten, import_params
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.language.decoder import Decoder, DecoderConfig, make_cache, mixtral_8x7b
from vita_jax.models.language.decoder_weights import config_from_hf, weight_table
from vita_jax.models.language.experts import ROUTER, expert_axes, router_logits
from vita_jax.ops.expert_parallel import ExpertAxes
from vita_jax.parallel.mesh import MESH_AXES
from vita_jax.parallel.rules import LOGICAL_RULES, param_shardings

CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    intermediate_size=10,
    qkv_bias=False,
    num_experts=4,
)
LENGTH = 7


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict:
    variables = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), *inputs())
    assert set(variables) == {"params"}
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, nn.unbox(variables)["params"])


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    embeds = jax.random.normal(jax.random.key(1), (2, LENGTH, CONFIG.hidden_size))
    return embeds, jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH)), jnp.ones((2, LENGTH), jnp.int32)


@pytest.fixture(scope="module")
def full(params) -> tuple[jax.Array, jax.Array]:
    """Hidden states and the router's logits of the whole rows."""
    apply = jax.jit(lambda params, *args: Decoder(CONFIG).apply({"params": params}, *args, mutable=[ROUTER]))
    (hidden, _), kept = apply(params, *inputs())
    return hidden, router_logits(kept)


def test_router_logits_of_all_layers_are_kept(full):
    assert full[1].shape == (CONFIG.num_layers, 2, LENGTH, CONFIG.num_experts)
    assert full[1].dtype == jnp.float32 and len(set(np.argmax(full[1], axis=-1).ravel().tolist())) > 2


def test_dense_experts_give_the_same(params, full):
    config = replace(CONFIG, expert_implementation="dense")
    hidden, _ = jax.jit(Decoder(config).apply)({"params": params}, *inputs())
    np.testing.assert_allclose(hidden, full[0], atol=1e-4)


def test_prefill_and_decode_equal_the_full_forward(params, full):
    """With padding in the first block, which is routed but changes nothing."""
    embeds, positions, segments = inputs()
    cache, step, pieces = make_cache(CONFIG, 2, LENGTH + 1), jax.jit(Decoder(CONFIG).apply), []
    padded = segments[:, :4].at[:, 3].set(0)
    noisy = embeds[:, :4].at[:, 3].set(50.0)
    hidden, cache = step({"params": params}, noisy, positions[:, :4], padded, cache)
    pieces.append(hidden[:, :3])
    for i in range(3, LENGTH):
        at = slice(i, i + 1)
        hidden, cache = step({"params": params}, embeds[:, at], positions[:, at], segments[:, at], cache)
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full[0], atol=1e-4)


def test_bfloat16_routes_in_float32(params):
    kept = jax.eval_shape(
        lambda params: Decoder(CONFIG, dtype=jnp.bfloat16).apply({"params": params}, *inputs(), mutable=[ROUTER]),
        params,
    )
    assert kept[0][0].dtype == jnp.bfloat16 and router_logits(kept[1]).dtype == jnp.float32


def test_weights_round_trip_under_the_names_of_each_expert(params):
    table, params = weight_table(CONFIG), jax.tree.map(np.asarray, params)
    tensors = export_params(table, params)
    moe = "model.layers.1.block_sparse_moe"
    assert tensors[f"{moe}.gate.weight"].shape == (4, 12)
    up = params["layers"]["moe"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(tensors[f"{moe}.experts.3.w3.weight"], up[1, 3].T)
    assert tensors[f"{moe}.experts.0.w2.weight"].shape == (12, 10)
    jax.tree.map(np.testing.assert_array_equal, import_params(table, tensors), params)
    del tensors[f"{moe}.experts.3.w1.weight"]
    with pytest.raises(UserError, match=r"1 tensors missing: model.layers.1.block_sparse_moe.experts.3.w1.weight"):
        import_params(table, tensors)


def abstract_params(config: DecoderConfig) -> dict:
    embeds = jax.ShapeDtypeStruct((1, 2, config.hidden_size), jnp.float32)
    row = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), embeds, row, row)["params"]


def test_experts_are_spread_over_their_mesh_axis():
    config = replace(CONFIG, vocab_size=20, num_kv_heads=2)
    mesh = AbstractMesh((2, 2, 2, 2, 1), MESH_AXES)
    specs = {path: x.spec for path, x in flatten(param_shardings(abstract_params(config), mesh)).items()}
    assert specs["layers/moe/gate_proj/kernel"] == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert specs["layers/moe/down_proj/kernel"] == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert specs["layers/moe/router/kernel"] == PartitionSpec(None, "fsdp", None)


def test_experts_are_computed_where_the_rule_table_has_them():
    """But for kernels that the mesh does not divide, which are whole everywhere."""
    mesh = AbstractMesh((1, 2, 2, 2, 2), MESH_AXES)
    with nn.logical_axis_rules(tuple(LOGICAL_RULES.items())):
        all_cut = ExpertAxes(("fsdp", "expert"), ("context",), ("expert",), ("fsdp",), ("tensor",))
        assert expert_axes(mesh, 4, 12, 10) == all_cut
        assert expert_axes(mesh, 3, 9, 5) == ExpertAxes(("fsdp", "expert"), ("context",))
        assert expert_axes(AbstractMesh((), ()), 4, 12, 10) == ExpertAxes()
    assert expert_axes(mesh, 4, 12, 10) == ExpertAxes()  # no table, nothing is cut


def test_sizes_that_the_mesh_does_not_divide_are_refused():
    """An odd vocabulary, or one key head, cannot be cut in two; the message names the parameter and the axis."""
    mesh, large = AbstractMesh((2, 2, 2, 2, 1), MESH_AXES), replace(CONFIG, hidden_size=1 << 18)
    odd = {"num_kv_heads": 2}, "'vocab' of size 19"
    for change, word in (odd, ({"vocab_size": 20}, "'kv_heads' of size 1")):
        with pytest.raises(UserError, match=rf"{word} cannot be cut in 2 parts \(mesh axis tensor\)"):
            param_shardings(abstract_params(replace(large, **change)), mesh)


def test_full_size_has_the_published_number_of_parameters_and_can_be_cut():
    boxed = abstract_params(mixtral_8x7b(51760))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed))) == 46_864_666_624
    specs = flatten(param_shardings(boxed, AbstractMesh((1, 2, 8, 8, 1), MESH_AXES)))
    assert specs["layers/moe/up_proj/kernel"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert specs["lm_head/kernel"].spec == PartitionSpec("fsdp", "tensor")


def test_config_of_a_published_mixtral():
    fields = {"model_type": "vita-mixtral", "vocab_size": 51760, "max_position_embeddings": 32768}
    fields |= {"rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.02, "output_router_logits": False}
    assert replace(config_from_hf(fields), remat="full") == mixtral_8x7b(51760)
    assert config_from_hf(fields | {"output_router_logits": True}).router_aux_loss_coef == 0.02
    with pytest.raises(UnsupportedOption, match="sliding_window 4096"):
        config_from_hf(fields | {"sliding_window": 4096})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"experts_per_token": 5}, "between 1 and num_experts 4"),
        ({"num_experts": 0, "router_aux_loss_coef": 0.1}, "needs experts"),
        ({"expert_implementation": "fast"}, "ragged, dense"),
        ({"expert_buffer_factor": 0.5}, "expert_buffer_factor 0.5 must be at least 1"),
    ],
)
def test_bad_configs_say_what_is_wrong(change, word):
    with pytest.raises(UserError, match=word):
        replace(CONFIG, **change)
