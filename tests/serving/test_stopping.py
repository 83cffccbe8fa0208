"""A server that is told to stop: what runs is finished, whoever talks is told, nothing new begins; its certificate."""

from __future__ import annotations

import json
import signal
import ssl
import threading
import time

import httpx
import pytest
import websockets.exceptions

from tests.serving.server import MODEL, WRITTEN, serving
from tests.serving.talker import talking
from vita_jax.inference.session import Session
from vita_jax.serving.tls import machine_names, own_certificate


def test_a_signal_lets_answers_end_and_tells_sessions(loaded: Session, monkeypatch: pytest.MonkeyPatch):
    go, begun = threading.Event(), threading.Event()
    ask = Session.ask

    def slow(self: Session, *given: object, **named: object):
        begun.set()
        assert go.wait(20)
        return ask(self, *given, **named)

    with serving(loaded) as running, talking(running) as talker:
        monkeypatch.setattr(Session, "ask", slow)
        body, answers = {"model": MODEL, "messages": [{"role": "user", "content": WRITTEN}]}, []
        url = f"{running.url}/v1/chat/completions"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=30)))
        thread.start()
        assert begun.wait(20)
        running.server.handle_exit(signal.SIGTERM, None)
        assert talker.listen("error")[-1].error.code == "server_shutdown"
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            talker.connection.recv()
        assert closed.value.rcvd.code == 1001
        refused = httpx.post(url, json=body)
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        assert httpx.get(f"{running.url}/health").json()["status"] == "stopping"
        go.set()
        thread.join()
        assert answers[0].json()["choices"][0]["message"]["content"] == "4271"
        for _ in range(200):
            if running.server.should_exit:
                break
            time.sleep(0.05)
        assert running.server.should_exit


def test_a_certificate_is_made_once_and_serves(loaded: Session, tmp_path):
    names = machine_names("localhost")
    assert {"localhost", "127.0.0.1"} <= set(names)
    certificate, key = own_certificate(tmp_path, names)
    made = certificate.read_bytes()
    assert key.stat().st_mode & 0o077 == 0
    assert own_certificate(tmp_path, names) == (certificate, key) and certificate.read_bytes() == made
    with serving(loaded, tls=(str(certificate), str(key))) as running:
        trusting = ssl.create_default_context(cafile=str(certificate))
        for host in ("localhost", "127.0.0.1"):
            url = f"https://{host}:{running.url.rpartition(':')[2]}/v1/models"
            models = httpx.get(url, verify=trusting, headers={"Origin": url.removesuffix("/v1/models")})
            assert json.loads(models.text)["data"][0]["id"] == MODEL
    own_certificate(tmp_path, [*names, "example.org"])
    assert certificate.read_bytes() != made
