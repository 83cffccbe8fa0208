"""Few-shot tasks: files, demonstrations by draw and by similarity, and prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.data.media import SIDE, write_clip, write_png
from vita_jax.data.document_examples import DocumentContext
from vita_jax.data.few_shot import (
    LARGEST_POOL,
    FewShotOptions,
    Shot,
    draw,
    make_prompt,
    most_similar,
    parse_shot,
    read_pictures,
    read_shots,
)
from vita_jax.data.images import ImageConfig
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError

QUERY = Shot("q", "vqa", "vqa", "How many?", "3", image="q.png")


@pytest.fixture(scope="module")
def context(own_tokenizer) -> DocumentContext:
    tokenizer = enlarge(own_tokenizer, [], [END_OF_CHUNK, IMAGE]).tokenizer
    return DocumentContext(tokenizer, ImageConfig(image_size=SIDE, max_tiles=1))


def pool(count: int) -> list[Shot]:
    return [Shot(f"s{i}", "vqa", "vqa", f"Q{i}?", f"A{i}", image=f"{i}.png") for i in range(count)]


def test_more_shots_end_with_the_same(context):
    shots = pool(20)
    four, eight = draw(QUERY, shots, 4, 42), draw(QUERY, shots, 8, 42)
    assert len(set(eight)) == 8 and eight[-4:] == four
    assert draw(QUERY, shots, 8, 42) == eight and draw(QUERY, shots, 8, 43) != eight
    assert draw(replace(QUERY, id="other"), shots, 8, 42) != eight
    assert draw(QUERY, shots, 0, 42) == []
    large = pool(LARGEST_POOL + 500)
    drawn = {place for i in range(200) for place in draw(replace(QUERY, id=str(i)), large, 32, 1)}
    kept = set(np.random.default_rng(1).permutation(len(large))[:LARGEST_POOL].tolist())
    assert drawn <= kept and len(drawn) > 1500
    with pytest.raises(UserError, match="query 'q': 21 demonstrations are asked for, its pool 'vqa' has 20"):
        draw(QUERY, shots, 21, 42)


def test_the_most_similar_comes_last():
    """Cosines by hand: 1, 0.6, 0.8, 0.6, -1; of equal ones the earlier counts as more similar."""
    vectors = [(1.0, 0.0), (0.6, 0.8), (0.8, 0.6), (0.6, -0.8), (-1.0, 0.0)]
    embeddings = {("image", f"{i}.png"): np.array(vector) for i, vector in enumerate(vectors)}
    embeddings[QUERY.file] = np.array([1.0, 0.0])
    assert most_similar(QUERY, pool(5), 4, embeddings) == [3, 1, 2, 0]
    assert most_similar(QUERY, pool(5), 2, embeddings) == [2, 0]
    with pytest.raises(UserError, match="6 demonstrations"):
        most_similar(QUERY, pool(5), 6, embeddings)


def test_prompts(context):
    shots = pool(2)
    prompt = make_prompt(QUERY, shots, 2, context, "\n")
    assert prompt.text == (
        f"{IMAGE}Question:Q0? Short answer:A0{END_OF_CHUNK}\n"
        f"{IMAGE}Question:Q1? Short answer:A1{END_OF_CHUNK}\n"
        f"{IMAGE}Question:How many? Short answer:"
    )
    assert prompt.files == (("image", "0.png"), ("image", "1.png"), ("image", "q.png"))
    tags = np.flatnonzero(prompt.ids == context.tag)
    assert prompt.times[tags].tolist() == [1, 2, 3] and prompt.times[-1] == 3
    blind = make_prompt(QUERY, shots, 0, context, "\n")
    assert blind.text.count(IMAGE) == 1 and "A1" in blind.text and blind.files == (("image", "q.png"),)
    named = make_prompt(replace(QUERY, question=""), [replace(shots[0], question="")], 1, context, "")
    assert named.text == f"{IMAGE}Output:A0{END_OF_CHUNK}{IMAGE}Output:"
    with pytest.raises(UserError, match="2 tags but 1 pictures; questions and answers must not hold tags"):
        make_prompt(replace(QUERY, question=f"What is {IMAGE}?"), [], 0, context, "")


def test_pictures_and_clips(context, tmp_path):
    write_png(tmp_path / "a.png")
    write_clip(tmp_path / "b.mp4")
    assert read_pictures([("image", "a.png")] * 2, tmp_path, context, 1).shape == (2, 1, SIDE, SIDE, 3)
    assert read_pictures([("video", "b.mp4")], tmp_path, context, 4).shape == (1, 4, SIDE, SIDE, 3)
    with pytest.raises(UserError, match="none.png cannot be read"):
        read_pictures([("image", "none.png")], tmp_path, context, 1)


def test_files(tmp_path):
    entry = {"id": "1", "task": "a", "pool": "p", "question": "", "answer": "cat", "image": "x.png"}
    lines = [entry, {**entry, "choices": ["cat", "dog"]}]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shots = read_shots(tmp_path / "queries.jsonl")
    assert shots[1].choices == ("cat", "dog") and shots[0].file == ("image", "x.png")
    for name, text, message in (
        ("none", None, "does not exist; training builds it"),
        ("empty", "", "is empty"),
        ("bad", "{", "bad:1: not JSON"),
        ("list", "[]", "list:1: expected a JSON object"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_shots(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": None}, "answer=None must be text"),
        ({"answer": " "}, "the answer is empty"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"video": "a.mp4"}, "must have an image or a video, one of them"),
        ({"choices": "cat"}, "choices='cat' must be a list"),
        ({"choices": ["dog"]}, "'cat' is not among its choices"),
    ],
)
def test_lines_that_are_no_queries(changes, message):
    entry = {"id": "1", "task": "a", "pool": "p", "question": "", "answer": "cat", "image": "x.png"}
    with pytest.raises(UserError, match=f"here:1: .*{message}"):
        parse_shot({**entry, **changes}, "here:1")
    with pytest.raises(UserError, match="the field 'pool' is missing"):
        parse_shot({name: value for name, value in entry.items() if name != "pool"}, "here:1")


def test_options_that_make_no_sense():
    for options, message in (
        ({"shots": ()}, "must be different numbers"),
        ({"shots": (4, 4)}, "must be different numbers"),
        ({"shots": (-1,)}, "must be different numbers"),
        ({"choice": "best"}, "choice 'best' is unknown"),
        ({"zero_shot_texts": -1}, "must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            FewShotOptions(**options)
