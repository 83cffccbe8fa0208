"""Everything that goes wrong with real data, in one build: each is stored or rejected with its reason, none is lost."""

from __future__ import annotations

import io
import json
import struct
import wave
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from tests.data.media import png_bytes, talk, tone, write_png, write_wav
from vita_jax.data.records import load_manifest


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes whose header promises 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def wav(samples, width, channels=1, rate=16_000):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)
    return buffer.getvalue()


def float_wav(samples):
    """32-bit float WAV."""
    data = np.asarray(samples, "<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
# Name -> (bytes, what the reason says; None = it can be used).
PICTURES = {
    "zero bytes": (b"", "is empty"),
    "truncated": (png_bytes(64, 64)[:400], "damaged or cut off"),
    "text": (b"not a picture", "not a picture"),
    "bomb": (bomb(), "pixels"),
    "cmyk": (encoded(RGB.convert("CMYK"), "JPEG"), None),
    "sixteen bit": (encoded(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)), "PNG"), None),
    "alpha": (encoded(RGB.convert("RGBA"), "PNG"), None),
    "palette": (encoded(RGB.convert("P"), "PNG"), None),
    "animated": (encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]), None),
    "webp": (encoded(RGB, "WEBP"), None),
    "one pixel": (encoded(RGB.resize((1, 1)), "PNG"), None),
    "thin": (encoded(Image.new("RGB", (20_000, 10)), "PNG"), None),
}
SOUNDS = {
    "zero bytes": (b"", "is empty"),
    "no samples": (wav(b"", 2), "no samples"),
    "eight bit": (wav(bytes(range(256)) * 40, 1), None),
    "float": (float_wav(tone()), None),
    "not numbers": (float_wav([0.1, np.nan] * 4000), "no numbers"),
    "six channels": (wav(np.zeros((4000, 6), "<i2").tobytes(), 2, channels=6), None),
    "one sample": (wav(b"\1\0", 2), None),
    "three hours": (wav(b"\0" * 3 * 3600 * 8000, 1, rate=8000), "lasts more than 200 s"),
    "text": (b"not a sound", "not a sound file"),
}
TEXTS = {
    "no file": ({"conversations": talk("<image>\nWhat?", "This.")}, "0 file(s) but 1 <image>"),
    "no placeholder": ({"image": "ok.png", "conversations": talk("What?", "This.")}, "1 file(s) but 0 <image>"),
    "two files": ({"image": ["ok.png"] * 2, "conversations": talk("<image>", "This.")}, "2 file(s) but 1 <image>"),
    "empty answer": ({"conversations": talk("What?", " ")}, "the answer is empty"),
    "escape": ({"image": "../secret.png", "conversations": talk("<image>", "This.")}, "outside of the root"),
    "missing": ({"image": "none.png", "conversations": talk("<image>", "This.")}, "no such file"),
    "half a character": ({"conversations": talk("What \ud800?", "This.")}, "half a character"),
    "unreadable video": ({"video": "ok.png", "conversations": talk("<video>", "This.")}, "video"),
    "huge": ({"conversations": talk(*["word " * 2000, "yes"] * 200)}, None),
    "twin": ({"id": "huge", "conversations": talk("Again?", "Yes.")}, None),
}


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "media"
    write_png(root / "ok.png")
    write_wav(root / "ok.wav", tone())
    (tmp_path / "secret.png").write_bytes(png_bytes(8, 8))
    entries, wanted = [], []
    for kind, files in (("image", PICTURES), ("audio", SOUNDS)):
        for name, (data, reason) in files.items():
            (root / f"{name}.{kind}").write_bytes(data)
            entries.append({"id": name, kind: f"{name}.{kind}", "conversations": talk(f"<{kind}>\nWhat?", "This.")})
            wanted.append(reason)
    for name, (entry, reason) in TEXTS.items():
        entries.append({"id": name, **entry})
        wanted.append(reason)
    (tmp_path / "all.json").write_text(json.dumps(entries))
    return RecordsFile(tmp_path / "all.json", root), wanted


def test_everything_is_stored_or_named(source, tmp_path):
    records, wanted = source
    manifest = build_records(records, tmp_path / "out", max_bad_fraction=0.9, shards=3)
    rejected = {line["record"]: line for line in map(json.loads, (tmp_path / "out" / "rejects.jsonl").open())}
    entries = json.loads(records.path.read_text())
    for place, reason in enumerate(wanted):
        name = entries[place]["id"]
        if reason is None:
            assert place not in rejected, (name, rejected[place])
        else:
            assert place in rejected, f"{name} was accepted"
            said = rejected[place]["reason"]
            assert reason in said, (name, said)
            assert "\n" not in said and rejected[place]["field"] and rejected[place]["id"] == name
    assert manifest.counts["records"] + len(rejected) == len(entries)
    assert sum(load_manifest(tmp_path / "out").rejects.values()) == len(rejected)
