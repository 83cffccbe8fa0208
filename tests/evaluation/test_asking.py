"""Questions of a user, asked of a tiny model: answers that are kept, devices that share the work, likelihoods."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from tests.bucket import folder_as_bucket
from tests.evaluation.random_run import random_run
from vita_jax import evaluate
from vita_jax.command_line import ProgressLine
from vita_jax.data.examples import media_from_file, prompt_example
from vita_jax.data.prompts import state_symbol_ids
from vita_jax.data.video import write_video
from vita_jax.errors import UserError
from vita_jax.evaluation import asking
from vita_jax.evaluation.answer_lines import Question
from vita_jax.evaluation.asking import AskOptions, KeptAnswers, ask_questions
from vita_jax.evaluation.likelihoods import likelihoods
from vita_jax.evaluation.opening import mesh_config, open_subject
from vita_jax.models.vita import VitaInputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Path(random_run(tmp_path_factory.mktemp("random") / "run").run_dir)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two pictures, a clip and a sound."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)
    write_video(folder / "clip.mp4", rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), 2.0)
    wavfile.write(folder / "c.wav", 16_000, (0.3 * np.sin(np.arange(8000) / 9)).astype(np.float32))
    return folder


QUESTIONS = [
    Question(1, "colour?", (("image", "a.png"),), ("red",)),
    Question(2, "colour?", (("image", "a.png"), ("image", "b.png")), ("red",)),
    Question(3, "number?", (("video", "clip.mp4"),), ("7",)),
    Question("s", "", (("audio", "c.wav"),), ("7",)),
    Question(5, "number?", (), ("7",)),
]
OPTIONS = AskOptions(max_new_tokens=4)


def test_a_stopped_run_goes_on_where_it_was(run, root, tmp_path, monkeypatch):
    asked = []

    def stop_after_two(subject, questions, *rest):
        asked.append([question.id for question in questions])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(subject, questions, *rest)

    real, shown = asking.answers_to, []
    subject, _ = open_subject(run, batch_size=4)
    whole = ask_questions(subject, QUESTIONS, root, KeptAnswers(tmp_path / "whole.jsonl", "m"), OPTIONS)
    assert [line["question_id"] for line in whole] == [1, 2, 3, "s", 5]
    monkeypatch.setattr(asking, "answers_to", stop_after_two)
    monkeypatch.setattr(asking, "AT_ONCE", 2)
    file = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask_questions(subject, QUESTIONS, root, KeptAnswers(file, "m"), OPTIONS)
    assert len(file.read_text().splitlines()) == 2
    with open(file, "a", encoding="utf-8") as lines:
        lines.write('{"question_id": 3, "pro')  # what a kill leaves
    said = ask_questions(
        subject, QUESTIONS, root, KeptAnswers(file, "m"), OPTIONS, lambda done, total: shown.append((done, total))
    )
    assert said == whole and asked == [[1, 2], [3, "s"], [3, "s"], [5]]
    assert shown[0] == (2, 5) and shown[-1] == (5, 5)
    # Another question by that name, and other options, are asked again.
    changed = [Question(1, "number?", (("image", "a.png"),)), *QUESTIONS[1:]]
    ask_questions(subject, changed, root, KeptAnswers(file, "m"), OPTIONS)
    assert asked[4:] == [[1]]
    with pytest.raises(UserError, match="is an answer of m, not of other"):
        KeptAnswers(file, "other")
    (tmp_path / "wrong.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="is no answer to a question"):
        KeptAnswers(tmp_path / "wrong.jsonl", "m")


def test_what_the_model_does_not_take_is_an_error(root, tmp_path):
    subject, _ = open_subject(random_run(tmp_path / "deaf", hears=False).run_dir, batch_size=1)
    kept = KeptAnswers(tmp_path / "a.jsonl", "m")
    with pytest.raises(UserError, match="this model does not hear"):
        ask_questions(subject, [QUESTIONS[3]], root, kept, OPTIONS)
    with pytest.raises(UserError, match="question 9: there is no file .*none.png"):
        ask_questions(subject, [Question(9, "?", (("image", "none.png"),))], root, kept, OPTIONS)


def test_likelihoods_are_those_of_the_whole_forward_pass(run, root):
    """Prompt, symbol and answer through the model at once, without batches, padding or features computed ahead."""
    subject, _ = open_subject(run, batch_size=4)
    questions, answers = [QUESTIONS[i] for i in (0, 3, 4, 4)], ["red", " B", "7", "blue green"]
    found = likelihoods(subject, questions, answers, root)
    context, symbols = subject.context, state_symbol_ids(subject.tokenizer, subject.context.template)
    numbers = {state: number for number, state in symbols.items()}
    for question, answer, one in zip(questions, answers, found, strict=True):
        media = [media_from_file(root / name, kind) for kind, name in question.media]
        prompt = prompt_example(question.question, media, context)
        ids = context.tokenizer.encode(answer.strip(), allow_special=False, add_bos=False)
        state = "audio" if question.id == "s" else "text"
        length = len(prompt["tokens"])
        tokens = np.concatenate([prompt["tokens"], [numbers[state]], ids])[None]
        index = np.pad(prompt["feature_index"], (0, len(ids) + 1), constant_values=-1)[None]
        sound = (
            {"audio": prompt["audio"][None], "audio_lengths": prompt["audio_lengths"][None]}
            if media[:1] and question.id == "s"
            else {}
        )
        inputs = VitaInputs(
            tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens), index, prompt["tiles"][None], **sound
        )
        hidden = subject.model.apply({"params": subject.params}, inputs)
        logits = subject.model.apply({"params": subject.params}, hidden, method="logits")[0].astype(jnp.float32)
        logits = logits[length : length + len(ids)]
        losses = -jax.nn.log_softmax(logits)[np.arange(len(ids)), np.asarray(ids)]
        np.testing.assert_allclose(one.loss, np.mean(losses), rtol=2e-5)
        assert one.is_greedy == bool(np.all(np.argmax(logits, -1) == np.asarray(ids)))
    with pytest.raises(UserError, match="question 5: the answer ' ' that is to be ranked is empty"):
        likelihoods(subject, [QUESTIONS[4]], [" "], root)


SHARED = """
import json, sys
from tests.evaluation.test_asking import OPTIONS, QUESTIONS
from vita_jax.evaluation.asking import answers_to
from vita_jax.evaluation.likelihoods import likelihoods
from vita_jax.evaluation.opening import mesh_config, open_subject

