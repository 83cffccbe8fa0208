"""lmms-eval asks this package: its command line finds the model, and pictures, clips and sounds reach it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import lmms_eval.models
import pytest
from lmms_eval.tasks import TaskManager

from tests.eval_libraries.local_tasks import write_tasks
from tests.eval_libraries.published_data import SUBJECTS, write_ceval, write_gsm8k
from tests.evaluation.random_run import random_run
from vita_jax import evaluate
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.evaluation.answer_lines import Question
from vita_jax.evaluation.asking import AskOptions, answers_to
from vita_jax.evaluation.library import LMMS_SETS, LmmsSet, figure_of
from vita_jax.evaluation.likelihoods import likelihoods
from vita_jax.evaluation.lmms.command import TASKS, find_python, run_lmms_eval
from vita_jax.evaluation.lmms.models import VitaJaxChat, VitaJaxSimple
from vita_jax.evaluation.opening import open_subject


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("random") / "run").run_dir


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing is fetched; data sets are cached where they are forgotten."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_the_model_is_found_by_its_entry_point():
    assert lmms_eval.models.get_model("vita_jax") is VitaJaxChat
    assert lmms_eval.models.get_model("vita_jax", force_simple=True) is VitaJaxSimple
    assert find_python() == sys.executable


def test_every_benchmark_is_a_task_there_with_its_metrics(monkeypatch):
    """Their files are read, with the code beside them and what that imports; those of this package are found, too."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    manager = TaskManager("ERROR", include_path=str(TASKS))
    for name, chosen in LMMS_SETS.items():
        assert chosen.task in manager.all_tasks, name
        for config in _tasks_of(manager, chosen.task):
            metrics = {metric["metric"] for metric in config["metric_list"]}
            assert set(chosen.metrics) <= metrics, (name, config["task"], metrics)
    subjects = [(config["task"], config["dataset_name"]) for config in _tasks_of(manager, "ceval")]
    assert len(subjects) == 52 and sorted(subjects) == [(f"ceval_{name}", name) for name in SUBJECTS]


def _tasks_of(manager: TaskManager, name: str) -> Iterator[dict]:
    """The settings of a task, or of those of a group."""
    if manager.task_index[name]["yaml_path"] == -1:  # a tag of tasks
        parts = manager.task_index[name]["task"]
    else:
        config = manager._get_config(name)
        parts = config["task"]
        if isinstance(parts, str):
            yield config
            return
    for part in parts:
        yield from _tasks_of(manager, part)


def test_what_is_shown_reaches_the_model(run, tasks, tmp_path, capfd):
    """One call for all tasks; every answer is the one that the model gives when it is asked the same directly."""
    names = ("tiny_clip", "tiny_librispeech", "tiny_mme", "tiny_pictures")
    output = tmp_path / "out.json"
    line = ["--checkpoint", str(run), "--benchmark", f"lmms:{','.join(names)}", "--data", str(tasks)]
    assert evaluate.main([*line, "--output", str(output)]) == 0
    assert "mme_perception_score" in capfd.readouterr().out
    result = json.loads(output.read_text())
    assert set(result["tasks"]) == set(names) and result["num_items"] == 8
    said = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    subject, _ = open_subject(run, batch_size=2)
    word = "\nAnswer the question using a single word or phrase."
    recognise = "Please recognize the speech and only output the recognized content:"
    picture = _pictures(tasks, tmp_path)
    expected = {
        "tiny_clip": ([Question(n, q, (("video", "clip.mp4"),)) for n, q in enumerate(("colour?", "number?"))], 4),
        "tiny_librispeech": ([Question(n, recognise, (("audio", f"{n}.wav"),)) for n in range(2)], 256),
        "tiny_mme": ([Question(n, q + word, (picture[0],)) for n, q in enumerate(("Is it red?", "Is it blue?"))], 16),
        "tiny_pictures": (
            [Question(n, "First <image>\nsecond <image>\ncolour?", (picture[0], picture[n + 1])) for n in range(2)],
            4,
        ),
    }
    for name, (questions, length) in expected.items():
        answers = answers_to(subject, questions, tasks, AskOptions(max_new_tokens=length))
        mine = [line for line in said if line["task"] == name]
        assert [line["text"] for line in mine] == [text for _, text in answers], name
    # Asked again, everything is kept.
    kept = tmp_path / "out.answers.jsonl"
    before = kept.read_bytes()
    assert len(before.splitlines()) == 8
    assert evaluate.main([*line, "--output", str(output)]) == 0
    assert kept.read_bytes() == before


