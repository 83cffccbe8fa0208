"""A server with the kept weights in a thread of its own, on a loopback port."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from openai import OpenAI
from PIL import Image

from vita_jax.inference.session import Session
from vita_jax.serving.app import create_app
from vita_jax.serving.limits import Limits
from vita_jax.serving.server import Server, bound_socket
from vita_jax.serving.service import Service
from vita_jax.serving.sounds import encoded, to_bytes

WEIGHTS = Path(__file__).parents[2] / "experiments/quickstart/weights"
MODEL = "quickstart"
LIMITS = Limits()
SMALL = Limits(
    body_bytes=200_000,
    body_seconds=1,
    messages=3,
    text_characters=200,
    images=1,
    sounds=1,
    image_pixels=10_000,
    audio_seconds=1,
    new_tokens=5,
    waiting=0,
)
WRITTEN = "red/white: 4271\nWhat are the digits?"


@dataclass
class Served:
    """A running server."""

    service: Service
    server: Server
    url: str

    def client(self, **options: object) -> OpenAI:
        """The official client, which asks once."""
        options = {"api_key": self.service.token or "none", "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=f"{self.url}/v1", **options)


@contextlib.contextmanager
def serving(
    session: Session, limits: Limits = LIMITS, tls: tuple[str, str] | None = None, **options: object
) -> Iterator[Served]:
    """Serves a loaded model as long as the block lasts."""
    service = Service(session, MODEL, limits, **options)
    listening = bound_socket("localhost", 0, limits)
    server = Server(create_app(service), service, tls=tls)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(service, server, f"http://localhost:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        service.close()
        listening.close()


def data_url(colour: str = "red", side: int = 32) -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def wav(samples: np.ndarray) -> bytes:
    """(n,) float32 at 24 kHz as a file."""
    return encoded(to_bytes(samples), "wav")
