"""The command `convert` as a user meets it: output, exit status, one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exchange.public import public_vita
from tests.training.everything import everything_run
from vita_jax import convert
from vita_jax.conversion.torch_files import TensorFiles
from vita_jax.exchange.importing import ALLOWANCES
from vita_jax.exchange.released import MODELS
from vita_jax.training.portable import DTYPES, PortableModel, write_portable


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "public"
    public_vita(folder)
    return folder


def test_there_and_back(public, tmp_path, capsys):
    run, back = str(tmp_path / "run"), str(tmp_path / "back")
    (tmp_path / "texts.json").write_text(json.dumps({"image": "a", "video": "b", "lang": "c"}))
    texts = ["--system-texts", str(tmp_path / "texts.json")]
    assert convert.main(["import", "--model", "vita_1_5", "--from", str(public), "--to", run, *texts]) == 0
    out = capsys.readouterr().out
    assert "written: " in out and "MB/s" in out and "note" not in out
    assert convert.main(["verify", "--model", "vita_1_5", "--from", run, "--against", str(public)]) == 0
    assert f"the same bits in all {len(TensorFiles(public))} tensors" in capsys.readouterr().out
    assert convert.main(["export", "--from", run, "--to", back, "--shard-gb", "0.00001"]) == 0
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert convert.main(["inspect", run]) == 0
    out = capsys.readouterr().out
    assert "stage imported" in out and "-> model.layers.{i}.mlp.up_proj.weight" in out and "nothing" not in out


def test_dry_run_writes_nothing(public, tmp_path, capsys):
    arguments = ["--model", "vita_1_5", "--from", str(public), "--to", str(tmp_path / "run"), "--dry-run"]
    assert convert.main(["import", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"{len(TensorFiles(public))} tensors would become" in out and "no --system-texts" in out
    assert not list(tmp_path.iterdir())


def test_inspect_a_public_folder(public, capsys):
    assert convert.main(["inspect", str(public)]) == 0
    out = capsys.readouterr().out
    assert "read as vita_1_5" in out and "bfloat16" in out and "complete: every tensor has its place" in out
    assert "-> language/layers/attention/q_proj/kernel[1]" in out


def test_a_small_model_kept(tmp_path, capsys):
    config, params = everything_run(tmp_path / "run")
    write_portable(tmp_path / "kept", PortableModel(params, config, "joint", 6), tmp_path / "run")
    kept, half = str(tmp_path / "kept"), str(tmp_path / "half")
    assert convert.main(["export", "--layout", "vita_jax", "--from", kept, "--to", half, "--dtype", "float16"]) == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "kept")]
    assert sizes[0] < 0.75 * sizes[1]
    assert convert.main(["inspect", half]) == 0
    assert convert.main(["export", "--from", half, "--to", str(tmp_path / "x"), "--dry-run"]) == 0
    assert "-> decoder/out_fnn.weight" in capsys.readouterr().out and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ACTION"),
        (["import"], "--model"),
        (["import", "--model", "vita", "--from", "a", "--to", "b"], "invalid choice: 'vita'"),
        (["import", "--model", "vita_1_5", "--from", "{none}", "--to", "b"], "does not exist"),
        (["import", "--model", "vita_1_5", "--from", "{none}", "--to", "b", "--system-texts", "{none}"], "system text"),
        (["export", "--from", "{none}", "--to", "b"], "does not exist"),
        (["export", "--from", "a", "--to", "b", "--shard-gb", "0"], "--shard-gb 0"),
        (["export", "--from", "a", "--to", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["inspect", "{none}"], "does not exist"),
        (["verify", "--model", "vita_1_5", "--from", "{none}", "--against", "b"], "does not exist"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert convert.main([argument.format(none=tmp_path / "none") for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_the_commands_lists_are_those_of_the_package():
    assert convert.MODELS == tuple(MODELS)
    assert set(convert.DTYPES) == set(DTYPES)
    assert convert.ALLOWANCES == ALLOWANCES


def test_output_that_nobody_reads_any_more_is_no_error():
    weights = Path(__file__).parents[1] / "experiments" / "quickstart" / "weights"
    said = subprocess.Popen(
        [sys.executable, "-m", "vita_jax.convert", "inspect", str(weights)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    said.stdout.close()
    assert (said.wait(timeout=120), said.stderr.read()) == (141, b"")