def _pictures(tasks: Path, folder: Path) -> list[tuple[str, str]]:
    """The first pictures of the data sets, as files."""
    import datasets

    data = datasets.Dataset.from_parquet(str(tasks / "tiny_pictures.parquet"))
    shown = [data[0]["first"], data[0]["second"], data[1]["second"]]
    for number, picture in enumerate(shown):
        picture.save(folder / f"{number}.png")
    return [("image", str(folder / f"{number}.png")) for number in range(len(shown))]


def test_options_are_ranked_by_their_likelihood(run, tasks, tmp_path):
    chosen = LmmsSet("options", "tiny_options", ("acc",), scale=100, likelihoods=True)
    result, lines = run_lmms_eval(chosen, str(run), tmp_path / "out", include_path=str(tasks))
    subject, _ = open_subject(run, batch_size=3)
    choices = ["red", "blue", "7"]
    losses = [one.loss for one in likelihoods(subject, [Question(0, "number?")] * 3, choices, tmp_path)]
    best = losses.index(min(losses))
    assert result["value"] == 50.0 * ((best == 0) + (best == 2)) and len(lines) == 2
    kept = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in kept] == pytest.approx([*losses, *losses], rel=1e-5)
    assert [line["text"].strip() for line in kept] == [*choices, *choices]


def test_chinese_options_and_examples_of_sums(run, tmp_path, monkeypatch):
    """C-Eval and GSM8K, whose tasks are of this package, with five examples in front of the question."""
    monkeypatch.chdir(tmp_path)
    write_ceval(tmp_path)
    text = write_gsm8k(tmp_path)
    both = LmmsSet("both", "ceval,gsm8k_five_shot", likelihoods=True)
    result, lines = run_lmms_eval(both, str(run), tmp_path / "out")
    subject, _ = open_subject(run, batch_size=4)
    # Every subject asks the same, behind a first line of its own; right is B, in law D.
    law = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
    asked = [f"数{n}？\nA. {n}\nB. {n + 1}\nC. {n + 2}\nD. {n + 3}\n答案：" for n in (0, 1, 2, 3, 4, 7)]
    law += "\n\n".join(one + answer for one, answer in zip(asked, ("A", "B", "C", "D", "A", ""), strict=True))
    losses = [one.loss for one in likelihoods(subject, [Question(0, law)] * 4, [*"ABCD"], tmp_path)]
    kept = [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]
    assert len(kept) == 52 * 4 + 1
    mine = [line for line in kept if line["question_id"].startswith("ceval_law:")]
    assert [line["text"] for line in mine] == [*"ABCD"]
    assert [line["loss"] for line in mine] == pytest.approx(losses, rel=1e-5)
    score = {line["task"]: line["acc"] for line in lines if line["task"].startswith("ceval_")}
    assert score["ceval_law"] == (losses.index(min(losses)) == 3)
    assert figure_of(LMMS_SETS["ceval"], result["tasks"]) == pytest.approx(100 * sum(score.values()) / 52)
    [sums] = [line for line in lines if line["task"] == "gsm8k_five_shot"]
    [(_, answer)] = answers_to(subject, [Question(0, text)], tmp_path, AskOptions(max_new_tokens=512))
    [raw] = [line for line in kept if line["question_id"].startswith("gsm8k_five_shot:")]
    assert sums["prompt"] == text and raw["text"] == answer.partition("Question:")[0]
    assert sums["text"] == "[invalid]"  # what its filter makes of an answer without the marks
    assert figure_of(LMMS_SETS["gsm8k"], result["tasks"]) == 0.0


def test_a_missing_clip_ends_the_evaluation(run, tasks, tmp_path, capfd):
    line = ["--checkpoint", str(run), "--benchmark", "lmms:tiny_missing", "--data", str(tasks)]
    assert evaluate.main([*line, "--output", str(tmp_path / "out.json")]) == 2
    told = capfd.readouterr()
    assert "none.mp4 does not exist" in told.out + told.err
    assert "without results" in told.err and not (tmp_path / "out.json").exists()


def test_arguments_that_are_not_known_are_refused(run):
    with pytest.raises(UserError, match="model_args temperature"):
        VitaJaxChat(str(run), temperature=1)
    with pytest.raises(UserError, match="--batch_size auto"):
        VitaJaxChat(str(run), batch_size="auto")
    model = VitaJaxChat(str(run), batch_size="2")
    assert (model.batch_size, model.rank, model.world_size) == (2, 0, 1)
    for method in (model.generate_until_multi_round, model.loglikelihood):
        with pytest.raises(UnsupportedOption):
            method([])
