"""`python -m vita_jax.serve`: what it prints, and what it refuses before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from tests.serving.server import LIMITS, WEIGHTS
from vita_jax import serve
from vita_jax.serve import check_arguments, make_parser, read_token
from vita_jax.serving import server
from vita_jax.serving.limits import Limits, changed_limits
from vita_jax.serving.tls import own_certificate

TOKEN = "0123456789abcdef"


def test_it_says_where_and_what_it_serves(monkeypatch: pytest.MonkeyPatch, capsys):
    served = []
    monkeypatch.setattr(server, "run", lambda app, service, listening, tls: served.append((service, tls)))
    arguments = ["--checkpoint", str(WEIGHTS), "--port", "0", "--cold", "--answers", "3", "--limit", "sessions=2"]
    assert serve.main([*arguments, "--name", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine: http://localhost:") and "  /v1/realtime" in lines and lines[-1] == "stopped"
    [(service, tls)] = served
    assert tls is None and service.limits.sessions == 2 and service.session.engine.num_rows == 3 + 2 * 2
    service.close()


def test_weights_and_cache_may_be_int8_and_strangers_need_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    served = []
    monkeypatch.setattr(server, "run", lambda app, service, listening, tls: served.append((service, tls)))
    (tmp_path / "token.txt").write_text(TOKEN)
    files = list(map(str, own_certificate(tmp_path, ["localhost"])))
    secured = ["--token-file", str(tmp_path / "token.txt"), "--tls", "--certificate", files[0], "--key", files[1]]
    secured += ["--host", "127.0.0.1", "--origin", "https://example.org"]
    arguments = ["--checkpoint", str(WEIGHTS), "--port", "0", "--cold", "--answers", "1", "--limit", "sessions=1"]
    assert serve.main([*arguments, *secured, "--int8", "cache", "weights"]) == 0
    weights, cache, where = capsys.readouterr().out.splitlines()[:3]
    assert "instead of" in weights and cache.startswith("cache of 3 x 2,048 positions: ") and "instead of" in cache
    [(service, tls)] = served
    assert tls == tuple(files) and where.partition(": ")[2].startswith("https://127.0.0.1:")
    session = service.session
    assert session.engine.cache_dtype == np.int8
    assert session.params["language"]["lm_head"]["kernel"].dtype == np.int8
    other = service.conversation()
    assert "".join(other.ask("red/white: 47\nWhat is the largest digit?")).strip() == "7"
    service.close()


def test_an_address_that_is_taken_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert serve.main(["--checkpoint", str(WEIGHTS), "--port", port]) == 2
    assert f"cannot listen on localhost:{port}" in capsys.readouterr().err


def test_a_certificate_that_is_none_is_refused(tmp_path: Path, capsys):
    (tmp_path / "a.pem").write_text("nothing")
    files = ["--certificate", str(tmp_path / "a.pem"), "--key", str(tmp_path / "a.pem")]
    assert serve.main(["--checkpoint", str(WEIGHTS), "--port", "0", "--tls", *files]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_arguments_that_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path):
    parser, needed = make_parser(), ["--checkpoint", "x"]
    for arguments, message in (
        (["--host", "0.0.0.0"], "lets other machines in"),
        (["--host", "example.org"], "lets other machines in"),
        (["--port", "-1"], "must be 0 to 65535"),
        (["--answers", "0"], "at least 1"),
        (["--certificate", "a"], "belong together"),
        (["--certificate", "a", "--key", "b"], "is for --tls"),
        (["--origin", "example.org"], "scheme and a host"),
    ):
        with pytest.raises(Exception, match=message):
            check_arguments(parser.parse_args(needed + arguments), None)
    check_arguments(parser.parse_args([*needed, "--host", "0.0.0.0"]), TOKEN)
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(Exception, match="16 to 512"):
        read_token(parser.parse_args([*needed, "--token-file", str(tmp_path / "token")]))
    monkeypatch.setenv("VITA_JAX_TOKEN", TOKEN)
    assert read_token(parser.parse_args(needed)) == TOKEN
    assert changed_limits(LIMITS, ["images=3", "audio_seconds=2.5"]) == Limits(images=3, audio_seconds=2.5)
    for change, message in (
        ("images", "NAME=VALUE"),
        ("x=1", "NAME=VALUE"),
        ("images=a", "whole"),
        ("images=0", "least"),
    ):
        with pytest.raises(Exception, match=message):
            changed_limits(LIMITS, [change])
