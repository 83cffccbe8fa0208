"""What a realtime session is told by `session.update`, and how it is shown in `session.updated`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vita_jax.inference.duplex import DuplexOptions
from vita_jax.inference.utterances import UtteranceOptions
from vita_jax.inference.vad import VadOptions
from vita_jax.serving.content import plain_text
from vita_jax.serving.fields import Fields
from vita_jax.serving.problems import invalid, not_supported
from vita_jax.serving.service import AUTO, Service
from vita_jax.serving.sounds import RATE

INPUT_RATES = (24_000, 16_000)  # Hz
AUDIO, TEXT = "audio", "text"
# Milliseconds and share; what the API allows.
MAX_BEFORE, MIN_SILENCE, MAX_SILENCE = 2000, 210, 5000
# Of the API, without an effect here.
IGNORED = ("tracing", "truncation", "include", "prompt", "model")


@dataclass(frozen=True)
class Settings:
    """How a session is led.

    Attributes:
      output: "audio" or "text".
      instructions: text that replaces the model's own system text; None leaves that.
      rate: of the sound that comes, Hz.
      detects: whether the server hears when somebody speaks; otherwise the client says so.
      threshold, before_ms, silence_ms: how, see `VadOptions` and `UtteranceOptions`.
      transcribes: whether questions are written down.
      voice: see `Service.voices`.
      max_tokens: of an answer.
    """

    output: str
    max_tokens: int
    instructions: str | None = None
    rate: int = RATE
    detects: bool = True
    threshold: float = 0.5
    before_ms: int = 300
    silence_ms: int = 500
    transcribes: bool = False
    voice: str = AUTO

    @property
    def lead(self) -> tuple[object, ...]:
        """What a conversation in progress has to be set up anew for, when it changes."""
        return self.output, self.detects, self.threshold, self.before_ms, self.silence_ms, self.voice, self.max_tokens

    def options(self, longest_seconds: float) -> DuplexOptions:
        """For `Duplex`."""
        vad = VadOptions(threshold=self.threshold, min_silence_ms=self.silence_ms)
        utterances = UtteranceOptions(
            vad, before_ms=self.before_ms if self.detects else 0, max_seconds=max(1.0, longest_seconds)
        )
        return DuplexOptions(language=self.voice, utterances=utterances)

    def shown(self, service: Service, session_id: str) -> dict[str, Any]:
        """The session object of the API."""
        turns = {
            "type": "server_vad",
            "threshold": self.threshold,
            "prefix_padding_ms": self.before_ms,
            "silence_duration_ms": self.silence_ms,
            "create_response": True,
            "interrupt_response": True,
        }
        heard = {
            "format": {"type": "audio/pcm", "rate": self.rate},
            "noise_reduction": None,
            "transcription": {"model": service.name} if self.transcribes else None,
            "turn_detection": turns if self.detects else None,
        }
        spoken = {"format": {"type": "audio/pcm", "rate": RATE}, "voice": self.voice, "speed": 1.0}
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": service.name,
            "output_modalities": [self.output],
            "instructions": self.instructions or "",
            "audio": {"input": heard, "output": spoken},
            "max_output_tokens": self.max_tokens,
            "tools": [],
            "tool_choice": "none",
        }


def first_settings(service: Service) -> Settings:
    """Of a session that has been told nothing."""
    return Settings(
        output=AUDIO if service.voices else TEXT,
        max_tokens=min(service.session.max_new_tokens, service.limits.new_tokens),
    )


def updated(settings: Settings, values: Any, service: Service) -> Settings:
    """The settings after a `session.update`; what it does not name stays. Raises `Problem`."""
    fields = Fields(values, "session")
    fields.text("type", "realtime", choices=("realtime",))
    changes: dict[str, Any] = {}
    output = fields.items("output_modalities", None)
    if output is not None:
        if output not in ([AUDIO], [TEXT]):
            raise invalid('session.output_modalities must be ["audio"] or ["text"]', "session.output_modalities")
        if output == [AUDIO] and not service.voices:
            raise not_supported("this model does not speak; use text", "session.output_modalities")
        changes["output"] = output[0]
    instructions = fields.text("instructions", None)
    if instructions is not None:
        if len(instructions) > service.limits.text_characters:
            raise invalid(
                f"session.instructions has {len(instructions)} characters, {service.limits.text_characters} are "
                "allowed (limit text_characters)",
                "session.instructions",
                "limit_exceeded",
            )
        changes["instructions"] = plain_text(instructions, "session.instructions") or None
    tokens = fields.take("max_output_tokens", None)
    if tokens == "inf":
        changes["max_tokens"] = service.limits.new_tokens
    elif tokens is not None:
        read = Fields({"max_output_tokens": tokens}, "session")
        changes["max_tokens"] = read.whole("max_output_tokens", 1, service.limits.new_tokens)
    audio = fields.nested("audio")
    changes |= _input(audio.nested("input"), service) | _output(audio.nested("output"), service)
    audio.finish()
    fields.only("tools", [])
    fields.only("tool_choice", "auto", "none")
    fields.ignore(*IGNORED)
    fields.finish()
    return replace(settings, **changes)


def _input(fields: Fields, service: Service) -> dict[str, Any]:
    """`audio.input`."""
    changes: dict[str, Any] = {}
    rate = _rate(fields.nested("format"), INPUT_RATES)
    if rate is not None:
        changes["rate"] = rate
    if fields.has("transcription"):
        wanted = fields.take("transcription", None)
        if wanted is not None:
            options = Fields(wanted, fields.param("transcription"))
            options.ignore("model", "language", "prompt", "delay")
            options.finish()
            if service.recogniser is None:
                raise not_supported("this model has no recogniser", fields.param("transcription"))
        changes["transcribes"] = wanted is not None
    if fields.has("turn_detection"):
        wanted = fields.take("turn_detection", None)
        changes["detects"] = wanted is not None
        if wanted is not None:
            changes |= _turns(Fields(wanted, fields.param("turn_detection")))
    fields.only("noise_reduction")
    fields.finish()
    return changes


def _turns(fields: Fields) -> dict[str, Any]:
    """`audio.input.turn_detection`."""
    fields.text("type", choices=("server_vad",))
    read = {
        "threshold": fields.number("threshold", 0.05, 1, None),
        "before_ms": fields.whole("prefix_padding_ms", 0, MAX_BEFORE, None),
        "silence_ms": fields.whole("silence_duration_ms", MIN_SILENCE, MAX_SILENCE, None),
    }
    # Whether something is answered, and stops what is being said, is what the model itself decides.
    fields.only("create_response", True)
    fields.only("interrupt_response", True)
    fields.only("idle_timeout_ms")
    fields.finish()
    return {name: value for name, value in read.items() if value is not None}


def _output(fields: Fields, service: Service) -> dict[str, Any]:
    """`audio.output`."""
    changes: dict[str, Any] = {}
    _rate(fields.nested("format"), (RATE,))
    voice = service.voice(fields, None)
    if voice is not None:
        changes["voice"] = voice
    fields.only("speed", 1, 1.0)
    fields.finish()
    return changes


def _rate(fields: Fields, allowed: tuple[int, ...]) -> int | None:
    """`format`; None: it is not named."""
    fields.text("type", "audio/pcm", choices=("audio/pcm",))
    rate = fields.take("rate", None)
    fields.finish()
    if rate is not None and rate not in allowed:
        raise invalid(f"{fields.param('rate')} must be {' or '.join(map(str, allowed))}", fields.param("rate"))
    return rate
