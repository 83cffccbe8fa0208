"""Few-shot evaluation: what a model says is what it generates, what is ranked what is likeliest; figures by hand."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.training.flamingo import COLOURS, FRAMES, SIDE, VOCAB, flamingo_config
from vita_jax.data.document_examples import DocumentContext, encode_tagged
from vita_jax.data.few_shot import QUERIES, SUPPORT, FewShotOptions
from vita_jax.data.images import ImageConfig
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.data.video import write_video
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError
from vita_jax.evaluation import few_shot
from vita_jax.evaluation.asking import KeptAnswers
from vita_jax.evaluation.few_shot import (
    FewShotSubject,
    clean_answer,
    evaluate_few_shot,
    figures,
    format_few_shot,
    mean_log_likelihood,
    picture_embeddings,
)
from vita_jax.models.flamingo import Flamingo, text_inputs

NAMES = list(COLOURS)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> FewShotSubject:
    """A model of random weights with open gates; questions about one picture of each colour, and clips."""
    folder = tmp_path_factory.mktemp("few_shot")
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((SIDE, SIDE, 3), COLOURS[name], np.uint8)).save(folder / f"{name}.png")
        frames = np.stack([np.full((16, 16, 3), COLOURS[NAMES[(number + i) % 3]], np.uint8) for i in range(3)])
        write_video(folder / f"{name}.mp4", frames, 1.0)

    def entry(task: str, number: int, **more) -> dict:
        name = NAMES[number % 3]
        fields = {"id": f"{task}{number}", "task": task, "pool": task, "question": "", "answer": name, "kind": name}
        return fields | {"choices": NAMES, "image": f"{name}.png"} | more

    def clip(number: int) -> dict:
        name = NAMES[number % 3]
        fields = {"id": f"c{number}", "task": "clips", "pool": "clips", "question": "First?", "answer": name}
        return fields | {"kind": "order", "video": f"{name}.mp4"}

    queries = [entry("colour", i) for i in range(5)] + [clip(i) for i in range(2)]
    support = [entry("colour", i, id=f"s{i}") for i in range(4)]
    for file, entries in ((QUERIES, queries), (SUPPORT, support)):
        (folder / file).write_text("".join(json.dumps(one) + "\n" for one in entries))
    texts = [*NAMES, "Output:", "Question:First? Short answer:"] * 3
    first = train_sentencepiece(texts, VOCAB - 2, None, at_most=True)
    context = DocumentContext(enlarge(first, [], [END_OF_CHUNK, IMAGE]).tokenizer, ImageConfig(SIDE, max_tiles=1))
    model = Flamingo(flamingo_config(VOCAB))
    params = nn.unbox(
        jax.jit(model.init)(jax.random.key(0), text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE))
    )
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params["params"])
    gates = {name: jnp.array([0.8, -0.6]) for name in ("attn_gate", "ff_gate")}
    params = {**params, "cross_attention": {**params["cross_attention"], **gates}}
    return FewShotSubject(model, params, context, folder, frames=FRAMES, batch_size=2, max_new_tokens=4)


OPTIONS = FewShotOptions(shots=(0, 2), zero_shot_texts=0, separator="")


@pytest.fixture(scope="module")
def evaluated(subject) -> tuple[dict, list[dict]]:
    return evaluate_few_shot(subject, OPTIONS)


def test_every_query_is_asked_with_every_number_of_shots(evaluated):
    """A task without support is asked without shots alone."""
    _, lines = evaluated
    asked = sorted((line["id"], line["shots"]) for line in lines)
    want = [(f"colour{i}", shots) for i in range(5) for shots in (0, 2)] + [("c0", 0), ("c1", 0)]
    assert asked == sorted(want)
    for line in lines:
        assert len(line["demonstrations"]) == line["shots"] and line["choice"] == "random"
        assert ("ranked" in line) == (line["task"] == "colour")


def test_a_prompt_that_is_too_long_for_the_language_model_is_refused(subject):
    config = subject.model.config
    short = dataclasses.replace(config, language=dataclasses.replace(config.language, max_positions=12))
    with pytest.raises(UserError, match=r"query 'colour0': its prompt of 2 shots has \d+ tokens, .* room for 8; ask"):
        options = dataclasses.replace(OPTIONS, shots=(2,))
        evaluate_few_shot(dataclasses.replace(subject, model=Flamingo(short)), options, tasks=["colour"])


def log_likelihood(subject: FewShotSubject, line: dict, choice: str) -> float:
    """By a loop over the tokens of the choice, one pass each."""
    shown = [*(one for one in line["demonstrations"]), line["id"]]
    support = {e["id"]: e for f in (QUERIES, SUPPORT) for e in map(json.loads, (subject.folder / f).open())}
    text = "".join(f"{IMAGE}Output:{support[name]['answer']}{END_OF_CHUNK}" for name in shown[:-1]) + f"{IMAGE}Output:"
    pictures = [np.asarray(Image.open(subject.folder / support[name]["image"])) for name in shown]
    images = np.stack(pictures)[None, :, None]
    ids, total = encode_tagged(text, subject.context), 0.0
    tokens = subject.context.tokenizer.encode(choice, add_bos=False)
    for token in tokens:
        row = jnp.array([ids])
        times = jnp.cumsum(row == subject.context.tag, axis=1)
        inputs = dataclasses.replace(text_inputs(row, image_size=SIDE), media_times=times, images=jnp.asarray(images))
        hidden = subject.model.apply({"params": subject.params}, inputs)
        logits = subject.model.apply({"params": subject.params}, hidden[:, -1:], method="logits")[0, 0]
        total += float(jax.nn.log_softmax(logits)[token])
        ids = [*ids, token]
    return total / len(tokens)


def test_choices_are_ranked_by_their_mean_log_likelihood(subject, evaluated):
    for line in [line for line in evaluated[1] if line["task"] == "colour"][::4]:
        scores = {name: log_likelihood(subject, line, name) for name in NAMES}
        assert line["ranked"] == max(scores, key=scores.get), scores
        assert line["ranked_right"] == (line["ranked"] == line["truth"])


def test_labels_that_are_not_there_count_for_nothing(subject):
    inputs = text_inputs(jnp.array([[5, 6, 7], [5, 6, 7]]), image_size=SIDE)
    labels = np.array([[-100, -100, -100], [-100, 6, -100]])
    empty, one = mean_log_likelihood(subject.model, subject.params, inputs, labels)
    assert empty == 0 and one < 0


def test_similar_pictures_are_shown_last(subject):
    """A colour's own picture is in the support; the others follow by their products."""
    _, lines = evaluate_few_shot(subject, dataclasses.replace(OPTIONS, choice="similar"), tasks=["colour"])
    shown = {line["id"]: line["demonstrations"] for line in lines if line["shots"] == 2}
    for number in range(5):
        last = shown[f"colour{number}"][-1]
        assert int(last[1:]) % 3 == number % 3
    # Of two equal ones the earlier is more similar.
    assert shown["colour0"] == ["s3", "s0"]


