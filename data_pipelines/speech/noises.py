"""Sounds that are not meant for the model, and what rooms and microphones do to speech. NumPy only.

Waveforms are (n,) float32 at 16 kHz; every function is a function of its arguments and of the generator it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vita_jax.errors import UserError

SAMPLE_RATE = 16000  # Hz
# Made of nothing but numbers, and made of other people's speech.
SYNTHETIC_KINDS = ("hum", "white", "pink", "brown", "chords", "arpeggio")
SPEECH_KINDS = ("babble", "second_speaker")
TRAINING_KINDS = SYNTHETIC_KINDS + SPEECH_KINDS
# Clicks as of typing, rain or a scratched record: in the benchmark only.
UNSEEN_KIND = "crackle"
BABBLE_VOICES = (4, 7)

# Power falls with frequency as f ** -exponent.
_COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
# Semitones above the root: major, minor, suspended, seventh.
_CHORDS = ((0, 4, 7), (0, 3, 7), (0, 5, 7), (0, 4, 7, 10))


def root_mean_square(waveform: np.ndarray) -> float:
    """Loudness of a waveform (n,)."""
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))


def with_loudness(waveform: np.ndarray, level: float) -> np.ndarray:
    """The waveform scaled to a root mean square of `level`, but never beyond a peak of 0.99.

    Raises:
      UserError: the waveform is silent.
    """
    loudness = root_mean_square(waveform)
    if loudness == 0:
        raise UserError(f"a waveform of {len(waveform)} samples is silent and cannot be made louder")
    scale = min(level / loudness, 0.99 / float(np.abs(waveform).max()))
    return (waveform * scale).astype(np.float32)


def snr_scale(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> float:
    """The factor of `noise` at which the power of speech is `snr_db` decibels above it."""
    loudness = root_mean_square(noise)
    if loudness == 0:
        raise UserError("the noise to mix is silent, so no signal-to-noise ratio can be reached")
    return root_mean_square(speech) / loudness * 10 ** (-snr_db / 20)


def mix(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Speech with noise behind it, as long as the speech.

    Args:
      speech: (n,) float32.
      noise: (m,) float32, repeated or cut to n.
      snr_db: power of speech over that of the noise, decibels, over the whole clip.

    Returns:
      (n,) float32; scaled down as a whole where the sum would leave -1..1, which does not change the ratio.

    Raises:
      UserError: no speech, or a silent noise.
    """
    if not len(speech) or not len(noise):
        raise UserError(f"cannot mix {len(speech)} samples of speech with {len(noise)} of noise; both need some")
    noise = np.resize(noise, len(speech))
    mixed = speech + snr_scale(speech, noise, snr_db) * noise
    return (mixed * min(1.0, 0.99 / float(np.abs(mixed).max()))).astype(np.float32)


# ---- kinds of noise --------------------------------------------------------------------------------------------------


def _times(seconds: float) -> np.ndarray:
    return np.arange(max(1, round(seconds * SAMPLE_RATE))) / SAMPLE_RATE


def _peak_one(waveform: np.ndarray) -> np.ndarray:
    return (waveform / np.abs(waveform).max()).astype(np.float32)


