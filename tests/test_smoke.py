"""The commands as a user calls them, on the smoke size: train, stop and go on, evaluate, chat, own data."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vita_jax.training.checkpoint import load_params

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def command(*args: str | Path, status: int = 0) -> str:
    """Output of `python -m ARGS`, which must end with `status`."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    command("vita_jax.train", "--config=experiments/quickstart.py", "--config.size=smoke", f"--config.run_dir={folder}")
    return folder


def test_smoke_run_leaves_everything(run_dir):
    stages = (
        *("language", "tower", "vision_alignment", "vision_understanding", "vision_sft"),
        *("speech_encoder", "speech_alignment", "audio_sft", "codec", "speech_decoders"),
    )
    assert all(any((run_dir / "stages" / stage / "checkpoints").iterdir()) for stage in stages)
    assert (run_dir / "config.json").is_file() and (run_dir / "tokenizer").is_dir()
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    assert {line["stage"] for line in steps} == set(stages)
    assert "<img" in (run_dir / "report.html").read_text(encoding="utf-8")
    final = json.loads((run_dir / "evaluation" / "final.json").read_text(encoding="utf-8"))
    assert set(final["groups"]) == {"typed", "typed_unseen_writers", "video_order", "text"}
    assert set(final["changes"]) == {"typed", "text"}
    speech = json.loads((run_dir / "evaluation" / "final.speech.json").read_text(encoding="utf-8"))
    heard = {"spoken", "noise", "transcribe", "accepted", "input_head", "recognition_full", "recognition_chunked"}
    voices = {"voice_synthesizer", "voice_copy", "voice_decoders"}
    assert set(speech["groups"]) - {"voice_answers"} == heard | voices
    assert set(json.loads((run_dir / "voices.json").read_text(encoding="utf-8"))) == {"en", "zh"}


def test_later_stages_leave_the_recogniser_and_the_language_model_alone(run_dir):
    """2.1a is the last stage that trains the speech encoder, and 3.2 freezes all but the speech decoders."""

    def params(stage):
        return load_params(run_dir / "stages" / stage / "checkpoints").params

    recogniser, hearing, final = params("speech_encoder"), params("audio_sft"), params("speech_decoders")
    jax.tree.map(np.testing.assert_array_equal, recogniser["audio"]["encoder"], final["audio"]["encoder"])
    jax.tree.map(np.testing.assert_array_equal, recogniser["ctc_head"], final["ctc_head"])
    for part in ("language", "vision", "projector", "audio", "state_head"):
        jax.tree.map(np.testing.assert_array_equal, hearing[part], final[part])


def test_finished_run_is_not_trained_again(run_dir):
    before = (run_dir / "metrics.jsonl").read_bytes()
    output = command(
        "vita_jax.train", "--config=experiments/quickstart.py", "--config.size=smoke", f"--config.run_dir={run_dir}"
    )
    assert output.count("already finished") == 10
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_another_configuration_in_the_same_folder_is_refused(run_dir):
    output = command(
        "vita_jax.train",
        "--config=experiments/quickstart.py",
        "--config.size=smoke",
        f"--config.run_dir={run_dir}",
        "--config.seed=5",
        status=2,
    )
    assert "seed" in output.splitlines()[-1] and "Traceback" not in output


def test_evaluate_and_chat(run_dir):
    assert "typed" in command("vita_jax.evaluate", "--checkpoint", run_dir, "--limit", "2").lower()
    picture = next((run_dir / "data/benchmarks/quickstart/media").glob("*.png"))
    command("vita_jax.chat", "--checkpoint", run_dir, "--image", picture, "--text", "How many digits are there?")
    speech = run_dir / "data/benchmarks/speech"
    question, picture = next((speech / "media").glob("*.wav")), next((speech / "media").glob("*.png"))
    command("vita_jax.chat", "--checkpoint", run_dir, "--image", picture, "--audio", question)
    output = command(
        "vita_jax.chat", "--checkpoint", run_dir, "--image", run_dir / "config.json", "--text", "?", status=2
    )
    assert "config.json" in output and "Traceback" not in output


def own_records(root: Path, *, with_media: bool) -> Path:
    """A small JSON unlike the quickstart's: shapes in colours, JPEG, other words."""
    colours = {"crimson": (180, 20, 60), "teal": (0, 128, 128), "gold": (230, 180, 30)}
    records = []
    for index, (name, rgb) in enumerate(list(colours.items()) * 8):
        turns = [
            {"from": "human", "value": f"Sample {index}: which shade?"},
            {"from": "gpt", "value": f"It is {name}, café № {index % 3}."},
        ]
        record = {"id": index, "conversations": turns}
        if with_media and index % 2:
            Image.new("RGB", (90 + index, 40), rgb).save(root / f"shade {index}.jpg")
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"shade {index}.jpg"
        records.append(record)
    path = root / "my records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.parametrize("with_media", [True, False])
def test_own_data_trains_and_answers(tmp_path, with_media):
    records = own_records(tmp_path, with_media=with_media)
    run = tmp_path / "run"
    command(
        "vita_jax.train",
        "--config=experiments/own_data.py",
        "--config.size=smoke",
        f"--config.data.json={records}",
        f"--config.data.root={tmp_path}",
        f"--config.run_dir={run}",
    )
    command("vita_jax.chat", "--checkpoint", run, "--text", "which shade?")
