"""The study of state tokens: what its arms are taught and asked, how it is counted, a run of a few steps, going on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.speech.clips import read_wav
from data_pipelines.speech.noises import root_mean_square
from data_pipelines.speech.voices import training_voices
from experiments.studies.arms import RESULT
from experiments.studies.finished_run import open_run
from experiments.studies.state_tokens import __main__ as study
from experiments.studies.state_tokens import sounds
from experiments.studies.state_tokens.negatives import MIXES, build_negatives
from experiments.studies.state_tokens.sounds import CONDITIONS, NEGATIVES, QUERIES, build_sounds, other_accents
from tests.studies.finished_run import finished_run
from vita_jax.errors import UserError
from vita_jax.evaluation.items import ITEMS, Item, read_items
from vita_jax.training import loop
from vita_jax.training.experiment import validate
from vita_jax.training.metrics import read_metrics

SMOKE = study.SIZES["smoke"]


@pytest.fixture(scope="module")
def scans():
    return load_scan_splits(0)


# ---- what is taught and asked ---------------------------------------------------------------------------------------


def test_every_arm_has_as_many_negatives_of_its_own_kinds(tmp_path, scans, capsys):
    assert all(sum(mix.shares.values()) == pytest.approx(1) for mix in MIXES.values())
    kinds = {name: build_negatives(tmp_path / name, mix, 40, scans["train"]) for name, mix in MIXES.items()}
    assert kinds["statements"] == {"speech": 40}
    assert set(kinds["sounds"]) == {"speech", "babble", "chords", "arpeggio"}
    assert set(kinds["speakers"]) == {*kinds["sounds"], "second_speaker"}
    for name, found in kinds.items():
        records = json.loads((tmp_path / name / "raw" / "records.json").read_text(encoding="utf-8"))
        assert sum(found.values()) == len(records) == 40
        assert all(record["conversations"][record["inserted_id"]]["from"] == "gpt" for record in records)
    capsys.readouterr()
    assert build_negatives(tmp_path / "sounds", MIXES["sounds"], 40, scans["train"]) == kinds["sounds"]
    assert capsys.readouterr().out == "", "made once"


def test_conditions_differ_in_what_they_are_named_after(tmp_path, scans, monkeypatch):
    names = [condition.name for condition in CONDITIONS]
    assert len(set(names)) == len(names) and {entry.family for entry in CONDITIONS} == {*NEGATIVES, *QUERIES}
    assert {voice.accent for voice in other_accents()}.isdisjoint(voice.accent for voice in training_voices("en"))
    chosen = [
        entry for entry in CONDITIONS if entry.kind in ("query", "hum", "statement") and entry.background != "babble"
    ]
    monkeypatch.setattr(sounds, "CONDITIONS", tuple(chosen))
    build_sounds(tmp_path, 2, scans["held_out"])
    items = {item.id: item for item in read_items(tmp_path / ITEMS)}
    assert len(items) == 2 * len(chosen)
    waves = {name: read_wav(tmp_path / item.audio) for name, item in items.items()}
    for number in range(2):
        query = waves[f"query-{number}"]
        for decibels in sounds.OVER_DB:
            mixed = waves[f"query, statement at {decibels:g} dB-{number}"]
            # The whole may have been made quieter; how much of it is the query says by how much.
            scale = np.dot(mixed, query) / np.dot(query, query)
            behind = mixed / scale - query
            measured = 20 * np.log10(root_mean_square(query) / root_mean_square(behind))
            assert measured == pytest.approx(decibels, abs=1.0)
        for kind in ("query", "statement", "hum"):
            whole, quiet = waves[f"{kind}-{number}"], waves[f"{kind}, -15 dB-{number}"]
            assert 20 * np.log10(root_mean_square(whole) / root_mean_square(quiet)) == pytest.approx(15, abs=0.1)
    assert items["query-1"].language == "zh" and items["query, other accents-1"].language == "en"
    assert items["query-0"].image == items["query, pink at 0 dB-0"].image is not None
    assert items["statement-0"].image is None
    before = (tmp_path / ITEMS).stat().st_mtime_ns
    build_sounds(tmp_path, 2, scans["held_out"])
    assert (tmp_path / ITEMS).stat().st_mtime_ns == before, "made once"


def test_shares_are_means_over_conditions():
    items = [
        Item(f"{kind}-{i}", "noise", kind, "en", "", "", audio="a.wav") for kind in ("hum", "pink") for i in range(4)
    ]
    found = study.refusal_figures(items, [True, True, True, True, True, False, False, False])
    assert found["conditions"]["hum"] == {"refused": 1.0, "low": 1.0, "high": 1.0, "n": 4}
    assert found["conditions"]["pink"]["refused"] == 0.25
    family = found["families"]["noise"]
    assert family["refused"] == 0.625 and family["n"] == 8 and 0.5 <= family["low"] < 0.625 < family["high"] <= 0.875
    assert family["outcomes"]["pink"] == {"pink-0": True, "pink-1": False, "pink-2": False, "pink-3": False}


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_finished_is_one_line(tmp_path, capsys):
    assert study.main(["--run", str(tmp_path), "--run_dir", str(tmp_path / "study")]) == 2
    assert "its stage 'speech_alignment' is not finished" in capsys.readouterr().err
    assert study.main(["--run", str(tmp_path), "--only", "music"]) == 2
    assert "invalid choice: 'music'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_leaves_a_table_and_trains_once(tmp_path, monkeypatch, capsys):
    few = [entry for entry in CONDITIONS if entry.kind in ("hum", "statement", "second_speaker", "chords", "query")]
    few = [entry for entry in few if not entry.level_db and entry.snr_db in (0.0, 20.0)]
    for module in (sounds, study):
        monkeypatch.setattr(module, "CONDITIONS", tuple(few))
    run = finished_run(tmp_path / "run", "speech_alignment")
    arguments = ["--run", run.run_dir, "--run_dir", str(tmp_path / "study"), "--size", "smoke"]
    arms = study.make_arms(open_run(run.run_dir, ("speech_alignment",)), str(tmp_path / "study"), SMOKE.steps)
    first = arms[0].config.stages[0]
    for arm in arms:
        (stage,) = arm.config.stages
        own = str(tmp_path / "study" / "negatives" / arm.name / "records")
        assert [source.path for source in stage.sources] == ["spoken", own]
        assert stage.steps == 3 and stage.start_from == first.start_from and stage.state_labels
        assert [source.weight for source in stage.sources] == [source.weight for source in first.sources]
    assert study.main([*arguments, "--only", "statements", "speakers"]) == 0
    for name in ("statements", "speakers"):
        validate(next(arm.config for arm in arms if arm.name == name))
        steps = [entry["step"] for entry in read_metrics(tmp_path / "study" / name) if entry["event"] == "step"]
        assert steps[-1] == 3
    content = json.loads((tmp_path / "study" / "state_tokens.json").read_text(encoding="utf-8"))
    assert list(content["arms"]) == ["statements", "speakers"] and "outcomes" not in str(content)
    assert sum(content["arms"]["speakers"]["kinds"].values()) == SMOKE.negatives
    for found in content["arms"].values():
        for way in study.WAYS:
            assert set(found[way]["conditions"]) == {entry.name for entry in few}
            assert all(part["n"] == 2 and 0 <= part["refused"] <= 1 for part in found[way]["conditions"].values())
            assert set(found[way]["families"]) == {*NEGATIVES, *QUERIES}
    page = (tmp_path / "study" / "state_tokens.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    assert (
        all(entry.name in rows for entry in few) and rows.count("statements") == 2 and rows.count("+ two speakers") == 4
    )
    assert (tmp_path / "study" / "state_tokens.png").read_bytes().startswith(b"\x89PNG")
    results = [tmp_path / "study" / name / RESULT for name in ("statements", "speakers")]
    before = [path.read_bytes() for path in results]
    monkeypatch.setattr(loop, "run", lambda *args, **more: pytest.fail("an arm was trained again"))
    capsys.readouterr()
    assert study.main([*arguments, "--only", "speakers"]) == 0
    assert [path.read_bytes() for path in results] == before
    assert capsys.readouterr().out.count("\n| statements ") == 2
    assert study.main([*arguments, "--only", "speakers", "--per_kind", "1"]) == 2
    with pytest.raises(UserError, match="no source 'negatives'"):
        study.make_arms(arms[0].config, str(tmp_path / "study"), 3)
