"""A reply aloud: text to speech tokens, sentence by sentence, and these to sound, all at once or as they come.

    text -> sentences -> words -> ids of the language model -> its embeddings -> NAR and AR decoders -> codec tokens
         -> wave

The voice is that of a recording (`voice_of`); `voices` gives those of a trained run. Streamed (`talk.py`) and offline
sound are the same samples: every sentence is drawn with a key of its own, and the codec is decoded with its whole
context (`codec_stream`).
"""

from __future__ import annotations

import json
import wave
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.manifests import MANIFEST, read_manifest
from vita_jax.data.speech_pairs import read_wave
from vita_jax.data.spoken_words import LANGUAGES, answer_aloud, language_of
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.codec_stream import TALKING, CodecStreamer, StreamOptions, to_pcm16
from vita_jax.inference.speech_text import MIN_PIECE_LENGTH, remove_markers, speakable_pieces
from vita_jax.inference.speech_tokens import SpeechSampling, draw_speech_tokens, stream_speech_tokens
from vita_jax.inference.timings import AR_DECODER, CODEC, FIRST_CODE, Timeline
from vita_jax.models.codec.codec import Codec
from vita_jax.models.speech.nar_decoder import text_rows
from vita_jax.models.speech.speech_decoder import SpeechDecoder
from vita_jax.models.vita import VitaConfig
from vita_jax.storage import place, write_whole
from vita_jax.training.experiment import VOICES, ExperimentConfig, data_folder

# The recordings of a run's assistant, below the data folder.
RECORDINGS = Path("raw") / "speech_out" / MANIFEST
# Sentences whose tokens are drawn together where several replies are spoken.
SENTENCES_AT_ONCE = 32


@dataclass(frozen=True)
class SpeakOptions:
    """How a reply is spoken.

    Attributes:
      sampling: how tokens are drawn.
      max_tokens: of one sentence, a bound for a decoder that does not find the end.
      bucket: text ids are padded to a multiple of it, so that few shapes are compiled.
      steps_per_call: tokens drawn per call of the device.
      min_piece: characters; a shorter piece of text waits for the next punctuation mark.
      stream: how the sound is cut when streamed.
      seed: of the draws.
    """

    sampling: SpeechSampling = SpeechSampling(greedy=True)
    max_tokens: int = 400
    bucket: int = 16
    steps_per_call: int = 20
    min_piece: int = MIN_PIECE_LENGTH
    stream: StreamOptions = TALKING
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "bucket", "steps_per_call"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")


