"""What stands for the weights of a checkpoint, without reading them."""

from __future__ import annotations

import json
import os

from tests.bucket import folder_as_bucket
from vita_jax.evaluation.opening import weights_mark
from vita_jax.storage import place
from vita_jax.training.checkpoint import MANIFEST
from vita_jax.training.portable import MODEL_FILE


def test_the_mark_of_a_checkpoint_is_made_from_its_manifest(tmp_path):
    """On a disk the checksums count, whenever they were written; in a bucket, which has none, that counts, too."""
    folder = tmp_path / "bucket" / "6"
    folder.mkdir(parents=True)
    with folder_as_bucket(tmp_path):
        marks = {}
        for where, path in (("disk", folder), ("bucket", place("gs://bucket/6"))):
            marks[where] = []
            for checksum, seconds in ((1, 1000), (2, 1000), (1, 1000), (1, 2000)):
                content = {"files": {"params/d/0": {"size": 8, "crc32": checksum}}}
                (folder / MANIFEST).write_text(json.dumps(content))
                os.utime(folder / MANIFEST, (seconds, seconds))
                marks[where].append(weights_mark(path))
    first, other, again, later = marks["disk"]
    assert first == again == later != other
    first, other, again, later = marks["bucket"]
    assert first == again and len({first, other, later}) == 3


def test_the_mark_of_an_exported_model_is_made_from_its_files(tmp_path):
    for name in (MODEL_FILE, "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (1000, 1000))
    marks = [weights_mark(tmp_path)]
    for name in ("notes.txt", MODEL_FILE, "model.safetensors"):
        os.utime(tmp_path / name, (2000, 2000))
        marks.append(weights_mark(tmp_path))
    assert marks[0] == marks[1] and len(set(marks)) == 3
