"""What `--int8` and `Session.load` make of a checkpoint, of a run and of kept weights; memory, and mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.benchmark_run import make_run
from vita_jax import chat, duplex, evaluate, latency, serve
from vita_jax.conversion.tables import flatten
from vita_jax.errors import UserError
from vita_jax.inference.quantization import FLOATS, QuantizationConfig, int8_parts
from vita_jax.inference.session import Session
from vita_jax.models.int8 import change_params, int8_weights
from vita_jax.models.vita_weights import weight_table
from vita_jax.training.checkpoint import load_params
from vita_jax.training.portable import PortableModel, write_portable

BOTH = QuantizationConfig(weights="int8", cache="int8")


def test_parts_are_named():
    assert int8_parts([]) == FLOATS and int8_parts(["cache", "weights"]) == BOTH
    assert int8_parts(["cache"]) == QuantizationConfig(cache="int8")
    assert FLOATS.change is None and FLOATS.cache_dtype is None and BOTH.cache_dtype == jnp.int8
    with pytest.raises(UserError, match="--int8 towers: only weights and cache"):
        int8_parts(["towers"])
    with pytest.raises(UserError, match="quantization.cache is 'int4'"):
        QuantizationConfig(cache="int4")


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (chat, []),
        (duplex, ["--script", "scene.json"]),
        (evaluate, ["--checkpoint", "x"]),
        (latency, ["--random", "small"]),
        (serve, ["--checkpoint", "x"]),
    ],
)
def test_every_command_that_answers_has_the_choice(command, needed):
    parser = command.make_parser()
    assert int8_parts(parser.parse_args([*needed, "--int8", "weights", "cache"]).int8) == BOTH
    assert int8_parts(parser.parse_args(needed).int8) == FLOATS
    with pytest.raises(UserError, match="invalid choice: 'towers'"):
        parser.parse_args([*needed, "--int8", "towers"])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return Path(make_run(tmp_path_factory.mktemp("int8") / "run").run_dir)


def test_a_run_and_its_export_are_read_alike(run_dir, tmp_path):
    """Kernels that become integers while they are read are those made of a model in memory; all else is as it was."""
    plain = load_params(run_dir)
    write_portable(tmp_path / "kept", PortableModel(plain.params, plain.config, plain.stage, plain.step), run_dir)
    want = flatten(change_params(plain.params, int8_weights(weight_table(plain.config.model))))
    for folder in (run_dir, tmp_path / "kept"):
        loaded = load_params(folder, change=BOTH.change)
        got = flatten(loaded.params)
        assert got.keys() == want.keys() and (loaded.stage, loaded.step) == (plain.stage, plain.step)
        for path, leaf in want.items():
            assert got[path].dtype == leaf.dtype, path
            np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def test_a_session_says_what_it_takes(run_dir):
    floats, integers = (Session.load(run_dir, num_rows=3, quantization=choice) for choice in (FLOATS, BOTH))
    assert integers.trained == floats.trained and integers.engine.cache_dtype == jnp.int8
    decoder = floats.engine.decoder.config
    vectors = 2 * decoder.num_layers * 3 * floats.engine.num_slots * decoder.num_kv_heads
    assert f"{4 * vectors * decoder.head_dim / 2**20:,.1f} MiB" in floats.memory and "instead" not in floats.memory
    weights, cache = integers.memory.splitlines()
    now, before = (float(number) for number in re.findall(r"([\d.]+)(?: MiB|$)", weights))
    assert now < 0.7 * before and weights.startswith("weights: ")
    assert cache == (
        f"cache of 3 x {floats.engine.num_slots:,} positions: {vectors * (decoder.head_dim + 4) / 2**20:,.1f} MiB "
        f"instead of {4 * vectors * decoder.head_dim / 2**20:,.1f}"
    )
    answers = ["".join(session.ask("colour?")) for session in (integers, integers.beside())]
    assert answers[0] == answers[1]  # the second one has its prompt from the first one's row
