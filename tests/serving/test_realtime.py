"""Realtime sessions with the official client."""

from __future__ import annotations

import base64
import time

import pytest
import websockets.exceptions
from websockets.sync.client import connect

from tests.serving.server import MODEL, WRITTEN, Served, serving
from tests.serving.talker import DONE, IGNORED, sound, talking, transcript, types
from vita_jax.inference.session import Session
from vita_jax.ops.filter_bank import resample
from vita_jax.serving.limits import Limits
from vita_jax.serving.sounds import RATE

DESCRIBE, COUNT, STATEMENT = (
    "Describe the picture.",
    "Count the digits.",
    "The train was late again and we had to wait.",
)
MANUAL = {"audio": {"input": {"turn_detection": None}}}
WITH_TEXT = {"output_modalities": ["text"]}


def test_a_spoken_question_is_answered_aloud(served: Served, speech, digits: bytes):
    with talking(served) as talker:
        shown = talker.update(audio={"input": {"transcription": {"model": MODEL}}, "output": {"voice": "en"}}).session
        assert shown.audio.input.transcription.model == MODEL and shown.audio.output.voice == "en"
        talker.show(digits)
        talker.listen("conversation.item.done")
        talker.say(speech(COUNT))
        events = talker.listen(DONE)
        if not any("transcription" in event.type for event in events):
            events += talker.listen("conversation.item.input_audio_transcription.completed")
    said = [kind for kind in types(events) if "delta" not in kind and "transcription" not in kind]
    assert said == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        DONE,
    ]
    by_type = {event.type: event for event in events}
    done = by_type[DONE].response
    assert done.status == "completed" and transcript(events).strip() == "4"
    assert done.output[0].content[0].transcript == transcript(events)
    assert len(sound(events)) > 0.1 * RATE and int(done.metadata["first_audio_ms"]) > 0
    started, stopped = (by_type[f"input_audio_buffer.speech_{what}"] for what in ("started", "stopped"))
    assert 0 <= started.audio_start_ms < 500 < stopped.audio_end_ms < 3000 and started.item_id == stopped.item_id
    heard = by_type["conversation.item.input_audio_transcription.completed"]
    assert "count" in heard.transcript and heard.item_id == started.item_id


def test_what_is_not_meant_for_the_model_is_ignored(served: Served, speech):
    with talking(served) as talker:
        talker.say(speech(STATEMENT, "en-gb"))
        events = talker.listen((IGNORED, DONE))
        assert events[-1].type == IGNORED and events[-1].reason == "noise"
        talker.ask(WRITTEN)
        assert talker.listen(DONE)[-1].response.status == "completed"


