"""Where placeholders become positions of the one feature table; numpy, on the host, for training and inference alike.

A prompt arrives as token ids in which -200 stands for one image tile (or video frame) and -500 for one audio clip. Here
every placeholder is expanded to its exact number of positions; each of them carries an index into the row's table of
features, and everything else carries -1. The model then needs one gather (`vita_jax.models.vita.splice`). The result is
the array that `vita/model/vita_arch.py` of the original assembles by cutting and joining embedding lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vita_jax.errors import UserError

IMAGE_PLACEHOLDER = -200
AUDIO_PLACEHOLDER = -500
IGNORE_LABEL = -100
TEXT_INDEX = -1
# What stands in `tokens` where a feature goes. Any valid id would do: its embedding is never selected.
FEATURE_TOKEN = 0


@dataclass(frozen=True)
class FeatureSpan:
    """`count` consecutive rows of a feature table, from row `start`."""

    start: int
    count: int


@dataclass(frozen=True)
class FeatureLayout:
    """How one row's feature table is laid out: tile slots first, then any other source (audio).

    Every tile slot owns `tokens_per_tile` features, followed by its pooled versions, one block of `g * g` per grid `g`
    of `pooled_grids` (empty unless slow-fast pooling is used). Slots are equally long, so moving an example to other
    slots of a packed row adds a multiple of `features_per_slot` to its indices.

    Attributes:
      tokens_per_tile: features of one whole tile (`VitaConfig.tokens_per_tile`; 256 at 448 px).
      pooled_grids: sides of the pooled grids that the model appends (`VitaConfig.pooled_grids`).
    """

    tokens_per_tile: int
    pooled_grids: tuple[int, ...] = ()

    @property
    def features_per_slot(self) -> int:
        """Rows of the table that belong to one tile slot."""
        return self.tokens_per_tile + sum(grid * grid for grid in self.pooled_grids)

    def tile_span(self, slot: int, num_tokens: int | None = None) -> FeatureSpan:
        """The features of tile `slot`: all of them, or the copy pooled to `num_tokens`.

        `frame_lengths` of `vita_jax.models.vision.frame_pooling` says how many each frame of a video keeps.

        Raises:
          UserError: no grid of `pooled_grids` has that many tokens.
        """
        start = slot * self.features_per_slot
        if num_tokens is None or num_tokens == self.tokens_per_tile:
            return FeatureSpan(start, self.tokens_per_tile)
        start += self.tokens_per_tile
        for grid in self.pooled_grids:
            if grid * grid == num_tokens:
                return FeatureSpan(start, num_tokens)
            start += grid * grid
        raise UserError(
            f"{num_tokens} features of a tile were asked for, but it has {self.tokens_per_tile}, or g * g for a grid g "
            f"of {self.pooled_grids}; add the grid to the model's pooled_grids"
        )

    def extra_start(self, num_tiles: int) -> int:
        """First row after `num_tiles` tile slots: where features from another source begin, clips of audio first."""
        return num_tiles * self.features_per_slot

    def clip_span(self, num_tiles: int, clip: int, tokens_per_clip: int, num_tokens: int) -> FeatureSpan:
        """The first `num_tokens` features of audio clip `clip`.

        Args:
          num_tiles: tile slots of the row, which come before the clips.
          clip: slot of the clip.
          tokens_per_clip: features that every clip owns, however short it is.
          num_tokens: the clip's own.

        Raises:
          UserError: the clip has fewer features.
        """
        if not 0 <= num_tokens <= tokens_per_clip:
            raise UserError(f"{num_tokens} features of a clip were asked for, but its slot holds {tokens_per_clip}")
        return FeatureSpan(self.extra_start(num_tiles) + clip * tokens_per_clip, num_tokens)


@dataclass(frozen=True)
class Spliced:
    """One row after expansion; every array is (s,) int32.

    Attributes:
      tokens: ids, 0 where a feature goes.
      labels: the label of the token at each position, -100 = ignored (always at features, but for `audio_labels`).
      feature_index: -1 for text, else a row of the feature table.
      positions: rotary positions, starting at 0.
    """

    tokens: np.ndarray
    labels: np.ndarray
    feature_index: np.ndarray
    positions: np.ndarray

    def cut(self, length: int) -> Spliced:
        """Its first positions, at most so many."""
        return Spliced(self.tokens[:length], self.labels[:length], self.feature_index[:length], self.positions[:length])

    def __len__(self) -> int:
        return len(self.tokens)


def expand_placeholders(
    ids: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None,
    image_spans: Sequence[FeatureSpan] = (),
    audio_spans: Sequence[FeatureSpan] = (),
    *,
    audio_labels: Sequence[int] | np.ndarray | None = None,
    max_length: int | None = None,
    visual_position_stride: int | None = None,
) -> Spliced:
    """Replaces each placeholder by as many positions as its span has features.

    Args:
      ids: (s,) token ids without padding; -200 per tile, -500 per audio clip.
      labels: (s,) aligned with `ids`, or None for all ignored.
      image_spans: one span per -200, in order of appearance.
      audio_spans: one span per -500, in order of appearance.
      audio_labels: a label for the last position of each clip, such as the state labels of
        `vita_jax.models.state_head`; None = features have no label.
      max_length: keeps this many positions from the left (the original's `tokenizer_model_max_length`, which counts
        positions after the expansion).
      visual_position_stride: None numbers the positions 0, 1, 2, ...; a stride shares them, see `shared_positions`.

    Raises:
      UserError: lengths differ, an unknown negative id, or placeholders and spans do not pair up.
    """
    ids = np.asarray(ids, np.int32)
    labels = np.full(ids.shape, IGNORE_LABEL, np.int32) if labels is None else np.asarray(labels, np.int32)
    _check_pairing(ids, labels, image_spans, audio_spans)

    counts = np.ones(ids.shape, np.int64)
    starts = np.full(ids.shape, TEXT_INDEX, np.int64)
    for placeholder, spans in ((IMAGE_PLACEHOLDER, image_spans), (AUDIO_PLACEHOLDER, audio_spans)):
        at = ids == placeholder
        counts[at] = [span.count for span in spans]
        starts[at] = [span.start for span in spans]

    source = np.repeat(np.arange(len(ids)), counts)  # for every new position, the old one it comes from
    is_feature = ids[source] < 0
    within_span = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    feature_index = np.where(is_feature, starts[source] + within_span, TEXT_INDEX)
    if visual_position_stride is None:
        positions = np.arange(len(source))
    else:
        positions = shared_positions(ids[source] == IMAGE_PLACEHOLDER, visual_position_stride)
    arrays = (
        np.where(is_feature, FEATURE_TOKEN, ids[source]),
        np.where(is_feature, _feature_labels(ids, audio_labels, source), labels[source]),
        feature_index,
        positions,
    )
    return Spliced(*(array[:max_length].astype(np.int32) for array in arrays))


def _feature_labels(ids: np.ndarray, audio_labels: Sequence[int] | np.ndarray | None, source: np.ndarray) -> np.ndarray:
    """Label of every expanded position that is a feature: that of a clip at its last position, else -100."""
    out = np.full(source.shape, IGNORE_LABEL, np.int64)
    if audio_labels is None:
        return out
    at = np.flatnonzero(ids == AUDIO_PLACEHOLDER)
    if len(audio_labels) != len(at):
        raise UserError(f"{len(audio_labels)} labels were given for {len(at)} audio placeholders; give one for each")
    kept = np.isin(at, source)  # a clip without features has no last position
    out[np.searchsorted(source, at[kept], side="right") - 1] = np.asarray(audio_labels)[kept]
    return out


def _check_pairing(
    ids: np.ndarray, labels: np.ndarray, image_spans: Sequence[FeatureSpan], audio_spans: Sequence[FeatureSpan]
) -> None:
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise UserError(f"ids {ids.shape} and labels {labels.shape} must be two rows of one length")
    unknown = ids[(ids < 0) & (ids != IMAGE_PLACEHOLDER) & (ids != AUDIO_PLACEHOLDER)]
    if unknown.size:
        raise UserError(f"token id {unknown[0]} is negative; only {IMAGE_PLACEHOLDER} and {AUDIO_PLACEHOLDER} may be")
    for name, placeholder, spans in (
        ("image", IMAGE_PLACEHOLDER, image_spans),
        ("audio", AUDIO_PLACEHOLDER, audio_spans),
    ):
        found = int(np.sum(ids == placeholder))
        if found != len(spans):
            raise UserError(
                f"the prompt has {found} {name} placeholders but {len(spans)} {name} features were given; "
                "they must be equal (one placeholder per tile, frame or clip)"
            )


def shared_positions(is_visual: np.ndarray, stride: int) -> np.ndarray:
    """Rotary positions in which `stride` neighbouring visual tokens share one (`make_shared_position_ids`).

    Text and audio advance by 1. A run of visual tokens (neighbouring tiles are one run) advances by `1 / stride` each;
    the last `run % stride` of them share one further position. Position = ceil(running sum) - 1. Unlike the original,
    a row without visual tokens works.

    Args:
      is_visual: (s,) bool.
      stride: visual tokens per position, at least 1.

    Returns:
      (s,) int64.
    """
    if stride < 1:
        raise UserError(f"visual position stride {stride} must be at least 1")
    is_visual = np.asarray(is_visual, bool)
    positions = np.zeros(len(is_visual), np.int64)
    edges = np.flatnonzero(np.diff(is_visual)) + 1
    used = 0  # whole positions taken so far; runs end on a whole position, so integers are enough
    for run in np.split(np.arange(len(is_visual)), edges):
        if not run.size:
            continue
        share = stride if is_visual[run[0]] else 1
        positions[run] = used + np.arange(len(run)) // share
        used += -(-len(run) // share)
    return positions


def pad_rows(rows: Sequence[Spliced], *, length: int | None = None, side: str = "right") -> dict[str, np.ndarray]:
    """Stacks rows of different lengths; one segment per row.

    Args:
      rows: b expanded rows.
      length: s of the result; default the longest row.
      side: "right" or "left", where the padding goes.

    Returns:
      tokens, labels, feature_index, positions, segment_ids, each (b s) int32; padding has label -100, feature index -1
      and segment 0, real positions have segment 1.

    Raises:
      UserError: unknown side, or a row longer than `length`.
    """
    if side not in ("right", "left"):
        raise UserError(f"padding side {side!r} must be 'right' or 'left'")
    longest = max((len(row) for row in rows), default=0)
    length = longest if length is None else length
    if longest > length:
        raise UserError(f"a row has {longest} positions but only {length} fit; raise the length or truncate")
    fill = {"tokens": 0, "labels": IGNORE_LABEL, "feature_index": TEXT_INDEX, "positions": 0, "segment_ids": 0}
    out = {name: np.full((len(rows), length), value, np.int32) for name, value in fill.items()}
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        for name in ("tokens", "labels", "feature_index", "positions"):
            out[name][i, at] = getattr(row, name)
        out["segment_ids"][i, at] = 1
    return out
