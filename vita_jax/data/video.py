"""Which frames of a video are shown to the model, and reading (and, for made data, writing) video files.

Axes: t chosen frames, n all frames, S side of a tile, 3 colour channels (red, green, blue).

The default rule is the paper's (VITA, section on data: under 4 seconds four frames, up to 16 seconds one per second,
beyond that sixteen evenly spread ones). The released code samples differently from place to place; those routines are
kept in `ORIGINAL_RULES`, each under its own name. Frames are not tiled: each becomes one tile, as `images.single_tile`
makes it.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vita_jax.data.images import MAX_PIXELS, ImageConfig, require_file, single_tile, source_name
from vita_jax.errors import UserError

MIN_FRAMES, MAX_FRAMES = 4, 16  # the paper's limits, also those of nearly all original routines

# Containers that FFmpeg may open. Without a list it would also take text files and playlists for video, and follow the
# latter to other files.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,flv,asf,ogg,h264,hevc"
CONTAINERS_FOR_HUMANS = "mp4, mov, mkv, webm, avi, mpeg, ts, flv, wmv, ogg, animated gif"

# Containers whose time stamps name frames reliably, so that a frame can be reached by a jump. Others (AVI stores no
# presentation times) are decoded from the start.
JUMPING_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

VideoSource = str | os.PathLike[str] | bytes


class FrameRateError(UserError):
    """So few frames per second that an original rule's stride becomes 0 (the original fails there too)."""


class EmptyClipError(UserError):
    """The chosen seconds lie outside the video."""


# ---- which frames ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FrameRule:
    """One sampling routine of the original code: a regular grid of frames, then thinned or repeated to fit the limits.

    Attributes:
      frames_per_second: density of the grid; None takes every frame.
      min_frames: shorter grids are stretched to this many by repeating positions; None has no minimum.
      max_frames: longer grids are thinned evenly to this many.
      count_per_second: if set, the number of frames is not that of the grid but that of a grid of this density, rounded
        up to a multiple of four within the limits (groups of four frames, as the "frameCat" data module wants them).
      empty_clip_fails: whether a clip outside the video is an error or "no frames".
    """

    frames_per_second: float | None = 1.0
    min_frames: int | None = MIN_FRAMES
    max_frames: int = MAX_FRAMES
    count_per_second: float | None = None
    empty_clip_fails: bool = False


ORIGINAL_RULES: dict[str, FrameRule] = {
    "demo": FrameRule(),  # video_audio_demo.py
    "web_ability": FrameRule(),  # web_demo/web_ability_demo.py
    "train_v1_5": FrameRule(frames_per_second=3.0, empty_clip_fails=True),  # data_utils_video_audio_neg_patch.py
    "train_v1_0_patch": FrameRule(empty_clip_fails=True),  # data_utils_video_audio.py
    "train_frameCat": FrameRule(frames_per_second=3.0, count_per_second=1.0),  # data_utils_video_audio_neg_frameCat.py
    "videomme": FrameRule(min_frames=None),  # videomme/yt_video_inference_qa.py
    "server": FrameRule(frames_per_second=None, max_frames=4),  # web_demo/server.py
}


def paper_frame_indices(num_frames: int, fps: float) -> list[int]:
    """The paper's rule: < 4 s four frames, evenly; 4 to 16 s one per second; > 16 s sixteen, evenly.

    Frames repeat only where the video has fewer than four; a slow video (fewer frames than the rule asks for) gives
    each of its frames once.

    Args:
      num_frames: n, at least 1.
      fps: average frames per second, positive.

    Returns:
      4 to 16 ascending indices below n.

    Raises:
      UserError: no frames, or a rate that is not positive.
    """
    _check_length(num_frames, fps)
    seconds = num_frames / fps
    if seconds < MIN_FRAMES:
        count = MIN_FRAMES
    elif seconds > MAX_FRAMES:
        count = MAX_FRAMES
    else:
        # One at 0 s, 1 s, ...; a started second counts. The small term keeps 5.0 s, as computed in floating point, from
        # being six.
        count = math.ceil(seconds - 1e-6)
        if count <= num_frames:
            return [min(int(second * fps + 1e-6), num_frames - 1) for second in range(count)]
    count = max(MIN_FRAMES, min(count, num_frames))
    return [round(position) for position in np.linspace(0, num_frames - 1, count).tolist()]


