"""From a record to the arrays of one example: the one path for training, chat and evaluation.

Media bytes become tiles (images: dynamic tiling; video frames: one tile each), the conversation becomes ids and labels
(`prompts.py`), every placeholder becomes positions of the feature table (`splice.py`). Axes: s positions, t tiles,
S side of a tile, k tokens per tile, m token ids per name.

An example is a dict of numpy arrays:
  tokens, labels, positions, segment_ids, feature_index  (s,) int32; segments are numbered 1, 2, ... inside the example
  tiles  (t S S 3) uint8; t = 0 without media. feature_index counts from the example's own first tile.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vita_jax.data.images import ImageConfig, dynamic_tiles, open_image, require_file, single_tile
from vita_jax.data.prompts import (
    PromptOptions,
    count_placeholders,
    encode_conversation,
    encode_prompt,
    with_media,
)
from vita_jax.data.records import PLACEHOLDERS, Media, Record, RecordError
from vita_jax.data.splice import IGNORE_LABEL, FeatureLayout, FeatureSpan, Spliced, expand_placeholders
from vita_jax.data.templates import SystemTexts, Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import FrameRule, read_video
from vita_jax.errors import UserError

Example = dict[str, np.ndarray]

# Between the names of a cell-naming answer, and the name of a cell that is not asked about.
NAME_SEPARATOR = " | "
NO_NAME = "-"

_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))


@dataclasses.dataclass(frozen=True)
class ExampleContext:
    """Everything besides the record that decides how an example looks.

    Attributes:
      layout: how features are numbered; `FeatureLayout(model.vision.tokens_per_tile)` for VITA.
      video_rule: which frames are taken, see `video.choose_frames`.
      untiled_sets: folder keys whose pictures stay one tile (the original's `NoPatchSets`).
      cell_name_width: m, the most token ids one cell name may have.
    """

    tokenizer: Tokenizer
    template: Template
    system_texts: SystemTexts
    image: ImageConfig
    layout: FeatureLayout
    video_rule: FrameRule | str = "paper"
    options: PromptOptions = PromptOptions()
    untiled_sets: tuple[str, ...] = ("khair", "jester")
    cell_name_width: int = 8


@dataclasses.dataclass(frozen=True)
class Limits:
    """What fits into one row: positions and tile slots. An example beyond either is refused, never cut."""

    row_length: int
    row_tiles: int

    def check_tiles(self, tiles: int, where: str) -> None:
        """Raises RecordError if `tiles` do not fit."""
        if tiles > self.row_tiles:
            reason = f"needs {tiles} tiles, row_tiles is {self.row_tiles}; raise row_tiles or lower image.max_tiles"
            raise RecordError(where, "", reason, "too many tiles")

    def check_length(self, length: int, segments: int, where: str) -> None:
        """Raises RecordError if `length` positions do not fit."""
        if length > self.row_length:
            rounds = f" in {segments} rounds" if segments > 1 else ""
            reason = f"has {length} positions{rounds}, row_length is {self.row_length}; raise row_length or shorten it"
            raise RecordError(where, "", reason, "too long")


# ---- media ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TileTable:
    """The tiles of one example.

    Attributes:
      tiles: uint8 (t S S 3).
      slots: per kind, the tile slots of each file in order of its placeholder. The same file twice has the same slots.
    """

    tiles: np.ndarray
    slots: Mapping[str, tuple[range, ...]]

    def counts(self, kind: str) -> list[int]:
        """Tiles (frames) of every file of that kind."""
        return [len(slots) for slots in self.slots[kind]]


def media_from_file(path: str | os.PathLike[str], kind: str) -> Media:
    """A user's picture ("image") or video ("video"). Raises UserError for a missing or empty file or another kind."""
    if kind not in PLACEHOLDERS:
        raise UserError(f"media kind {kind!r} is unknown; use one of {', '.join(PLACEHOLDERS)}")
    require_file(path, os.fspath(path))
    try:
        return Media(kind, os.fspath(path), Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


def media_tiles(media: Media, context: ExampleContext) -> np.ndarray:
    """Decodes one file.

    Returns:
      uint8 (t S S 3): grid cells and thumbnail of a picture, or the frames of a video.

    Raises:
      UserError: the file is damaged or not what its kind says.
    """
    if media.kind == "video":
        return read_video(media.data, context.image, rule=context.video_rule, name=media.name)
    picture = open_image(media.data, name=media.name)
    if media.set is not None and media.set in context.untiled_sets:
        return single_tile(picture, context.image)[None]
    return dynamic_tiles(picture, context.image)


def tile_table(media: Sequence[Media], context: ExampleContext, where: str | None = None) -> TileTable:
    """Decodes all files of an example, each once however often it is used.

    Args:
      where: the record they belong to, for messages; None = files that the user named one by one.

    Raises:
      UserError: a file cannot be decoded; RecordError if `where` is given.
    """
    slots: dict[str, list[range]] = {kind: [] for kind in PLACEHOLDERS}
    seen: dict[tuple[str, str | None, bytes], range] = {}
    side = context.image.image_size
    tiles, used = [np.zeros((0, side, side, 3), np.uint8)], 0
    for item in media:
        key = (item.kind, item.set, item.data)
        if key not in seen:
            try:
                tiles.append(media_tiles(item, context))
            except UserError as error:
                if where is None:
                    raise
                raise RecordError(where, item.kind, str(error), "damaged media") from error
            seen[key] = range(used, used + len(tiles[-1]))
            used += len(tiles[-1])
        slots[item.kind].append(seen[key])
    joined = tiles[1] if len(tiles) == 2 else np.concatenate(tiles)
    return TileTable(joined, {kind: tuple(ranges) for kind, ranges in slots.items()})


# ---- conversations --------------------------------------------------------------------------------------------------


def rounds_apart(turns: Sequence[Mapping[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Each question with its answer as a conversation of its own that sees the same media.

    The placeholders of earlier questions are put in front of a later one in their order, so it sees what a reader of
    the whole conversation has been shown by then, and no more.
    """
    shown = ""
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = question["value"]
        yield [{"from": "human", "value": shown + text}, {"from": "gpt", "value": answer["value"]}]
        shown += "".join(f"{placeholder}\n" for placeholder in _PLACEHOLDER.findall(text))


def _expand(
    ids: np.ndarray, labels: np.ndarray | None, media_slots: Sequence, table: TileTable, layout: FeatureLayout
) -> Spliced:
    """Points every -200 at the tile it stands for, wherever that tile lies in the table."""
    spans: list[FeatureSpan] = []
    for slot in media_slots:
        tiles = table.slots[slot.kind][slot.index]
        if len(tiles) != slot.tiles:
            raise UserError(
                f"{slot.kind} {slot.index} has {len(tiles)} tiles but {slot.tiles} placeholders; "
                "several pictures in one sentence need PromptOptions(tiles_per='image')"
            )
        spans += [layout.tile_span(tile) for tile in tiles]
    return expand_placeholders(ids, labels, spans)


def _join(parts: Sequence[Spliced], tiles: np.ndarray) -> Example:
    """Segments 1, 2, ... one after the other."""
    example = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("tokens", "labels", "positions", "feature_index")
    }
    numbers = np.arange(1, len(parts) + 1, dtype=np.int32)
    example["segment_ids"] = np.repeat(numbers, [len(part) for part in parts])
    example["tiles"] = tiles
    return example


def _encode(turns: Sequence[Mapping[str, str]], table: TileTable, context: ExampleContext) -> Spliced:
    """One conversation as ids with labels. Media are those its placeholders reach: the first ones of each kind."""
    images, videos, _ = count_placeholders(turns)
    encoded = encode_conversation(
        turns,
        tokenizer=context.tokenizer,
        template=context.template,
        system_texts=context.system_texts,
        tile_counts=table.counts("image")[:images],
        frame_counts=table.counts("video")[:videos],
        options=context.options,
    )
    return _expand(encoded.input_ids, encoded.labels, encoded.media, table, context.layout)


# ---- the three kinds of example -------------------------------------------------------------------------------------


def training_example(
    record: Record, context: ExampleContext, *, split_rounds: bool = False, limits: Limits | None = None
) -> Example:
    """A conversation with its targets.

    `inserted_id` and `end_tag` change nothing here: the original ignores them in text records, and records with
    pictures but without audio may not have them.

    Args:
      split_rounds: False = one segment, the ordinary conversation. True = every round is its own segment (system text,
        media, that question, that answer; positions restart) and all segments gather the same tiles, so many
        independent questions cost one pass of the vision tower.
      limits: None = any size.

    Raises:
      RecordError: undecodable media, an example that exceeds a limit, or one without any target.
    """
    where = f"record {record.id!r}"
    table = tile_table(record.media, context, where)
    if limits is not None:
        limits.check_tiles(len(table.tiles), where)
    conversations = rounds_apart(record.conversations) if split_rounds else (record.conversations,)
    try:
        parts = [_encode(turns, table, context) for turns in conversations]
    except UserError as error:
        raise RecordError(where, "conversations", str(error), "prompt") from error
    length = sum(len(part) for part in parts)
    if limits is not None:
        limits.check_length(length, len(parts), where)
    example = _join(parts, table.tiles)
    if np.all(example["labels"] == IGNORE_LABEL):
        raise RecordError(where, "conversations", "gives no token to learn from", "prompt")
    return example


def prompt_example(
    conversations: str | Sequence[Mapping[str, str]],
    media: Sequence[Media],
    context: ExampleContext,
    *,
    table: TileTable | None = None,
    limits: Limits | None = None,
) -> Example:
    """A prompt that ends with the open answer, for generation; one segment, every label ignored.

    Args:
      conversations: turns, the last one from "human", with a placeholder for each file; or a bare question, which gets
        the placeholders in front unless it has some.
      media: the files, those of each kind in order of their placeholders.
      table: their `tile_table`, where it is already known because several prompts share the files.

    Raises:
      UserError: undecodable media, placeholders that do not match the media, or a limit exceeded.
    """
    if isinstance(conversations, str):
        question = conversations
        if not any(placeholder in question for placeholder in PLACEHOLDERS.values()):
            kinds = [item.kind for item in media]
            question = with_media(question, kinds.count("image"), kinds.count("video"))
        conversations = [{"from": "human", "value": question}]
    table = tile_table(media, context) if table is None else table
    if limits is not None:
        limits.check_tiles(len(table.tiles), "prompt")
    encoded = encode_prompt(
        conversations,
        tokenizer=context.tokenizer,
        template=context.template,
        system_texts=context.system_texts,
        tile_counts=table.counts("image"),
        frame_counts=table.counts("video"),
        options=context.options,
    )
    spliced = _expand(encoded.input_ids, None, encoded.media, table, context.layout)
    if limits is not None:
        limits.check_length(len(spliced), 1, "prompt")
    return _join([spliced], table.tiles)


def cell_naming_example(record: Record, context: ExampleContext, *, limits: Limits | None = None) -> Example:
    """Tiles with the words that name what each visual token shows, for training a vision tower by itself.

    The record has one round; its answer lists a name for every visual token, k per tile in reading order, tiles in the
    order of the sequence (grid cells, then the thumbnail), joined by " | ". The name "-" leaves a token out.

    Returns:
      tiles (t S S 3) uint8 and cell_names (t*k, m) int32: the token ids of each name, then -1; all -1 = left out.

    Raises:
      RecordError: undecodable media, no media, too many tiles, a wrong number of names or one that is too long.
    """
    where = f"record {record.id!r}"
    if not record.media or record.num_rounds != 1:
        reason = f"has {len(record.media)} files and {record.num_rounds} rounds; cell naming needs media and one round"
        raise RecordError(where, "conversations", reason, "cell names")
    table = tile_table(record.media, context, where)
    if limits is not None:
        limits.check_tiles(len(table.tiles), where)
    names = record.conversations[1]["value"].strip().split(NAME_SEPARATOR)
    expected = len(table.tiles) * context.layout.tokens_per_tile
    if len(names) != expected:
        reason = (
            f"lists {len(names)} names; {len(table.tiles)} tiles of {context.layout.tokens_per_tile} tokens need "
            f"{expected}, joined by {NAME_SEPARATOR!r}"
        )
        raise RecordError(where, "conversations[1].value", reason, "cell names")
    distinct, index = np.unique(np.array(names, object), return_inverse=True)
    return {"tiles": table.tiles, "cell_names": np.stack([_name_ids(name, context, where) for name in distinct])[index]}


def _name_ids(name: str, context: ExampleContext, where: str) -> np.ndarray:
    """(m,) int32: the ids of one name, filled up with -1."""
    out = np.full(context.cell_name_width, -1, np.int32)
    if name == NO_NAME:
        return out
    ids = context.tokenizer.encode(name, allow_special=False, add_bos=False)
    if not 0 < len(ids) <= len(out):
        reason = f"name {name!r} has {len(ids)} tokens; expected 1 to {len(out)} (cell_name_width)"
        raise RecordError(where, "conversations[1].value", reason, "cell names")
    out[: len(ids)] = ids
    return out
