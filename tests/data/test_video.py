"""Frame rules, and reading what was written."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vita_jax.data import video
from vita_jax.data.images import ImageConfig
from vita_jax.data.video import (
    ORIGINAL_RULES,
    EmptyClipError,
    FrameRateError,
    choose_frames,
    original_frame_indices,
    paper_frame_indices,
    probe_video,
    read_frames,
    read_video,
    segment_midpoints,
    write_video,
)
from vita_jax.errors import UserError

SMALL = ImageConfig(image_size=16)
RATES = st.sampled_from([0.4, 1.0, 2.5, 10.0, 12.5, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 60.0])


def levels(count: int) -> np.ndarray:
    """A grey level per frame that tells neighbours and their neighbours apart after lossy compression."""
    return (np.arange(count) * 37 % 240).astype(np.uint8)


def clip(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.broadcast_to(levels(count)[:, None, None, None], (count, height, width, 3))


def level(picture: np.ndarray) -> float:
    return float(np.asarray(picture).astype(float).mean())


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    write_video(path, clip(600), 25)
    return path


# ---- the paper's rule -----------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), RATES)
def test_paper_rule_counts_by_duration(num_frames, fps):
    indices = paper_frame_indices(num_frames, fps)
    seconds = num_frames / fps
    assert indices == sorted(indices) and indices[0] == 0 and indices[-1] < num_frames
    assert 4 <= len(indices) <= 16
    # Never a repeated frame while there are different ones to show.
    assert len(set(indices)) == min(len(indices), num_frames)
    if num_frames >= 16:
        assert (len(indices) == 4) == (seconds <= 4 + 1e-6)
        if seconds > 16:
            assert len(indices) == 16
    if seconds < 4 or seconds > 16:
        assert indices[-1] == num_frames - 1


@pytest.mark.parametrize(
    ("num_frames", "fps", "want"),
    [
        (1, 30.0, [0, 0, 0, 0]),
        (4, 30.0, [0, 1, 2, 3]),
        (31, 30.0, [0, 10, 20, 30]),
        (120, 30.0, [0, 30, 60, 90]),
        (125, 25.0, [0, 25, 50, 75, 100]),
        (160, 10.0, list(range(0, 160, 10))),
        (301, 10.0, list(range(0, 301, 20))),
        (8, 0.4, list(range(8))),
        (10, 0.4, list(range(10))),
        (5, 1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_paper_rule_examples(num_frames, fps, want):
    assert paper_frame_indices(num_frames, fps) == want


@pytest.mark.parametrize(("num_frames", "fps"), [(0, 25.0), (10, 0.0), (10, float("nan")), (10, -1.0)])
def test_impossible_videos_are_refused(num_frames, fps):
    with pytest.raises(UserError, match="positive"):
        paper_frame_indices(num_frames, fps)


# ---- the original routines ------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(ORIGINAL_RULES)), st.integers(1, 3000), RATES)
def test_original_rules_stay_within_their_limits(name, num_frames, fps):
    rule = ORIGINAL_RULES[name]
    try:
        indices = original_frame_indices(num_frames, fps, name)
    except FrameRateError:
        assert round(fps / rule.frames_per_second) == 0
        return
    assert (rule.min_frames or 1) <= len(indices) <= rule.max_frames
    assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < num_frames
    if rule.count_per_second is not None:
        assert len(indices) % 4 == 0


def test_seconds_select_a_clip():
    assert choose_frames(900, 30.0, "demo", 2, 9) == list(range(60, 271, 30))
    assert choose_frames(900, 30.0, "paper", 2, 9) == choose_frames(900, 30.0, "paper", 9, 2)
    assert choose_frames(900, 30.0, "paper", 2, 9) == list(range(60, 271, 30))
    assert choose_frames(900, 30.0, "paper", start=29) == [870, 880, 889, 899]
    assert original_frame_indices(900, 30.0, "demo", 31, 40) is None
    with pytest.raises(EmptyClipError):
        original_frame_indices(900, 30.0, "train_v1_5", 31, 40)
    for rule in ("paper", "demo"):
        with pytest.raises(UserError, match="31 to 40.*30.00 s"):
            choose_frames(900, 30.0, rule, 31, 40)


def test_unknown_rule_lists_the_known_ones():
    with pytest.raises(UserError, match="'fast'.*demo"):
        choose_frames(9, 30.0, "fast")


@given(st.integers(1, 2000), st.integers(1, 64))
def test_segment_midpoints_ascend(num_frames, count):
    indices = segment_midpoints(num_frames, count)
    assert len(indices) == count and indices == sorted(indices) and 0 <= indices[0] and indices[-1] < num_frames


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fps", "frames"), [(6, 2, 4), (4, 1, 4), (12, 2, 6), (40, 2, 16), (2, 2, 4), (50, 12.5, 4)]
)
def test_what_is_written_is_read(count, fps, frames, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, clip(count), fps)
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (count, fps)
    tiles = read_video(path, SMALL)
    assert tiles.shape == (frames, 16, 16, 3) and tiles.dtype == np.uint8
    want = levels(count)[paper_frame_indices(count, fps)]
    np.testing.assert_allclose([level(tile) for tile in tiles], want, atol=6)
    np.testing.assert_array_equal(read_video(path.read_bytes(), SMALL), tiles)


def test_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip(20), 5)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_jumping_finds_the_same_frames_as_reading_on(long_clip):
    info = probe_video(long_clip)
    assert len(info.keyframes) > 1
    indices = [599, 0, 5, 249, 250, 251, 299, 400, 5]
    jumped = read_frames(long_clip, indices, info)
    straight = read_frames(long_clip, indices, video.VideoInfo(info.num_frames, info.fps))
    for index, a, b in zip(indices, jumped, straight, strict=True):
        assert a.tobytes() == b.tobytes()
        assert abs(level(a) - levels(600)[index]) < 6


@pytest.mark.parametrize("ending", ["mkv", "avi", "mov", "ts"])
def test_other_containers(ending, tmp_path):
    path = tmp_path / f"clip.{ending}"
    write_video(path, clip(60), 10)
    tiles = read_video(path, SMALL)
    np.testing.assert_allclose([level(t) for t in tiles], levels(60)[[0, 10, 20, 30, 40, 50]], atol=6)


def test_rules_and_seconds_reach_the_reader(long_clip):
    assert len(read_video(long_clip, SMALL, rule="server")) == 4
    assert len(read_video(long_clip, SMALL, start=2, end=8)) == 7
    with pytest.raises(EmptyClipError, match=r"long\.mp4: seconds 90"):
        read_video(long_clip, SMALL, start=90, end=95)


def test_padding_keeps_the_sides_of_a_frame(tmp_path):
    frames = np.zeros((4, 16, 48, 3), np.uint8)
    frames[:, :, :8] = 255
    path = tmp_path / "wide.mp4"
    write_video(path, frames, 4)
    assert read_video(path, SMALL)[0].max() < 40  # the centre only
    padded = read_video(path, ImageConfig(image_size=16, aspect="pad"))[0]
    assert padded[8, 0].min() > 200


def test_animated_gif_is_a_video():
    frames = [Image.new("RGB", (20, 20), (int(v),) * 3) for v in levels(10)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    tiles = read_video(file.getvalue(), SMALL)
    np.testing.assert_allclose([level(t) for t in tiles], levels(10)[[0, 3, 6, 9]], atol=2)


def test_a_turned_recording_is_shown_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    frames[:, :16] = 255  # the upper half
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)  # anticlockwise
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    (picture,) = read_frames(path, [0], probe_video(path))
    assert picture.size == (32, 48)
    assert np.asarray(picture)[:, :12].min() > 200 and np.asarray(picture)[:, 20:].max() < 60


def one_line(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_video(source, SMALL, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_files_are_named(tmp_path, long_clip):
    path = tmp_path / "clip.mp4"
    assert f"{path}: no such file" in one_line(path)
    assert "is a folder" in one_line(tmp_path)
    path.write_bytes(b"")
    assert f"{path}: the file is empty" in one_line(path)
    path.write_bytes(np.random.default_rng(0).bytes(4000))
    assert f"{path}: not a video" in one_line(path)
    path.write_bytes(long_clip.read_bytes()[:5000])  # the index, at the end of the file, is missing
    assert f"{path}: not a video" in one_line(path)
    assert "convert it" in one_line(long_clip.read_bytes().replace(b"avc1", b"vita"))
    damaged = bytearray(long_clip.read_bytes())
    for place in range(1000, len(damaged) // 2, 97):
        damaged[place] ^= 0x5A
    assert one_line(bytes(damaged), name="damaged.mp4").startswith("damaged.mp4: the video is damaged")


@pytest.mark.parametrize("name", ["a.png", "a.txt", "list.m3u8", "list.ffconcat"])
def test_files_of_other_kinds_are_no_videos(name, tmp_path):
    path = tmp_path / name
    content = {"a.txt": "words\n" * 99, "list.m3u8": "#EXTM3U\n#EXTINF:1,\nb.mp4\n"}
    if name == "a.png":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_text(content.get(name, "ffconcat version 1.0\nfile b.mp4\n"))
    write_video(tmp_path / "b.mp4", clip(4), 2)
    assert "not a video" in one_line(path)
    assert "not a video" in one_line(path.read_bytes(), name=name)


def test_sound_without_picture_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert "no video stream" in one_line(path)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_damaged_videos_open_or_give_one_line(long_clip, data):
    content = bytearray(long_clip.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[-data.draw(st.integers(1, len(content)))] = data.draw(st.integers(0, 255))
    try:
        assert 4 <= len(read_video(bytes(content), SMALL)) <= 16
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("frames", "fps", "word"),
    [
        (np.zeros((2, 15, 16, 3), np.uint8), 5, "even"),
        (np.zeros((2, 16, 16, 3), np.float32), 5, "float32"),
        (np.zeros((2, 16, 16), np.uint8), 5, "n h w 3"),
        (np.zeros((0, 16, 16, 3), np.uint8), 5, "n >= 1"),
        (np.zeros((2, 16, 16, 3), np.uint8), 0, "positive"),
    ],
)
def test_unwritable_frames_are_refused(frames, fps, word, tmp_path):
    with pytest.raises(UserError, match=word):
        write_video(tmp_path / "clip.mp4", frames, fps)


def test_unwritable_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="folder does not exist"):
        write_video(tmp_path / "none" / "clip.mp4", clip(2), 5)
    with pytest.raises(UserError, match=r"use \.mp4"):
        write_video(tmp_path / "clip.words", clip(2), 5)
