"""Documents as examples: text, windows, what each position sees, what is learnt, and pictures."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.media import SIDE, png_bytes, write_clip
from vita_jax.data.document_examples import (
    DocumentContext,
    NotUsed,
    cut_document,
    document_text,
    encode_tagged,
    first_pictures,
    frame_numbers,
    media_frames,
    picture_times,
    training_example,
)
from vita_jax.data.documents import DocumentRecord
from vita_jax.data.images import ImageConfig
from vita_jax.data.interleaved import END_OF_CHUNK, IGNORE, IMAGE, interleaved_text
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.data.records import Media, RecordError
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError
from vita_jax.ops.media import media_times

DATA = DataSet("web", (SourceConfig("none"),), max_tokens=64, row_length=64, drop_single=0.0)


@pytest.fixture(scope="module")
def context(own_tokenizer) -> DocumentContext:
    tokenizer = enlarge(own_tokenizer, [], [END_OF_CHUNK, IMAGE]).tokenizer
    return DocumentContext(tokenizer, ImageConfig(image_size=SIDE, max_tiles=1))


def picture(number: int) -> Media:
    """Of one colour, by which it is known."""
    return Media("image", f"{number}.png", png_bytes(SIDE, SIDE, number))


def document(*pieces) -> DocumentRecord:
    return DocumentRecord("d", tuple(picture(piece) if isinstance(piece, int) else piece for piece in pieces))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def shown(ids, context) -> str:
    return context.tokenizer.decode([int(i) for i in ids])


def test_text_is_that_of_open_flamingo():
    """A picture before a sentence is a piece before it."""
    sentences, eos = ["One two. ", " Three.", "Four five."], "</s>"
    for tagged in ([0, 2], [1], [0, 1, 2], [2]):
        pieces = [piece for i, text in enumerate(sentences) for piece in ([i] if i in tagged else []) + [text]]
        want = interleaved_text([text.strip() for text in sentences], tagged, eos)
        assert document_text(document(*pieces)) + eos == want
    assert document_text(document("a", " b")) == f"a{END_OF_CHUNK}b{END_OF_CHUNK}"
    assert document_text(document(1, 2)) == f"{IMAGE}{END_OF_CHUNK}{IMAGE}{END_OF_CHUNK}"


def test_no_token_of_the_text_itself_takes_effect(context):
    ids = encode_tagged(f"{IMAGE}a <|im_end|>{END_OF_CHUNK}", context)
    assert ids[0] == context.tag and ids[-1] == context.end_of_chunk
    assert context.tokenizer.eos_id not in ids and shown(ids[1:-1], context) == "a <|im_end|>"


def test_a_tokenizer_without_tags_is_refused(own_tokenizer):
    with pytest.raises(UserError, match="has no token <image>"):
        DocumentContext(own_tokenizer, ImageConfig())


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.booleans())
def test_times_are_those_of_the_model(tags, next_picture):
    want = media_times(jnp.array([tags]), attend_next=next_picture)[0]
    assert picture_times(np.array(tags), next_picture).tolist() == want.tolist()


def test_a_document_as_an_example(context):
    found = training_example(document("Text. ", 1, "one", 2, "two"), context, DATA, rng())
    tokens, labels, positions, times = found["text"].T
    text = f"Text.{IMAGE}one{END_OF_CHUNK}{IMAGE}two{END_OF_CHUNK}"
    assert tokens.tolist() == [*encode_tagged(text, context), context.eos]
    assert positions.tolist() == list(range(len(tokens)))
    assert shown(tokens[times == 1], context) == f"{IMAGE}one{END_OF_CHUNK}"
    assert shown(labels[labels != IGNORE], context) == f"one{END_OF_CHUNK}two{END_OF_CHUNK}"
    want = np.stack([media_frames(picture(n), context.image, 1) for n in (1, 2)])
    np.testing.assert_array_equal(found["images"], want)
    assert found["images"].shape == (2, 1, SIDE, SIDE, 3) and not np.array_equal(want[0], want[1])


def test_text_that_sees_the_next_picture(context):
    found = training_example(document("zero", 1, "one", 2, "two"), context, replace(DATA, next_picture=1.0), rng())
    tokens, labels, _, times = found["text"].T
    assert shown(tokens[times == 1], context) == f"zero{IMAGE}"
    assert shown(tokens[times == 2], context) == f"one{END_OF_CHUNK}{IMAGE}"
    assert shown(labels[labels != IGNORE], context) == f"zeroone{END_OF_CHUNK}"


def test_half_of_the_documents_see_the_next_picture_and_the_choice_is_the_records_own(context):
    data, numbers = replace(DATA, next_picture=0.5), np.random.default_rng(5)
    seeds = [int(seed) for seed in numbers.integers(0, 1 << 30, 200)]

    def sees_next(seed: int) -> bool:
        found = training_example(document("zero", 1, "one"), context, data, np.random.default_rng(seed))
        return bool(found["text"][0, 3] == 1)

    first = [sees_next(seed) for seed in seeds]
    assert first == [sees_next(seed) for seed in seeds]
    assert 80 <= sum(first) <= 120


def test_pairs_and_text(context):
    pairs = replace(DATA, kind="pairs")
    tokens, labels, _, times = training_example(document(1, "a cat "), context, pairs, rng())["text"].T
    assert shown(labels[1:], context) == f"a cat{END_OF_CHUNK}{shown([context.eos], context)}"
    assert labels[0] == IGNORE and set(times.tolist()) == {1}
    cut = training_example(document(1, "a cat"), context, replace(pairs, max_tokens=2), rng())["text"]
    assert len(cut) == 2
    text = replace(DATA, kind="text", row_images=0)
    found = training_example(document("a", "b"), context, text, rng())
    np.testing.assert_array_equal(found["text"][:, 0], found["text"][:, 1])
    assert not found["text"][:, 3].any() and found["images"].shape == (0, 1, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("pieces", "kind", "message"),
    [
        (("only text",), "documents", "document 'd': document: has no picture; use it in a data set of kind 'text'"),
        ((1, "a"), "text", "has 1 pictures; data set 'web' is text alone"),
        (("a", 1), "pairs", "has 1 pictures and 1 texts; a pair is one picture or video, then its caption"),
        ((1, "a", "b"), "pairs", "has 1 pictures and 2 texts"),
        ((1, 2, "a"), "pairs", "has 2 pictures and 1 texts"),
    ],
)
def test_documents_of_another_kind_are_bad(context, pieces, kind, message):
    with pytest.raises(RecordError, match=message):
        training_example(document(*pieces), context, replace(DATA, kind=kind), rng())


def test_what_the_rules_leave_out(context):
    alone = document(1, "one")
    training_example(alone, context, DATA, rng())
    assert rng().random() > 0.5  # the draw below
    training_example(alone, context, replace(DATA, drop_single=0.5), rng())
    for data in (replace(DATA, drop_single=1.0), replace(DATA, min_images=2), replace(DATA, max_tokens=1 + 1)):
        with pytest.raises(NotUsed):
            training_example(
                document("Read all the digits, then", 1) if data.max_tokens == 2 else alone, context, data, rng()
            )


def test_a_document_of_a_hundred_pictures_keeps_the_first_ones(context):
    pieces = [piece for i in range(100) for piece in (i % 7, f"n{i}.")]
    found = training_example(document(*pieces), context, replace(DATA, max_images=3), rng())
    tokens = found["text"][:, 0]
    assert (tokens == context.tag).sum() == len(found["images"]) == 3
    want = f"{IMAGE}n0.{END_OF_CHUNK}{IMAGE}n1.{END_OF_CHUNK}{IMAGE}n2. n3. n4."
    assert shown(tokens, context).startswith(want)
    assert [media.name for media in first_pictures(document(*pieces), 2).media] == ["0.png", "1.png"]


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 4))
def test_windows_hold_whole_pictures_in_order(context, seed, length, most):
    pieces = [piece for i in range(8) for piece in (i, f"text {i}")]
    ids = [*encode_tagged(document_text(document(*pieces)), context), context.eos]
    data = replace(DATA, window="random", max_tokens=length, max_images=most)
    found, pictures = cut_document(ids, context, data, np.random.default_rng(seed))
    tags = np.flatnonzero(found == context.tag)
    assert len(found) <= length and len(tags) == len(pictures) <= most
    assert pictures.tolist() == list(range(pictures[0], pictures[0] + len(pictures))) if len(pictures) else True
    for tag, number in zip(tags, pictures, strict=True):
        after = shown(found[tag + 1 :], context)
        assert after.startswith(f"text {number}"[: len(after)]) or after.startswith(f"text {number}")
    ends = np.flatnonzero(found == context.end_of_chunk)
    assert not len(tags) or not np.any(ends == tags[0] - 1)


def test_mirrored_together(context):
    plain = training_example(document(1, "a", 2, "b"), context, DATA, rng())["images"]
    turned = training_example(document(1, "a", 2, "b"), context, replace(DATA, flip=1.0), rng())["images"]
    np.testing.assert_array_equal(turned, plain[:, :, :, ::-1])


def test_frames_of_clips(context, tmp_path):
    assert frame_numbers(8, 8) == list(range(8)) and frame_numbers(32, 4) == [4, 12, 20, 28]
    assert frame_numbers(2, 4) == [0, 0, 1, 1]
    write_clip(tmp_path / "clip.mp4")
    clip = Media("video", "clip.mp4", (tmp_path / "clip.mp4").read_bytes())
    frames = media_frames(clip, context.image, 4)
    assert frames.shape == (4, SIDE, SIDE, 3)
    levels = frames.reshape(4, -1).mean(axis=1)
    np.testing.assert_allclose(levels, np.linspace(0, 255, 8)[[1, 3, 5, 7]], atol=4)
    with pytest.raises(UserError, match="is a video, but this data set has pictures"):
        media_frames(clip, context.image, 1)
    with pytest.raises(UserError, match="is a picture, but this data set has clips of 4 frames"):
        media_frames(picture(1), context.image, 4)


def test_a_damaged_picture_is_a_bad_document(context):
    bad = DocumentRecord("d", (Media("image", "x.png", b"no picture"), "a"))
    with pytest.raises(RecordError, match="document 'd': image: x.png: not a picture") as caught:
        training_example(bad, context, DATA, rng())
    assert caught.value.category == "damaged media"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "is no valid name"),
        ({"sources": ()}, "has no sources"),
        ({"weight": 0.0}, "weight is 0.0; it must be positive"),
        ({"row_images": 3}, "a document may have 6 pictures, a row has row_images 3"),
        ({"row_images": 0}, "row_images is 0; it must be at least 1"),
        ({"row_length": 63}, "max_tokens 64 does not fit a row of row_length 63"),
        ({"next_picture": 1.5}, "next_picture is 1.5; it is a share"),
        ({"frames": 0}, "frames is 0"),
    ],
)
def test_data_sets_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        replace(DATA, **changes)
