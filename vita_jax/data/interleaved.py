"""Flamingo's text: captioned pictures and documents with pictures between their sentences, and what of it is supervised
(`open_flamingo/train/data.py`, `train_utils.py`; arXiv 2204.14198, section 3.2).

A tag, `<image>`, stands where a picture is; `<|endofchunk|>` stands before every tag but the first and at the end.
Pictures of a document come without places: each is given to the sentence it fits best, by a one-to-one assignment.
Numpy, on the host. Axes: b rows, s positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from vita_jax.errors import UserError

IMAGE, END_OF_CHUNK = "<image>", "<|endofchunk|>"
IGNORE = -100
# Pictures of this many thousand bytes or fewer are icons and spacers.
SMALLEST_KILOBYTES = 10
PAIR_TOKENS, DOCUMENT_TOKENS = 32, 256

# Why a document is not used.
NO_IMAGE = "no_image"
TOO_FEW_IMAGES = "too_few_images"
SINGLE_IMAGE = "single_image"
IMAGE_AT_END = "image_at_end"


@dataclass(frozen=True)
class DocumentOptions:
    """How a document becomes a sample; defaults are those of the open models' training, but for `order`.

    Attributes:
      similarity_threshold: pictures that fit their sentence less are dropped.
      max_images: pictures beyond these are dropped.
      min_images: documents with fewer tags, after the text was cut, are dropped.
      max_tokens: s, what the text is cut and padded to.
      order: of the pictures, and so which of them are kept and which belongs to which tag. "sentence": as their tags
        stand in the text. "image", as in the original: as they stand in the document's list, which gives pictures to
        wrong sentences where the assignment does not rise.
    """

    similarity_threshold: float = 0.24
    max_images: int = 6
    min_images: int = 1
    max_tokens: int = DOCUMENT_TOKENS
    order: str = "sentence"

    def __post_init__(self) -> None:
        if self.order not in ("sentence", "image"):
            raise UserError(f"order {self.order!r} is unknown; use 'sentence' or 'image'")
        if self.max_images < 1 or self.max_tokens < 1:
            raise UserError(f"max_images {self.max_images} and max_tokens {self.max_tokens} must be at least 1")


@dataclass(frozen=True)
class Document:
    """A document as a sample.

    Attributes:
      assignment: (picture, sentence, similarity) of every usable picture, before any is dropped.
      images: the pictures that are kept, in the order of the image tensor.
      text: with tags; None if no picture is left.
      rejected: None, or why the sample is not to be used: NO_IMAGE, TOO_FEW_IMAGES, SINGLE_IMAGE or IMAGE_AT_END.
      ids, attention_mask: (s,) int32, padded on the right; None if there is no text.
    """

    assignment: tuple[tuple[int, int, float], ...]
    images: tuple[int, ...]
    text: str | None
    rejected: str | None
    ids: np.ndarray | None = None
    attention_mask: np.ndarray | None = None


def pair_text(caption: str, eos: str) -> str:
    """A captioned picture: tag, caption, end of chunk, end of text."""
    return f"{IMAGE}{caption.strip()}{END_OF_CHUNK}{eos}"


def usable_images(sizes: Sequence[int | None]) -> list[int]:
    """Indices of the pictures that are there (None: missing) and not too small; sizes in bytes."""
    return [i for i, size in enumerate(sizes) if size is not None and size // 1000 > SMALLEST_KILOBYTES]


def assign_images(similarity: np.ndarray, usable: Sequence[int]) -> tuple[tuple[int, int, float], ...]:
    """Gives pictures to sentences, at most one each, so that the similarities add up to the most.

    Args:
      similarity: (pictures, sentences).
      usable: the pictures to place; with more pictures than sentences some get none.

    Returns:
      (picture, sentence, similarity) by rising picture.
    """
    if not usable:
        return ()
    chosen = np.asarray(similarity, np.float64)[list(usable)]
    pictures, sentences = linear_sum_assignment(-chosen)
    return tuple((usable[p], int(s), float(chosen[p, s])) for p, s in zip(pictures, sentences, strict=True))


def interleaved_text(sentences: Sequence[str], tagged: Sequence[int], eos: str) -> str:
    """A document with a tag before some of its sentences.

    Tags in the sentences themselves would have no picture and are taken out.

    Args:
      sentences: of the document.
      tagged: indices of sentences that a picture belongs to.
      eos: end of text.
    """
    plain = [sentence.replace(IMAGE, "").replace(END_OF_CHUNK, "") for sentence in sentences]
    marked = (f"{END_OF_CHUNK}{IMAGE}{text}" if i in set(tagged) else text for i, text in enumerate(plain))
    text = " ".join(marked).replace(END_OF_CHUNK, "", 1)
    text = text.replace(f" {END_OF_CHUNK}", END_OF_CHUNK).replace(f"{IMAGE} ", IMAGE).replace(f" {IMAGE}", IMAGE)
    return f"{text}{END_OF_CHUNK}{eos}"


def build_document(
    sentences: Sequence[str],
    similarity: np.ndarray,
    image_bytes: Sequence[int | None],
    *,
    encode: Callable[[str], list[int]],
    eos: str,
    image_token: int,
    pad_token: int,
    draw: float,
    options: DocumentOptions = DocumentOptions(),  # noqa: B008 (frozen)
) -> Document:
    """A document as a sample, or why it is none.

    Args:
      sentences: of the document.
      similarity: (pictures, sentences), how well they fit.
      image_bytes: size of every picture's file; None: it is missing.
      encode: text with tags -> ids.
      eos: end of text, as `encode` knows it.
      image_token, pad_token: ids of the tag and of padding.
      draw: uniform in 0..1, from the record's seed: half of the documents with a single picture are not used.
      options: see `DocumentOptions`.
    """
    assignment = assign_images(similarity, usable_images(image_bytes))
    kept = [(image, sentence) for image, sentence, score in assignment if score >= options.similarity_threshold]
    if not kept:
        return Document(assignment, (), None, NO_IMAGE)
    if options.order == "sentence":
        kept.sort(key=lambda pair: pair[1])
    kept = kept[: options.max_images]
    images = tuple(image for image, _ in kept)
    text = interleaved_text(sentences, [sentence for _, sentence in kept], eos)
    found = encode(text)[: options.max_tokens]
    ids = np.full(options.max_tokens, pad_token, np.int32)
    ids[: len(found)] = found
    mask = (np.arange(options.max_tokens) < len(found)).astype(np.int32)
    tags = found.count(image_token)
    rejected = None
    if tags < options.min_images:
        rejected = TOO_FEW_IMAGES
    elif tags == 1 and draw <= 0.5:
        rejected = SINGLE_IMAGE
    elif tags == 1 and ids[-1] == image_token:
        rejected = IMAGE_AT_END
    return Document(assignment, images, text, rejected, ids, mask)


def pair_labels(ids: np.ndarray, pad_token: int, image_token: int) -> np.ndarray:
    """Labels of captioned pictures: ids (b s) -> (b s), -100 at padding and tags. The end of text is supervised."""
    return np.where((ids == pad_token) | (ids == image_token), IGNORE, ids)


def interleaved_labels(ids: np.ndarray, pad_token: int, image_token: int, end_of_chunk: int) -> np.ndarray:
    """Labels of documents: ids (b s) -> (b s).

    Only what follows a tag is supervised, up to the end of its chunk, which is. Text before the first picture, text
    that belongs to none, and the end of text are not.
    """
    places = np.broadcast_to(np.arange(1, ids.shape[1] + 1), ids.shape)

    def latest(marker: int) -> np.ndarray:
        """Place, from 1, of the last marker before each position; 0 = none."""
        before = np.maximum.accumulate(np.where(ids == marker, places, 0), axis=1)
        return np.pad(before[:, :-1], ((0, 0), (1, 0)))

    inside = latest(image_token) > latest(end_of_chunk)
    return np.where(inside, pair_labels(ids, pad_token, image_token), IGNORE)