def hum(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Mains, a fan or an engine: harmonics of a low tone whose strength sways slowly."""
    times = _times(seconds)
    base = rng.choice((50.0, 60.0, rng.uniform(70, 140)))
    count = int(rng.integers(4, 14))
    sway = 1 + 0.3 * np.sin(2 * np.pi * (rng.uniform(0.3, 4) * times + rng.random()))
    harmonics = np.arange(1, count + 1)
    strengths = rng.uniform(0.2, 1, count) / harmonics ** rng.uniform(0.3, 1.2)
    phases = rng.random(count)
    tones = np.sin(2 * np.pi * (base * harmonics[:, None] * times + phases[:, None]))
    return _peak_one(sway * (strengths @ tones) + 0.02 * rng.standard_normal(len(times)))


def coloured(seconds: float, rng: np.random.Generator, colour: str) -> np.ndarray:
    """ "white", "pink" or "brown" noise: power falls as 1, 1/f, 1/f**2 from 20 Hz on."""
    count = len(_times(seconds))
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequencies = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 20)
    return _peak_one(np.fft.irfft(spectrum * frequencies ** (-_COLOURS[colour] / 2), count))


def _note(frequency: float, times: np.ndarray, rng: np.random.Generator, decay: float) -> np.ndarray:
    """A plucked or blown tone with overtones; `decay` in 1/s."""
    overtones = np.arange(1, 6)
    strengths = overtones ** -rng.uniform(1, 2)
    tone = strengths @ np.sin(2 * np.pi * frequency * overtones[:, None] * times)
    attack = np.minimum(times / 0.01, 1)
    return tone * attack * np.exp(-decay * times)


def _music(seconds: float, rng: np.random.Generator, note_seconds: float, broken: bool) -> np.ndarray:
    """Notes of a chord after another: struck together, or (broken) one by one."""
    times = _times(seconds)
    out = np.zeros(len(times))
    root = 110 * 2 ** (rng.integers(0, 25) / 12)
    decay = rng.uniform(0.5, 6)
    start, step = 0.0, 0
    chord = _CHORDS[rng.integers(len(_CHORDS))]
    while start < seconds:
        if step % 4 == 0 or not broken:
            chord = _CHORDS[rng.integers(len(_CHORDS))]
            shift = int(rng.choice((0, 0, 5, 7, -3)))
        first = round(start * SAMPLE_RATE)
        for interval in (chord[step % len(chord)],) if broken else chord:
            out[first:] += _note(root * 2 ** ((interval + shift) / 12), times[: len(times) - first], rng, decay)
        start += note_seconds
        step += 1
    return _peak_one(out)


def chords(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Chords of three or four notes, a new one every half second or so."""
    return _music(seconds, rng, rng.uniform(0.35, 0.9), broken=False)


def arpeggio(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """The notes of chords one after the other, as on a harp."""
    return _music(seconds, rng, rng.uniform(0.12, 0.3), broken=True)


def crackle(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Clicks at random moments, each a damped ringing of 1 to 6 kHz; 15 to 60 of them a second."""
    count = len(_times(seconds))
    clicks = np.zeros(count)
    number = max(3, rng.poisson(rng.uniform(15, 60) * seconds))
    clicks[rng.integers(0, count, number)] = rng.standard_normal(number) * rng.uniform(0.3, 1, number)
    times = np.arange(round(0.02 * SAMPLE_RATE)) / SAMPLE_RATE
    ringing = np.sin(2 * np.pi * rng.uniform(1000, 6000) * times + 0.5) * np.exp(-rng.uniform(200, 900) * times)
    out = convolve(clicks, ringing)[:count]
    return _peak_one(out + 0.002 * rng.standard_normal(count))


def babble(clips: Sequence[np.ndarray], seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Many people at once: every clip at the same loudness, repeated from a random moment on.

    Args:
      clips: waveforms of different voices, 2 at least.

    Raises:
      UserError: fewer than 2 clips.
    """
    if len(clips) < 2:
        raise UserError(f"babble is made of at least 2 voices, got {len(clips)}")
    count = len(_times(seconds))
    total = np.zeros(count)
    for clip in clips:
        turned = np.roll(clip, int(rng.integers(len(clip))))
        total += np.resize(with_loudness(turned, 0.1), count)
    return _peak_one(total)


def second_speaker(near: np.ndarray, far: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two people talking to each other, partly at the same time; the second one stands further away."""
    start = round(rng.uniform(0.2, 0.7) * len(near))
    far = far * rng.uniform(0.3, 0.9) * root_mean_square(near) / max(root_mean_square(far), 1e-6)
    out = np.zeros(max(len(near), start + len(far)))
    out[: len(near)] += near
    out[start : start + len(far)] += far
    return _peak_one(out)


_SYNTHETIC: dict[str, Callable[[float, np.random.Generator], np.ndarray]] = {
    "hum": hum,
    "white": lambda seconds, rng: coloured(seconds, rng, "white"),
    "pink": lambda seconds, rng: coloured(seconds, rng, "pink"),
    "brown": lambda seconds, rng: coloured(seconds, rng, "brown"),
    "chords": chords,
    "arpeggio": arpeggio,
    UNSEEN_KIND: crackle,
}


def synthetic_noise(kind: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A noise without speech in it, peak 1.

    Args:
      kind: one of `SYNTHETIC_KINDS`, or `UNSEEN_KIND`.
      seconds: how long, more than 0.

    Raises:
      UserError: an unknown kind, or no time for it.
    """
    if kind not in _SYNTHETIC:
        raise UserError(f"unknown kind of noise {kind!r}; known: {', '.join(_SYNTHETIC)}")
    if not seconds > 0:
        raise UserError(f"a noise of {seconds} seconds; give it more than 0")
    return _SYNTHETIC[kind](seconds, rng)


# ---- rooms and microphones -------------------------------------------------------------------------------------------


def convolve(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """(n,) * (m,) -> (n+m-1,), through the Fourier transform."""
    length = len(waveform) + len(response) - 1
    size = 1 << (length - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(response, size), size)[:length]


def in_room(waveform: np.ndarray, rng: np.random.Generator, reverberation: float | None = None) -> np.ndarray:
    """Speech in a small room: the direct sound, a few early reflections and a tail of decaying noise.

    Args:
      reverberation: seconds until the tail is 60 dB down; drawn from 0.1 to 0.4 if None.

    Returns:
      As long and as loud as `waveform`.
    """
    if reverberation is None:
        reverberation = rng.uniform(0.1, 0.4)
    times = _times(reverberation)
    response = 0.02 * rng.standard_normal(len(times)) * np.exp(-6.9 * times / reverberation)
    for _ in range(3):
        response[rng.integers(16, max(17, len(times) // 4))] += rng.uniform(-0.4, 0.4)
    response[0] = 1
    return with_loudness(convolve(waveform, response)[: len(waveform)], root_mean_square(waveform))


def equalized(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As another microphone hears it: three broad bands raised or lowered by up to 6 dB. As loud as before."""
    spectrum = np.fft.rfft(waveform)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE), 20) / 1000)
    gain_db = sum(rng.uniform(-6, 6) * np.exp(-((octaves - centre) ** 2)) for centre in (-2.5, 0.0, 2.3))
    shaped = np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(waveform))
    return with_loudness(shaped, root_mean_square(waveform))


def augmented(
    speech: np.ndarray, rng: np.random.Generator, background: np.ndarray | None = None, quietest_snr_db: float = 12
) -> np.ndarray:
    """Speech as training hears it: half of the time in a room, through another microphone, with noise; any loudness.

    Args:
      speech: (n,) float32.
      background: noise behind the speech, mixed at `quietest_snr_db` to 30 dB; None for none.

    Returns:
      (n,) float32 in -1..1.
    """
    if rng.random() < 0.5:
        speech = in_room(speech, rng)
    if rng.random() < 0.5:
        speech = equalized(speech, rng)
    if background is not None:
        speech = mix(speech, background, rng.uniform(quietest_snr_db, 30))
    return with_loudness(speech, 10 ** rng.uniform(-1.7, -0.9))
