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
from tests.training.tiny import experiment, make_batches, stage
from vita_jax import storage
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.report import write_report
from vita_jax.exchange.adapters import read_adapters
from vita_jax.exchange.exporting import export_checkpoint, open_checkpoint
from vita_jax.storage import place, write_whole
from vita_jax.training import guard, loop
from vita_jax.training import metrics as metrics_lib
from vita_jax.training.checkpoint import checkpoint_folder, complete_steps, load_params, newest_usable
from vita_jax.training.experiment import DataConfig, ProfileConfig, validate
from vita_jax.training.experiment_file import prepare_data
from vita_jax.training.metrics import MetricsWriter, read_metrics
from vita_jax.training.param_store import open_params
from vita_jax.training.portable import PortableModel, check_new_folder, new_folder, read_portable, write_portable
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


def test_a_run_of_a_disk_is_gone_on_with_and_started_from_where_it_was_copied(runs) -> None:
    """Orbax marks what it writes to a bucket; what it wrote on a disk has no marks."""
    root, disk = runs
    for name in ("copied", "finished"):
        shutil.copytree(disk, root / "bucket" / name)
    shutil.rmtree(root / "bucket/copied/stages/joint/checkpoints/6")
    assert complete_steps(checkpoint_folder("gs://bucket/copied", "joint")) == [4]
    assert "going on from step 4 of 6" in run("gs://bucket/copied")
    wanted, found = (flatten(jax.device_get(load_params(path).params)) for path in (str(disk), "gs://bucket/copied"))
    for path in wanted:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)
    more = stage("more", trainable=("^projector/",), start_from="gs://bucket/finished", steps=2)
    loop.run(experiment("gs://bucket/more", stages=(more,)), make_batches=make_batches, stream=io.StringIO())
    started = flatten(jax.device_get(load_params("gs://bucket/more").params))
    changed = {path for path in wanted if not np.array_equal(started[path], wanted[path])}
    assert changed and all(path.startswith("projector/") for path in changed)


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


def test_a_run_in_a_bucket_is_not_exported(runs, tmp_path) -> None:
    loaded = load_params(RUN)
    model = PortableModel(loaded.params, loaded.config, loaded.stage, loaded.step)
    for write in (
        lambda: write_portable(tmp_path / "new", model, loaded.run_dir),
        lambda: export_checkpoint(open_checkpoint(RUN), tmp_path / "new"),
    ):
        with pytest.raises(UserError, match="gs://bucket/my/run: a run that is exported has to be on a disk; copy it"):
            write()
    with pytest.raises(UserError, match="gs://bucket/new: what this command writes has to be on a disk"):
        write_portable("gs://bucket/new", model, tmp_path)
    with pytest.raises(UserError, match="gs://bucket/new: what this command writes has to be on a disk"):
        with new_folder("gs://bucket/new"):
            pass
    with pytest.raises(UserError, match="gs://bucket/lora: a folder of peft has to be on a disk"):
        read_adapters(open_checkpoint(RUN), "gs://bucket/lora")


def test_a_bucket_that_does_not_answer_ends_no_run(tmp_path, monkeypatch, capsys) -> None:
    class HttpError(Exception):
        """As that of gcsfs, no OSError."""

    def down(*arguments) -> None:
        raise HttpError("503\nback-end")

    with folder_as_bucket(tmp_path), monkeypatch.context() as patched:
        metrics = MetricsWriter(place("gs://bucket/run"))
        patched.setattr(metrics_lib, "UPLOAD_SECONDS", -1.0)
        patched.setattr(storage, "write_whole", down)
        metrics.step("naming", 1, {"loss": 1.0})
        told = capsys.readouterr().err
        assert (
            told == "gs://bucket/run: its numbers cannot be brought there (tried again): HttpError('503\\nback-end')\n"
        )
        assert len(metrics.rewind("naming", 1)) == 1
        patched.setattr(storage, "write_whole", write_whole)
        metrics.step("naming", 2, {"loss": 1.0})
        assert [record["step"] for record in read_metrics("gs://bucket/run")] == [1, 2]
        patched.setattr(storage, "write_whole", down)
        patched.setattr(guard, "append", down)
        watchdog = guard.Watchdog(guard.GuardConfig(), place("gs://bucket/run"), stage("naming"))
        watchdog._tell()
        assert "the stacks of all threads" in (told := capsys.readouterr().err) and "hang.txt cannot be written" in told
        with pytest.raises(loop.Stopped), metrics:
            metrics.step("naming", 3, {"loss": 1.0})
            raise loop.Stopped("naming", 3, 15)
        assert "(lost): HttpError" in capsys.readouterr().err and not metrics._scratch.folder.exists()


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
