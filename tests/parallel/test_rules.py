"""The mesh, and the resolution of logical axis names into layouts, without devices to spare."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.training.tiny import model_config
from vita_jax.errors import UserError
from vita_jax.models.vita import Vita
from vita_jax.parallel.mesh import BATCH_AXES, MESH_AXES, MeshConfig, make_mesh, mesh_shape, num_batch_shards, put_batch
from vita_jax.parallel.rules import LOGICAL_RULES, param_shardings, partition_spec
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
