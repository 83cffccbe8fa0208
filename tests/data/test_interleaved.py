"""Documents with pictures, captioned pictures, few-shot prompts, and labels; tests/parity has the tables."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vita_jax.data.flamingo_prompts import (
    caption_prompt,
    effective_shots,
    few_shot_prompt,
    meme_prompt,
    question_prompt,
)
from vita_jax.data.interleaved import (
    END_OF_CHUNK,
    IGNORE,
    IMAGE,
    IMAGE_AT_END,
    NO_IMAGE,
    SINGLE_IMAGE,
    TOO_FEW_IMAGES,
    Document,
    DocumentOptions,
    assign_images,
    build_document,
    interleaved_labels,
    interleaved_text,
    pair_labels,
    pair_text,
    usable_images,
)
from vita_jax.errors import UserError

EOS, END_ID, TAG_ID, EOS_ID = "</s>", 95, 96, 2
SENTENCES = ("One two.", "Three.", "Four five six.")
SIMILARITY = np.array([[0.1, 0.2, 0.9], [0.8, 0.3, 0.1], [0.3, 0.7, 0.6]])
LARGE = 20_000


def encode(text: str) -> list[int]:
    special = {END_OF_CHUNK: END_ID, IMAGE: TAG_ID, EOS: EOS_ID}
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
    return [id_ for part in parts for id_ in ([special[part]] if part in special else [7] * len(part.split()))]


def document(sentences=SENTENCES, similarity=SIMILARITY, sizes=(LARGE,) * 3, draw=0.9, **options) -> Document:
    return build_document(
        sentences,
        similarity,
        sizes,
        encode=encode,
        eos=EOS,
        image_token=TAG_ID,
        pad_token=0,
        draw=draw,
        options=replace(DocumentOptions(max_tokens=24), **options),
    )


def test_pictures_go_with_the_sentences_they_fit():
    """Picture 0 fits the last sentence: it comes last, unless the original's order is asked for."""
    found = document()
    assert found.assignment == ((0, 2, 0.9), (1, 0, 0.8), (2, 1, 0.7))
    assert found.images == (1, 2, 0) and found.rejected is None
    want = f"{IMAGE}One two.{END_OF_CHUNK}{IMAGE}Three.{END_OF_CHUNK}{IMAGE}Four five six.{END_OF_CHUNK}{EOS}"
    assert found.text == want
    assert found.ids[: found.attention_mask.sum()].tolist() == encode(want)
    assert document(order="image").images == (0, 1, 2) and document(order="image").text == want
    with pytest.raises(UserError, match="order 'list' is unknown"):
        document(order="list")


def test_pictures_that_are_missing_small_or_unfit_are_dropped():
    assert usable_images([LARGE, None, 10_999, 11_000]) == [0, 3]
    assert assign_images(SIMILARITY, []) == ()
    assert document(sizes=(LARGE, None, LARGE)).images == (2, 0)
    assert document(similarity_threshold=0.75).images == (1, 0)
    assert document(max_images=1).images == (1,) and document(max_images=1, order="image").images == (0,)


def test_why_documents_are_not_used():
    none = document(similarity_threshold=2.0)
    assert (none.rejected, none.text, none.ids) == (NO_IMAGE, None, None)
    assert document(max_images=1, draw=0.5).rejected == SINGLE_IMAGE
    assert document(max_images=1, draw=0.51).rejected is None
    assert document(max_tokens=3, min_images=2).rejected == TOO_FEW_IMAGES
    alone = document(("a b",), np.array([[0.9]]), (LARGE,), draw=1.0, max_tokens=1)
    assert alone.rejected == IMAGE_AT_END


def test_text_before_the_first_picture_and_tags_inside_of_sentences():
    text = interleaved_text([f"a {IMAGE}b", "c", "d"], [1], EOS)
    assert text == f"a b{IMAGE}c d{END_OF_CHUNK}{EOS}"
    assert pair_text("  two birds ", EOS) == f"{IMAGE}two birds{END_OF_CHUNK}{EOS}"


def test_labels():
    ids = np.array([[5, TAG_ID, 6, END_ID, 8, TAG_ID, 9, END_ID, EOS_ID, 0]])
    assert pair_labels(ids, 0, TAG_ID)[0].tolist() == [5, IGNORE, 6, END_ID, 8, IGNORE, 9, END_ID, EOS_ID, IGNORE]
    want = [IGNORE, IGNORE, 6, END_ID, IGNORE, IGNORE, 9, END_ID, IGNORE, IGNORE]
    assert interleaved_labels(ids, 0, TAG_ID, END_ID)[0].tolist() == want


@given(st.lists(st.sampled_from([0, 5, 6, TAG_ID, END_ID]), min_size=1, max_size=12))
def test_interleaved_labels_read_from_left_to_right(ids):
    inside, want = False, []
    for id_ in ids:
        want.append(id_ if inside and id_ not in (0, TAG_ID) else IGNORE)
        inside = id_ == TAG_ID or (inside and id_ != END_ID)
    assert interleaved_labels(np.array([ids]), 0, TAG_ID, END_ID)[0].tolist() == want


def test_few_shot_prompts():
    shown = [question_prompt("Open?", "yes"), question_prompt("How many?", "3")]
    query = question_prompt("Where?")
    prompt = few_shot_prompt(shown, query)
    assert prompt == (
        f"{IMAGE}Question:Open? Short answer:yes{END_OF_CHUNK}\n"
        f"{IMAGE}Question:How many? Short answer:3{END_OF_CHUNK}\n"
        f"{IMAGE}Question:Where? Short answer:"
    )
    blind = few_shot_prompt(shown, query, pictures=False, separator="")
    assert blind.count(IMAGE) == 1 and blind.endswith(query) and "\n" not in blind
    assert meme_prompt("words", ('says "', '". Bad? '), "no") == f'{IMAGE}says "words". Bad? Answer:no{END_OF_CHUNK}'
    assert caption_prompt() == f"{IMAGE}Output:"
    assert [effective_shots(shots) for shots in (0, 1, 32)] == [2, 1, 32]
    with pytest.raises(UserError, match="shots -1"):
        effective_shots(-1)
