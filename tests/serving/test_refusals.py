"""What is refused, and how: limits, foreign pages, wrong tokens, overload; and requests that make no sense."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from tests.serving.server import MODEL, WRITTEN, Served, data_url, serving, wav
from vita_jax.inference.session import Session
from vita_jax.serving.limits import Rate
from vita_jax.serving.problems import Problem

CHAT = "/v1/chat/completions"
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def guarded(loaded: Session):
    with serving(loaded, token=TOKEN, origins=("https://friend.example",)) as running:
        yield running


def chat(*messages: object, **options: object) -> dict:
    return {"model": MODEL, "messages": list(messages), **options}


def user(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def text(value: object) -> dict:
    return {"type": "text", "text": value}


def image(url: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def sound(data: object, form: str = "wav") -> dict:
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    return response.json()["error"]


LONG = base64.b64encode(wav(np.zeros(48_000, np.float32))).decode()
SHORT = base64.b64encode(wav(np.zeros(2_400, np.float32))).decode()
REFUSED = [
    (chat(), 400, "messages is empty"),
    (chat(*[user(text("a"))] * 4), 400, "limit messages"),
    (chat(user(text("a" * 201))), 400, "limit text_characters"),
    (chat(user(image(data_url()), image(data_url("blue")), text("?"))), 400, "limit images"),
    (chat(user(image(data_url(side=101)), text("?"))), 400, "limit image_pixels"),
    (chat(user(sound(LONG))), 400, "lasts more than 1 s"),
    (chat(user(sound(SHORT), sound(SHORT))), 400, "limit sounds"),
    (chat(user(text("a")), max_tokens=6), 400, "max_tokens is 6; expected 1 to 5"),
    (chat(user(text("a" * 10)), user=1, x="b" * 200_000), 413, "limit body_bytes"),
    (chat(user(image("https://example.org/a.png"))), 400, "fetches nothing"),
    (chat(user(image("file:///etc/passwd"))), 400, "fetches nothing"),
    (chat(user(image("data:image/png;base64,###"))), 400, "not base64"),
    (chat(user(image("data:image/png;base64,AAAA"))), 400, "not a picture"),
    (chat(user(sound("AAAA"))), 400, "not a sound file"),
    (chat(user(sound("AAAA", "mid"))), 400, "use one of wav"),
    (chat(user(text("what is <image>?"))), 400, "stands for a file"),
    (chat(user(text("\ud800"))), 400, "half a character"),
    (chat(user(text("  "))), 400, "question is empty"),
    (chat({"role": "tool", "content": "a"}), 400, "role 'tool' is not supported"),
    (chat({"role": "assistant", "content": "a"}), 400, "must be of the user"),
    (chat(user(text("a")), n=2), 400, "n is not supported"),
    (chat(user(text("a")), tools=[{}]), 400, "tools is not supported"),
    (chat(user(text("a")), logprobs=True), 400, "logprobs is not supported"),
    (chat(user(text("a")), temprature=1), 400, "temprature is unknown"),
    (chat(user(text("a")), temperature=3), 400, "temperature is 3; expected 0 to 2"),
    (chat(user(text("a")), temperature=10**400), 400, "too large a number"),
    (chat(user(text("a")), stop=""), 400, "stop must be"),
    (chat(user(text("a")), modalities=["audio"]), 400, "modalities must be"),
    (chat(user(text("a")), modalities=["text", "audio"], audio={"voice": "x", "format": "wav"}), 400, "voice 'x'"),
    ({"model": "gpt", "messages": [user(text("a"))]}, 404, "use 'quickstart'"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_every_limit_has_its_error(small: Served, body: dict, status: int, message: str):
    response = httpx.post(f"{small.url}{CHAT}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(response, status)
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_what_is_no_json_object_is_refused(small: Served):
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"1" * 5000):
        response = httpx.post(f"{small.url}{CHAT}", content=body, headers={"Content-Type": "application/json"})
        assert error_of(response, 400)["code"] == "invalid_json"
    response = httpx.post(f"{small.url}{CHAT}", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "Content-Type" in error_of(response, 415)["message"]
    assert error_of(httpx.get(f"{small.url}{CHAT}"), 405) and error_of(httpx.get(f"{small.url}/v1/nothing"), 404)


def test_forms_that_are_damaged_are_refused(small: Served):
    url, good = f"{small.url}/v1/audio/transcriptions", wav(np.zeros(12_000, np.float32))
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--x", b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--", b"--y--"):
        error_of(httpx.post(url, content=body, headers=head), 400)
    error_of(httpx.post(url, content=b"", headers={"Content-Type": "multipart/form-data"}), 400)
    for files, data, message in (
        ({}, {"model": MODEL, "x": "1"}, "Content-Type"),
        ({"file": b""}, {"model": MODEL}, "empty"),
        ({"file": b"RIFF"}, {"model": MODEL}, "not a sound file"),
        ({"file": wav(np.zeros(10, np.float32))}, {"model": MODEL}, "at least 0.1 s"),
        ({"file": wav(np.zeros(48_000, np.float32))}, {"model": MODEL}, "lasts more than 1 s"),
        ({"file": good}, {}, "model is missing"),
        ({"file": good}, {"model": MODEL, "response_format": "srt"}, "response_format 'srt'"),
        ({"file": good}, {"model": MODEL, "stream": "true"}, "stream is not supported"),
        ({"file": good, "other": good}, {"model": MODEL}, "form is damaged"),
    ):
        response = httpx.post(url, files=files, data=data)
        assert message in response.json()["error"]["message"], response.text


def test_speech_that_cannot_be_made_is_refused(small: Served):
    for body, message in (
        ({"input": " ", "voice": "en"}, "input is empty"),
        ({"input": "a" * 201, "voice": "en"}, "limit text_characters"),
        ({"input": "four", "voice": "alloy"}, "use one of auto, en, zh"),
        ({"input": "four", "voice": "en", "speed": 2}, "speed is not supported"),
        ({"input": "four", "voice": "en", "response_format": "midi"}, "use one of mp3"),
        ({"input": "...", "voice": "en"}, "makes no sound"),
    ):
        response = httpx.post(f"{small.url}/v1/audio/speech", json={"model": MODEL, **body})
        assert message in error_of(response, 400)["message"]


def test_a_body_that_does_not_come_is_not_waited_for(small: Served):
    with socket.create_connection(("localhost", int(small.url.rpartition(":")[2]))) as client:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        )
        client.sendall(head.encode() + b"{")
        client.settimeout(10)
        assert b" 408 " in client.recv(1000)


def test_overload_is_answered_at_once(small: Served, monkeypatch: pytest.MonkeyPatch):
    """One request runs, none may wait."""
    go, begun = threading.Event(), threading.Event()

    def slow(self: Session, *given: object, **named: object):
        begun.set()
        assert go.wait(20)
        return ask(self, *given, **named)

    ask = Session.ask
    monkeypatch.setattr(Session, "ask", slow)
    body, answers = chat(user(text(WRITTEN)), max_tokens=2), []
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{small.url}{CHAT}", json=body, timeout=30)))
    thread.start()
    assert begun.wait(20)
    refused = httpx.post(f"{small.url}{CHAT}", json=body)
    assert error_of(refused, 503)["code"] == "overloaded" and int(refused.headers["Retry-After"]) >= 1
    assert httpx.get(f"{small.url}/health").status_code == 200  # the event loop is free
    go.set()
    thread.join()
    assert answers[0].status_code == 200


def test_a_client_that_leaves_ends_its_answer(small: Served):
    body = chat(user(text(WRITTEN)), stream=True, max_tokens=5)
    with httpx.stream("POST", f"{small.url}{CHAT}", json=body) as response:
        assert response.status_code == 200
    for _ in range(100):
        if small.service.worker.load == (0, 0):
            break
        time.sleep(0.05)
    assert small.service.worker.load == (0, 0)
    assert httpx.post(f"{small.url}{CHAT}", json=body | {"stream": False}).status_code == 200


def test_other_pages_and_other_names_are_refused(served: Served, guarded: Served):
    own = served.url.removeprefix("http://")
    for headers, status in (
        ({}, 200),
        ({"Origin": served.url}, 200),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "https://" + own}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "127.evil.example"}, 421),
        ({"Host": "["}, 421),
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),  # a name that was pointed here
    ):
        assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == status, headers
    key = {"Authorization": f"Bearer {TOKEN}"}
    friend = httpx.get(f"{guarded.url}/v1/models", headers=key | {"Origin": "https://friend.example"})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    foe = httpx.get(f"{guarded.url}/v1/models", headers=key | {"Origin": "https://foe.example"})
    assert error_of(foe, 403)["code"] == "wrong_origin" and "access-control-allow-origin" not in foe.headers


def test_the_token_is_asked_for(guarded: Served):
    for path in ("/v1/models", "/metrics"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            response = httpx.get(f"{guarded.url}{path}", headers=encoded)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{guarded.url}/health").status_code == 200
    assert [model.id for model in guarded.client().models.list()] == [MODEL]


def test_a_rate_is_kept():
    now = 0.0
    rate = Rate(60, clock=lambda: now)
    for _ in range(15):
        rate.take("a")
    with pytest.raises(Problem, match="requests_per_minute") as caught:
        rate.take("a")
    assert caught.value.status == 429 and caught.value.headers == {"Retry-After": "1"}
    rate.take("b")
    now = 2.0
    rate.take("a")
    rate.take("a")
    with pytest.raises(Problem):
        rate.take("a")
