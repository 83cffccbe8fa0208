"""Whole public checkpoints in and out: every bit, every small file, in bounded steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.exchange.public import public_vita
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import INDEX_NAME, TensorFiles
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.exchange import importing
from vita_jax.exchange.exporting import export_checkpoint, open_checkpoint
from vita_jax.exchange.importing import import_released
from vita_jax.exchange.inspecting import open_and_verify
from vita_jax.exchange.released import read_released
from vita_jax.inference.session import Session
from vita_jax.training.checkpoint import load_params, read_meta
from vita_jax.training.families import PLAIN_TEXTS
from vita_jax.training.param_store import StoredLeaf, total_bytes


def quiet(done: int, total: int, name: str) -> None:
    """No progress."""


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = TensorFiles(one), TensorFiles(other)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(
    ("sparse", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float16"), (False, "float32")]
)
def test_round_trip_of_every_bit(tmp_path, sparse, dtype):
    model = "vita_1_0" if sparse else "vita_1_5"
    source, run, back = tmp_path / "public.v1", tmp_path / "run", tmp_path / "back"
    config = public_vita(source, sparse=sparse, dtype=dtype)
    released = read_released(model, source)
    assert released.config.language == config.language and released.config.vision == config.vision
    assert released.config.audio == config.audio
    assert import_released(released, run) == []
    assert {np.dtype(leaf.dtype).name for leaf in flatten(load_params(run).params).values()} == {dtype}
    stored = open_checkpoint(run)
    assert all(isinstance(leaf, StoredLeaf) for leaf in flatten(stored.params).values())
    assert stored.config.dtypes.compute_dtype == ("float32" if dtype == "float32" else "bfloat16")
    export_checkpoint(stored, back, shard_bytes=10_000)
    assert (back / INDEX_NAME).is_file()
    assert_same_tensors(source, back)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    count = open_and_verify(run, model, source, quiet)
    assert count == len(TensorFiles(source))


def test_an_imported_run_answers(tmp_path):
    public_vita(tmp_path / "public", dtype="float32")
    texts = SystemTexts("See.", "Watch.", "Read.")
    import_released(read_released("vita_1_5", tmp_path / "public"), tmp_path / "run", system_texts=texts)
    session = Session.load(tmp_path / "run")
    session.max_new_tokens = 2
    assert session.config.system_texts == texts
    assert isinstance("".join(session.ask("a")), str) and len(session.turns) == 2


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    public_vita(tmp_path / "public")
    released = read_released("vita_1_5", tmp_path / "public")
    run, written = tmp_path / "run", []

    class Interrupted(importing.ParamWriter):
        def write(self, rule, index, part):
            if len(written) == 40:
                raise KeyboardInterrupt
            written.append((rule.path, index))
            super().write(rule, index, part)

    monkeypatch.setattr(importing, "ParamWriter", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_released(released, run)
    assert not run.exists()
    with pytest.raises(UserError, match="neither a run"):
        load_params(tmp_path / "run.partial")
    first = len(written)
    monkeypatch.setattr(importing, "ParamWriter", Counting)
    Counting.written = 0
    import_released(released, run)
    total = len(released.table.torch_names)
    assert total - first <= Counting.written < total - first + 4
    assert open_and_verify(run, "vita_1_5", tmp_path / "public", quiet) == total
    assert not (tmp_path / "run.partial").exists() and not list(run.glob("journal*"))


class Counting(importing.ParamWriter):
    """Counts what is written."""

    written = 0

    def write(self, rule, index, part):
        Counting.written += 1
        super().write(rule, index, part)


def test_what_another_folder_left_is_not_gone_on_with(tmp_path, monkeypatch):
    public_vita(tmp_path / "public")
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "journal.json").write_text(json.dumps({"fingerprint": "other", "done": [], "warnings": []}))
    (partial / "stray").write_text("")
    import_released(read_released("vita_1_5", tmp_path / "public"), tmp_path / "run")
    assert not (tmp_path / "run" / "stray").exists()


def test_progress_counts_every_byte(tmp_path):
    public_vita(tmp_path / "public")
    seen = []
    import_released(
        read_released("vita_1_5", tmp_path / "public"),
        tmp_path / "run",
        progress=lambda done, total, name: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == total_bytes(load_params(tmp_path / "run").params)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_other_numbers_of_vocabulary_rows_are_taken_from_the_tensors(tmp_path):
    config = public_vita(tmp_path / "public")
    fields = json.loads((tmp_path / "public" / "config.json").read_text())
    (tmp_path / "public" / "config.json").write_text(json.dumps(fields | {"vocab_size": 999}))
    released = read_released("vita_1_5", tmp_path / "public")
    assert released.config.language.vocab_size == config.language.vocab_size
    assert any("999 vocabulary rows" in note for note in released.notes)


def test_sizes_without_the_small_files_come_from_the_tensors(tmp_path):
    config = public_vita(tmp_path / "public")
    (tmp_path / "public" / "audio-encoder-v1.2" / "train.yaml").unlink()
    released = read_released("vita_1_5", tmp_path / "public")
    assert released.config.audio == config.audio
    assert any("train.yaml" in note for note in released.notes)
    (tmp_path / "public" / "InternViT-tiny" / "config.json").unlink()
    with pytest.raises(UserError, match="width 8 is none of the published ones"):
        read_released("vita_1_5", tmp_path / "public")


def test_conversion_of_the_dtype(tmp_path):
    public_vita(tmp_path / "public", dtype="float32")
    import_released(read_released("vita_1_5", tmp_path / "public"), tmp_path / "run", dtype="bfloat16")
    params = load_params(tmp_path / "run").params
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {"bfloat16"}
    with pytest.raises(UserError, match=r"tensors differ: .*\(bfloat16 here, float32 there\)"):
        open_and_verify(tmp_path / "run", "vita_1_5", tmp_path / "public", quiet)


def test_the_run_is_like_any_other(tmp_path):
    public_vita(tmp_path / "public")
    import_released(read_released("vita_1_5", tmp_path / "public"), tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "imported" / "checkpoints" / "0"
    assert read_meta(folder)["finished"]
    loaded = load_params(tmp_path / "run")
    assert loaded.config.system_texts == PLAIN_TEXTS and loaded.config.template == "qwen2p5_instruct"
    assert load_tokenizer(loaded.run_dir / "tokenizer").vocab_size == loaded.config.model.language.vocab_size
    kernel = next(folder.glob("params/language.lm_head.kernel/0.0"))
    kernel.write_bytes(kernel.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="has changed since it was written"):
        load_params(tmp_path / "run")
