"""What tasks of lmms-eval show, as files and placeholders; what is missing or not offered is an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vita_jax.data.audio import read_audio
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.evaluation.lmms.requests import Files, Generation, generation, question_of, question_of_messages
from vita_jax.inference.sampling import GREEDY, Temperature, TopK, TopP


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def picture(value: int = 7) -> Image.Image:
    return Image.fromarray(np.full((4, 6, 3), value, np.uint8))


def test_pictures_stand_before_the_text_and_keep_their_pixels(files):
    first = picture()
    question = question_of("t:test:0", "Which?", [first, picture(9), first], files)
    assert question.question == ({"from": "human", "value": "<image>\n<image>\n<image>\nWhich?"},)
    assert [kind for kind, _ in question.media] == ["image"] * 3
    assert question.media[0] == question.media[2] != question.media[1]  # one file of one object
    np.testing.assert_array_equal(np.asarray(Image.open(question.media[1][1])), np.asarray(picture(9)))
    assert question_of("t", "Which?", None, files).media == ()


def test_messages_keep_the_places_of_their_files(files, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"0")
    sound = {"array": np.array([0.5, -0.25, 0.0]), "sampling_rate": 16_000}
    content = [
        {"type": "text", "text": "First "},
        {"type": "image", "url": picture()},
        {"type": "audio", "url": sound},
        {"type": "text", "text": "then"},
        {"type": "video", "url": str(tmp_path / "clip.mp4")},
    ]
    messages = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]},
        {"role": "user", "content": content},
    ]
    question = question_of_messages("t", messages, files)
    assert [turn["from"] for turn in question.question] == ["human", "gpt", "human"]
    assert question.question[2]["value"] == "First <image>\n<audio>\nthen<video>\n"
    assert [kind for kind, _ in question.media] == ["image", "video", "audio"]  # sounds last
    heard = read_audio(question.media[2][1])
    np.testing.assert_array_equal(heard, np.float32([0.5, -0.25, 0.0]))  # not rounded to 16 bits
    assert question.prompt.startswith("Hello.\nYes?\nFirst")


@pytest.mark.parametrize("channels_first", [False, True])
def test_sounds_of_every_shape(files, channels_first):
    left = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
    samples = np.stack([left, -left])
    shown = {"array": samples if channels_first else samples.T, "sampling_rate": 16_000}
    np.testing.assert_array_equal(read_audio(files.part(shown)[1][1]), left)  # the first channel, as ever
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=samples, sample_rate=16_000))
    np.testing.assert_array_equal(read_audio(files.part(decoder)[1][1]), left)
    # What lmms-eval makes of a decoded sound that its task does not write into messages.
    question = question_of_messages("t", [{"role": "user", "content": [{"type": "video", "url": shown}]}], files)
    assert question.media[0][0] == "audio"


def test_placeholders_of_the_text_are_taken_where_they_are(files):
    question = question_of("t", "Is <image> like <image>?", [picture(), picture(3)], files)
    assert question.question[0]["value"] == "Is <image> like <image>?" and len(question.media) == 2
    with pytest.raises(
        UserError, match="t: its text holds placeholders of .*'image': 1.* and the task shows .*'image': 2"
    ):
        question_of("t", "Is <image>?", [picture(), picture(3)], files)


@pytest.mark.parametrize(
    ("shown", "error", "message"),
    [
        (None, UserError, "its data is incomplete"),
        ("none.mp4", UserError, "none.mp4 does not exist"),
        ("https://host/clip.mp4", UserError, "nothing is fetched"),
        ({"video": "a.mp4", "video_start": 1, "video_end": 2}, UnsupportedOption, "only whole clips"),
        ({"path": None}, UserError, "its data is incomplete"),
        (np.zeros((3, 4, 4, 3)), UnsupportedOption, "shows ndarray"),
        ({"array": np.zeros((0,)), "sampling_rate": 16_000}, UserError, r"a sound of shape \(0,\)"),
        ({"bytes": b"1"}, UserError, "without saying of what kind"),
    ],
)
def test_what_is_missing_is_an_error(shown, error, message, files):
    with pytest.raises(error, match=message):
        question_of("t", "?", [shown], files)


def test_folders_systems_and_open_ends_are_refused(files, tmp_path):
    with pytest.raises(UnsupportedOption, match="folder of frames"):
        files.part(str(tmp_path))
    with pytest.raises(UnsupportedOption, match="role 'system'"):
        question_of_messages("t", [{"role": "system", "content": "Be brief."}], files)
    with pytest.raises(UserError, match="not of the user"):
        question_of_messages("t", [{"role": "assistant", "content": "A"}], files)


def test_options_mean_what_they_mean_in_transformers():
    assert generation({}) == Generation(1024, GREEDY, ())
    mme = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert generation(mme) == Generation(16, GREEDY, ())
    assert generation({"temperature": 0.2, "do_sample": False}).sampler == GREEDY
    assert generation({"temperature": 0.5}).sampler == Temperature(0.5)
    assert generation({"temperature": 1.0, "top_p": 0.9, "do_sample": True}).sampler == TopP(0.9, 1.0)
    assert generation({"temperature": 1.0, "top_k": 5}).sampler == TopK(5, 1.0)
    until = generation({"until": ["Question:", "</s>"], "max_gen_toks": 8})
    assert until.max_new_tokens == 8 and until.cut("42 </s> Question: x") == "42 " and until.cut("42") == "42"
    for wrong, message in (
        ({"num_beams": 3}, "num_beams=3"),
        ({"best_of": 2}, "best_of=2"),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 5}, "one of them at a time"),
    ):
        with pytest.raises(UnsupportedOption, match=message):
            generation(wrong)


def test_bytes_with_a_name_are_that_file(files, tmp_path):
    data = tmp_path / "x.jpg"
    picture().save(data)
    kind, (_, name) = files.part({"bytes": data.read_bytes(), "path": "inside.jpg"})
    assert kind == "image" and Path(name).suffix == ".jpg" and Path(name).read_bytes() == data.read_bytes()