class Speaker:
    """Speaks with the decoders and the codec of a model, in one voice."""

    def __init__(
        self,
        config: VitaConfig,
        params: Mapping[str, Any],
        voice: np.ndarray,
        options: SpeakOptions = SpeakOptions(),
    ) -> None:
        """
        Args:
          config: of the model.
          params: its nested parameters; `language/embed_tokens`, `speech` and `codec` are used.
          voice: (g,) int32, see `voice_of`.
          options: see `SpeakOptions`.

        What it does is measured in `timeline`, which a caller may replace.

        Raises:
          UserError: the model has no codec or no speech decoders, or the voice has another number of codes.
        """
        if config.codec is None or config.speech is None:
            raise UserError("this model does not speak: its config needs both `codec` and `speech`")
        self.config, self.options = config, options
        self.sampling_rate = config.codec.sampling_rate
        self._table = params["language"]["embed_tokens"]["embedding"]
        self._decoder, self._params = SpeechDecoder(config.speech), params["speech"]
        self._streamer = CodecStreamer(Codec(config.codec), params["codec"], voice)
        self.timeline = Timeline()

    def tokens(self, text_ids: Sequence[int], sentence: int = 0) -> Iterator[int]:
        """Codec tokens of one sentence as they are drawn.

        Args:
          text_ids: ids of the language model, without special ones.
          sentence: its number in the reply; each has draws of its own.

        Raises:
          UserError: an id that the language model does not have.
        """
        if not len(text_ids):
            return
        features, lengths = self._rows([list(text_ids)])
        yield from stream_speech_tokens(
            self._decoder,
            self._params,
            features,
            lengths,
            key=jax.random.fold_in(jax.random.key(self.options.seed), sentence),
            max_tokens=self.options.max_tokens,
            sampling=self.options.sampling,
            steps_per_call=self.options.steps_per_call,
        )

    def _rows(self, sentences: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
        """What the decoders read of some sentences: rows (b s d), padded, and how many are real (b,)."""
        size = self.config.language.vocab_size
        known = [i for ids in sentences for i in ids]
        if min(known) < 0 or max(known) >= size:
            raise UserError(
                f"text ids go from {min(known)} to {max(known)}, but the language model has 0 to {size - 1}"
            )
        longest = max(len(ids) for ids in sentences)
        padded = np.zeros((len(sentences), -(-longest // self.options.bucket) * self.options.bucket), np.int32)
        for row, ids in enumerate(sentences):
            padded[row, : len(ids)] = ids
        width = self.config.speech.hidden_size
        features = text_rows(jnp.take(self._table, jnp.asarray(padded), axis=0), width)
        per_token = self.config.language.hidden_size // width
        return features, jnp.asarray([len(ids) * per_token for ids in sentences], jnp.int32)

    def speak_many(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
        """Several replies, their sentences together: (n,) float32 samples each, empty where there is nothing to say.

        Greedy ones are those of `speak`; drawn ones have other draws.
        """
        pieces = [
            (i, ids) for i, text in enumerate(texts) for ids in sentences([text], tokenizer, self.options.min_piece)
        ]
        tokens: list[np.ndarray] = [np.zeros((0,), np.int32)] * len(pieces)
        order = sorted(range(len(pieces)), key=lambda number: len(pieces[number][1]))
        for start in range(0, len(order), SENTENCES_AT_ONCE):
            chosen = order[start : start + SENTENCES_AT_ONCE]
            # Rows beyond the sentences stay empty.
            rows = [pieces[number][1] for number in chosen] + [[]] * (SENTENCES_AT_ONCE - len(chosen))
            drawn = draw_speech_tokens(
                self._decoder,
                self._params,
                *self._rows(rows),
                key=jax.random.fold_in(jax.random.key(self.options.seed), start),
                max_tokens=self.options.max_tokens,
                sampling=self.options.sampling,
                steps_per_call=self.options.steps_per_call,
            )
            for number, row in zip(chosen, drawn, strict=False):
                tokens[number] = row
        waves = self._streamer.decode_many(tokens)
        silence = np.zeros((0,), np.float32)
        return [
            np.concatenate([silence, *(wave for (owner, _), wave in zip(pieces, waves, strict=True) if owner == i)])
            for i in range(len(texts))
        ]

    def speak_ids(self, text_ids: Sequence[int], sentence: int = 0) -> np.ndarray:
        """One sentence at once: (n,) float32 samples in -1 .. 1."""
        tokens = np.fromiter(self.tokens(text_ids, sentence), np.int32)
        return self._streamer.decode(tokens) if len(tokens) else np.zeros((0,), np.float32)

    def stream_ids(self, text_ids: Sequence[int], sentence: int = 0, opening: bool = False) -> Iterator[np.ndarray]:
        """One sentence as segments for the player, which joined are `speak_ids`; opening: it is a reply's first."""
        codec, timeline = self.config.codec, self.timeline
        tokens = timeline.watch(AR_DECODER, self.tokens(text_ids, sentence), 1 / codec.frame_rate, FIRST_CODE)
        for segment in self._streamer.segments(tokens, self.options.stream, opening, timeline):
            timeline.made(CODEC, len(segment) / self.sampling_rate)
            yield segment

    def speak(self, text: str, tokenizer: Tokenizer, language: str | None = None) -> np.ndarray:
        """A whole reply, sentence after sentence: (n,) float32 samples in -1 .. 1; none if there is nothing to say.

        Args:
          text: the reply.
          tokenizer: of the language model.
          language: in which it is written out in words, see `sentences`.
        """
        pieces = speakable_pieces([text], self.options.min_piece)
        waves = [self.speak_ids(piece_ids(piece, tokenizer, language), n) for n, piece in enumerate(pieces)]
        return np.concatenate([np.zeros((0,), np.float32), *waves])


def sentences(
    text: Iterable[str], tokenizer: Tokenizer, min_length: int = MIN_PIECE_LENGTH, language: str | None = None
) -> Iterator[list[int]]:
    """Ids of the speakable pieces of a reply that comes in strings of any length, as soon as each is complete.

    What the decoders were trained on is what they can say. Without a language only markers are taken out, and
    `speech_text` offers the originals' normalisations to a caller whose data has them. With one, every piece is written
    out in words (`answer_aloud`), as the decoders of this package's experiments are trained.

    Args:
      text: the reply.
      tokenizer: of the language model.
      min_length: characters; a shorter piece waits for the next punctuation mark.
      language: "en" or "zh", in which digits are said; None leaves the text as it is written.

    Raises:
      UserError: an unknown language.
    """
    for piece in speakable_pieces(text, min_length):
        ids = piece_ids(piece, tokenizer, language)
        if ids:
            yield ids


def piece_ids(piece: str, tokenizer: Tokenizer, language: str | None) -> list[int]:
    """Ids of one piece, see `sentences`; none where nothing can be said."""
    words = remove_markers(piece).strip()
    if language is not None:
        words = answer_aloud(words, language)
    return tokenizer.encode(words, allow_special=False, add_bos=False)


def voice_of(config: VitaConfig, params: Mapping[str, Any], recording: np.ndarray) -> np.ndarray:
    """The voice of a recording, codes of the utterance: (n,) float32 samples at the codec's rate -> (g,) int32.

    Raises:
      UserError: the model has no codec, or the recording is shorter than two frames.
    """
    if config.codec is None:
        raise UserError("a voice needs a codec; set the model config's `codec`")
    hop = config.codec.hop
    frames = len(recording) // hop
    if frames < 2:
        raise UserError(f"a recording of {len(recording)} samples is too short for a voice; give at least {2 * hop}")
    samples = jnp.asarray(recording[: frames * hop], jnp.float32)[None]
    _, codes = Codec(config.codec).apply({"params": params["codec"]}, samples, method=Codec.encode)
    return np.asarray(codes[0])


def voices(config: ExperimentConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The voices of a run by language, (g,) int32 each.

    They are those of `<run_dir>/voices.json` where there is one, else of the first recording in each language that the
    voice was trained on.

    Args:
      config: the run; its `run_dir` says where it lies now.
      params: nested parameters; `codec` is used.

    Raises:
      UserError: the model has no codec, there is neither the file nor a recording, or one of them is damaged.
    """
    path = place(config.run_dir) / VOICES
    return read_voices(path) if path.is_file() else recorded_voices(config, params)


def recorded_voices(config: ExperimentConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The voices of the recordings, whether or not there is a file of voices; see `voices`."""
    manifest = data_folder(config) / RECORDINGS
    if not manifest.is_file():
        path = place(config.run_dir) / VOICES
        raise UserError(
            f"the model's voice is unknown: there is no {manifest}; keep the run's data folder, or put codes per "
            f'language in {path}, such as {{"en": [1, 2]}}'
        )
    if config.model.codec is None:
        raise UserError("a voice needs a codec; set the model config's `codec`")
    found: dict[str, np.ndarray] = {}
    for pair in read_manifest(manifest):
        language = language_of(pair.text)
        if language not in found:
            recording = read_wave(pair.audio, config.model.codec.sampling_rate)
            found[language] = voice_of(config.model, params, recording)
            if len(found) == len(LANGUAGES):
                break
    return found


def read_voices(path: str | Path) -> dict[str, np.ndarray]:
    """A JSON object, language -> list of codes. Raises `UserError` if it is anything else."""
    try:
        entries = json.loads(place(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"voices {path} cannot be read: {error}") from None
    whole = isinstance(entries, dict) and entries
    if not whole or not all(isinstance(v, list) and v and all(type(c) is int for c in v) for v in entries.values()):
        raise UserError(f'voices {path}: expected codes per language, such as {{"en": [1, 2]}}')
    return {language: np.asarray(codes, np.int32) for language, codes in entries.items()}


def save_voices(config: ExperimentConfig, params: Mapping[str, Any]) -> Path:
    """Writes `<run_dir>/voices.json`, the voices of the recordings, so that they outlive the data. Returns its path.

    Those of an earlier training are replaced.

    Raises:
      UserError: see `voices`, or it cannot be written.
    """
    path = place(config.run_dir) / VOICES
    try:
        found = {language: codes.tolist() for language, codes in recorded_voices(config, params).items()}
        write_whole(path, json.dumps(found) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def write_wav(path: str | Path, samples: np.ndarray, sampling_rate: int) -> None:
    """Writes (n,) float samples as 16-bit mono WAV. Raises UserError if the file cannot be written."""
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sampling_rate)
            file.writeframes(to_pcm16(samples).astype("<i2").tobytes())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
