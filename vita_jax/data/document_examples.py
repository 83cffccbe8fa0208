"""From a document to the arrays of one example: the one path for training, few-shot prompts and chat.

A picture's tag is one token, and the text around it sees the picture (`vita_jax.ops.media`): its own, or in some
documents the next one. Texts are data, so tags written in them stay text. Rules are those of arXiv 2204.14198, section
3.2, and `open_flamingo/train/data.py`; which ones is said by `mixture.DataSet`.

An example is a dict of numpy arrays; axes: s positions, t pictures, f frames, S side of a picture.
  text    (s, 4) int32: tokens, labels (-100 where nothing is learnt), positions, and times: which picture a position
          sees, from 1, 0 = none
  images  (t f S S 3) uint8
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from vita_jax.data.documents import DocumentRecord
from vita_jax.data.images import ImageConfig, open_image, single_tile
from vita_jax.data.interleaved import END_OF_CHUNK, IGNORE, IMAGE, interleaved_labels
from vita_jax.data.mixture import DataSet, Kind
from vita_jax.data.records import Media, RecordError
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import probe_video, read_frames
from vita_jax.errors import UserError

Example = dict[str, np.ndarray]
# Texts of a document that follow each other are sentences of one text.
SENTENCE_SPACE = " "
_TAGS = re.compile(f"({re.escape(IMAGE)}|{re.escape(END_OF_CHUNK)})")


@dataclasses.dataclass(frozen=True)
class DocumentContext:
    """Everything besides the document that decides how an example looks.

    Attributes:
      tokenizer: which has the two tags as special tokens.
      image: how pictures become squares: side, mean colour and `aspect`; there are no tiles.
      end_of_text: id that ends a document; None = the tokenizer's own.

    Raises:
      UserError: the tokenizer lacks a tag.
    """

    tokenizer: Tokenizer
    image: ImageConfig
    end_of_text: int | None = None

    def __post_init__(self) -> None:
        for tag in (IMAGE, END_OF_CHUNK):
            if tag not in self.tokenizer.special_tokens:
                raise UserError(
                    f"the tokenizer has no token {tag}, which Flamingo's text needs; add it, for example by "
                    "python -m vita_jax.enlarge_vocabulary"
                )

    @property
    def tag(self) -> int:
        """Id of a picture's tag."""
        return self.tokenizer.special_tokens[IMAGE]

    @property
    def end_of_chunk(self) -> int:
        """Id of the end of a chunk."""
        return self.tokenizer.special_tokens[END_OF_CHUNK]

    @property
    def eos(self) -> int:
        """Id that ends a document."""
        return self.tokenizer.eos_id if self.end_of_text is None else self.end_of_text


class NotUsed(Exception):
    """A document that is in order but that the rules of its data set leave out; no error."""


# ---- text -----------------------------------------------------------------------------------------------------------


def encode_tagged(text: str, context: DocumentContext) -> list[int]:
    """Ids of a text in which the two tags take effect and no other special token does; starts with the BOS, if any."""
    bos = context.tokenizer.bos_id
    ids = [] if bos is None else [bos]
    for part in _TAGS.split(text):
        if part in (IMAGE, END_OF_CHUNK):
            ids.append(context.tokenizer.special_tokens[part])
        elif part:
            ids += context.tokenizer.encode(part, allow_special=False, add_bos=False)
    return ids


def document_text(document: DocumentRecord) -> str:
    """The pieces as one text: a tag for each picture or video, the end of a chunk before every tag but the first and at
    the end; no space next to a tag. Without pictures every piece is a chunk.
    """
    if not document.media:
        return "".join(f"{text.strip()}{END_OF_CHUNK}" for text in document.texts)
    chunks: list[list[str]] = [[]]
    for piece in document.pieces:
        if isinstance(piece, str):
            chunks[-1].append(piece.strip())
        else:
            chunks.append([])
    first, *others = (SENTENCE_SPACE.join(chunk) for chunk in chunks)
    return f"{first}{IMAGE}{f'{END_OF_CHUNK}{IMAGE}'.join(others)}{END_OF_CHUNK}"


def first_pictures(document: DocumentRecord, count: int) -> DocumentRecord:
    """The document without its pictures beyond the first `count`; all of its text stays."""
    kept = set(map(id, document.media[:count]))
    pieces = tuple(piece for piece in document.pieces if isinstance(piece, str) or id(piece) in kept)
    return dataclasses.replace(document, pieces=pieces)


def picture_times(is_tag: np.ndarray, next_picture: bool) -> np.ndarray:
    """Which picture every position of a document sees: is_tag (s,) bool -> (s,) int32; see `vita_jax.ops.media`."""
    count = np.cumsum(is_tag)
    if next_picture:
        count = np.where(is_tag, count, np.where(count < count[-1], count + 1, 0)) if len(count) else count
    return count.astype(np.int32)


