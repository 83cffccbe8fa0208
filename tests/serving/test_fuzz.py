"""Whatever is sent, the server answers; a mistake of its own is never the answer."""

from __future__ import annotations

import base64
import json

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from tests.serving.server import MODEL, Served
from vita_jax.serving.realtime import HANDLERS
from vita_jax.serving.sounds import to_bytes

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
FUZZER = httpx.Client(timeout=30)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BASE64 = st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()) | st.text(max_size=30)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "input_audio"]) | VALUES,
        "text": st.text(max_size=20) | VALUES,
        "image_url": st.fixed_dictionaries({"url": BASE64.map("data:image/png;base64,".__add__)}) | VALUES,
        "input_audio": st.fixed_dictionaries({"data": BASE64, "format": st.sampled_from(["wav", "mp3"])}) | VALUES,
    },
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system"]) | VALUES,
        "content": st.lists(PARTS, max_size=3) | VALUES,
        "name": VALUES,
    },
)
BODIES = st.fixed_dictionaries(
    {"model": st.just(MODEL) | VALUES, "max_tokens": st.integers(-1, 3)},
    optional={
        "messages": st.lists(MESSAGES, max_size=3) | VALUES,
        "stream": st.booleans() | VALUES,
        **{name: VALUES for name in ("temperature", "stop", "seed", "modalities", "audio", "stream_options", "n")},
    },
)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES | VALUES)
def test_no_request_makes_a_mistake_of_the_server(small: Served, body: object):
    data = json.dumps(body)
    head = {"Content-Type": "application/json"}
    response = FUZZER.post(f"{small.url}{CHAT}", content=data, headers=head)
    small.service.rate._left.clear()  # the limit of the rate is another test's
    assert response.status_code in (200, 400, 404), response.text


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(sound=st.binary(max_size=200), head=st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\x1aE\xdf\xa3"]))
def test_no_file_makes_a_mistake_of_the_server(small: Served, sound: bytes, head: bytes):
    files = {"file": ("a.wav", head + sound)}
    response = FUZZER.post(f"{small.url}/v1/audio/transcriptions", files=files, data={"model": MODEL})
    small.service.rate._left.clear()
    assert response.status_code == 400, response.text


NOISE = np.random.default_rng(0).normal(0, 0.1, 4_800).astype(np.float32)
SOUND = st.just(base64.b64encode(to_bytes(NOISE)).decode())
TURNS = st.none() | st.fixed_dictionaries({"type": st.just("server_vad"), "threshold": st.floats(0, 1)}) | VALUES
SESSIONS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.just("realtime") | VALUES,
        "output_modalities": st.sampled_from([["text"], ["audio"]]) | VALUES,
        "instructions": st.text(max_size=20) | VALUES,
        "max_output_tokens": st.integers(-1, 8) | VALUES,
        "audio": VALUES | st.fixed_dictionaries({"input": st.fixed_dictionaries({"turn_detection": TURNS})}),
    },
)
ITEM_PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "input_image"]) | VALUES},
    optional={
        "text": st.text(max_size=20) | VALUES,
        "image_url": BASE64.map("data:image/png;base64,".__add__) | VALUES,
    },
)
ITEMS = st.fixed_dictionaries(
    {"type": st.just("message"), "role": st.just("user") | VALUES, "content": st.lists(ITEM_PARTS, max_size=2) | VALUES}
)
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(sorted(HANDLERS)) | VALUES},
    optional={
        "event_id": st.text(max_size=5) | VALUES,
        "session": SESSIONS | VALUES,
        "audio": SOUND | BASE64 | VALUES,
        "item": ITEMS | VALUES,
        "response": VALUES,
        "item_id": st.text(max_size=5) | VALUES,
        "content_index": st.integers(-1, 1) | VALUES,
        "audio_end_ms": st.integers(-1, 10**8) | VALUES,
    },
)
SENT = EVENTS.map(json.dumps) | st.text(max_size=40) | st.binary(max_size=40)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(SENT, min_size=1, max_size=8))
def test_no_message_of_a_session_makes_a_mistake_of_the_server(served: Served, messages: list):
    served.service.rate._left.clear()
    with connect(f"{served.url.replace('http', 'ws')}/v1/realtime") as socket:
        for message in (*messages, json.dumps({"type": "dance", "event_id": "the last"})):
            socket.send(message)
        while True:
            event = json.loads(socket.recv(timeout=30))
            if event["type"] == "error":
                assert event["error"]["code"] != "internal_error", event
                if event["error"]["event_id"] == "the last":
                    break
    assert httpx.get(f"{served.url}/health").status_code == 200
