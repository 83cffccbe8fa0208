"""Compiles what requests will run, so that no client waits for it and none is held up by another's first question."""

from __future__ import annotations

import io
import itertools

import numpy as np
from PIL import Image

from vita_jax.data.records import Media
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.silero import Button
from vita_jax.ops.filter_bank import resample
from vita_jax.serving.service import Service
from vita_jax.serving.sounds import RATE, encoded, to_bytes

SECONDS = (1.0, 2.5, 5.0)  # of sounds; longer ones are compiled when they come
WORDS = {"en": ("one.", "one two three four five six."), "zh": ("一。", "一二三四五六七八九。")}


def warm_up(service: Service) -> None:
    """Runs everything once; called before there are requests. What a model cannot do is left out."""
    session = service.session
    session.engine.warm_up()
    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    shown = [Media("image", "picture", picture.getvalue())]
    other = service.conversation(max_new_tokens=2)
    list(other.ask("?", images=shown))
    other.close()
    for seconds in SECONDS if service.hears else ():
        wave = 0.01 * np.sin(np.arange(int(seconds * RATE)) / 5).astype(np.float32)
        sound = encoded(to_bytes(wave), "wav")
        other = service.conversation(max_new_tokens=2)
        list(other.ask("", audio=[Media("audio", "sound", sound)]))
        other.close()
        if service.recogniser is not None:
            service.transcript(resample(wave, RATE, session.config.audio.sample_rate))
    if service.mute_reason is None:
        _converse(service)
    if session.external is None:
        for language in service.voices[1:]:
            for words in WORDS.get(language, ()):
                list(session.aloud([words], language))


def _converse(service: Service) -> None:
    """A spoken question and its answer, whose player is as fast as can be."""
    seconds = itertools.count()
    speak = bool(service.voices)
    duplex = Duplex.of(
        service.conversation(max_new_tokens=8), speak=speak, detector=Button(), clock=lambda: float(next(seconds))
    )
    rng = np.random.default_rng(0)
    for question in (None, "?"):
        if question is None:
            duplex.hear(rng.normal(0, 0.05, 40_000).astype(np.float32))
            duplex.end_utterance()
        else:
            duplex.ask(question)
        while duplex.advance():
            pass
    duplex.close()
