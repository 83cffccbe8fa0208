"""From a record to the arrays of one example: the one path for training, chat and evaluation.

Media bytes become tiles (images: dynamic tiling; video frames: one tile each) and log-mel features (sounds), the
conversation becomes ids and labels (`prompts.py`), every placeholder becomes positions of the feature table
(`splice.py`). Axes: s positions, t tiles, S side of a tile, k tokens per tile, m token ids per name; a clips of sound,
f frames of 10 ms, h mel bins.

An example is a dict of numpy arrays:
  tokens, labels, positions, segment_ids, feature_index  (s,) int32; segments are numbered 1, 2, ... inside the example
  tiles  (t S S 3) uint8; t = 0 without media. feature_index counts from the example's own first tile; the clips follow
    its tiles.
  state_labels  (s,) int32, if the context asks for them: see `state_label_row`.
  audio (a f h) float32 and audio_lengths (a,) int32: clips and their frames, zeros behind each one's end; if the limits
    have room for clips, or if there are some.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vita_jax.data.audio import AudioContext, Clip, clip_features, pad_clips
from vita_jax.data.conversations import WritingOptions, encode_conversation, encode_prompt
from vita_jax.data.images import ImageConfig, image_tiles, open_image, require_file, single_tile
from vita_jax.data.prompts import (
    STATE_LABELS,
    PromptOptions,
    answer_states,
    count_placeholders,
    state_labels,
    with_media,
)
from vita_jax.data.records import PLACEHOLDERS, Media, Record, RecordError
from vita_jax.data.splice import (
    AUDIO_PLACEHOLDER,
    IGNORE_LABEL,
    FeatureLayout,
    FeatureSpan,
    Spliced,
    expand_placeholders,
)
from vita_jax.data.templates import SystemTexts, Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import FrameRule, read_video
from vita_jax.errors import UserError

Example = dict[str, np.ndarray]

# Between the names of a cell-naming answer, and the name of a cell that is not asked about.
NAME_SEPARATOR = " | "
NO_NAME = "-"

# What a later question of a conversation still refers to. A sound is what somebody said, so it belongs to its question.
_SHOWN = re.compile(f"{PLACEHOLDERS['image']}|{PLACEHOLDERS['video']}")


@dataclasses.dataclass(frozen=True)
class ExampleContext:
    """Everything besides the record that decides how an example looks.

    Attributes:
      layout: how features are numbered; `FeatureLayout(model.vision.tokens_per_tile)` for VITA.
      options: variants of writing; their kind says whether conversations are VITA's or LLaVA's.
      video_rule: which frames are taken, see `video.choose_frames`.
      untiled_sets: folder keys whose pictures stay one tile (the original's `NoPatchSets`).
      cell_name_width: m, the most token ids one cell name may have.
      audio: how sounds become features; None for a model that does not hear.
      state_labels: where the labels of a state head stand, see `state_label_row`; None = there are none.
      cut_text: a conversation without media that is too long for a row loses its end, as in the original, and is not
        refused.
    """

    tokenizer: Tokenizer
    template: Template
    system_texts: SystemTexts
    image: ImageConfig
    layout: FeatureLayout
    video_rule: FrameRule | str = "paper"
    options: WritingOptions = PromptOptions()
    untiled_sets: tuple[str, ...] = ("khair", "jester")
    cell_name_width: int = 8
    audio: AudioContext | None = None
    state_labels: Literal["answer", "audio"] | None = None
    cut_text: bool = False


@dataclasses.dataclass(frozen=True)
class Limits:
    """What fits into one row: positions, tile slots, slots for sounds and their frames (of 10 ms).

    An example beyond any of them is refused; none is cut but text, see `ExampleContext.cut_text`.
    """

    row_length: int
    row_tiles: int
    row_clips: int = 0
    clip_frames: int = 0

    def check_tiles(self, tiles: int, where: str) -> None:
        """Raises RecordError if `tiles` do not fit."""
        if tiles > self.row_tiles:
            reason = f"needs {tiles} tiles, row_tiles is {self.row_tiles}; raise row_tiles or lower image.max_tiles"
            raise RecordError(where, "", reason, "too many tiles")

    def check_clips(self, clips: Sequence[Clip], where: str) -> None:
        """Raises RecordError if the sounds do not fit."""
        if len(clips) > self.row_clips:
            reason = f"needs {len(clips)} clips of sound, row_clips is {self.row_clips}; raise row_clips"
            raise RecordError(where, "audio", reason, "too many clips")
        longest = max((len(clip.features) for clip in clips), default=0)
        if longest > self.clip_frames:
            reason = f"has a sound of {longest} frames of 10 ms, clip_frames is {self.clip_frames}; raise clip_frames"
            raise RecordError(where, "audio", reason, "sound too long")

    def check_length(self, length: int, segments: int, where: str) -> None:
        """Raises RecordError if `length` positions do not fit."""
        if length > self.row_length:
            rounds = f" in {segments} rounds" if segments > 1 else ""
            reason = f"has {length} positions{rounds}, row_length is {self.row_length}; raise row_length or shorten it"
            raise RecordError(where, "", reason, "too long")


# ---- media ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TileTable:
    """The tiles and sounds of one example.

    Attributes:
      tiles: uint8 (t S S 3).
      slots: per kind, the slots of each file in order of its placeholder: of tiles, or one of `clips` ("audio"). The
        same file twice has the same slots.
      clips: the different sounds.
    """

    tiles: np.ndarray
    slots: Mapping[str, tuple[range, ...]]
    clips: tuple[Clip, ...] = ()

    def counts(self, kind: str) -> list[int]:
        """Tiles (frames) of every file of that kind."""
        return [len(slots) for slots in self.slots[kind]]


def media_from_file(path: str | os.PathLike[str], kind: str) -> Media:
    """A user's "image", "video" or "audio". Raises UserError for a missing or empty file or another kind."""
    if kind not in PLACEHOLDERS:
        raise UserError(f"media kind {kind!r} is unknown; use one of {', '.join(PLACEHOLDERS)}")
    require_file(path, os.fspath(path))
    try:
        return Media(kind, os.fspath(path), Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


def media_clip(media: Media, context: ExampleContext) -> Clip:
    """Decodes one sound. Raises UserError: see `clip_features`; or the model does not hear."""
    if context.audio is None:
        raise UserError(f"{media.name}: this model does not hear (its config has no audio tower); leave sounds out")
    return clip_features(media.data, context.audio, name=media.name)


def media_tiles(media: Media, context: ExampleContext) -> np.ndarray:
    """Decodes one picture or video.

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
    return image_tiles(picture, context.image)


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
    clips: list[Clip] = []
    for item in media:
        key = (item.kind, item.set, item.data)
        if key not in seen:
            try:
                if item.kind == "audio":
                    clips.append(media_clip(item, context))
                    seen[key] = range(len(clips) - 1, len(clips))
                else:
                    tiles.append(media_tiles(item, context))
                    seen[key] = range(used, used + len(tiles[-1]))
                    used += len(tiles[-1])
            except UserError as error:
                if where is None:
                    raise
                deaf = item.kind == "audio" and context.audio is None
                category = "unsupported audio" if deaf else "damaged media"
                raise RecordError(where, item.kind, str(error), category) from error
        slots[item.kind].append(seen[key])
    joined = tiles[1] if len(tiles) == 2 else np.concatenate(tiles)
    return TileTable(joined, {kind: tuple(ranges) for kind, ranges in slots.items()}, tuple(clips))


def join_tables(tables: Sequence[TileTable], context: ExampleContext) -> TileTable:
    """One table of the files of several, in their order."""
    if len(tables) == 1:
        return tables[0]
    side = context.image.image_size
    slots: dict[str, list[range]] = {kind: [] for kind in PLACEHOLDERS}
    tiles, clips = 0, 0
    for table in tables:
        for kind, ranges in table.slots.items():
            start = clips if kind == "audio" else tiles
            slots[kind] += [range(r.start + start, r.stop + start) for r in ranges]
        tiles += len(table.tiles)
        clips += len(table.clips)
    joined = np.concatenate([np.zeros((0, side, side, 3), np.uint8), *(table.tiles for table in tables)])
    every_clip = tuple(clip for table in tables for clip in table.clips)
    return TileTable(joined, {kind: tuple(ranges) for kind, ranges in slots.items()}, every_clip)


# ---- conversations --------------------------------------------------------------------------------------------------


def rounds_apart(turns: Sequence[Mapping[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Each question with its answer as a conversation of its own that sees the same pictures and videos.

    The placeholders of earlier questions are put in front of a later one in their order, so it sees what a reader of
    the whole conversation has been shown by then, and no more. Sounds are questions themselves and stay in their round.
    """
    shown = ""
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = question["value"]
        yield [{"from": "human", "value": shown + text}, {"from": "gpt", "value": answer["value"]}]
        shown += "".join(f"{placeholder}\n" for placeholder in _SHOWN.findall(text))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A conversation that becomes one segment.

    Attributes:
      first_clip: which of the record's sounds its first `<audio>` is.
      inserted_id, end_tag: as in `Record`, for this conversation.
      seed: for orders that are drawn.
    """

    turns: Sequence[Mapping[str, str]]
    first_clip: int = 0
    inserted_id: int | None = None
    end_tag: bool = True
    seed: int = 0


def _parts(record: Record, split_rounds: bool) -> list[_Part]:
    """The segments of a record. Without sounds its `inserted_id` and `end_tag` mean nothing, as in the original."""
    hears = any(media.kind == "audio" for media in record.media)
    inserted_id, end_tag = (record.inserted_id, record.end_tag) if hears else (None, True)
    seed = zlib.crc32(str(record.id).encode())
    if not split_rounds:
        return [_Part(record.conversations, 0, inserted_id, end_tag, seed)]
    parts, clips = [], 0
    for number, turns in enumerate(rounds_apart(record.conversations)):
        is_last = number == record.num_rounds - 1
        noise = 1 if inserted_id == 2 * number + 1 else None
        parts.append(_Part(turns, clips, noise, end_tag or not is_last, seed + number))
        clips += turns[0]["value"].count(PLACEHOLDERS["audio"])
    return parts


def state_label_row(
    spliced: Spliced, turns: Sequence[Mapping[str, str]], inserted_id: int | None, place: Literal["answer", "audio"]
) -> np.ndarray:
    """Labels of a state head (`vita_jax.models.state_head`), read from the hidden states where they stand.

    Args:
      spliced: the conversation; with place "audio", its labels hold the state labels of `audio_labels`.
      place: "answer": the last position before each answer says what it will answer: -101 speech, -102 sound that is
        not meant for the model, -103 text. "audio": the last position of each clip says -101 or -102, as in
        `vita_fo_qwen2.py`, whose two-class head knows no text.

    Returns:
      (s,) int32, -100 elsewhere.

    Raises:
      UserError: "answer", and the answers cannot be told apart in the labels.
    """
    if place == "audio":
        return np.where(spliced.labels < IGNORE_LABEL, spliced.labels, IGNORE_LABEL).astype(np.int32)
    states = answer_states(turns, inserted_id)
    supervised = np.concatenate([[False], spliced.labels >= 0])
    before = np.flatnonzero(~supervised[:-1] & supervised[1:]) - 1
    if len(before) != len(states) or np.any(before < 0):
        raise UserError(
            f"{len(states)} answers but {len(before)} runs of targets, so their states have no place; use a template "
            "with a text in front of every answer"
        )
    out = np.full(len(spliced), IGNORE_LABEL, np.int32)
    out[before] = [STATE_LABELS[state] for state in states]
    return out


def _expand(
    ids: np.ndarray,
    labels: np.ndarray | None,
    media_slots: Sequence,
    table: TileTable,
    context: ExampleContext,
    *,
    clip_frames: int,
    first_clip: int = 0,
    audio_labels: Sequence[int] | None = None,
) -> Spliced:
    """Points every -200 at the tile it stands for, wherever that tile lies in the table, and every -500 at its clip."""
    spans: list[FeatureSpan] = []
    for slot in media_slots:
        tiles = table.slots[slot.kind][slot.index]
        if len(tiles) != slot.tiles:
            raise UserError(
                f"{slot.kind} {slot.index} has {len(tiles)} tiles but {slot.tiles} placeholders; "
                "several pictures in one sentence need PromptOptions(tiles_per='image')"
            )
        spans += [context.layout.tile_span(tile) for tile in tiles]
    audio_spans = []
    for (clip,) in table.slots["audio"][first_clip : first_clip + int(np.sum(ids == AUDIO_PLACEHOLDER))]:
        room, used = context.audio.num_tokens(clip_frames), table.clips[clip].num_tokens
        audio_spans.append(context.layout.clip_span(len(table.tiles), clip, room, used))
    return expand_placeholders(ids, labels, spans, audio_spans, audio_labels=audio_labels)


def _join(
    parts: Sequence[Spliced], table: TileTable, clip_frames: int, context: ExampleContext, row_clips: int
) -> Example:
    """Segments 1, 2, ... one after the other, and the media."""
    example = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("tokens", "labels", "positions", "feature_index")
    }
    # State labels among them stand in an array of their own.
    example["labels"] = np.maximum(example["labels"], IGNORE_LABEL)
    numbers = np.arange(1, len(parts) + 1, dtype=np.int32)
    example["segment_ids"] = np.repeat(numbers, [len(part) for part in parts])
    example["tiles"] = table.tiles
    if table.clips or row_clips:
        bins = context.audio.config.filter_bank.num_mel_bins
        example["audio"] = pad_clips([clip.features for clip in table.clips], clip_frames, bins)
        example["audio_lengths"] = np.array([len(clip.features) for clip in table.clips], np.int32)
    return example


def _clip_frames(table: TileTable, limits: Limits | None) -> int:
    """f: frames that every clip of the example is padded to."""
    if limits is not None and limits.row_clips:
        return limits.clip_frames
    return max((len(clip.features) for clip in table.clips), default=0)


def _encode(part: _Part, table: TileTable, context: ExampleContext, clip_frames: int) -> Spliced:
    """One conversation as ids with labels. Media are those its placeholders reach: the first ones of each kind."""
    images, videos, _ = count_placeholders(part.turns)
    encoded = encode_conversation(
        part.turns,
        tokenizer=context.tokenizer,
        template=context.template,
        system_texts=context.system_texts,
        tile_counts=table.counts("image")[:images],
        frame_counts=table.counts("video")[:videos],
        inserted_id=part.inserted_id,
        end_tag=part.end_tag,
        options=context.options,
        seed=part.seed,
    )
    on_clips = context.state_labels == "audio"
    return _expand(
        encoded.input_ids,
        encoded.labels,
        encoded.media,
        table,
        context,
        clip_frames=clip_frames,
        first_clip=part.first_clip,
        audio_labels=state_labels(part.turns, part.inserted_id) if on_clips else None,
    )


# ---- the three kinds of example -------------------------------------------------------------------------------------


def training_example(
    record: Record, context: ExampleContext, *, split_rounds: bool = False, limits: Limits | None = None
) -> Example:
    """A conversation with its targets.

    `inserted_id` and `end_tag` mean something only in records with sound: the original ignores them in text records,
    and records with pictures but without sound may not have them.

    Args:
      split_rounds: False = one segment, the ordinary conversation. True = every round is its own segment (system text,
        media, that question, that answer; positions restart) and all segments gather the same tiles, so many
        independent questions cost one pass of the vision tower.
      limits: None = any size.

    Raises:
      RecordError: undecodable media, sound for a model that does not hear, an example that exceeds a limit, or one
        without any target.
    """
    where = f"record {record.id!r}"
    table = tile_table(record.media, context, where)
    if limits is not None:
        limits.check_tiles(len(table.tiles), where)
        limits.check_clips(table.clips, where)
    frames, parts = _clip_frames(table, limits), _parts(record, split_rounds)
    place = context.state_labels
    try:
        segments = [_encode(part, table, context, frames) for part in parts]
        pairs = zip(segments, parts, strict=True) if place else ()
        rows = [state_label_row(segment, part.turns, part.inserted_id, place) for segment, part in pairs]
    except UserError as error:
        raise RecordError(where, "conversations", str(error), "prompt") from error
    if limits is not None:
        if context.cut_text and not record.media and len(segments) == 1:
            segments, rows = [segments[0].cut(limits.row_length)], [row[: limits.row_length] for row in rows]
        limits.check_length(sum(len(segment) for segment in segments), len(segments), where)
    example = _join(segments, table, frames, context, limits.row_clips if limits is not None else 0)
    if place:
        example["state_labels"] = np.concatenate(rows)
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
            question = with_media(question, *(kinds.count(kind) for kind in PLACEHOLDERS))
        conversations = [{"from": "human", "value": question}]
    table = tile_table(media, context) if table is None else table
    if limits is not None:
        limits.check_tiles(len(table.tiles), "prompt")
        limits.check_clips(table.clips, "prompt")
    encoded = encode_prompt(
        conversations,
        tokenizer=context.tokenizer,
        template=context.template,
        system_texts=context.system_texts,
        tile_counts=table.counts("image"),
        frame_counts=table.counts("video"),
        options=context.options,
    )
    frames = _clip_frames(table, limits)
    spliced = _expand(encoded.input_ids, None, encoded.media, table, context, clip_frames=frames)
    if limits is not None:
        limits.check_length(len(spliced), 1, "prompt")
    return _join([spliced], table, frames, context, 0)


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
