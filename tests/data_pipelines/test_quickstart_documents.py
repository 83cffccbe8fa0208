"""What the small Flamingo reads: pages of pictures, names that only the page tells, held-out scans and names."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from data_pipelines.quickstart.documents import (
    LISTED,
    MOST_PICTURES,
    SETS,
    SUPPORT_PICTURES,
    DocumentCounts,
    build_documents,
    draw_labels,
    labelling_page,
    name_list,
    names,
    page,
    question_page,
    square_scene,
    syllables,
    text_document,
)
from data_pipelines.quickstart.questions import KINDS
from data_pipelines.quickstart.scenes import BLANK
from vita_jax.data.documents import decode_document
from vita_jax.data.few_shot import QUERIES, SUPPORT, read_shots
from vita_jax.data.loader import RecordSource, SourceConfig
from vita_jax.data.records import decode_record
from vita_jax.data.tokenizer import train_sentencepiece

COUNTS = DocumentCounts(30, 20, 16, 4, 2, 6, 2, 3, 2, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    build_documents(folder, COUNTS, 0, progress=lambda line: None)
    return folder


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_names_of_the_test_are_never_read():
    known, held_out = names(held_out=False), names(held_out=True)
    assert not set(known) & set(held_out) and len(set(known)) == len(known) == 105 and len(held_out) == 27
    assert all(re.fullmatch("[knvz][aio][knvz][aio]", name) for name in known + held_out)
    # Every syllable is known, in either place; only the pair is new.
    assert {name[k : k + 2] for name in held_out for k in (0, 2)} <= {name[:2] for name in known}
    drawn = {name for seed in range(200) for name in draw_labels(rng(seed), held_out=True).of.values()}
    assert drawn <= set(held_out)


def test_names_are_drawn_anew_for_every_page():
    """Within a page a digit has one name; over pages the same digit has many."""
    by_digit: dict[int, set[str]] = {}
    for seed in range(300):
        shown = labelling_page(rng(seed))
        assert 3 <= len(shown) <= MOST_PICTURES
        own = {one.scene.digits[0]: one.text for one in shown}
        assert all(own[one.scene.digits[0]] == one.text for one in shown)
        assert len(set(own.values())) == len(own) <= 4 and all(text.startswith("Output:") for text in own.values())
        for digit, name in own.items():
            by_digit.setdefault(digit, set()).add(name)
    assert set(by_digit) == set(range(10)) and min(map(len, by_digit.values())) > 30


def test_pages_and_texts():
    shares = np.mean([page(rng(seed))[0].text.startswith("Output:") for seed in range(400)])
    assert 0.4 < shares < 0.6  # labelling, and one caption of six
    questions = [one.text for seed in range(100) for one in question_page(rng(seed))]
    assert all("Short answer:" in text or text.startswith("Output:") for text in questions)
    documents = [text_document(rng(seed)) for seed in range(400)]
    lists = [document for document in documents if document[0][0].isdigit()]
    assert 0.19 < len(lists) / len(documents) < 0.31
    texts = [text for document in documents if document not in lists for text in document]
    assert all("/" in text and (BLANK in text or any(c.isdigit() for c in text)) for text in texts)
    scene = square_scene(rng(), [3, 1])
    assert (scene.columns, scene.rows, scene.num_tiles, scene.digits) == (2, 2, 1, (3, 1))


def test_a_list_names_every_digit_alike():
    styles = set()
    for seed in range(100):
        text = name_list(rng(seed))
        entries = re.findall("([0-9])(:?)([a-z]{4})( ?)", text)
        assert "".join(map("".join, entries)) == text and 4 <= len(entries) <= LISTED
        assert len({between for _, between, _, _ in entries}) == 1
        assert all(bool(between) == bool(behind) for _, between, _, behind in entries[:-1])
        of = {digit: name for digit, _, name, _ in entries}
        assert all(of[digit] == name for digit, _, name, _ in entries) and len(set(of.values())) == len(of)
        assert set(of.values()) <= set(names(held_out=False))
        styles.add(entries[0][1])
    assert styles == {"", ":"}


def test_sets(folder):
    counts = {}
    for name in SETS:
        source = RecordSource(SourceConfig(str(folder / name)), 0, 0)
        documents = [decode_document(source[i][1]) for i in range(len(source))]
        counts[name] = len(documents)
        kinds = {media.kind for document in documents for media in document.media}
        assert kinds == {"lists": set(), "texts": set(), "clips": {"video"}}.get(name, {"image"})
        if name not in ("lists", "texts"):
            assert all(len(document.texts) == len(document.media) for document in documents)
    assert counts == {"lists": 30, "texts": 20, "pages": 16, "captions": 4, "clips": 2}
    cells = RecordSource(SourceConfig(str(folder / "cells")), 0, 0)
    record = decode_record(cells[0][1])
    assert len(cells) == 6 and record.conversations[1]["value"].count(" | ") == 3


def test_tasks(folder):
    queries, support = (read_shots(folder / "few_shot" / name) for name in (QUERIES, SUPPORT))
    by_task = {
        task: [query for query in queries if query.task == task] for task in ("typed", "video_order", "labelling")
    }
    assert [len(own) for own in by_task.values()] == [2 * len(KINDS), 2, 3]
    assert {query.kind for query in by_task["typed"]} == set(KINDS)
    for query in by_task["labelling"]:
        own = [shot for shot in support if shot.pool == query.pool]
        assert len(own) == SUPPORT_PICTURES and {shot.answer for shot in own} <= set(query.choices)
        assert set(query.choices) <= set(names(held_out=True)) and query.answer in query.choices
    assert sum(shot.pool == "typed" for shot in support) == 7
    for shot in (*queries, *support):
        assert (folder / "few_shot" / shot.file[1]).is_file()
    assert len({shot.id for shot in (*queries, *support)}) == len(queries) + len(support)


def test_the_tokenizer_cuts_where_prompts_end(folder):
    """An answer is spelt alike behind its prompt and by itself, also one with a name that was never read."""
    lines = (folder / "tokenizer_text.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = train_sentencepiece([json.loads(line) for line in lines], 600, None, at_most=True, symbols=syllables())
    assert all(len(tokenizer.encode(name)) == 2 for known in (False, True) for name in names(known))
    for prompt in ("Output:", "Question:Count the digits. Short answer:"):
        for answer in (*names(held_out=True)[:40], "3", "red", "3+4=7"):
            assert tokenizer.encode(prompt + answer) == tokenizer.encode(prompt) + tokenizer.encode(answer)


def test_a_second_build_does_nothing(folder):
    before = (folder / "few_shot" / QUERIES).stat().st_mtime_ns
    lines: list[str] = []
    build_documents(folder, COUNTS, 0, progress=lines.append)
    assert "is up to date" in lines[0] and (folder / "few_shot" / QUERIES).stat().st_mtime_ns == before
