"""Sound files of every kind to waveforms and features."""

import io

import av
import numpy as np
import pytest

from tests.data.media import tone, write_wav
from vita_jax.data.audio import (
    AudioConfig,
    AudioContext,
    clip_features,
    pad_clips,
    read_audio,
    waveform_features,
)
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import FilterBankConfig, audio_tokens, log_mel

CONTEXT = AudioContext(AudioConfig(), audio_tokens)
CODECS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "ogg": "libopus"}


def encoded(waveform, rate, container, codec, layout="mono", sample_format="s16"):
    """The bytes of a file with (channels n) samples."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        values = np.atleast_2d(waveform)
        if sample_format in ("s16", "s32", "u8"):
            values = {
                "s16": lambda v: np.round(v * 32767).astype(np.int16),
                "s32": lambda v: np.round(v * 2147483000).astype(np.int32),
                "u8": lambda v: np.round(v * 127 + 128).astype(np.uint8),
            }[sample_format](values)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values.T.reshape(1, -1)), sample_format, layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.codec_context.format.name, layout, rate, stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return buffer.getvalue()


KINDS = [(c, rate, n) for c in ("wav", "flac", "mp3") for rate, n in ((16_000, 1), (44_100, 2), (22_050, 1))]


@pytest.mark.parametrize(("container", "rate", "channels"), [*KINDS, ("ogg", 16_000, 1), ("ogg", 48_000, 2)])
def test_formats_rates_and_channels(container, rate, channels):
    """A tone of 440 Hz comes back with its frequency, its level and its length."""
    left = tone(0.5, rate, 440.0)
    both = left[None] if channels == 1 else np.stack([left, tone(0.5, rate, 1000.0)])
    data = encoded(both, rate, container, CODECS[container], ("mono", "stereo")[channels - 1])
    waveform = read_audio(data, name="x")
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    slack = 2500 if container in ("mp3", "ogg") else 1
    assert abs(len(waveform) - 8000) <= slack
    middle = waveform[2000:6000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(np.argmax(spectrum) * 16_000 / len(middle) - 440) < 8
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize(("codec", "sample_format", "atol"), [
    ("pcm_u8", "u8", 0.01), ("pcm_s16le", "s16", 1e-4), ("pcm_s24le", "s32", 1e-6), ("pcm_f32le", "flt", 0),
])  # fmt: skip
def test_sample_formats(codec, sample_format, atol):
    wave = tone(0.2, 16_000)
    np.testing.assert_allclose(read_audio(encoded(wave, 16_000, "wav", codec, "mono", sample_format)), wave, atol=atol)


def test_int16_samples_are_exact(tmp_path):
    values = np.arange(-400, 400, dtype=np.int16)
    write_wav(tmp_path / "a.wav", values / 32768.0)
    assert np.array_equal(read_audio(tmp_path / "a.wav"), values / np.float32(32768.0))


def test_channels(tmp_path):
    wave = np.stack([np.full(800, 0.5), np.full(800, -0.25)])
    write_wav(tmp_path / "a.wav", wave)
    assert read_audio(tmp_path / "a.wav")[0] == 0.5
    assert read_audio(tmp_path / "a.wav", AudioConfig(channel="mean"))[0] == 0.125


def test_features_and_tokens(tmp_path):
    wave = tone(1.0, 16_000)
    write_wav(tmp_path / "a.wav", wave)
    clip = clip_features(tmp_path / "a.wav", CONTEXT)
    assert clip.features.shape == (98, 80) and clip.features.dtype == np.float32 and clip.num_tokens == 12
    np.testing.assert_array_equal(clip.features, log_mel(read_audio(tmp_path / "a.wav")))
    padded = pad_clips([clip.features, clip.features[:5]], 120, 80)
    assert padded.shape == (2, 120, 80) and not padded[1, 5:].any() and padded[0, 97].any()


def test_dither_belongs_to_the_clip():
    config = AudioConfig(FilterBankConfig(dither=1.0))
    wave = tone(0.1, 16_000)
    assert np.array_equal(waveform_features(wave, config), waveform_features(wave, config))
    assert not np.array_equal(waveform_features(wave, config), waveform_features(wave))


def test_mistakes_name_the_file(tmp_path):
    good = encoded(tone(1.0, 16_000), 16_000, "wav", "pcm_s16le")
    cases = {
        "none.wav": (None, "no such file"),
        "empty.wav": (b"", "is empty"),
        "text.wav": (b"hello, this is no sound at all" * 9, "not a sound file"),
        "header.wav": (good[:44], "cut off"),
        "cut.wav": (good[:16_000], "cut off"),
        "broken.flac": (encoded(tone(1.0, 16_000), 16_000, "flac", "flac")[:40] + b"\xff" * 400, "damaged|no samples"),
        "list.m3u": (b"#EXTM3U\nhttp://example.com/a.mp3\n", "not a sound file"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="x: lasts more than 0.5 s"):
        read_audio(good, AudioConfig(max_seconds=0.5), name="x")
    with pytest.raises(UserError, match="x: lasts 0.080 s, too short"):
        clip_features(encoded(tone(0.08, 16_000), 16_000, "wav", "pcm_s16le"), CONTEXT, name="x")


def test_damage_anywhere_is_one_clear_error():
    """Whatever byte is wrong: sound, or a UserError."""
    rng = np.random.default_rng(0)
    for container in CODECS:
        data = encoded(tone(0.3, 16_000), 16_000, container, CODECS[container])
        for _ in range(15):
            broken = bytearray(data[: rng.integers(1, len(data))])
            broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
            try:
                assert np.isfinite(read_audio(bytes(broken), name="x")).all()
            except UserError as error:
                assert str(error).startswith("x: ")


@pytest.mark.parametrize("values", [{"max_seconds": 0}, {"max_seconds": 500}, {"channel": "left"}])
def test_config_is_checked(values):
    with pytest.raises(UserError, match="audio: "):
        AudioConfig(**values)
