"""Sentences: held out by their text, a vocabulary that is really used, and answers in spoken words."""

import re

import numpy as np
import pytest

from data_pipelines.quickstart.questions import _QUESTIONS, ask
from data_pipelines.quickstart.scenes import sample_scene
from data_pipelines.quickstart.sentences import (
    DIGITS_SHARE,
    HELD_OUT_SHARE,
    MAX_UNITS,
    MAX_WORDS,
    MIN_WORDS,
    REFUSAL,
    TRANSCRIBE,
    distinct_sentences,
    draw_digits,
    draw_sentence,
    draw_statement,
    draw_words,
    split_of,
    units,
    vocabulary_words,
)
from data_pipelines.quickstart.vocabulary import FILLERS, TEMPLATES
from vita_jax.data.spoken_words import answer_aloud, digits_aloud, heard, number_aloud
from vita_jax.errors import UserError

LANGUAGES = ("en", "zh")
WANTED = {"en": 300, "zh": 200}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_vocabulary_really_occurs(language):
    texts = distinct_sentences(language, "train", 2000, np.random.default_rng(0))
    assert len({unit for text in texts for unit in units(text, language)}) >= WANTED[language]


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_texts_never_occur_in_training(language):
    train = distinct_sentences(language, "train", 1500, np.random.default_rng(0))
    held_out = distinct_sentences(language, "held_out", 200, np.random.default_rng(1))
    assert not {t.replace(" ", "") for t in train} & {t.replace(" ", "") for t in held_out}
    words = {unit for text in train for unit in units(text, language)}
    new = [t for t in held_out if not set(units(t, language)) <= words]
    assert len(new) < 0.05 * len(held_out)  # sentences are new, words are not


def test_the_split_is_a_property_of_the_text():
    assert split_of("the cat sleeps") == split_of("thecat  sleeps")
    share = np.mean([split_of(f"text {index}") == "held_out" for index in range(5000)])
    assert share == pytest.approx(1 / HELD_OUT_SHARE, abs=0.015)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_slot_has_fillers_and_every_filler_a_slot(language):
    slots = {slot for template in TEMPLATES[language] for slot in re.findall(r"\{(\w+)\}", template)}
    assert slots == set(FILLERS[language])
    assert all(len(set(f)) == len(f) > 1 for f in FILLERS[language].values())
    assert len(set(TEMPLATES[language])) == len(TEMPLATES[language])


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_what_is_heard_and_some_recite_digits(language):
    rng = np.random.default_rng(0)
    texts = [draw_sentence(language, "train", rng) for _ in range(600)]
    assert all(text == heard(text) and "{" not in text for text in texts)
    digits = set(digits_aloud(range(10), language).split() if language == "en" else digits_aloud(range(10), language))
    recited = [set(units(text, language)) <= digits for text in texts]
    assert np.mean(recited) == pytest.approx(DIGITS_SHARE, abs=0.05)


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_in_no_order_are_those_of_the_sentences(language):
    rng = np.random.default_rng(0)
    gap = " " if language == "en" else ""
    drawn = [draw_words(language, "train", rng) for _ in range(400)]
    assert len(set(drawn)) == len(drawn) and all(split_of(text) == "train" for text in drawn)
    known = set("".join(vocabulary_words(language)) if language == "zh" else vocabulary_words(language))
    statements = [draw_statement(language, "train", rng) for _ in range(400)]
    for text in drawn + statements:
        assert set(units(text, language)) <= known and text == heard(text)
    assert max(len(list(units(text, language))) for text in drawn) <= MAX_UNITS
    if language == "en":
        lengths = {len(text.split(gap)) for text in drawn}
        assert lengths == set(range(MIN_WORDS, MAX_WORDS + 1))


def test_statements_are_no_questions():
    questions = {heard(text) for kinds in _QUESTIONS.values() for texts in kinds.values() for text in texts}
    rng = np.random.default_rng(0)
    for language in LANGUAGES:
        drawn = {draw_statement(language, split, rng) for split in ("train", "held_out") for _ in range(300)}
        assert not drawn & questions


def test_drawing_is_deterministic():
    first, again = ([draw_digits("zh", "train", np.random.default_rng(5)) for _ in range(3)] for _ in range(2))
    assert first == again
    assert len(set(distinct_sentences("en", "held_out", 50, np.random.default_rng(2), statements_only=True))) == 50


@pytest.mark.parametrize(
    ("answer", "language", "aloud"),
    [
        ("3486", "en", "three four eight six"),
        ("3486", "zh", "三四八六"),
        ("7+0=7+7=14", "en", "fourteen"),
        ("7+0=7+7=14", "zh", "十四"),
        ("9", "en", "nine"),
        ("red/grey: 707", "en", "red grey seven zero seven"),
        ("红色/灰色: 707", "zh", "红色灰色七零七"),
        ("one by one: 12", "en", "one by one one two"),
        ("依次出现: 12", "zh", "依次出现一二"),
        ("purple", "en", "purple"),
    ],
)
def test_answers_in_spoken_words(answer, language, aloud):
    assert answer_aloud(answer, language) == aloud


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_answer_of_the_quickstart_can_be_said(language):
    rng = np.random.default_rng(0)
    for kind in ("count", "kth", "largest", "sum", "read", "colour", "caption", "order", "clip_caption"):
        for _ in range(20):
            text = answer_aloud(ask(sample_scene(rng), kind, language, rng).answer, language)
            assert text == heard(text) and not re.search(r"[\d+=/:]", text)


@pytest.mark.parametrize(
    ("number", "english", "chinese"),
    [(0, "zero", "零"), (10, "ten", "十"), (13, "thirteen", "十三"), (20, "twenty", "二十"),
     (36, "thirty six", "三十六"), (99, "ninety nine", "九十九")],
)  # fmt: skip
def test_numbers(number, english, chinese):
    assert (number_aloud(number, "en"), number_aloud(number, "zh")) == (english, chinese)


def test_heard_drops_case_and_punctuation():
    assert heard("What digits are written, in order?") == "what digits are written in order"
    assert heard("按顺序写了哪些数字？") == "按顺序写了哪些数字"


def test_fixed_texts_are_there_in_both_languages():
    assert set(TRANSCRIBE) == set(REFUSAL) == set(LANGUAGES)


def test_impossible_requests_are_refused():
    with pytest.raises(UserError, match="language 'fr'"):
        draw_statement("fr", "train", np.random.default_rng(0))
    with pytest.raises(UserError, match="language 'fr'"):
        answer_aloud("3", "fr")
    with pytest.raises(UserError, match="got 100"):
        number_aloud(100, "en")
