"""Sound as clients want it: containers and rates."""

from __future__ import annotations

import io
import math

import av
import numpy as np

from vita_jax.inference.codec_stream import PCM_SCALE, to_pcm16
from vita_jax.ops.filter_bank import resample_kernel

RATE = 24_000  # Hz of everything that is sent
# Name in the API -> (container, codec, media type); "pcm" is samples without a container.
FORMATS = {
    "mp3": ("mp3", "libmp3lame", "audio/mpeg"),
    "opus": ("ogg", "libopus", "audio/ogg"),
    "aac": ("adts", "aac", "audio/aac"),
    "flac": ("flac", "flac", "audio/flac"),
    "wav": ("wav", "pcm_s16le", "audio/wav"),
}
PCM = "pcm"
PCM_TYPE = f"audio/pcm;rate={RATE}"


class Resampler:
    """A stream of sound at another rate: what it gives, joined, is `resample` of the whole."""

    def __init__(self, rate: int, target: int) -> None:
        """rate, target: Hz."""
        self._rate, self._same = rate, rate == target
        self._kernel = resample_kernel(rate, target)
        self._stride, self._phases = rate // math.gcd(rate, target), len(self._kernel)
        self._half = (self._kernel.shape[1] - self._stride) // 2
        self._held = np.zeros((self._half,), np.float32)  # silence before the first sample, as in `resample`
        self._taken = self._given = 0

    @property
    def seconds(self) -> float:
        """How much sound it has taken."""
        return self._taken / self._rate

    def push(self, block: np.ndarray) -> np.ndarray:
        """One more block, (n,) float32 of any n -> (m,), the samples that are certain now."""
        self._taken += len(block)
        if self._same:
            return block
        out = self._certain(block)
        self._given += len(out)
        return out

    def flush(self) -> np.ndarray:
        """The sound is over: its last samples."""
        if self._same:
            return np.zeros((0,), np.float32)
        total = -(-self._phases * self._taken // self._stride)
        return self._certain(np.zeros((self._half + self._stride,), np.float32))[: total - self._given]

    def _certain(self, block: np.ndarray) -> np.ndarray:
        x, size = np.concatenate([self._held, block]), self._kernel.shape[1]
        count = max(0, (len(x) - size) // self._stride + 1)
        self._held = x[count * self._stride :]
        if not count:
            return np.zeros((0,), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(x, size)[: count * self._stride : self._stride]
        return (windows @ self._kernel.T).reshape(-1)


def to_bytes(samples: np.ndarray) -> bytes:
    """(n,) float32 -> 16-bit little-endian samples."""
    return to_pcm16(samples).astype("<i2").tobytes()


def from_bytes(data: bytes) -> np.ndarray:
    """16-bit little-endian samples -> (n,) float32."""
    return np.frombuffer(data, "<i2").astype(np.float32) / PCM_SCALE


def encoded(data: bytes, name: str) -> bytes:
    """A file of some PCM: 16-bit mono at `RATE`. name: of `FORMATS`, or `PCM`, which changes nothing."""
    if name == PCM:
        return data
    container, codec, _ = FORMATS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=RATE)
        stream.layout = "mono"
        samples = np.frombuffer(data, "<i2")[None]
        if samples.size:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="s16", layout="mono")
            frame.sample_rate = RATE
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
