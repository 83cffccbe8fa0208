"""Every endpoint, asked by the official client."""

from __future__ import annotations

import base64
import io
import wave

import httpx
import numpy as np
import openai
import pytest

from tests.serving.server import MODEL, WRITTEN, Served, data_url
from vita_jax.data.audio import read_audio
from vita_jax.inference.session import Session
from vita_jax.serving.sounds import FORMATS, RATE, from_bytes

USER = {"role": "user", "content": WRITTEN}


def spoken(sound: bytes) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}


def shown(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_models_and_health(served: Served):
    client = served.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).voices == ["auto", "en", "zh"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "model": MODEL}


def test_a_chat_says_what_a_session_says(served: Served, loaded: Session):
    session = loaded.beside()
    want = ["".join(session.ask(WRITTEN)), "".join(session.ask("3+4"))]
    client = served.client()
    first = client.chat.completions.create(model=MODEL, messages=[USER])
    history = [USER, {"role": "assistant", "content": want[0]}, {"role": "user", "content": "3+4"}]
    second = client.chat.completions.create(model=MODEL, messages=history)
    assert [answer.choices[0].message.content for answer in (first, second)] == want
    assert first.choices[0].finish_reason == "stop" and first.choices[0].message.state == "text"
    usage = second.usage
    assert usage.prompt_tokens == len(session.work.prompt) and usage.completion_tokens == len(session.work.tokens)
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens  # what was said before was known


def test_streamed_is_not_streamed(served: Served):
    client = served.client()
    options = {"model": MODEL, "messages": [USER], "temperature": 1.5, "top_p": 0.9, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content and len(texts) > 3
    assert (
        chunks[-1].usage.model_dump()
        == whole.usage.model_copy(update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}).model_dump()
    )
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    hot = [options | {"seed": seed, "temperature": 2.0, "top_p": 1.0} for seed in range(6)]
    assert len({client.chat.completions.create(**other).choices[0].message.content for other in hot}) > 1


def test_an_answer_ends_at_a_stop_and_at_its_longest(served: Served):
    client = served.client()
    whole = client.chat.completions.create(model=MODEL, messages=[USER]).choices[0].message.content
    stop = whole[2:4]
    cut = client.chat.completions.create(model=MODEL, messages=[USER], stop=[stop, "nowhere"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    short = client.chat.completions.create(model=MODEL, messages=[USER], max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_pictures_and_sounds_are_seen_and_heard(served: Served, loaded: Session, question: bytes, tmp_path):
    (tmp_path / "question.wav").write_bytes(question)
    (tmp_path / "red.png").write_bytes(base64.b64decode(data_url().partition(",")[2]))
    session = loaded.beside()
    want = "".join(session.ask("", [tmp_path / "red.png"], audio=[tmp_path / "question.wav"]))
    content = [shown(data_url()), spoken(question)]
    answer = served.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    assert answer.choices[0].message.content == want and answer.choices[0].message.state == session.last_state
    assert answer.usage.prompt_tokens == len(session.work.prompt)


def test_a_system_message_replaces_the_models_own(served: Served):
    messages = [{"role": "system", "content": "Reply with one word. " * 4}, USER]
    client = served.client()
    plain = client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=1).usage.prompt_tokens
    other = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1).usage.prompt_tokens
    assert other > plain + 10


def test_an_answer_is_spoken_as_a_session_speaks_it(served: Served, loaded: Session):
    session = loaded.beside()
    text = "".join(session.ask(WRITTEN))
    want, rate = session.say(text, "en")
    options = {"model": MODEL, "messages": [USER], "modalities": ["text", "audio"]}
    client = served.client()
    whole = client.chat.completions.create(**options, audio={"voice": "auto", "format": "wav"}).choices[0].message
    assert whole.audio.transcript == text and whole.content is None
    heard = read_audio(base64.b64decode(whole.audio.data), sample_rate=rate)
    assert len(heard) == len(want) and np.abs(heard - want).max() < 0.05  # twice resampled
    chunks = client.chat.completions.create(**options, audio={"voice": "en", "format": "pcm16"}, stream=True)
    parts = [part for part in (getattr(chunk.choices[0].delta, "audio", None) for chunk in chunks) if part]
    assert "".join(part.transcript or "" for part in parts) == text
    sound = b"".join(base64.b64decode(part.data or "") for part in parts)
    with wave.open(io.BytesIO(base64.b64decode(whole.audio.data))) as file:
        assert file.getframerate() == RATE and file.readframes(10**9) == sound


def test_speech_is_given_in_every_format(served: Served, loaded: Session):
    client = served.client()
    want, rate = loaded.beside().say("four seven", "en")
    with client.audio.speech.with_streaming_response.create(
        model=MODEL, voice="auto", input="four seven", response_format="pcm"
    ) as response:
        pieces = list(response.iter_bytes())
        assert response.headers["content-type"] == "audio/pcm;rate=24000"
    sound = from_bytes(b"".join(pieces))
    assert len(sound) == -(-len(want) * RATE // rate)
    for name in FORMATS:
        made = client.audio.speech.create(model=MODEL, voice="en", input="four seven", response_format=name).content
        heard = read_audio(made, sample_rate=RATE)
        assert abs(len(heard) - len(sound)) < 0.1 * RATE, name
        if name in ("wav", "flac"):
            np.testing.assert_allclose(heard, sound, atol=1e-6)


def test_what_is_said_is_written_down(served: Served, loaded: Session, question: bytes):
    from vita_jax.data.ctc_vocabulary import load_ctc_vocabulary
    from vita_jax.inference.transcription import transcribe

    wave_16k = read_audio(question)
    vocabulary = load_ctc_vocabulary(loaded.ctc_vocabulary_file)
    [want] = transcribe(loaded.model, loaded.params, vocabulary, [wave_16k])
    client = served.client()
    said = client.audio.transcriptions.create(model=MODEL, file=("question.wav", question))
    assert said.text == want and "largest" in want
    text = client.audio.transcriptions.create(model=MODEL, file=("q.wav", question), response_format="text")
    assert text.strip() == want
    more = client.audio.transcriptions.create(model=MODEL, file=("q.wav", question), response_format="verbose_json")
    assert more.language == "en" and more.duration == pytest.approx(len(wave_16k) / 16_000, abs=0.01)


def test_figures(served: Served):
    served.client().chat.completions.create(model=MODEL, messages=[USER])
    text = httpx.get(f"{served.url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['vita_jax_requests_total{endpoint="/v1/chat/completions",status="200"}']) >= 1
    assert float(figures["vita_jax_answer_tokens_total"]) >= 1 and float(figures["vita_jax_jobs_running"]) == 0
