"""Parameters on disk one by one: Orbax reads what is written, and what Orbax wrote is read."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training.test_checkpoint import save_some
from vita_jax.conversion.tables import Rule, Table, copy, export_params, flatten, import_params, iter_parts, linear
from vita_jax.errors import UserError
from vita_jax.training import param_store
from vita_jax.training.param_store import METADATA, ParamWriter, chunk_shape, open_params

TABLE = Table(
    (
        *linear("l.{i}.q", "layers/q", (4,), (2, 3), layers=3),
        Rule("l.{i}.{e}.w", "layers/moe/w", (2, 3), permute=(1, 0), layers=3, experts=2),
        copy("n", "norm/scale", (5,)),
        copy("s", "scalar", ()),
        copy("zero", "zero", (3,)),
    )
)


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = {"n": np.float32, "s": np.float16, "zero": np.int32}
    tensors = {
        name: rng.normal(size=rule.torch_shape).astype(dtypes.get(name, ml_dtypes.bfloat16))
        for rule in TABLE.rules
        for name in rule.names
    }
    tensors["zero"] = np.zeros(3, np.int32)
    tensors["l.1.q.bias"] = np.full(6, -0.0, ml_dtypes.bfloat16)
    writer = ParamWriter(tmp_path / "params")
    for rule, index, part in iter_parts(TABLE, tensors):
        writer.write(rule, index, part)
    writer.finish(TABLE.rules)
    return tmp_path / "params", tensors


def same_bits(got, want):
    assert got.dtype == want.dtype and np.asarray(got).tobytes() == want.tobytes()


@pytest.mark.parametrize("chunk_bytes", [64 << 20, 8])
def test_orbax_reads_it_and_so_do_we(tmp_path, monkeypatch, chunk_bytes, request):
    monkeypatch.setattr(param_store, "CHUNK_BYTES", chunk_bytes)
    folder, tensors = request.getfixturevalue("written")
    want = flatten(import_params(TABLE, tensors))
    handler = ocp.StandardCheckpointHandler()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), handler.metadata(folder).tree
    )
    restored = flatten(handler.restore(folder, args=ocp.args.StandardRestore(abstract)))
    assert restored.keys() == want.keys()
    for path, leaf in want.items():
        same_bits(restored[path], leaf)
    back = export_params(TABLE, open_params(folder))
    for name, tensor in tensors.items():
        same_bits(back[name], tensor)


def test_what_training_saved_is_read_layer_by_layer(tmp_path):
    folder, params, _ = save_some(tmp_path)
    read = open_params(folder / "6" / "params")
    same_bits(np.asarray(read["vision"]["a"]), np.asarray(params["vision"]["a"]))
    same_bits(read["vision"]["a"][(3,)], np.asarray(params["vision"]["a"])[3])


def test_chunks_are_places_of_the_stack_and_small():
    assert chunk_shape((28,), (3584, 28, 128), 2) == (1, 3584, 28, 128)
    # As few as fit, and equally long: a short last one would be stored as long as the others.
    assert chunk_shape((), (152064, 3584), 2) == (8945, 3584) and 17 * 8945 - 152064 == 1
    assert chunk_shape((32, 8), (4096, 14336), 2) == (1, 1, 2048, 14336)
    assert chunk_shape((), (), 4) == () and chunk_shape((), (0, 5), 4) == (1, 5)


def test_layers_have_one_dtype(tmp_path):
    writer, rule = ParamWriter(tmp_path), TABLE.rules[0]
    writer.write(rule, (0,), np.zeros(rule.param_shape, np.float32))
    with pytest.raises(UserError, match=r"tensor l\.1\.q\.weight: dtype float16, but others .* float32"):
        writer.write(rule, (1,), np.zeros(rule.param_shape, np.float16))


def test_damage_is_named(written):
    folder, _ = written
    with pytest.raises(UserError, match="holds no parameters"):
        open_params(folder.parent)
    (folder / "scalar" / ".zarray").unlink()
    with pytest.raises(UserError, match="parameter scalar cannot be read"):
        open_params(folder)
    (folder / METADATA).write_text(json.dumps({"tree_metadata": 3}))
    with pytest.raises(UserError, match="holds no parameters"):
        open_params(folder)
