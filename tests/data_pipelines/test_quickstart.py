"""The quickstart's data: held-out scans stay held out, names follow the visual tokens, answers are true."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.quickstart import build as build_lib
from data_pipelines.quickstart.build import build_quickstart, tokenizer_texts, written_scene
from data_pipelines.quickstart.clips import clip_transcript, draw_clip, sample_clip
from data_pipelines.quickstart.questions import KINDS, LANGUAGES, ask
from data_pipelines.quickstart.scans import SPLITS, load_scan_splits
from data_pipelines.quickstart.scenes import (
    BLANK,
    CELL_PIXELS,
    CELLS_PER_TILE_SIDE,
    OVERVIEW,
    SHEETS,
    Scene,
    cell_names,
    draw_sheet,
    sample_scene,
    transcript,
)
from data_pipelines.quickstart.sentences import TRANSCRIBE, split_of
from vita_jax.data.images import ImageConfig, dynamic_tiles, tile_grid
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.data.video import paper_frame_indices

IMAGE = ImageConfig(image_size=32)
COUNTS = {"text": 12, "cells": 6, "captions": 6, "pictures": 6, "clips": 2} | {
    "typed": 8,
    "typed_unseen_writers": 4,
    "text_only": 2,
    "video_order": 3,
}


@pytest.fixture(scope="module")
def splits():
    return load_scan_splits(0)


def test_splits_are_disjoint_and_complete(splits):
    indices = [splits[name].indices for name in SPLITS]
    assert sorted(np.concatenate(indices)) == list(range(1797))
    assert len(splits["held_out"].digits) == round(0.2 * 1797)
    np.testing.assert_array_equal(splits["unseen_writers"].indices, np.arange(1437, 1797))
    for name in ("train", "held_out"):  # stratified: every class has its share within one scan
        share = np.bincount(splits[name].digits, minlength=10) / len(splits[name].digits)
        assert np.abs(share - 0.1).max() < 0.01


def test_splits_depend_on_the_seed_only(splits):
    np.testing.assert_array_equal(load_scan_splits(0)["train"].indices, splits["train"].indices)
    assert set(load_scan_splits(1)["held_out"].indices) != set(splits["held_out"].indices)


@pytest.mark.parametrize(("columns", "rows"), SHEETS)
@pytest.mark.parametrize("pixels", CELL_PIXELS)
def test_every_sheet_is_cut_into_its_own_tiles(columns, rows, pixels):
    grid = tile_grid(columns * pixels, rows * pixels, IMAGE)
    assert grid == (columns // CELLS_PER_TILE_SIDE, rows // CELLS_PER_TILE_SIDE)


@pytest.mark.parametrize("seed", range(30))
def test_names_follow_the_visual_tokens(splits, seed):
    """The ink of tile t, token k is where, and only where, name 4 t + k is a digit."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    pixels, _ = draw_sheet(scene, splits["train"], rng, cell_pixels=16)
    tiles = dynamic_tiles(Image.fromarray(pixels), IMAGE).astype(int)[: scene.num_tiles]
    cells = tiles.reshape(-1, 2, 16, 2, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16 * 16, 3)
    has_ink = np.ptp(cells, axis=1).max(axis=-1) > 24
    assert has_ink.tolist() == [name is not None for name in cell_names(scene)]
    assert [name for name in cell_names(scene) if name is not None] == list(scene.digits)
    assert len(transcript(scene)) == 4 * (scene.num_tiles + (scene.num_tiles > 1))


def test_answers_are_true():
    scene = Scene(4, 2, (7, 0, 7), (1, 2, 3), ink=1, paper=4)
    rng = np.random.default_rng(0)
    answers = {kind: ask(scene, kind, "en", rng, k=1).answer for kind in ("count", "kth", "largest", "sum", "read")}
    assert answers == {"count": "3", "kth": "0", "largest": "7", "sum": "7+0=7+7=14", "read": "707"}
    colours = {ask(scene, "colour", language, rng).answer for language in LANGUAGES for _ in range(20)}
    assert colours == {"red", "grey", "红色", "灰色"}
    assert ask(scene, "caption", "zh", rng).answer == "红色/灰色: 707"