def clip_range(num_frames: int, fps: float, start: float | None = None, end: float | None = None) -> tuple[int, int]:
    """First and last frame of the seconds `start` to `end` as the original computes them; last < first means none.

    Whole seconds count (cut towards zero), negative ones are 0, reversed ones are exchanged, equal ones become one
    second. None is the respective end of the video.
    """
    first_second = None if start is None else max(int(start), 0)
    last_second = None if end is None else max(int(end), 0)
    if first_second is not None and last_second is not None:
        first_second, last_second = sorted((first_second, last_second))
        if first_second == last_second:
            last_second = first_second + 1
    first = 0 if first_second is None else int(first_second * fps)
    last = num_frames - 1 if last_second is None else int(min(last_second * fps, num_frames - 1))
    return first, last


def _stride(fps: float, frames_per_second: float | None) -> int:
    if frames_per_second is None:
        return 1
    stride = int(round(fps / frames_per_second))  # Python rounds halves to even; so did the original
    if stride == 0:
        raise FrameRateError(
            f"the video has {fps:g} frames per second, too few to take {frames_per_second:g} per second; "
            "use the rule 'paper'"
        )
    return stride


def _evenly(positions: Sequence[int], count: int) -> list[int]:
    """`count` of `positions` from first to last, cut towards zero: repeats some if there are fewer."""
    return [positions[i] for i in np.linspace(0, len(positions) - 1, count, dtype=int)]


