"""The mesh, and the resolution of logical axis names into layouts, without devices to spare."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.training.tiny import model_config
from vita_jax.errors import UserError
from vita_jax.models.vita import Vita, vita_1_0, vita_1_5_with_voice
from vita_jax.parallel.mesh import BATCH_AXES, MESH_AXES, MeshConfig, make_mesh, mesh_shape, num_batch_shards, put_batch
from vita_jax.parallel.rules import LOGICAL_RULES, check_whole, param_shardings, partition_spec
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.stages import flatten


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_specs_follow_the_table_and_leave_out_axes_of_size_one():
    mesh = mesh_of(fsdp=2, tensor=2)
    names = ("layers", "embed", "q_heads", "head_dim")
    assert partition_spec(names, (3, 8, 4, 2), mesh, "q") == PartitionSpec(None, "fsdp", "tensor", None)
    assert partition_spec(names, (3, 8, 4, 2), mesh_of(), "q") == PartitionSpec(None, None, None, None)
    assert partition_spec(("batch", None), (8, 3), mesh_of(data=2, expert=2), "x") == PartitionSpec(
        ("data", "expert"), None
    )
    assert LOGICAL_RULES["batch"] == BATCH_AXES == ("data", "fsdp", "expert")


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("mlp", "vocab"), (4, 4), "parameter a/b .*'mlp' and 'vocab' both fall on mesh axis 'tensor'"),
        (("embed", "mlp"), (3, 1 << 20), "parameter a/b: dimension 'embed' of size 3 cannot be cut in 2 parts"),
        (("embed", "width"), (4, 4), "logical axis 'width' is not in the rule table"),
        (("embed",), (4, 4), "shape"),
    ],
)
def test_layout_errors_name_the_parameter(names, shape, message):
    with pytest.raises(UserError, match=message):
        partition_spec(names, shape, mesh_of(fsdp=2, tensor=2), "a/b")


def test_small_parameters_may_stay_whole():
    assert partition_spec(("embed", "mlp"), (3, 4), mesh_of(fsdp=2, tensor=2), "a") == PartitionSpec(None, "tensor")


def test_every_parameter_of_the_model_has_a_layout():
    """No collision in any parameter, on a mesh that uses every axis."""
    model = Vita(model_config())
    boxed = jax.eval_shape(lambda key: init_params(model, OBJECTIVES["cell_naming"], key), jax.random.key(0))
    mesh = mesh_of(data=2, fsdp=2, expert=2, tensor=2, context=2)
    specs = {path: sharding.spec for path, sharding in flatten(param_shardings(boxed, mesh)).items()}
    assert specs["language/layers/attention/q_proj/kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["language/embed_tokens/embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["vision/layers/mlp/fc2/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    whole = [path for path, spec in specs.items() if path.endswith("kernel") and not any(spec)]
    assert whole == [], "kernels that would be whole on every device"


def test_mesh_sizes():
    assert mesh_shape(MeshConfig(fsdp=2, tensor=2), 8) == (2, 2, 1, 2, 1)
    for bad, message in ((MeshConfig(data=3), "needs 3 devices but 8"), (MeshConfig(tensor=0), "mesh.tensor=0")):
        with pytest.raises(UserError, match=message):
            mesh_shape(bad, 8)


def test_batches_without_tiles_can_be_placed():
    import numpy as np

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert num_batch_shards(mesh) == 1
    placed = put_batch({"tiles": np.zeros((4, 0, 8, 8, 3), np.uint8)}, mesh)
    assert placed["tiles"].shape == (4, 0, 8, 8, 3)


def test_large_parameters_must_not_lie_whole_on_every_device():
    def boxed(names: tuple[str | None, ...], *shape: int) -> dict:
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        return {"head": {"kernel": nn.LogicallyPartitioned(leaf, names), "bias": jax.ShapeDtypeStruct((9,), "float32")}}

    large = boxed((None, "layers"), 5 << 20, 4)  # 80 MiB
    check_whole(large, mesh_of(data=8), MeshConfig())
    with pytest.raises(UserError, match=r"parameter head/kernel .*None, 'layers'.* has 80 MiB.*fsdp 2 x tensor 4"):
        check_whole(large, mesh_of(fsdp=2, tensor=4), MeshConfig())
    check_whole(boxed(("embed", "layers"), 5 << 20, 4), mesh_of(fsdp=2, tensor=4), MeshConfig())
    check_whole(boxed((None, "layers"), 4 << 20, 4), mesh_of(fsdp=2), MeshConfig())
    check_whole(large, mesh_of(fsdp=2), MeshConfig(max_whole_mib=80))
    check_whole(large, mesh_of(fsdp=2), MeshConfig(may_be_whole=("^head/",)))
    with pytest.raises(UserError, match="may_be_whole.*regular expression"):
        check_whole(large, mesh_of(fsdp=2), MeshConfig(may_be_whole=("(",)))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 4, "expert": 4}])
def test_no_large_parameter_of_the_full_models_lies_whole_on_every_device(sizes):
    for config in (vita_1_5_with_voice(), vita_1_0()):
        for objective in ("language_modeling", "cell_naming"):
            model = Vita(config)
            draw = functools.partial(init_params, model, OBJECTIVES[objective])
            check_whole(jax.eval_shape(draw, jax.random.key(0)), mesh_of(**sizes), MeshConfig())
