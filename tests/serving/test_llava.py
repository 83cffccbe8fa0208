"""A LLaVA behind the server: pictures are seen, sound is refused."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import openai
import pytest

from tests.exchange.test_llava import public_llava
from tests.serving.server import MODEL, data_url, serving, wav
from vita_jax.exchange.importing import import_released
from vita_jax.exchange.released import read_released
from vita_jax.inference.session import Session


def test_a_question_about_a_picture(tmp_path):
    public_llava(tmp_path / "public", "original")
    import_released(read_released("llava", tmp_path / "public"), tmp_path / "run")
    loaded, url = Session.load(tmp_path / "run", num_rows=2), data_url("green", 13)
    (tmp_path / "green.png").write_bytes(base64.b64decode(url.partition(",")[2]))
    session = loaded.beside(max_new_tokens=3)
    want = "".join(session.ask("colour?", [tmp_path / "green.png"]))
    shown = {"type": "image_url", "image_url": {"url": url}}
    asked = {"role": "user", "content": [shown, {"type": "text", "text": "colour?"}]}
    sound = base64.b64encode(wav(np.zeros(2400, np.float32))).decode()
    said = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
    with serving(loaded, answers=1) as served:
        client = served.client()
        answer = client.chat.completions.create(model=MODEL, messages=[asked], max_completion_tokens=3)
        assert answer.choices[0].message.content == want
        assert answer.usage.prompt_tokens == len(session.work.prompt) > loaded.config.model.tokens_per_tile
        with pytest.raises(openai.BadRequestError, match="this model does not hear; leave input_audio out"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [said]}])
        assert httpx.post(f"{served.url}/v1/audio/speech", json={}).status_code == 404
