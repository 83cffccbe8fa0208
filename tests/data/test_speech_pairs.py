"""Spoken pairs: crops and padding, order, resuming, bad records."""

from __future__ import annotations

import json
import wave

import av
import numpy as np
import pytest

from tests.data.media import tone, write_wav
from vita_jax.data.lanes import Lanes, Reading
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import read_manifest
from vita_jax.data.records import RecordError
from vita_jax.data.speech_pairs import (
    CropShape,
    PairShape,
    crop,
    make_crop_loader,
    make_pair_loader,
    read_wave,
)
from vita_jax.errors import UserError

RATE, HOP = 800, 10
SHAPE = PairShape(RATE, HOP, frames=12, tokens=6)


class Letters:
    """One id per letter."""

    def encode(self, text: str, *, allow_special: bool = True, add_bos: bool = True) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]


def encode(path, codec, samples, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        values = np.round(samples[None] * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(piece):
                container.mux(packet)


def write(path, samples, rate=RATE):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())


@pytest.fixture
def source(tmp_path):
    """Ten utterances of 21 .. 111 samples; sample values name the utterance."""
    rows = []
    for number in range(10):
        write(tmp_path / f"{number}.wav", np.arange(21 + 10 * number) + 1000 * number)
        rows.append({"id": str(number), "audio": f"{number}.wav", "text": "abcdef"[: 1 + number % 6]})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return SourceConfig(str(tmp_path))


def crop_loader(source, seed=3, **options):
    return make_crop_loader(
        [source], CropShape(RATE, 30), seed=seed, **{"batch_size": 2, "reading": Reading(0), **options}
    )


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_crops_are_two_pieces_of_one_utterance(source):
    for batch in [next(crop_loader(source)) for _ in range(3)]:
        assert batch["waves"].shape == batch["other_waves"].shape == (2, 30) and batch["waves"].dtype == np.float32
        for one, other in zip(batch["waves"], batch["other_waves"], strict=True):
            values = np.round(one[:20] * 32768).astype(int)
            assert np.all(np.diff(values) == 1)
            assert values[0] // 1000 == round(other[0] * 32768) // 1000


def test_short_waves_are_followed_by_zeros():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(crop(np.ones(3), 5, rng), [1, 1, 1, 0, 0])
    starts = {int(crop(np.arange(8), 5, rng)[0]) for _ in range(100)}
    assert starts == {0, 1, 2, 3}


def test_order_is_that_of_the_seed_and_resumes(source):
    whole = crop_loader(source, reading=Reading(2))
    batches = [next(whole) for _ in range(12)]
    interrupted = crop_loader(source)
    assert all(same(next(interrupted), batch) for batch in batches[:4])
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = crop_loader(source, prefetch_batches=0)
    with pytest.raises(UserError, match="start the stage anew"):
        resumed.set_state({})
    resumed = crop_loader(source)
    resumed.set_state(state)
    assert all(same(next(resumed), batch) for batch in batches[4:])
    assert not same(next(crop_loader(source, seed=4)), batches[0])
    # The second epoch takes other crops.
    assert not any(same(a, b) for a in batches[:5] for b in batches[5:10])
    for loader in (whole, interrupted, resumed):
        loader.close()


def pair_loader(source, batch_size, **options):
    options = {"seed": 0, "reading": Reading(0), "shuffle": False, **options}
    return make_pair_loader([source], SHAPE, Letters(), batch_size=batch_size, **options)


def test_pairs_are_padded(source):
    loader = pair_loader(source, 5, num_epochs=1)
    batch = next(loader)
    assert batch["text_tokens"].shape == (5, 6) and batch["waves"].shape == (5, 90)  # steps of 12 / 4 frames
    np.testing.assert_array_equal(batch["text_lengths"], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(batch["frames"], [3, 4, 5, 6, 7])
    np.testing.assert_array_equal(batch["text_tokens"][2], [1, 2, 3, 0, 0, 0])
    assert np.all(batch["waves"][0, 21:] == 0) and batch["waves"][0, 20] != 0
    assert next(loader)["waves"].shape == (5, 120)
    loader.close()


def test_batches_are_of_similar_length_and_hold_every_pair_once(source):
    loader = pair_loader(source, 2, num_epochs=1, shuffle=True)
    batches = list(loader)
    assert [sorted(batch["frames"]) for batch in batches] == [[3, 4], [9, 10], [5, 6], [11, 12], [7, 8]]
    assert [batch["waves"].shape[1] for batch in batches] == [60, 120, 60, 120, 90]
    # Hosts must agree on shapes without asking each other.
    shared = pair_loader(source, 2, num_epochs=1, lanes=Lanes(2, (1,)))
    assert [batch["waves"].shape for batch in shared] == [(2, 120)] * 2


def test_sorted_pairs_resume(source):
    whole = pair_loader(source, 2, shuffle=True)
    batches = [next(whole) for _ in range(20)]
    interrupted = pair_loader(source, 2, shuffle=True)
    assert all(same(next(interrupted), batch) for batch in batches[:11])
    resumed = pair_loader(source, 2, shuffle=True)
    resumed.set_state(json.loads(json.dumps(interrupted.get_state())))
    assert all(same(next(resumed), batch) for batch in batches[11:])
    for loader in (whole, interrupted, resumed):
        loader.close()


def test_bad_records_are_counted_and_too_many_stop(source, tmp_path):
    (tmp_path / "0.wav").write_bytes(b"no sound at all, only text")
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    (tmp_path / "2.wav").unlink()
    shape = PairShape(RATE, HOP, frames=11, tokens=6)
    options = {"seed": 0, "batch_size": 6, "reading": Reading(0), "prefetch_batches": 0}
    loader = make_pair_loader([source], shape, Letters(), max_bad_fraction=0.5, num_epochs=1, **options)
    next(loader)
    counts = loader.counts
    assert counts.bad == 4
    assert counts.reasons == {"damaged media": 2, "missing media": 1, "too long": 1}
    strict = make_pair_loader([source], shape, Letters(), max_bad_fraction=0.1, **options)
    with pytest.raises(UserError, match="records cannot be used"):
        next(strict)


def test_errors_name_the_place(source, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "no.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"audio": "a.wav", "text": "a"}\n{"audio": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_manifest(bad)
    bad.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_manifest(bad)
    with pytest.raises(UserError, match="have no weight"):
        crop_loader(SourceConfig(source.path, weight=1.0))
    with pytest.raises(UserError, match="cannot be shared"):
        crop_loader(SourceConfig(source.path, ratio=0.2), lanes=Lanes(3, (0,)))
    write(tmp_path / "none.wav", [])
    with pytest.raises(RecordError, match="none.wav: holds no samples"):
        read_wave(tmp_path / "none.wav", RATE)
    with pytest.raises(RecordError, match="missing.wav: cannot be read"):
        read_wave(tmp_path / "missing.wav", RATE)


def test_recordings_of_other_forms_are_decoded_and_resampled(tmp_path):
    rate, seconds = 16_000, 0.5
    expected = tone(seconds, rate, 440.0)
    write_wav(tmp_path / "stereo.wav", np.stack([tone(seconds, 48_000), np.zeros(24_000, np.float32)]), 48_000)
    encode(tmp_path / "a.flac", "flac", tone(seconds, 22_050), 22_050)
    encode(tmp_path / "a.mp3", "mp3", tone(seconds, 44_100), 44_100)
    for name, tolerance in (("stereo.wav", 1e-3), ("a.flac", 1e-3)):
        samples = read_wave(tmp_path / name, rate)
        assert samples.dtype == np.float32 and len(samples) == len(expected)
        np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=tolerance)
    # MP3 adds a little silence in front and changes the samples, not the tone.
    heard = read_wave(tmp_path / "a.mp3", rate)
    assert abs(len(heard) - len(expected)) < rate // 10
    assert np.argmax(np.abs(np.fft.rfft(heard, rate))) == 440
