"""A run whose folder is in a bucket: the same numbers as on a disk, interrupted or not."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import grain
import jax
import numpy as np
import pytest

from tests.bucket import folder_as_bucket
from tests.training.records import prepare_records, records_experiment
from tests.training.test_loop import Killed, interrupted
from tests.training.tiny import experiment, make_batches
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.report import write_report
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_params, newest_usable
from vita_jax.training.experiment import DataConfig, ProfileConfig, validate
from vita_jax.training.experiment_file import prepare_data
from vita_jax.training.metrics import read_metrics
from vita_jax.training.param_store import open_params
from vita_jax.training.portable import check_new_folder, read_portable
from vita_jax.training.stages import flatten

RUN = "gs://bucket/my/run"


def run(run_dir: str, batches=make_batches) -> str:
    stream = io.StringIO()
    loop.run(experiment(run_dir), make_batches=batches, stream=stream)
    return stream.getvalue()


def losses(run_dir: str) -> list[tuple]:
    return [(r["event"], r["stage"], r["step"], r.get("loss")) for r in read_metrics(run_dir)]


def die() -> None:
    raise Killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that is the bucket, with a run that was killed and gone on with; and the same run on a disk."""
    root, disk = tmp_path_factory.mktemp("buckets"), tmp_path_factory.mktemp("disk")
    run(str(disk))
    with folder_as_bucket(root):
        with pytest.raises(Killed):
            run(RUN, interrupted("joint", 5, die))
        # What a process leaves that is killed while it saves: arrays, but neither manifest nor mark.
        half = root / "bucket/my/run/stages/joint/checkpoints/6/params"
        half.mkdir(parents=True)
        (half / "d").write_bytes(b"half")
        printed = run(RUN)
        assert "going on from step 4 of 6" in printed
        yield root, disk


def test_the_run_is_that_on_a_disk(runs) -> None:
    root, disk = runs
    folder = root / "bucket" / "my" / "run"
    assert losses(RUN) == losses(str(disk))
    assert list((folder / "tensorboard").iterdir()) and (folder / "config.json").is_file()
    assert complete_steps(checkpoint_folder(RUN, "joint")) == complete_steps(checkpoint_folder(disk, "joint")) == [4, 6]
    left, right = load_params(RUN), load_params(str(disk))
    assert (left.stage, left.step, str(left.run_dir)) == ("joint", 6, RUN)
    left, right = (flatten(jax.device_get(model.params)) for model in (left, right))
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    stored = flatten(open_params(checkpoint_folder(RUN, "joint") / "6" / "params"))
    assert all(np.asarray(stored[path]).tobytes() == np.asarray(left[path]).tobytes() for path in left)


def test_the_report_is_written_beside(runs) -> None:
    root, _ = runs
    assert str(write_report(RUN)) == f"{RUN}/report.html"
    assert "joint" in (root / "bucket/my/run/report.html").read_text(encoding="utf-8")


def test_an_object_of_another_size_is_damage(runs) -> None:
    root, _ = runs
    shutil.copytree(root / "bucket/my/run", root / "bucket/damaged")
    folder = checkpoint_folder("gs://bucket/damaged", "joint")
    manifest = json.loads((root / "bucket/damaged/stages/joint/checkpoints/6/manifest.json").read_text())
    assert all(entry.keys() == {"size"} for entry in manifest["files"].values())
    (root / "bucket/damaged/stages/joint/checkpoints/6" / max(manifest["files"])).write_bytes(b"")
    lines = []
    assert newest_usable(folder, lines.append)["step"] == 4
    assert "has 0 bytes instead of" in lines[0] and "put aside as damaged-6" in lines[0]


def test_what_a_bucket_cannot_be_used_for(runs) -> None:
    config = experiment(RUN)
    with pytest.raises(UserError, match="the profiler writes to disks only, not to run_dir=gs://bucket/my/run"):
        validate(dataclasses.replace(config, profile=ProfileConfig(start=1)))
    with pytest.raises(UserError, match="prepares its own data and tokenizer, on disks only"):
        prepare_data(SimpleNamespace(prepare=lambda config: None), config)
    with pytest.raises(UserError, match="a model that was exported has to be on a disk"):
        read_portable("gs://bucket/kept")
    with pytest.raises(UserError, match="what this command writes has to be on a disk"):
        check_new_folder("gs://bucket/new")


def test_records_and_tokenizer_are_read_from_a_bucket(tmp_path, monkeypatch) -> None:
    """But for the reader of ArrayRecord files, which opens addresses by itself: it is handed the files."""
    prepare_records(records_experiment(tmp_path / "bucket" / "made"))
    config = records_experiment("gs://bucket/run", data=DataConfig("gs://bucket/made"))
    tokenizer = dataclasses.replace(config.tokenizer, folder="gs://bucket/made/tokenizer")
    joint = dataclasses.replace(config.stages[1], start_from=None, steps=2)
    asked, reader = [], grain.sources.ArrayRecordDataSource

    def read(paths):
        asked.extend(paths)
        return reader([path.replace("gs://", f"{tmp_path}/") for path in paths])

    monkeypatch.setattr(grain.sources, "ArrayRecordDataSource", read)
    with folder_as_bucket(tmp_path):
        loop.run(dataclasses.replace(config, stages=(joint,), tokenizer=tokenizer), stream=io.StringIO())
        assert [r["step"] for r in read_metrics("gs://bucket/run")] == [2, 2]
        assert load_tokenizer("gs://bucket/run/tokenizer").vocab_size > 0
    files = [f"gs://bucket/made/{name}/records-00000-of-00001.array_record" for name in ("pictures", "text")]
    assert sorted(asked) == files
