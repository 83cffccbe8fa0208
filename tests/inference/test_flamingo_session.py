"""Questions to a Flamingo: the document that they make, what it is given to see, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.flamingo import FRAMES, SIDE, flamingo_experiment, prepare_documents
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.flamingo_session import FlamingoSession
from vita_jax.models.flamingo import text_inputs
from vita_jax.training.experiment import build_model, data_folder, tokenizer_folder


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[FlamingoSession, Path]:
    """A session with random weights, and the folder of its pictures."""
    config = prepare_documents(flamingo_experiment(tmp_path_factory.mktemp("session")))
    model = build_model(config)
    init = jax.jit(model.init)(jax.random.key(0), text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE))
    params = nn.unbox(init)["params"]
    session = FlamingoSession(model, params, config, load_tokenizer(tokenizer_folder(config)), max_new_tokens=4)
    return session, data_folder(config) / "source"


@pytest.fixture
def session(known) -> FlamingoSession:
    known[0].reset()
    return known[0]


def test_a_conversation_is_a_document(session, known):
    red, blue = (str(known[1] / f"{name}.png") for name in ("red", "blue"))
    (first,) = session.ask("Which colour? ", [red])
    assert session.text == f"{IMAGE}Question:Which colour? Short answer:{first}{END_OF_CHUNK}"
    (second,) = session.ask("And these?", [blue, red])
    want = f"{IMAGE}{END_OF_CHUNK}{IMAGE}Question:And these? Short answer:{second}{END_OF_CHUNK}"
    assert session.text.endswith(want) and len(session.media) == 3
    (third,) = session.ask(f"The last {IMAGE}one?")
    assert session.text.endswith(f"Question:The last one? Short answer:{third}{END_OF_CHUNK}")
    assert session.text.count(IMAGE) == 3
    session.reset()
    assert session.text == "" and session.media == []


def test_a_question_sees_the_last_picture(session, known):
    list(session.ask("Which colour?", [str(known[1] / "red.png")]))
    media = list(session.media)
    inputs = session._inputs(f"{session.text}Question:Again? Short answer:", media)
    times, segments = np.asarray(inputs.media_times[0]), np.asarray(inputs.segment_ids[0])
    assert set(times[segments > 0]) == {1} and np.all(times[segments == 0] == 0)
    assert inputs.images.shape == (1, 1, 1, SIDE, SIDE, 3)


def test_clips_have_the_frames_of_training(session, known):
    list(session.ask("First?", videos=[str(known[1] / "red.mp4")]))
    inputs = session._inputs(session.text, session.media)
    assert inputs.images.shape == (1, 1, FRAMES, SIDE, SIDE, 3)
    with pytest.raises(UserError, match="a document has pictures or clips, not both; /reset"):
        session.ask("And?", [str(known[1] / "red.png")])


def test_an_answer_that_is_not_read_leaves_no_trace(session, known):
    session.ask("Which colour?", [str(known[1] / "red.png")])
    assert session.text == "" and session.media == []


def test_what_it_cannot_do(session, known):
    with pytest.raises(UserError, match="does not hear"):
        session.ask("", audio=["a.wav"])
    with pytest.raises(UserError, match="the question is empty"):
        session.ask("  ")
    with pytest.raises(UserError, match="does not speak"):
        session.speaker("en")
    with pytest.raises(UserError, match="no such file"):
        session.ask("What?", [str(known[1] / "none.png")])
    with pytest.raises(UserError, match=r"the document has \d+ tokens, the model has room for 508"):
        session.ask("colour " * 600)
