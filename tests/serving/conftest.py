"""The kept weights, loaded once, and a server with them."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

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
    return Session.load(WEIGHTS, num_rows=4)


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
def question() -> bytes:
    """A spoken question, as a file."""
    samples, rate = Synthesizer().speak("which number is the largest one?", "en-us")
    return wav(resample(np.asarray(samples, np.float32), rate, RATE))