def cut_document(
    ids: Sequence[int], context: DocumentContext, data: DataSet, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The part of a document that is used.

    Args:
      ids: of the whole document.
      data: `max_tokens`, `window`, `max_images`.
      rng: for a random window.

    Returns:
      ids of the part (s,), and which of the document's pictures its tags stand for (t,).
    """
    found = np.asarray(ids, np.int32)
    number = np.cumsum(found == context.tag) - 1
    start = 0
    if data.window == "random" and len(found) > data.max_tokens:
        start = int(rng.integers(len(found) - data.max_tokens + 1))
        found, number = found[start : start + data.max_tokens], number[start : start + data.max_tokens]
    tags = np.flatnonzero(found == context.tag)
    dropped = tags[data.images_of_document :]
    # A tag takes the end of the chunk before it along; so does the first one of a window, behind what it was cut from.
    if start and len(tags):
        dropped = np.concatenate([dropped, tags[:1]])
    ends = dropped[dropped > 0] - 1
    keep = np.ones(len(found), bool)
    keep[ends[found[ends] == context.end_of_chunk]] = False
    keep[tags[data.images_of_document :]] = False
    found, number = found[keep][: data.max_tokens], number[keep][: data.max_tokens]
    return found, number[found == context.tag]


def labels_of(
    ids: np.ndarray, times: np.ndarray, context: DocumentContext, kind: Kind, next_picture: bool
) -> np.ndarray:
    """What is learnt of a document, (s,) int32; see `DataSet.kind`. Of text that sees the next picture: all that sees
    one.
    """
    if kind == "text":
        return ids
    if kind == "pairs":
        return np.where(ids == context.tag, IGNORE, ids)
    if next_picture:
        return np.where((times > 0) & (ids != context.tag), ids, IGNORE)
    # No id is padding here, not even that of an end of text which doubles as padding.
    return interleaved_labels(ids[None], IGNORE, context.tag, context.end_of_chunk)[0]


# ---- pictures -------------------------------------------------------------------------------------------------------


def frame_numbers(num_frames: int, count: int) -> list[int]:
    """The middles of `count` equal parts of a clip; a clip of fewer frames repeats some.

    The paper takes one frame a second of clips of 8 s.
    """
    return [(2 * i + 1) * num_frames // (2 * count) for i in range(count)]


def media_frames(media: Media, image: ImageConfig, frames: int) -> np.ndarray:
    """A picture, or the frames of a clip, as squares: (f S S 3) uint8, f = `frames`.

    Raises:
      UserError: the file is damaged; a clip where pictures are wanted (`frames` 1), or the other way round.
    """
    if media.kind == "image":
        if frames != 1:
            raise UserError(f"{media.name}: is a picture, but this data set has clips of {frames} frames")
        return single_tile(open_image(media.data, name=media.name), image)[None]
    if frames == 1:
        raise UserError(f"{media.name}: is a video, but this data set has pictures; give it `frames`")
    info = probe_video(media.data, name=media.name)
    pictures = read_frames(media.data, frame_numbers(info.num_frames, frames), info, name=media.name)
    return np.stack([single_tile(picture, image) for picture in pictures])


# ---- examples -------------------------------------------------------------------------------------------------------


def training_example(
    document: DocumentRecord, context: DocumentContext, data: DataSet, rng: np.random.Generator
) -> Example:
    """A document as an example.

    Args:
      document: with its media.
      context: tokenizer and size of pictures.
      data: the rules.
      rng: of this document in this epoch.

    Raises:
      RecordError: it has no picture, or more or fewer pieces than its kind says, or a picture that cannot be used.
      NotUsed: the rules leave it out.
    """
    _check_kind(document, data)
    if data.window == "start":
        document = first_pictures(document, data.images_of_document)
    ids = [*encode_tagged(document_text(document), context), context.eos]
    found, pictures = cut_document(ids, context, data, rng)
    is_tag = found == context.tag
    draw = rng.random(3)  # of all documents alike, so that an option changes nothing but what it says
    if data.kind == "documents":
        _check_rules(is_tag, data, float(draw[0]))
    next_picture = data.kind == "documents" and bool(draw[1] < data.next_picture)
    times = picture_times(is_tag, next_picture)
    labels = labels_of(found, times, context, data.kind, next_picture)
    media = document.media
    images = _images([media[i] for i in pictures], document.id, context, data)
    if draw[2] < data.flip:
        images = images[:, :, :, ::-1]
    columns = (found, labels, np.arange(len(found), dtype=np.int32), times)
    return {"text": np.stack(columns, axis=1).astype(np.int32), "images": images}


def _check_kind(document: DocumentRecord, data: DataSet) -> None:
    where, media, texts = f"document {document.id!r}", len(document.media), len(document.texts)
    if data.kind == "text" and media:
        raise RecordError(where, "document", f"has {media} pictures; data set {data.name!r} is text alone", "pictures")
    if data.kind == "documents" and not media:
        reason = f"has no picture; use it in a data set of kind 'text', {data.name!r} is not"
        raise RecordError(where, "document", reason, "no picture")
    if data.kind == "pairs" and (media != 1 or texts != 1 or isinstance(document.pieces[0], str)):
        reason = f"has {media} pictures and {texts} texts; a pair is one picture or video, then its caption"
        raise RecordError(where, "document", reason, "no pair")


def _check_rules(is_tag: np.ndarray, data: DataSet, draw: float) -> None:
    """Raises NotUsed for what `build_document` rejects."""
    tags = int(is_tag.sum())
    if tags < data.min_images or (tags == 1 and (draw < data.drop_single or is_tag[-1])):
        raise NotUsed


def _images(media: Sequence[Media], identity: str, context: DocumentContext, data: DataSet) -> np.ndarray:
    side = context.image.image_size
    images = np.zeros((len(media), data.frames, side, side, 3), np.uint8)
    for i, item in enumerate(media):
        try:
            images[i] = media_frames(item, context.image, data.frames)
        except UserError as error:
            raise RecordError(f"document {identity!r}", item.kind, str(error), "damaged media") from error
    return images
