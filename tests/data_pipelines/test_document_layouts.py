"""Published documents and captions in the public format, built, counted and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.build import main
from data_pipelines.document_layouts import public_document
from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from data_pipelines.stats import gather
from tests.data.media import write_json, write_png
from vita_jax.data.documents import decode_document
from vita_jax.data.loader import RecordSource, SourceConfig
from vita_jax.data.records import RecordError


def pieces(entry, layout, root=None, folders=None):
    return public_document(entry, layout, "file: record 0", root, folders)["document"]


def test_tags_become_pieces():
    entry = {"id": 1, "text": "One <image>two <video> three <image>", "image": ["a.png", "b.png"], "video": "c.mp4"}
    want = ["One ", {"image": "a.png"}, "two ", {"video": "c.mp4"}, " three ", {"image": "b.png"}]
    assert pieces(entry, "tagged") == want
    assert pieces({"text": "words"}, "tagged") == ["words"]
    assert pieces({"image": "a.png", "caption": "cat"}, "pairs") == [{"image": "a.png"}, "cat"]


@pytest.mark.parametrize(
    ("entry", "layout", "message"),
    [
        ({"text": "a <image>", "image": ["a", "b"]}, "tagged", r"image: 2 file\(s\) but 1 <image> in the text"),
        ({"text": "a <image><image>", "image": "a"}, "tagged", r"image: 1 file\(s\) but 2 <image>"),
        ({"text": "a <video>"}, "tagged", r"video: 0 file\(s\) but 1 <video>"),
        ({"image": "a"}, "tagged", "text: must be text"),
        ({"image": "a", "video": "b", "caption": "c"}, "pairs", "must have 'image' or 'video'"),
        ({"image": "a"}, "pairs", "and 'caption', a text"),
        ({"text_list": "a"}, "mmc4", "text_list: must be a list of texts"),
        ({"text_list": ["a"], "image_info": [{}]}, "mmc4", "image_info: must be a list of objects"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "x"}], "similarity_matrix": [[1, 2]]},
            "mmc4",
            r"similarity_matrix: must be 1 x 1 numbers, .* not of shape \(1, 2\)",
        ),
        (
            {"text_list": ["a"], "image_info": [], "similarity_matrix": "x"},
            "mmc4",
            r"similarity_matrix: must be 0 x 1 numbers",
        ),
    ],
)
def test_other_shapes_are_refused(entry, layout, message):
    with pytest.raises(RecordError, match=message):
        pieces(entry, layout)


def large_png(path, seed):
    """Noise, which is larger than an icon."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)


def test_pictures_of_mmc4_find_their_sentences(tmp_path):
    """By the assignment; icons, missing and unfit pictures are left out."""
    for name in ("a.png", "b.png", "unfit.png"):
        large_png(tmp_path / name, len(name))
    write_png(tmp_path / "icon.png")
    names = ["icon.png", "a.png", "missing.png", "b.png", "unfit.png"]
    similarity = [[0.9] * 3, [0.3, 0.2, 0.5], [0.9] * 3, [0.4, 0.1, 0.45], [0.1, 0.2, 0.1]]
    entry = {
        "text_list": ["First <image>.", "Second.", "Third."],
        "image_info": [{"image_name": name} for name in names],
        "similarity_matrix": similarity,
        "url": "https://example.org",
    }
    # a to the third and b to the first: 0.5 + 0.4 is more than 0.3 + 0.45.
    want = [{"image": "b.png"}, "First .", "Second.", {"image": "a.png"}, "Third."]
    assert pieces(entry, "mmc4", str(tmp_path)) == want
    assert pieces({**entry, "set": "s"}, "mmc4", None, {"s": str(tmp_path)}) == want
    with pytest.raises(RecordError, match="no picture is there") as caught:
        pieces(entry, "mmc4", str(tmp_path / "elsewhere"))
    assert caught.value.category == "no picture"


def test_documents_are_built_counted_and_refused(tmp_path, capsys):
    write_png(tmp_path / "a.png")
    entries = [{"id": str(i), "document": ["Text.", {"image": "a.png"}, f"Number {i}."]} for i in range(5)]
    entries += [{"id": "bad", "document": [{"image": "none.png"}]}]
    file, output = write_json(tmp_path / "pages.json", entries), tmp_path / "pages"
    line = ["records", "--json", str(file), "--root", str(tmp_path), "--layout", "documents", "--output", str(output)]
    assert main(line) == 2 and "1 of 6 records rejected" in capsys.readouterr().err
    assert main([*line, "--max-bad-fraction", "0.5"]) == 0
    reject = json.loads((output / "rejects.jsonl").read_text())
    assert (reject["record"], reject["id"], reject["category"]) == (5, "bad", "missing media")
    source = RecordSource(SourceConfig(str(output)), 0, 0)
    assert source.manifest.counts == {"records": 5, "rounds": 0, "images": 5, "videos": 0, "text_only": 0}
    assert decode_document(source[2][1]).texts == ("Text.", "Number 2.")
    stats = gather(output)
    assert stats.numbers["pictures and videos of a document"] == [1] * 5
    assert stats.classes["script of a text"] == {"latin": 10}


def test_captions_are_documents_of_two_pieces(tmp_path):
    write_png(tmp_path / "a.png")
    entries = [{"image": "a.png", "caption": f"A picture, number {i}."} for i in range(3)]
    source = RecordsFile(write_json(tmp_path / "pairs.json", entries), tmp_path, layout="pairs")
    manifest = build_records(source, tmp_path / "pairs")
    assert manifest.counts["records"] == 3 and manifest.options["layout"] == "pairs"
