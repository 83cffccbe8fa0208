"""The study of interruptions: its scenes, what is counted, the page."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from experiments.studies.duplex import __main__ as study
from experiments.studies.duplex.scenes import KINDS, draw_scenes
from vita_jax.errors import UserError
from vita_jax.inference.scene_run import SceneCutShort
from vita_jax.models.vita import vita_1_5_with_voice


def test_scenes_are_drawn_alike_and_say_what_is_meant(tmp_path):
    drawn, again = (list(draw_scenes(tmp_path, 2)) for _ in range(2))
    assert [entry.kind for entry in drawn] == [kind for kind in KINDS for _ in range(2)]
    for one, other in zip(drawn, again, strict=True):
        assert (one.answer, one.asked) == (other.answer, other.asked)
        for sound, same in zip(one.scene.sounds, other.scene.sounds, strict=True):
            assert sound.samples.tobytes() == same.samples.tobytes() and len(sound.samples) > 8000
        assert one.scene.images[0].path.is_file()
        meant = [sound.meant for sound in one.scene.sounds]
        assert meant == {"twice": [True] * 3}.get(one.kind, [True, one.kind not in study.DISTURBED])
        assert (one.asked == "caption") == (one.kind in study.DISTURBED)


def test_only_scenes_that_were_cut_short_count_as_failed(tmp_path, monkeypatch):
    """A scene whose sounds waited in vain is counted once, though it was played to warm up, too; errors are errors."""
    told, raised, session = [], [SceneCutShort("waited"), SceneCutShort("waited")], SimpleNamespace(reset=lambda: None)

    def run_scene(*arguments):
        raise raised.pop()

    monkeypatch.setattr(study, "run_scene", run_scene)
    monkeypatch.setattr(study, "draw_scenes", lambda *rest: [SimpleNamespace(kind="early", scene=None)])
    tally = study.play(session, 1, tmp_path, told.append)["early"]
    assert (tally.failed, tally.scenes) == (1, 0)
    assert told == ["early: 0 scenes, 1 cut short: what they wait for did not happen"]
    raised.append(UserError("the microphone is gone"))
    with pytest.raises(UserError, match="the microphone is gone"):
        study.play(session, 1, tmp_path, told.append)


@pytest.mark.slow
def test_the_study_with_the_kept_weights(tmp_path, capsys):
    """One scene of each kind: latencies are those of this machine, everything else is the model's."""
    assert study.main(["--scenes", "1", "--output", str(tmp_path / "results")]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    scenes = content["scenes"]
    assert list(scenes) == list(KINDS) and (tmp_path / "results.png").stat().st_size > 10_000
    for kind, tally in scenes.items():
        assert tally["scenes"] + tally["failed"] == 1
        assert tally["recognised"][1] == (
            0 if tally["failed"] else {"twice": 3}.get(kind, 1 + (kind not in study.DISTURBED))
        )
    played = [tally for tally in scenes.values() if not tally["failed"]]
    assert len(played) >= 5 and sum(len(tally["responses"]) for tally in played) >= 5
    assert all(tally["swapped"][0] == tally["swapped"][1] for tally in played), "the stream that listened answers"
    page = (tmp_path / "results.md").read_text()
    assert "\n| interrupted " in page and "two whole models" in capsys.readouterr().out


def test_memory_of_the_full_size_model():
    """8.3 G parameters of 2 bytes, and a cache of 28 layers with 4 heads of 128 for keys and for values."""
    memory = study.memory_of(vita_1_5_with_voice(), 8192, jnp.bfloat16)
    shared, apart, twice = memory.values()
    cache = 8192 * 28 * 4 * 128 * 2 * 2
    assert shared == pytest.approx(2 * 8.9e9 + 2 * cache, rel=0.05)
    assert twice == 2 * (shared - cache) and shared < apart < twice
    assert apart - shared == pytest.approx(2 * 7.6e9, rel=0.01)