@pytest.mark.parametrize("seed", range(20))
def test_clip_transcript_is_what_the_paper_samples(splits, seed):
    rng = np.random.default_rng(seed)
    clip = sample_clip(rng)
    frames = draw_clip(clip, splits["train"], rng, build_lib.CLIP_FPS)
    chosen = paper_frame_indices(len(frames), build_lib.CLIP_FPS)
    per_digit = clip.seconds_each * build_lib.CLIP_FPS
    shown = "".join(str(clip.scene.digits[index // per_digit]) for index in chosen)
    assert clip_transcript(clip, build_lib.CLIP_FPS).replace(BLANK, "") == shown
    assert list(dict.fromkeys(shown)) == [str(digit) for digit in clip.scene.digits]


def test_cells_of_written_scenes_stay_single_tokens(tmp_path):
    rng = np.random.default_rng(0)
    records = [build_lib.text_record(index, rng) for index in range(200)]
    tokenizer = train_sentencepiece(tokenizer_texts(records), 600, tmp_path, at_most=True)
    scene = sample_scene(rng)
    ids = tokenizer.encode(written_scene(scene, "en"))
    cells = [tokenizer.decode([i]) for i in ids][-len(transcript(scene)) :]
    assert "".join(cells) == transcript(scene)
    assert all(cell in (BLANK, OVERVIEW) or cell.isdigit() for cell in cells)


def test_written_sentences_stand_in_for_spoken_ones():
    rng = np.random.default_rng(1)
    records = [build_lib.sentences_record(index, rng) for index in range(300)]
    requests = {request for language in TRANSCRIBE.values() for request in language}
    asked, drawn_out = set(), 0
    for record in records:
        turns = [turn["value"] for turn in record["conversations"]]
        assert len(turns) == 2 * build_lib.TEXT_ROUNDS
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            sentence, request = question.split("\n")
            assert sentence.replace(BLANK, "") == answer
            assert split_of(answer) == "train"
            assert BLANK * (build_lib.LONGEST_GAP + 1) not in sentence
            asked.add(request)
            drawn_out += BLANK in sentence
    assert asked == requests
    assert 0.4 < drawn_out / (len(records) * build_lib.TEXT_ROUNDS) < 0.6


def test_gaps_are_between_words_and_between_chinese_characters():
    rng = np.random.default_rng(0)
    parts = [set(build_lib.drawn_out(text, rng).split(BLANK)) for text in ("the cat sat", "你好吗") for _ in range(100)]
    assert set().union(*parts[:100]) >= {"the", " cat", " sat", "the cat", ""}
    assert set().union(*parts[100:]) >= {"你", "好", "吗", "你好"}


def test_sentences_come_with_speech_only(splits, tmp_path):
    for sentences, expected in ((True, 2), (False, 0)):
        writer = build_lib.Writer(tmp_path / str(sentences), splits["train"], 0)
        for _ in range(2 * build_lib.SENTENCES_EVERY):
            writer.add_text(sentences)
        requests = tuple(request for language in TRANSCRIBE.values() for request in language)
        found = [r for r in writer.records if r["conversations"][0]["value"].endswith(requests)]
        assert len(found) == expected


def test_build_is_complete_deterministic_and_repeatable(tmp_path):
    lines = []
    build_quickstart(tmp_path / "a", COUNTS, 3, lines.append)
    build_quickstart(tmp_path / "b", COUNTS, 3, lines.append)
    first, second = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.suffix in (".png", ".jsonl", ".json")}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    changing = {name for name in first if name.endswith("manifest.json")}
    assert {n: b for n, b in first.items() if n not in changing} == {
        n: b for n, b in second.items() if n not in changing
    }
    build_quickstart(tmp_path / "a", COUNTS, 3, lines.append)
    assert lines[-1].endswith("is up to date")

    items = [json.loads(line) for line in (tmp_path / "a/benchmarks/quickstart/items.jsonl").open(encoding="utf-8")]
    typed = [item for item in items if item["group"] == "typed"]
    assert len(typed) == COUNTS["typed"] * len(KINDS)
    for kind in KINDS:
        of_kind = [item for item in typed if item["kind"] == kind]
        for key, values in (("num_digits", (1, 2, 3, 4)), ("language", LANGUAGES)):
            assert {v: sum(item[key] == v for item in of_kind) for v in values} == {
                v: COUNTS["typed"] // len(values) for v in values
            }
    assert all((tmp_path / "a/benchmarks/quickstart" / item["image"]).is_file() for item in typed)
