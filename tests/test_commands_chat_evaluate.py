"""The commands `evaluate` and `chat` as a user meets them: output, exit status, one clear line for every mistake."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.bucket import folder_as_bucket
from tests.evaluation.benchmark_run import make_run
from vita_jax import chat, evaluate
from vita_jax.evaluation import asking


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return Path(make_run(tmp_path_factory.mktemp("commands") / "run").run_dir)


def error_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_evaluate_run(run_dir, tmp_path, capsys, monkeypatch):
    output = tmp_path / "result.json"
    assert evaluate.main(["--checkpoint", str(run_dir), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "benchmark quickstart: 9 questions" in printed and "accuracy after stage" in printed
    final = run_dir / "evaluation" / "final.json"
    result = json.loads(final.read_text())
    assert result == json.loads(output.read_text())
    assert result["config"]["run_dir"] == str(run_dir) and result["version"] and {"commit", "changed"} <= set(result)
    # A line for every item, and the same command asks none of them again.
    lines = [json.loads(line) for line in final.with_suffix(".jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["group"] for line in lines] == ["typed"] * 6 + ["video_order"] + ["text"] * 2
    assert all(line["prompt"] and line["truth"] and line["text"] is not None for line in lines)
    for name, group in result["groups"].items():
        right = {line["question_id"]: bool(line["score"]) for line in lines if line["group"] == name}
        assert right == {key: value for kind in group["outcomes"].values() for key, value in kind.items()}
    with monkeypatch.context() as changed:
        changed.setattr(asking, "answers_to", None)
        assert evaluate.main(["--checkpoint", str(run_dir)]) == 0
    again = json.loads(final.read_text())
    assert again["groups"] == result["groups"] and again["examples"] == result["examples"]
    assert len((run_dir / "evaluation" / "final.answers.jsonl").read_text().splitlines()) == len(lines) == 9
    capsys.readouterr()
    final.unlink()
    checkpoint = run_dir / "stages" / "joint"
    (tmp_path / "bucket").mkdir()
    with folder_as_bucket(tmp_path):
        arguments = ["--checkpoint", str(checkpoint), "--limit", "1", "--output", "gs://bucket/result.json"]
        assert evaluate.main(arguments) == 0
    assert json.loads((tmp_path / "bucket" / "result.json").read_text())["limit"] == 1
    assert sorted(path.name for path in (tmp_path / "bucket").iterdir()) == ["result.json", "result.jsonl"]
    assert not final.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{none}"], "does not exist"),
        ([], "--checkpoint"),
        (["--checkpoint", "{run}", "--benchmark", "quikstart"], "nearest is 'quickstart'"),
        (["--checkpoint", "{run}", "--limit", "0"], "--limit 0"),
        (["--checkpoint", "{run}", "--limit", "many"], "many"),
        (["--checkpoint", "{run}", "--output", "a.txt"], "argument --output: a.txt: its name must end with .json"),
        (["--checkpoint", "{run}", "--chekpoint", "x"], "--chekpoint"),
    ],
)
def test_evaluate_mistakes(arguments, message, run_dir, tmp_path, capsys):
    filled = [argument.format(none=tmp_path / "none", run=run_dir) for argument in arguments]
    assert evaluate.main(filled) == 2
    assert message in error_line(capsys)


def test_int8_is_a_choice_of_both(run_dir, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--checkpoint", str(run_dir), "--int8", "weights", "cache"]
    assert evaluate.main([*arguments, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["int8"] == ["cache", "weights"]
    assert not (run_dir / "evaluation" / "final.json").exists()  # it is not the run's own result
    capsys.readouterr()
    assert chat.main([*arguments, "--text", "colour?"]) == 0
    assert re.match(r"weights: .* instead of .*\ncache of 1 x .* instead of ", capsys.readouterr().out)
    for command in (chat, evaluate):
        assert command.main(["--checkpoint", str(run_dir), "--int8", "towers"]) == 2
        assert "invalid choice: 'towers'" in error_line(capsys)


def test_evaluate_without_data(run_dir, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(run_dir, moved)
    # This run's data folder is the folder it was trained in.
    items = run_dir / "benchmarks" / "quickstart" / "items.jsonl"
    items.rename(items.with_suffix(".away"))
    try:
        assert evaluate.main(["--checkpoint", str(moved)]) == 2
    finally:
        items.with_suffix(".away").rename(items)
    assert "items.jsonl does not exist" in error_line(capsys)


def test_chat_one_shot(run_dir, tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    arguments = ["--checkpoint", str(run_dir), "--text", "colour?", "--image", str(tmp_path / "a.png")]
    assert chat.main(arguments) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{none}", "--text", "a"], "does not exist"),
        (["--checkpoint", "{run}", "--text", "a", "--image", "{none}"], "none"),
        (["--checkpoint", "{run}", "--text", "a", "--image", "{text}"], "note.txt"),
        (["--checkpoint", "{run}", "--text", "a", "--video", "{text}"], "note.txt"),
        (["--checkpoint", "{run}", "--text", " "], "--text is empty"),
    ],
)
def test_chat_mistakes(arguments, message, run_dir, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("hello")
    places = {"none": tmp_path / "none", "run": run_dir, "text": tmp_path / "note.txt"}
    assert chat.main([argument.format(**places) for argument in arguments]) == 2
    assert message in error_line(capsys)


def test_chat_interactive(run_dir, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    lines = [f"/image {tmp_path / 'none.png'}", f"/image {tmp_path / 'a.png'}", "", "colour?", "/image", "/imge x"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "/reset"]) + "\n"))
    assert chat.main(["--checkpoint", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "none.png: no such file" in printed and "a.png: ask about it" in printed
    assert "/image needs a file" in printed and "unknown command /imge" in printed and "new conversation" in printed
    assert printed.startswith("/image FILE")


@pytest.mark.parametrize("command", [chat, evaluate])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and "python -m vita_jax." in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a"], "--text does not go with --duplex"),
        (["--video", "{clip}"], "--video does not go with --duplex"),
        (["--speak", "{reply}"], "give the questions by --audio"),
        ([], "pip install sounddevice"),
    ],
)
def test_duplex_mistakes(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vita_jax.inference.live.has_sound_card", lambda: False)
    (tmp_path / "clip.mp4").write_bytes(b"0")
    filled = [argument.format(clip=tmp_path / "clip.mp4", reply=tmp_path / "reply.wav") for argument in arguments]
    assert chat.main(["--duplex", *filled]) == 2
    assert message in error_line(capsys)
