"""The kept weights, loaded once, and a server with them."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.scenes import Scene as Sheet
from data_pipelines.quickstart.scenes import draw_sheet
from data_pipelines.speech.synthesizer import Synthesizer
from tests.serving.server import SMALL, WEIGHTS, Served, serving, wav
from vita_jax.inference.session import Session
from vita_jax.ops.filter_bank import resample
from vita_jax.serving.sounds import RATE


@pytest.fixture(scope="package", autouse=True)
def _precise() -> Iterator[None]:
    """In all threads, so that rows of one batch say what each says alone."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="package")
def loaded(_precise: None) -> Session:
    return Session.load(WEIGHTS, num_rows=8)


@pytest.fixture(scope="package")
def served(loaded: Session) -> Iterator[Served]:
    with serving(loaded) as running:
        yield running


@pytest.fixture(scope="package")
def small(loaded: Session) -> Iterator[Served]:
    """A server of narrow limits."""
    with serving(loaded, SMALL, answers=1) as running:
        yield running


@pytest.fixture(scope="package")
def speech() -> Callable[[str, str], np.ndarray]:
    """(text, voice) -> what is said at 24 kHz, with some silence on both sides."""

    @functools.cache
    def spoken(text: str, voice: str = "en-us") -> np.ndarray:
        samples, rate = Synthesizer().speak(text, voice)
        samples = resample(np.asarray(samples, np.float32), rate, RATE)
        return np.concatenate([np.zeros(RATE // 4, np.float32), samples, np.zeros(RATE, np.float32)])

    return spoken


@pytest.fixture(scope="package")
def question(speech: Callable[[str, str], np.ndarray]) -> bytes:
    """A spoken question, as a file."""
    return wav(speech("which number is the largest one?"))


@pytest.fixture(scope="package")
def digits() -> bytes:
    """A picture of 4, 2, 7 and 1, as a file."""
    sheet = Sheet(columns=2, rows=2, digits=(4, 2, 7, 1), cells=(0, 1, 2, 3), ink=1, paper=4)
    pixels, _ = draw_sheet(sheet, load_scan_splits(0)["held_out"], np.random.default_rng(5))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