def original_frame_indices(
    num_frames: int, fps: float, rule: FrameRule | str, start: float | None = None, end: float | None = None
) -> list[int] | None:
    """The frames that a routine of the original code takes; see `FrameRule` and `ORIGINAL_RULES`.

    Args:
      num_frames: n, at least 1.
      fps: average frames per second, positive.
      rule: a rule or the name of one of `ORIGINAL_RULES`.
      start, end: seconds; see `clip_range`.

    Returns:
      Ascending indices below n, possibly with repeats; None where the original decodes nothing because the clip lies
      outside the video.

    Raises:
      FrameRateError: the stride would be 0.
      EmptyClipError: the clip lies outside the video and the rule fails on that.
      UserError: unknown rule, no frames, or a rate that is not positive.
    """
    _check_length(num_frames, fps)
    rule = named_rule(rule) if isinstance(rule, str) else rule
    first, last = clip_range(num_frames, fps, start, end)
    if last < first:
        if rule.empty_clip_fails:
            raise EmptyClipError(_outside(start, end, num_frames, fps))
        return None
    grid = range(first, last + 1, _stride(fps, rule.frames_per_second))
    if rule.count_per_second is not None:
        count = len(range(first, last + 1, _stride(fps, rule.count_per_second)))
        count = min(-(-count // 4) * 4, rule.max_frames)
        return _evenly(grid, max(count, rule.min_frames or 0))
    if len(grid) > rule.max_frames:
        return _evenly(grid, rule.max_frames)
    if rule.min_frames is not None and len(grid) < rule.min_frames:
        return _evenly(grid, rule.min_frames)
    return list(grid)


def segment_midpoints(num_frames: int, count: int) -> list[int]:
    """The middles of `count` equal segments, as `videomme/yt_video_inference_qa_imgs.py` takes frames from a folder.

    That evaluator asks for min(16, n) of them. Halves are rounded to even.
    """
    if num_frames < 1 or count < 1:
        raise UserError(f"{count} of {num_frames} frames were asked for; both must be at least 1")
    edges = np.round((num_frames - 1) / count * np.arange(count + 1)).astype(int)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def named_rule(name: str) -> FrameRule:
    """Looks a name up in `ORIGINAL_RULES`; an unknown one raises UserError with the known ones."""
    if name not in ORIGINAL_RULES:
        raise UserError(f"unknown frame rule {name!r}; use 'paper' or one of {', '.join(ORIGINAL_RULES)}")
    return ORIGINAL_RULES[name]


def choose_frames(
    num_frames: int, fps: float, rule: FrameRule | str = "paper", start: float | None = None, end: float | None = None
) -> list[int]:
    """Indices by the paper's rule ("paper") or an original one, of the whole video or of the seconds `start` to `end`.

    Raises:
      UserError: see `original_frame_indices`; a clip outside the video is an error under every rule.
    """
    if rule == "paper":
        _check_length(num_frames, fps)
        first, last = clip_range(num_frames, fps, start, end)
        indices = None if last < first else [first + i for i in paper_frame_indices(last - first + 1, fps)]
    else:
        indices = original_frame_indices(num_frames, fps, rule, start, end)
    if indices is None:
        raise EmptyClipError(_outside(start, end, num_frames, fps))
    return indices


def _check_length(num_frames: int, fps: float) -> None:
    if num_frames < 1 or not (fps > 0 and math.isfinite(fps)):
        raise UserError(f"{num_frames} frames at {fps} frames per second are no video; both must be positive")


def _outside(start: float | None, end: float | None, num_frames: int, fps: float) -> str:
    return f"seconds {start} to {end} lie outside the video, which lasts {num_frames / fps:.2f} s"


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe_video` finds without decoding.

    Attributes:
      num_frames: n.
      fps: average frames per second.
      times: presentation time of every frame in units of the stream's time base, ascending; empty if the file does not
        say reliably.
      keyframes: the times among them at which decoding can start.
    """

    num_frames: int
    fps: float
    times: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()


class _Reader:
    """An open file and its video stream; closes the file on exit and turns FFmpeg's errors into one clear line."""

    def __init__(self, source: VideoSource, label: str) -> None:
        self.source, self.label = source, label

    def __enter__(self) -> _Reader:
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else os.fspath(self.source)
        try:
            # "file:" keeps FFmpeg from reading a protocol into an odd file name.
            self.container = av.open(
                file if isinstance(file, io.BytesIO) else f"file:{file}",
                container_options={"format_whitelist": CONTAINERS},
            )
        except av.ArgumentError as error:  # what the list of containers leads to
            raise UserError(f"{self.label}: not a video in a known format ({CONTAINERS_FOR_HUMANS})") from error
        except (av.FFmpegError, ValueError) as error:
            raise UserError(
                f"{self.label}: not a video in a known format ({CONTAINERS_FOR_HUMANS}), or damaged ({_reason(error)})"
            ) from error
        cover = av.stream.Disposition.attached_pic  # the cover picture of a music file is no video
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            self.container.close()
            raise UserError(f"{self.label}: has no video stream")
        self.stream = streams[0]
        if self.stream.codec_context is None:
            self.container.close()
            raise UserError(f"{self.label}: its video is in a coding FFmpeg does not know; convert it to H.264 in mp4")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise UserError(f"{self.label}: the video is damaged ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def probe_video(source: VideoSource, *, name: str | None = None) -> VideoInfo:
    """Counts the frames of a video and finds where decoding can start, reading the file once without decoding it.

    Args:
      source: a path, or the bytes of a video file.
      name: what to call the video in error messages; default the path.

    Raises:
      UserError: missing, empty, damaged file, no video in it, or frames of more than MAX_PIXELS pixels.
    """
    label = source_name(source, name)
    require_file(source, label)
    with _Reader(source, label) as reader:
        stream = reader.stream
        if stream.width * stream.height > MAX_PIXELS:
            size = f"{stream.width} x {stream.height} pixels"
            raise UserError(f"{label}: frames of {size}; at most {MAX_PIXELS} are accepted, scale it down")
        packets = [(p.pts, p.is_keyframe) for p in reader.container.demux(stream) if p.size and not p.is_discard]
        rate = stream.average_rate or stream.guessed_rate
        jumping = reader.container.format.name in JUMPING_CONTAINERS
    if not packets:
        raise UserError(f"{label}: the video has no frames")
    if not rate:
        raise UserError(f"{label}: does not say how many frames per second it has; convert it to mp4")
    times = [pts for pts, _ in packets]
    if not jumping or None in times or len(set(times)) != len(times):
        return VideoInfo(len(packets), float(rate))
    keyframes = sorted(pts for pts, is_keyframe in packets if is_keyframe)
    return VideoInfo(len(packets), float(rate), tuple(sorted(times)), tuple(keyframes))


def _upright(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame as RGB, turned as the camera recorded it was held (players do the same)."""
    pixels = frame.to_ndarray(format="rgb24")
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))


def _decode_in_order(source: VideoSource, label: str, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """(index, picture) for the ascending indices `wanted`, decoding from the start."""
    with _Reader(source, label) as reader:
        for index, frame in enumerate(reader.container.decode(reader.stream)):
            if index in wanted:
                yield index, _upright(frame)
            if index >= wanted[-1]:
                return


def _decode_by_time(
    source: VideoSource, label: str, info: VideoInfo, wanted: Sequence[int]
) -> Iterator[tuple[int, Image.Image]]:
    """(index, picture) for the ascending indices `wanted`, jumping to the key frame before one if that skips frames."""
    with _Reader(source, label) as reader:
        frames = reader.container.decode(reader.stream)
        reached = info.keyframes[0]  # the time up to which everything is decoded
        for index in wanted:
            time = info.times[index]
            start = info.keyframes[max(bisect.bisect_right(info.keyframes, time) - 1, 0)]
            if start > reached:
                reader.container.seek(start, stream=reader.stream)
                frames = reader.container.decode(reader.stream)
            frame = next((f for f in frames if f.pts is not None and f.pts >= time), None)
            if frame is None or frame.pts != time:
                return
            reached = time
            yield index, _upright(frame)


def read_frames(
    source: VideoSource, indices: Sequence[int], info: VideoInfo, *, name: str | None = None
) -> list[Image.Image]:
    """Decodes the frames `indices` (any order, repeats allowed), and no more of the file than that takes.

    Args:
      source: a path, or the bytes of a video file.
      indices: each below `info.num_frames`.
      info: of the same file, from `probe_video`.

    Returns:
      One RGB picture per index, upright.

    Raises:
      UserError: the file is damaged: a frame cannot be decoded.
    """
    label = source_name(source, name)
    wanted = sorted(set(indices))
    pictures = dict(_decode_by_time(source, label, info, wanted)) if info.keyframes else {}
    if len(pictures) < len(wanted):
        # No usable time stamps, or a container whose index of key frames is wrong: count frames from the start instead.
        pictures = dict(_decode_in_order(source, label, wanted))
    if len(pictures) < len(wanted):
        lost = next(i for i in wanted if i not in pictures)
        raise UserError(f"{label}: the video is damaged: frame {lost} of {info.num_frames} cannot be decoded")
    return [pictures[index] for index in indices]


def read_video(
    source: VideoSource,
    config: ImageConfig,
    *,
    rule: FrameRule | str = "paper",
    start: float | None = None,
    end: float | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Samples a video and makes each frame one tile (no tiling; `config.aspect` is honoured).

    Args:
      source: a path, or the bytes of a video file or animated GIF.
      config: tile side, padding.
      rule: "paper", the name of one of `ORIGINAL_RULES`, or a `FrameRule`.
      start, end: take only these seconds; see `clip_range`.
      name: what to call the video in error messages; default the path.

    Returns:
      uint8 (t S S 3); t is 4 to 16 under the paper's rule.

    Raises:
      UserError: missing, empty or damaged file, no video in it, a clip outside the video, or a rule that does not fit
        its rate.
    """
    label = source_name(source, name)
    info = probe_video(source, name=label)
    try:
        indices = choose_frames(info.num_frames, info.fps, rule, start, end)
    except UserError as error:
        raise type(error)(f"{label}: {error}") from error
    pictures = read_frames(source, indices, info, name=label)
    tiles = {id(picture): single_tile(picture, config) for picture in pictures}
    return np.stack([tiles[id(picture)] for picture in pictures])


# ---- writing --------------------------------------------------------------------------------------------------------


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: float) -> None:
    """Writes frames as H.264 (MPEG-4 where FFmpeg was built without x264); the same frames give the same bytes.

    Args:
      path: the file; its ending names the container (".mp4").
      frames: uint8 (n h w 3), n >= 1, h and w even (colour is stored at half resolution).
      fps: frames per second, positive.

    Raises:
      UserError: wrong dtype, shape or rate, or an ending that names no container.
    """
    label = os.fspath(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise UserError(f"{label}: frames are {frames.dtype} {frames.shape}; they must be uint8 (n h w 3) with n >= 1")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2 or not height or not width:
        raise UserError(f"{label}: frames of {width} x {height} pixels; both must be even, pad or crop by one pixel")
    _check_length(len(frames), fps)
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{label}: its folder does not exist; create it first")
    has_x264 = "libx264" in av.codecs_available
    codec, rate = ("libx264" if has_x264 else "mpeg4"), Fraction(fps).limit_denominator(1001)
    try:
        container = av.open(label, "w", options={"fflags": "+bitexact"})
        stream = container.add_stream(codec, rate=rate)
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{label}: cannot be written as a {codec} video ({_reason(error)}); use .mp4") from error
    with container:
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # with more, the bytes would depend on the number of cores
        if has_x264:
            # x264's macroblock tree picks one of several equal encodings by what lies in memory, once in a thousand.
            stream.options = {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}
        else:
            stream.bit_rate = max(400_000, int(width * height * float(fps)))  # MPEG-4's default rate blurs small text
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
