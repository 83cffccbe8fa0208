"""The study of speech decoders and chunks: what its arms differ in, how sound is read back, a run of a few steps."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments.studies.arms import RESULT, component_sizes
from experiments.studies.speech_decoders import __main__ as study
from experiments.studies.speech_decoders.voice import Streamed, Text, latency_figures, read_back
from tests.studies.finished_run import SPEAKS, finished_run
from vita_jax.errors import UserError
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.metrics import read_metrics
from vita_jax.training.stages import flatten


def test_decoders_of_the_arms():
    arms = study.arm_speech(SPEAKS)
    assert tuple(arms) == tuple(study.TITLES) and arms["nar_ar"] == SPEAKS
    layers = {name: (config.num_nar_layers, config.num_layers) for name, config in arms.items()}
    assert layers == {"nar_ar": (1, 2), "ar": (0, 2), "ar_deep": (0, 3)}
    with pytest.raises(UserError, match="NAR layers and no initial head"):
        study.arm_speech(arms["ar"])


def test_settings_cut_the_sound_in_every_way():
    settings = study.stream_settings(full=3)
    assert {"2, 40, full, 20", "2, 40, full, 5", "8, 8, full, 20", "8, 40, 10, 20", study.WHOLE} <= set(settings)
    assert "8, 40, 4, 20" not in settings, "as good as full"
    assert all(options.stream.quiet_level is None for options in settings.values())
    assert settings["2, 40, full, 5"].stream.first_chunks == (2, 4, 8, 16, 32)
    assert settings["2, 40, full, 5"].steps_per_call == 5 and settings[study.WHOLE].stream.first_chunks == ()


class Hears:
    """A recogniser that hears what it is told."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def hear(self, waves, sampling_rate):
        return self.texts[: len(waves)]


def test_reading_back_counts_texts_and_characters():
    texts = [Text(str(i), group, "en", "seven") for i, group in enumerate(("answers", "answers", "held-out texts"))]
    waves = [np.ones(3), np.zeros(0), np.ones(2)]
    found = read_back(texts, waves, Hears("seven", "seven", "even"), 16000)
    assert found["answers"]["accuracy"] == 0.5, "what made no sound was not said"
    assert found["answers"]["misread"] == {"rate": 0.0, "low": 0.0, "high": 0.0}
    assert found["held-out texts"]["accuracy"] == 0 and found["held-out texts"]["misread"]["rate"] == pytest.approx(0.2)
    assert found["answers"]["outcomes"] == {"answers": {"0": True, "1": False}}


def test_latencies_are_of_what_made_a_sound():
    streamed = [Streamed(np.zeros(100), 0.1, 0.5, 0.3, 0.1), Streamed(np.zeros(300), 0.3, 0.5, 0.3, 0.1)]
    found = latency_figures([*streamed, Streamed(np.zeros(0), None, 9.0, 9.0, 0.0)], 100)
    assert (found["first_ms"], found["first_ms_most"]) == pytest.approx((200, 300))
    assert (found["real_time_factor"], found["decoder"], found["codec"]) == pytest.approx((0.25, 0.15, 0.05))
    assert set(latency_figures([], 100).values()) == {None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("decoders") / "run", "audio_sft", "codec")


def test_arms_differ_in_their_decoders_alone(run, tmp_path):
    arms = study.make_arms(run, str(tmp_path), "start", 5)
    for arm in arms:
        base = dataclasses.replace(
            arm.config,
            name=arms[0].config.name,
            run_dir=arms[0].config.run_dir,
            model=dataclasses.replace(arm.config.model, speech=SPEAKS),
        )
        assert base == arms[0].config and arm.config.stages[0].steps == 5
    sizes = {arm.name: component_sizes(arm.config.model)["speech"] for arm in arms}
    assert sizes["ar_deep"] == sizes["nar_ar"] > sizes["ar"]
    assert study.make_arms(run, str(tmp_path), "start")[0].config.stages[0].steps == run.stage("speech_decoders").steps


@pytest.mark.slow
def test_a_run_leaves_tables_and_trains_once(run, tmp_path, monkeypatch, capsys):
    for name, values in (("FIRST_CHUNKS", (8,)), ("CHUNKS", (20,)), ("CONTEXTS", (0,))):
        monkeypatch.setattr(study, name, values)
    arguments = ["--run", run.run_dir, "--run_dir", str(tmp_path), "--size", "smoke"]
    assert study.main([*arguments, "--only", "nar_ar", "ar"]) == 0
    started = flatten(load_params(checkpoint_folder(run.run_dir, "audio_sft")).params)
    for name in ("nar_ar", "ar"):
        after = flatten(load_params(tmp_path / name).params)
        assert any(path.startswith("speech/nar/") for path in after) == (name == "nar_ar")
        for path in started:
            if not path.startswith("speech/"):
                np.testing.assert_array_equal(started[path], after[path], err_msg=path)
        assert [entry["step"] for entry in read_metrics(tmp_path / name) if entry["event"] == "step"][-1] == 3
    content = json.loads((tmp_path / "speech_decoders.json").read_text(encoding="utf-8"))
    assert list(content["arms"]) == ["nar_ar", "ar"] and "streams" not in content["arms"]["ar"]
    streams = content["arms"]["nar_ar"]["streams"]
    exact = ["8, 40, full, 20", "8, 20, full, 20", "8, 40, full, 5", study.WHOLE]
    assert list(streams) == [*exact[:2], "8, 40, 0, 20", *exact[2:]]
    for name in exact:
        assert streams[name]["largest"] < 1e-5 and streams[name]["mel_distance"] < 1e-2, name
    assert streams["8, 40, 0, 20"]["largest"] > 1e-4, "the codec sees beyond a chunk"
    assert all(found["first_ms"] > 0 and found["real_time_factor"] > 0 for found in streams.values())
    for found in content["arms"].values():
        assert {group: part["n"] for group, part in found["read"].items()} == {"answers": 1, "held-out texts": 1}
    page = (tmp_path / "speech_decoders.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    assert rows == ["decoders", "---", "NAR + AR", "AR", "first chunk, later, context, call", "---", *streams]
    for name in ("speech_decoders.png", "streams.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in page
    before = [(tmp_path / name / RESULT).read_bytes() for name in ("nar_ar", "ar")]
    monkeypatch.setattr(loop, "run", lambda *args, **more: pytest.fail("an arm was trained again"))
    capsys.readouterr()
    assert study.main([*arguments, "--only", "ar"]) == 0
    assert [(tmp_path / name / RESULT).read_bytes() for name in ("nar_ar", "ar")] == before
    assert "| NAR + AR" in capsys.readouterr().out