def test_embeddings_have_length_one(subject):
    from vita_jax.data.few_shot import read_shots

    queries = read_shots(subject.folder / QUERIES)
    found = picture_embeddings(subject, queries, {})
    assert len(found) == 5  # three pictures, two clips
    for vector in found.values():
        np.testing.assert_allclose(np.linalg.norm(vector), 1.0, atol=1e-6)


def test_batches_do_not_matter(subject, evaluated):
    other = dataclasses.replace(subject, batch_size=3)
    _, lines = evaluate_few_shot(other, OPTIONS)

    def known(lines: list[dict]) -> dict:
        return {(line["id"], line["shots"]): (line["answer"], line.get("ranked")) for line in lines}

    assert known(lines) == known(evaluated[1])


def test_a_stopped_evaluation_goes_on(subject, evaluated, tmp_path, monkeypatch):
    """Killed in its third batch; the lines are those of a whole one, and nothing is asked twice."""
    real, asked = few_shot.answer_batch, []

    def noted(subject, queries, prompts):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([query.id for query in queries])
        return real(subject, queries, prompts)

    file, shown = tmp_path / "kept.jsonl", []
    monkeypatch.setattr(few_shot, "answer_batch", noted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_few_shot(subject, OPTIONS, kept=KeptAnswers(file, "m"), identity="a")
    assert sum(map(len, asked)) == len(file.read_text().splitlines()) == 4
    monkeypatch.setattr(few_shot, "answer_batch", lambda *batch: asked.append([]) or real(*batch))
    kept = {"kept": KeptAnswers(file, "m"), "identity": "a", "progress": lambda *done: shown.append(done)}
    result, lines = evaluate_few_shot(subject, OPTIONS, **kept)
    assert len(file.read_text().splitlines()) == len(lines) == 12 and (shown[0], shown[-1]) == ((4, 12), (12, 12))
    own = [{name: value for name, value in one.items() if name not in ("model_id", "asked")} for one in lines]
    assert own == evaluated[1] and result == evaluated[0]
    before, colours = len(asked), [one for one in lines if one["id"] == "colour1"]
    assert evaluate_few_shot(subject, OPTIONS, **kept)[1] == lines and len(asked) == before
    assert colours[0]["prompt"] == f"{IMAGE}Output:"
    assert colours[1]["prompt"].count(f"{END_OF_CHUNK}{IMAGE}Output:") == 2
    # Of other weights.
    evaluate_few_shot(subject, OPTIONS, tasks=["clips"], kept=KeptAnswers(file, "m"), identity="b")
    assert len(asked) == before + 1 and len(file.read_text().splitlines()) == 14


def line(number: int, kind: str, shots: int, right: bool, ranked: bool | None = None) -> dict:
    fields = {"id": str(number), "task": "t", "kind": kind, "shots": shots, "right": right}
    return fields if ranked is None else {**fields, "ranked_right": ranked}


def test_figures_by_hand():
    """Kinds weigh the same: (1/2 + 1) / 2, then (1 + 1) / 2; the change is paired."""
    lines = [line(0, "a", 0, True), line(1, "a", 0, False), line(2, "b", 0, True)]
    lines += [line(0, "a", 4, True), line(1, "a", 4, True), line(2, "b", 4, True)]
    found = figures(lines, FewShotOptions(shots=(0, 4)))["t"]
    assert [found["shots"][name]["accuracy"] for name in ("0", "4")] == [0.75, 1.0]
    assert found["shots"]["0"]["by_kind"] == {"a": {"accuracy": 0.5, "n": 2}, "b": {"accuracy": 1.0, "n": 1}}
    # Draws of two of kind a give 0, 1/2 or 1, so the mean lies between 1/2 and 1.
    assert (found["shots"]["0"]["low"], found["shots"]["0"]["high"]) == (0.5, 1.0)
    (change,) = found["changes"]
    assert (change["from"], change["to"], change["difference"], change["won"], change["lost"]) == (0, 4, 25.0, 1, 0)
    both = figures([line(0, "a", 0, False, True)], FewShotOptions(shots=(0,)))
    assert both["t"]["shots"]["0"]["accuracy"] == 0 and both["t_ranked"]["shots"]["0"]["accuracy"] == 1
    text = format_few_shot({"few_shot": {"t": found}})
    assert "75.0 % (50.0 .. 100.0)" in text and text.splitlines()[0].split() == [
        "task",
        "n",
        "0",
        "shots",
        "4",
        "shots",
    ]


def test_what_counts_of_an_answer():
    assert clean_answer(" 3, of course. Question:x", True) == "3"
    assert clean_answer("a cat Short", True) == "a cat"
    assert clean_answer('"a cat" Output: a dog', False) == "a cat"


def test_what_cannot_be_measured(subject):
    with pytest.raises(UserError, match="has no task 'none'; tasks: colour, clips"):
        evaluate_few_shot(subject, OPTIONS, tasks=["none"])
    with pytest.raises(UserError, match="task 'clips': its smallest pool has 0 demonstrations"):
        evaluate_few_shot(subject, dataclasses.replace(OPTIONS, shots=(4,)), tasks=["clips"])
    with pytest.raises(UserError, match="limit 0"):
        evaluate_few_shot(subject, OPTIONS, limit=0)
