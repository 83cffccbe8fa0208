"""What is counted, for Prometheus. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as _text

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


class Metrics:
    """The figures of one server; attributes are what `prometheus_client` calls them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vita_jax_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"vita_jax_{name}", text, labels, registry=self.registry, buckets=SECONDS)

        self.requests = counter("requests_total", "Requests by endpoint and status", "endpoint", "status")
        self.request_seconds = histogram("request_seconds", "From a request to the end of its answer", "endpoint")
        self.refused = counter("refused_total", "Requests and messages that were refused, by the error's code", "code")
        self.prompt_tokens = counter("prompt_tokens_total", "Positions of prompts")
        self.reused_tokens = counter("reused_tokens_total", "Positions of prompts that were in the cache already")
        self.answer_tokens = counter("answer_tokens_total", "Tokens of answers")
        self.first_text = histogram("first_text_seconds", "From a request to the first text of its answer", "endpoint")
        self.first_audio = histogram("first_audio_seconds", "From the end of a question to the first sound", "endpoint")
        self.heard_seconds = counter("heard_seconds_total", "Sound that was received")
        self.spoken_seconds = counter("spoken_seconds_total", "Sound that was made")
        self.sessions = Gauge("vita_jax_sessions", "Realtime sessions", registry=self.registry)
        self.utterances = counter("utterances_total", "Utterances of realtime sessions by what became of them", "fate")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when the figures are read."""
        Gauge(f"vita_jax_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return _text(self.registry)
