"""The page: what is served, and a conversation in Chromium: a file is its microphone, a picture its camera."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serving.server import WRITTEN, Served, wav
from vita_jax.serving.pages import FOLDER
from vita_jax.serving.sounds import RATE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 30_000  # milliseconds


def test_everything_the_page_needs_is_served_and_nothing_else_is_loaded(served: Served):
    page = httpx.get(served.url)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    needed = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    for name in {*needed, *(f"/page/{path.name}" for path in FOLDER.iterdir() if path.suffix != ".html")}:
        if not name.startswith("data:"):
            part = httpx.get(f"{served.url}{name}")
            assert part.status_code == 200 and part.content, name
            assert not re.findall(r"https?://", part.text), name
    # Every text there is in both languages, and every one that is asked for is there.
    texts = (FOLDER / "words.js").read_text(encoding="utf-8")
    english, chinese = (set(re.findall(r'(\w+): (?:"[^"]*"|{)', part)) for part in texts.split("zh: {"))
    assert english == chinese | {"en"}
    script = (FOLDER / "page.js").read_text(encoding="utf-8") + page.text
    asked = {first or second for first, second in re.findall(r'data-(?:text|label)="(\w+)"|say\("(\w+)"\)', script)}
    assert asked and asked <= english
    identifiers = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert identifiers and all(f'id="{name}"' in page.text for name in identifiers)


def write_video(path: Path, picture: bytes) -> None:
    """A picture as an uncompressed video (YUV4MPEG2), which Chromium takes for its camera."""
    pixels = Image.open(io.BytesIO(picture)).convert("YCbCr").resize((320, 240))
    y, u, v = (np.asarray(channel) for channel in pixels.split())
    frame = b"FRAME\n" + y.tobytes() + u[::2, ::2].tobytes() + v[::2, ::2].tobytes()
    path.write_bytes(b"YUV4MPEG2 W320 H240 F10:1 Ip A1:1 C420jpeg\n" + 10 * frame)


@pytest.fixture
def browser(tmp_path: Path, speech, digits: bytes) -> Iterator[Any]:
    """Chromium, whose microphone hears a question once."""
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    silence = np.zeros(2 * RATE, np.float32)
    sound = np.concatenate([silence, speech("Count the digits."), silence])
    (tmp_path / "microphone.wav").write_bytes(wav(sound))
    write_video(tmp_path / "camera.y4m", digits)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=BROWSER,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}%noloop",
                f"--use-file-for-fake-video-capture={tmp_path / 'camera.y4m'}",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield running
        running.close()


def wait_until(page: Any, condition: str) -> None:
    """Until a condition holds in the page; its policy forbids what Playwright does for that."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, (condition, page.evaluate("window.states"), page.inner_text("body"))
        page.wait_for_timeout(50)


@pytest.mark.slow
def test_a_conversation_in_a_browser(served: Served, browser: Any):
    page = browser.new_page(locale="en-GB")
    problems, requests = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(served.url)
    wait_until(page, "document.querySelector('#voice').options.length === 3")
    page.evaluate(
        """() => {
          window.states = [];
          const state = document.querySelector("#state");
          new MutationObserver(() => window.states.push(state.dataset.state)).observe(state, { attributes: true });
        }"""
    )
    # A question aloud, with the camera's picture.
    page.check("#use-camera")
    wait_until(page, "document.querySelector('#camera').videoWidth === 320")
    page.click("#start")
    page.wait_for_selector("#log .you img", timeout=PATIENCE)
    page.wait_for_selector("#log .model", timeout=PATIENCE)
    wait_until(page, "/[0-9]/.test(document.querySelector('#first-audio').textContent)")
    wait_until(page, "/[0-9]/.test(document.querySelector('#heard-after').textContent)")
    wait_until(page, "document.querySelector('#state').dataset.state === 'listening'")
    states = page.evaluate("window.states")
    order = ["listening", "hearing", "thinking", "speaking", "listening"]
    places = iter(states)
    assert all(state in places for state in order), states
    assert "count" in page.inner_text("#log .you")
    # A typed one, in Chinese surroundings, without the camera.
    page.uncheck("#use-camera")
    page.click("#language")
    assert page.inner_text("#start") == "结束" and page.inner_text("#state-text") == "在听"
    page.fill("#text", WRITTEN.replace("\n", " "))
    page.press("#text", "Enter")
    wait_until(page, "document.querySelectorAll('#log .model').length === 2")
    wait_until(page, "document.querySelector('#stop-answer').disabled")
    # Push to talk.
    page.uncheck("#hands-free")
    page.wait_for_selector("#talk:not([hidden])")
    page.dispatch_event("#talk", "pointerdown")
    page.wait_for_timeout(700)
    page.dispatch_event("#talk", "pointerup")
    wait_until(page, "document.querySelectorAll('#log .model, #log .ignored').length === 3")
    page.click("#start")
    wait_until(page, "document.querySelector('#state').dataset.state === 'off'")
    assert not problems and all(url.startswith((served.url, "data:", "blob:")) for url in requests)
    assert page.is_hidden("#problem"), page.inner_text("#problem")