run, root = sys.argv[1:]
found = {}
for name, sizes in (("copies", []), ("cut", ["fsdp=2", "tensor=2"])):
    subject, _ = open_subject(run, mesh=mesh_config(sizes), batch_size=3)
    losses = likelihoods(subject, QUESTIONS[:2], ["red", "blue"], root)
    kernel = subject.params["language"]["layers"]["attention"]["q_proj"]["kernel"]
    found[name] = {
        "rows": subject.batch_size,
        "devices": len(kernel.sharding.device_set),
        "whole": kernel.sharding.is_fully_replicated,
        "said": answers_to(subject, QUESTIONS, root, OPTIONS),
        "losses": [one.loss for one in losses],
    }
print(json.dumps(found))
"""


def test_devices_share_the_work(run, root):
    """Four devices: with a copy of the model each, and with the model cut in four, as one device alone."""
    subject, _ = open_subject(run, batch_size=3)
    assert subject.batch_size == 3 and subject.mesh is None
    said = [list(one) for one in asking.answers_to(subject, QUESTIONS, root, OPTIONS)]
    losses = [one.loss for one in likelihoods(subject, QUESTIONS[:2], ["red", "blue"], root)]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARED, run, root], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert (found["rows"], found["devices"], found["whole"]) == (4, 4, name == "copies")
        assert found["said"] == said
        np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)


def test_mesh_of_the_command_line():
    assert mesh_config(["fsdp=4", "tensor=2"]).fsdp == 4
    for wrong in ("fsdp", "fsdp=x", "model=2", "context=2"):
        with pytest.raises(UserError, match=f"--mesh {wrong}: expected AXIS=SIZE"):
            mesh_config([wrong])


def test_the_command_scores_what_a_file_asks(run, root, tmp_path, capsys, monkeypatch):
    lines = [{"question_id": q.id, "text": q.question or "", "answer": list(q.truths)} for q in QUESTIONS]
    for line, question in zip(lines, QUESTIONS, strict=True):
        for kind, name in question.media:
            line.setdefault(kind, []).append(name)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--checkpoint", str(run), "--questions", str(asked), "--root", str(root), "--max-new-tokens", "4"]
    command += ["--answers", str(tmp_path / "said.jsonl"), "--scoring", "exact"]
    assert evaluate.main(command) == 0
    told = capsys.readouterr().out
    assert "asked: 5 questions in" in told and "accuracy 0.0 % (95 % interval 0.0 % .. 0.0 %)" in told
    result = json.loads((tmp_path / "said.json").read_text())
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert (result["n"], result["value"], result["scoring"]) == (5, 0.0, "exact")
    assert result["config"]["name"] == "tiny" and set(result) >= {"version", "commit", "changed"}
    assert [(line["question_id"], line["score"]) for line in said] == [(q.id, 0) for q in QUESTIONS]
    # Made true by what it said; nothing is asked again.
    monkeypatch.setattr(asking, "answers_to", None)
    for line, answer in zip(lines, said, strict=True):
        line["answer"] = answer["text"].strip() or "-"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.main(command) == 0
    right = sum(bool(answer["text"].strip()) for answer in said)
    assert right >= 3 and json.loads((tmp_path / "said.json").read_text())["value"] == right / 5


ASKED = ["--questions", "q.jsonl", "--answers", "a.jsonl"]
SET = ["--benchmark", "aishell1", "--data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "mme", "--scoring", "exact"], "--scoring belongs to --questions"),
        (["--benchmark", "mme", "--max-new-tokens", "9"], "--max-new-tokens belongs to --questions"),
        (["--max-new-tokens", "9"], "--max-new-tokens belongs to --questions"),
        ([*ASKED, "--benchmark", "mme"], "--benchmark belongs to benchmarks; leave it out with --questions"),
        ([*ASKED, "--mos", "a:b"], "--mos belongs to benchmarks"),
        (["--benchmark", "aishell1"], "reads a folder: --data FOLDER"),
        ([*SET, "x", "--output", "y.txt"], "its name must end with .json"),
        ([*SET, "x", "--output", "gs://b/y.json"], "gs://b/y.json: the result of this benchmark has to be on a disk"),
        ([*SET, "gs://b/x", "--output", "y.json"], "gs://b/x: the folder of --data has to be on a disk"),
        ([*ASKED[:3], "gs://b/a.jsonl"], "gs://b/a.jsonl: the file of --answers has to be on a disk"),
        (["--questions", "gs://b/q.jsonl", *ASKED[2:]], "gs://b/q.jsonl: the file of --questions has to be on a disk"),
        (["--output", "s3://b/y.json"], "s3:// is not supported"),
        (["--mesh", "fsdp=2"], "--mesh is for questions"),
    ],
)
def test_arguments_that_would_not_be_heeded_are_refused(arguments, message, run, capsys):
    assert evaluate.main(["--checkpoint", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_result_of_a_run_in_a_bucket_needs_a_disk(run, capsys):
    with folder_as_bucket(run.parent.parent):
        assert evaluate.main(["--checkpoint", f"gs://{run.parent.name}/{run.name}", *SET, "x"]) == 2
    assert "is in a bucket, where answers cannot be kept as they are made" in capsys.readouterr().err


def test_answers_outlive_the_calls_that_ask_fewer_but_not_the_weights(tmp_path, monkeypatch, capsys):
    asked, real, run = [], asking.answers_to, tmp_path / "run"

    def noted(subject, questions, *rest):
        asked.append([question.id for question in questions])
        return real(subject, questions, *rest)

    monkeypatch.setattr(asking, "answers_to", noted)
    random_run(run, hears=False)
    file, said = tmp_path / "asked.jsonl", tmp_path / "said.jsonl"
    lines = [{"question_id": n, "text": text, "answer": "red"} for n, text in enumerate(("colour?", "number?", "yes"))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--checkpoint", str(run), "--questions", str(file), "--answers", str(said), "--max-new-tokens", "4"]
    assert evaluate.main(command) == 0 and asked == [[0, 1, 2]]
    first = [json.loads(line)["text"] for line in said.read_text().splitlines()]
    # The result has what was asked; scoring it, or asking a part, forgets nothing.
    assert evaluate.main([*command, "--limit", "1", "--scoring", "exact"]) == 0
    assert len(said.read_text().splitlines()) == 1 and json.loads((tmp_path / "said.json").read_text())["limit"] == 1
    assert evaluate.main(command) == 0 and asked == [[0, 1, 2]]
    assert [json.loads(line)["text"] for line in said.read_text().splitlines()] == first
    # Trained again: the same run, stage and step, other weights.
    shutil.rmtree(run / "stages")
    random_run(run, hears=False, seed=1)
    assert evaluate.main(command) == 0 and asked == [[0, 1, 2]] * 2
    assert [json.loads(line)["text"] for line in said.read_text().splitlines()] != first
    assert len((tmp_path / "said.answers.jsonl").read_text().splitlines()) == 6
    # What is no file of answers is not written over.
    before = file.read_text()
    assert evaluate.main([*command[:5], str(file)]) == 2
    assert "asked.jsonl:1: is no answer to a question" in capsys.readouterr().err and file.read_text() == before


def test_what_is_left_is_told(capsys):
    times = iter((0.0, 10.0, 400.0))
    line = ProgressLine("answered", sys.stdout, lambda: next(times))
    for done in (50, 60, 100):
        line(done, 150)
    shown = [part for part in capsys.readouterr().out.split("\r\x1b[2K") if part]
    assert shown == ["answered 50 of 150", "answered 60 of 150, 90 s left", "answered 100 of 150, 7 min left"]
