"""Voice activity, the prompt of a duplex turn, and text on its way to speech."""

from __future__ import annotations

import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.inference import speech_text
from vita_jax.inference.history import Request, duplex_format, heard_text, merge_history, system_modality
from vita_jax.inference.vad import UtteranceState, VadOptions, VadState, listen, vad_step

CHUNK = 4000  # samples, a quarter of a second


def utterances(probabilities: list[float]) -> list[list[int]]:
    """Numbers of the chunks of each utterance cut from a stream with these probabilities."""
    state, found = UtteranceState(), []
    for number, probability in enumerate(probabilities):
        state, _, utterance = listen(state, np.full(CHUNK, number), probability)
        if utterance is not None:
            found.append(utterance.reshape(-1, CHUNK)[:, 0].tolist())
    return found


def test_utterance_holds_the_chunk_before_and_the_silence_after() -> None:
    assert utterances([0.1, 0.1, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]) == [[1, 2, 3, 4, 5, 6]]


def test_short_pauses_and_middling_probabilities_do_not_end_it() -> None:
    assert utterances([0.1, 0.9, 0.1, 0.1, 0.9, 0.6, 0.6, 0.6, 0.6, 0.1, 0.1, 0.1]) == [list(range(12))]


def test_speech_in_the_very_first_chunk_is_kept() -> None:
    assert utterances([0.9, 0.1, 0.1, 0.1]) == [[0, 1, 2, 3]]


def test_events_are_padded_and_options_checked() -> None:
    state, event = vad_step(VadState(heard=8000), 0.8, CHUNK)
    assert (event.kind, event.sample, event.seconds) == ("start", 12000 - 480 - 4000, 0.5)
    assert vad_step(state, 0.8, CHUNK)[1] is None
    with pytest.raises(UserError, match="threshold 1.5"):
        VadOptions(threshold=1.5)


def test_history_keeps_sounds_and_drops_pictures() -> None:
    past = [Request("<image><audio>", {"image": ["old"], "audio": ["a0"]}, "☞ Yes.")]
    current = Request("<image><audio>", {"image": ["new"], "audio": ["a1"]})
    prompt, media = merge_history(past, current, "S", duplex_format("vita_1_5"))
    assert media == {"image": ["new"], "audio": ["a0", "a1"]}
    assert prompt.count("<image>") == 1 and prompt.count("<|im_start|>user\n") == 1 and "☞Yes." in prompt
    assert system_modality(current) == "video" and system_modality(Request("hello")) == "lang"
    assert past[0].media["audio"] == ["a0"]  # nothing given is changed
    with pytest.raises(UserError, match="past request 0 has no response"):
        merge_history([current], current, "S", duplex_format("vita_1_5"))
    with pytest.raises(UserError, match="'vita_2' is unknown"):
        duplex_format("vita_2")


def test_stripping_letters_is_a_quirk_of_the_first_release() -> None:
    past, current = [Request("see <audio>", {"audio": ["a"]}, "<1>x")], Request("now")
    prompt, _ = merge_history(past, current, "S", duplex_format("vita_1_0"))
    assert prompt.startswith("system:S</s>\nuser: <audio></s>\nbot:<1>x</s>\nuser:now")  # "see" went with "user:"


def test_pieces_end_at_marks_once_they_are_long_enough() -> None:
    stream = ["No, ", "I do", " not. Really?", " and a tail"]
    assert list(speech_text.speakable_pieces(stream)) == ["No, I do not.", " Really?", " and a tail"]
    assert list(speech_text.speakable_pieces(["  "])) == []
    assert speech_text.soften_first_sentence("a, b，c") == "a。 b。c"


def test_a_decimal_point_ends_no_sentence() -> None:
    assert speech_text.ends_sentence("good.", "all")
    assert not speech_text.ends_sentence(".", "pi is 3")
    assert not speech_text.ends_sentence("well,", "") and speech_text.ends_sentence("well,", "", commas=True)


@pytest.mark.parametrize(
    ("played", "heard"),
    [
        (0.0, ""),
        (0.9, ""),
        (1.0, "One, "),
        (3.0, "One, two three "),
        (3.9, "One, two three "),
        (9.0, "One, two three four.红黄"),
    ],
)
def test_what_was_heard_is_whole_pieces_and_a_share_of_the_next(played, heard) -> None:
    spoken = [("One, ", 1.0), ("two three four.", 3.0), ("红黄", 1.0)]
    assert heard_text(spoken, played) == heard
    assert heard_text([("红黄", 1.0)], 0.5) == "红"
