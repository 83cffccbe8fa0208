"""Small pictures, videos, records and a context for tests of the data path."""

import io
import json
import wave

import numpy as np
from PIL import Image

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from vita_jax.data.examples import ExampleContext
from vita_jax.data.images import ImageConfig
from vita_jax.data.splice import FeatureLayout
from vita_jax.data.templates import SystemTexts, get_template
from vita_jax.data.video import write_video

SIDE = 16
TOKENS_PER_TILE = 4


def context(tokenizer, **changes):
    """Tiles of 16 pixels, at most 2 and a thumbnail, 4 tokens each."""
    values = {
        "tokenizer": tokenizer,
        "template": get_template("qwen2p5_instruct"),
        "system_texts": SystemTexts("Look.", "Watch.", "Reply."),
        "image": ImageConfig(image_size=SIDE, max_tiles=2),
        "layout": FeatureLayout(TOKENS_PER_TILE),
    }
    return ExampleContext(**{**values, **changes})


def png_bytes(width, height, seed=0):
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path, width=SIDE, height=SIDE, seed=0):
    """Writes `png_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(width, height, seed))


def write_clip(path, frames=8):
    """Writes a short video of `frames` grey levels at 4 frames per second."""
    levels = np.linspace(0, 255, frames).astype(np.uint8)
    write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, 32, 32, 3)), 4.0)


def talk(*texts):
    """Turns that alternate human, gpt."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_json(path, records):
    """Writes records as JSON."""
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def mixed_records(root, count):
    """Records of all kinds with distinct answers: one and three tiles, two pictures, several rounds, video, text."""
    write_png(root / "wide.png", 40, 20, 1)
    write_png(root / "square.png", 16, 16, 2)
    write_clip(root / "clip.mp4")
    shapes = [
        {"image": "wide.png", "conversations": talk("<image>\nWhat?", "Answer {i}.")},
        {"image": ["square.png"], "conversations": talk("<image>\nWhat?", "It {i}.", "And then?", "Then {i}.")},
        {"image": ["square.png", "wide.png"], "conversations": talk("<image> or <image>", "The second {i}.")},
        {"video": "clip.mp4", "conversations": talk("<video>\nOrder?", "First {i}.")},
        {"conversations": talk("How many?", "There are {i} digits.", "Sure?", "Yes {i}.")},
    ]
    records = []
    for i in range(count):
        record = json.loads(json.dumps(shapes[i % len(shapes)]).replace("{i}", str(i)))
        records.append({"id": f"r{i}", **record})
    return records


def build(folder, records, name="data", **options):
    """Builds records whose media lie in `folder`; returns the output folder as text."""
    output = folder / name
    build_records(RecordsFile(write_json(folder / f"{name}.json", records), folder), output, **options)
    return str(output)


def tone(seconds=0.5, rate=16_000, frequency=440.0):
    """(n,) float32, a sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path, waveform, rate=16_000):
    """Writes (n,) or (channels n) floats as 16-bit WAV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.clip(np.round(np.atleast_2d(waveform).T * 32768.0), -32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