def test_sound_at_16_khz_is_heard_alike(served: Served, speech, digits: bytes):
    with talking(served) as talker:
        talker.update(audio={"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}, **WITH_TEXT)
        talker.show(digits)
        talker.say(resample(speech(COUNT), RATE, 16_000), 16_000)
        assert transcript(talker.listen(DONE)).strip() == "4"


def test_the_client_may_say_when_it_has_spoken(served: Served, speech, digits: bytes):
    with talking(served) as talker:
        talker.update(**MANUAL, **WITH_TEXT)
        talker.connection.input_audio_buffer.commit()
        assert talker.listen("error")[-1].error.code == "input_audio_buffer_commit_empty"
        talker.say(speech(STATEMENT))
        talker.connection.input_audio_buffer.clear()
        talker.listen("input_audio_buffer.cleared")
        talker.show(digits)
        talker.say(speech(COUNT))
        talker.connection.input_audio_buffer.commit()
        committed = talker.listen("input_audio_buffer.committed")[-1]
        assert talker.listen("conversation.item.done")[-1].item.id == committed.item_id
        talker.connection.response.create()
        events = talker.listen(DONE)
        assert transcript(events).strip() == "4" and not any("speech" in event.type for event in events)
        talker.connection.response.create()
        assert talker.listen("error")[-1].error.code == "nothing_to_answer"
    with talking(served) as talker:
        talker.update(**MANUAL, **WITH_TEXT)
        # What is not meant for the model has an answer without content, for which a client waits.
        talker.say(speech(STATEMENT))
        talker.connection.input_audio_buffer.commit()
        talker.connection.response.create()
        done = talker.listen(DONE)[-1].response
        assert done.status == "completed" and done.output == [] and done.metadata == {"ignored": "noise"}


def test_typed_text_is_answered_as_in_a_session(served: Served, loaded: Session):
    session = loaded.beside()
    want = ["".join(session.ask(text)) for text in (WRITTEN, "red/white: 35\nWhat is the smallest digit?")]
    with talking(served) as talker:
        talker.update(**WITH_TEXT)
        got = []
        for text in (WRITTEN, "red/white: 35\nWhat is the smallest digit?"):
            talker.ask(text)
            events = talker.listen(DONE)
            got.append(transcript(events))
            assert "response.output_audio.delta" not in types(events)
    assert got == want


def test_an_answer_is_broken_off_where_it_was_heard(served: Served, digits: bytes):
    with talking(served) as talker:
        talker.show(digits)
        talker.ask(DESCRIBE)
        events = talker.listen("response.output_audio.delta")
        talker.connection.response.cancel()
        events += talker.listen(DONE)
        done = events[-1].response
        assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
        assert transcript(events).startswith(done.output[0].content[0].transcript)
        item = done.output[0].id
        talker.connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=0)
        assert talker.listen("conversation.item.truncated")[-1].item_id == item
        talker.connection.response.cancel()
        assert talker.listen("error")[-1].error.code == "response_cancel_not_active"
        talker.connection.conversation.item.truncate(item_id="item_x", content_index=0, audio_end_ms=0)
        assert talker.listen("error")[-1].error.code == "item_not_found"


def test_a_question_stops_the_answer(served: Served, speech, digits: bytes):
    with talking(served) as talker:
        talker.show(digits)
        talker.ask(DESCRIBE)
        talker.listen("response.output_audio.delta")
        talker.say(speech(COUNT, "en-gb"))
        first = talker.listen(lambda event: event.type == DONE or event.type == "vita_jax.response.interrupted")
        if first[-1].type == DONE and first[-1].response.status == "cancelled":
            assert first[-1].response.status_details.reason == "turn_detected"
        second = talker.listen(lambda event: event.type == DONE and event.response.status == "completed")
        assert transcript([event for event in second if getattr(event, "delta", None)]).strip().endswith("4")


def test_sessions_do_not_hear_each_other(served: Served, speech, digits: bytes):
    """Two users at once, and a chat request beside them."""
    with talking(served) as first, talking(served) as second:
        for talker in (first, second):
            talker.update(**WITH_TEXT)
        first.show(digits)
        first.say(speech(COUNT))
        second.ask("red/white: 35\nWhat is the smallest digit?")
        chat = served.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": WRITTEN}])
        mine, yours = first.listen(DONE), second.listen(DONE)
        assert transcript(mine).strip() == "4" and transcript(yours).strip() == "3"
        assert chat.choices[0].message.content == "4271"
        assert {event.response.id for event in mine if event.type == DONE}.isdisjoint(
            event.response.id for event in yours if event.type == DONE
        )
        # One leaves; the other goes on, and remembers.
        first.connection.close()
        second.ask("What is the largest digit?")
        assert transcript(second.listen(DONE)).strip() == "5"


def address(url: str, query: str = "") -> str:
    """Of the WebSocket."""
    return f"{url.replace('http', 'ws')}/v1/realtime{query}"


def refusal(url: str, query: str = "", **options: object) -> tuple[int, dict]:
    """How a WebSocket is refused."""
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        connect(address(url, query), **options).__enter__()
    response = caught.value.response
    return response.status_code, dict(response.headers)


def test_sessions_are_refused(loaded: Session):
    token = "0123456789abcdef"
    with serving(loaded, Limits(sessions=1), token=token) as running:
        key = {"Authorization": f"Bearer {token}"}
        assert refusal(running.url)[0] == 401
        assert refusal(running.url, additional_headers=key, origin="http://evil.example")[0] == 403
        protocols = ["realtime", f"openai-insecure-api-key.{token}"]
        with connect(address(running.url), subprotocols=protocols, origin=running.url) as socket:
            assert socket.subprotocol == "realtime"
            status, headers = refusal(running.url, additional_headers=key)
            assert status == 503 and int(headers["retry-after"]) >= 1
        for _ in range(100):
            if not running.service.sessions:
                break
            time.sleep(0.05)
        with talking(running):
            pass
        assert refusal(running.url, "?model=gpt", additional_headers=key)[0] == 404


LIMITS = Limits(
    sessions=2,
    message_bytes=2_000_000,
    session_seconds=60,
    idle_seconds=1.5,
    session_images=1,
    text_characters=100,
    image_pixels=10_000,
    audio_speed=1,
    audio_seconds=2,
)


def test_every_limit_of_a_session_has_its_error(loaded: Session, digits: bytes):
    with serving(loaded, LIMITS) as running, talking(running) as talker:
        silence, long = (base64.b64encode(bytes(2 * RATE * seconds)).decode() for seconds in (1, 16))

        def error_of(*events: dict) -> object:
            for event in events:
                talker.connection.send(event)
            return talker.listen("error")[-1].error

        def item(*parts: dict, **more: object) -> dict:
            given = {"type": "message", "role": "user", "content": list(parts)} | more
            return {"type": "conversation.item.create", "item": given}

        def update(**session: object) -> dict:
            return {"type": "session.update", "session": {"type": "realtime", **session}}

        def heard(**given: object) -> dict:
            return update(audio={"input": given})

        image = {"type": "input_image", "image_url": "data:image/png;base64," + base64.b64encode(digits).decode()}
        truncate = {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1}
        append = {"type": "input_audio_buffer.append", "audio": silence}
        for message, *events in (
            ("limit message_bytes", {"type": "x" * 2_000_001}),
            ("is unknown; use one of", {"type": "response.dance"}),
            ("type is missing", {"event_id": "a"}),
            ("limit audio_speed", append | {"audio": long}),
            ("not base64", append | {"audio": "###"}),
            ("samples of pcm16 have two", append | {"audio": "QUJD"}),
            ("limit text_characters", item({"type": "input_text", "text": "a" * 101})),
            ("limit session_images", item(image), item(image)),
            ("fetches nothing", item({"type": "input_image", "image_url": "https://example.org/a.png"})),
            ("use one of input_text", item({"type": "input_audio", "audio": silence})),
            ("role 'assistant'", item({"type": "input_text", "text": "a"}, role="assistant")),
            ("voice 'alloy'", update(audio={"output": {"voice": "alloy"}})),
            ("must be 24000 or 16000", heard(format={"type": "audio/pcm", "rate": 8000})),
            ("use one of audio/pcm", heard(format={"type": "audio/pcmu"})),
            ("use one of server_vad", heard(turn_detection={"type": "semantic_vad"})),
            ("interrupt_response", heard(turn_detection={"type": "server_vad", "interrupt_response": False})),
            ("before anything has been said", update(instructions="Be brief.")),
            ("unknown or not supported", update(temperature=1)),
            ("set audio.input.turn_detection to null", {"type": "input_audio_buffer.commit"}),
            ("nothing to answer", {"type": "response.create"}),
            ("no answer 'x'", truncate),
        ):
            error = error_of(*events)
            assert message in error.message, error
        assert error_of({"type": "response.create", "event_id": "mine"}).event_id == "mine"
        assert talker.listen("error")[-1].error.code in ("idle_timeout", "session_expired")
        with pytest.raises(websockets.exceptions.ConnectionClosedOK):
            talker.connection.recv()


def test_messages_have_a_rate(loaded: Session):
    with serving(loaded, Limits(messages_per_minute=40)) as running, talking(running) as talker:
        for _ in range(11):
            talker.connection.send({"type": "input_audio_buffer.commit"})
        errors = [talker.listen("error")[-1].error for _ in range(11)]
    assert [error.code for error in errors[-2:]] == [None, "rate_limit_exceeded"]


def test_a_session_ends_after_its_time(loaded: Session):
    with serving(loaded, Limits(session_seconds=1)) as running, talking(running) as talker:
        assert talker.listen("error")[-1].error.code == "session_expired"
        with pytest.raises(websockets.exceptions.ConnectionClosedOK):
            talker.connection.recv()


def test_a_vanished_client_leaves_nothing(served: Served, digits: bytes):
    with talking(served) as talker:
        talker.show(digits)
        talker.ask(DESCRIBE)
        talker.listen("response.output_audio.delta")
        talker.connection._connection.socket.close()  # without a word
    engine = served.service.session.engine
    for _ in range(200):
        if not served.service.sessions and not any(seat and seat.work for seat in engine._seats):
            break
        time.sleep(0.05)
    assert not served.service.sessions and not served.service.worker._turns
    assert not any(seat and seat.work for seat in engine._seats)
    assert served.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "3+4"}])
