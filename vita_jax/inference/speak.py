"""A reply aloud: text to speech tokens, sentence by sentence, and these to sound, all at once or as they come.

    text -> sentences -> ids of the language model -> its embeddings -> NAR and AR decoders -> codec tokens -> wave

The voice is that of a recording (`voice_of`). Streamed and offline sound are the same samples: every sentence is drawn
with a key of its own, and the codec is decoded with its whole context (`codec_stream`).
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

from vita_jax.data.speech_pairs import MANIFEST, read_manifest, read_wave
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.codec_stream import LATER_SENTENCES, CodecStreamer, StreamOptions, to_pcm16
from vita_jax.inference.speech_text import MIN_PIECE_LENGTH, remove_markers, speakable_pieces
from vita_jax.inference.speech_tokens import SpeechSampling, draw_speech_tokens, stream_speech_tokens
from vita_jax.inference.spoken_words import language_of
from vita_jax.models.codec.codec import Codec
from vita_jax.models.speech.nar_decoder import text_rows
from vita_jax.models.speech.speech_decoder import SpeechDecoder
from vita_jax.models.vita import VitaConfig
from vita_jax.training.experiment import ExperimentConfig, data_folder
from vita_jax.training.objectives.speech import SPEECH_OBJECTIVES

# The voice of every language, in the run's folder.
VOICES = "voices.json"
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
    stream: StreamOptions = LATER_SENTENCES
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

    def stream_ids(self, text_ids: Sequence[int], sentence: int = 0) -> Iterator[np.ndarray]:
        """One sentence as segments for the player, which joined are `speak_ids`."""
        yield from self._streamer.segments(self.tokens(text_ids, sentence), self.options.stream)

    def speak(self, text: str, tokenizer: Tokenizer) -> np.ndarray:
        """A whole reply, sentence after sentence: (n,) float32 samples in -1 .. 1."""
        pieces = sentences([text], tokenizer, self.options.min_piece)
        waves = [self.speak_ids(ids, number) for number, ids in enumerate(pieces)]
        return np.concatenate([np.zeros((0,), np.float32), *waves])

    def stream(self, text: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        """A reply that is still being written, as segments for the player, which joined are `speak`."""
        for number, ids in enumerate(sentences(text, tokenizer, self.options.min_piece)):
            yield from self.stream_ids(ids, number)


def sentences(text: Iterable[str], tokenizer: Tokenizer, min_length: int = MIN_PIECE_LENGTH) -> Iterator[list[int]]:
    """Ids of the speakable pieces of a reply that comes in strings of any length, as soon as each is complete.

    Only markers are taken out: what the decoders were trained on is what they can say, so the text is otherwise left as
    it is, and `speech_text` offers the originals' normalisations to a caller whose data has them.
    """
    for piece in speakable_pieces(text, min_length):
        ids = tokenizer.encode(remove_markers(piece).strip(), allow_special=False, add_bos=False)
        if ids:
            yield ids


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
    """The voice that each language is spoken in: language -> (g,) int32, see `voice_of`.

    That of `<run_dir>/voices.json` if there is such a file, else of the recordings that the voice was trained on.

    Raises:
      UserError: the model has no codec, the file is damaged or does not fit it, or there are neither file nor
        recordings.
    """
    if config.model.codec is None:
        raise UserError("this model does not speak: its config has no `codec`")
    path = Path(config.run_dir) / VOICES
    if not path.is_file():
        return trained_voices(config, params)
    try:
        found = {name: np.asarray(codes, np.int32) for name, codes in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to have it made again") from None
    codec = config.model.codec
    for name, codes in found.items():
        fits = codes.shape == (codec.num_global_codes,) and np.all((codes >= 0) & (codes < codec.num_codes))
        if not fits:
            raise UserError(
                f"{path}: the voice {name!r} must be {codec.num_global_codes} numbers from 0 to {codec.num_codes - 1}; "
                "delete the file to have it made again"
            )
    return found


def why_no_voices(config: ExperimentConfig) -> str | None:
    """Why there are no voices to speak in; None if there are."""
    if (Path(config.run_dir) / VOICES).is_file():
        return None
    recordings = _voice_recordings(config)
    if recordings is None:
        return f"the run has no {VOICES}, and none of its stages trains a voice"
    manifest = recordings / MANIFEST if recordings.suffix == "" else recordings
    return None if manifest.is_file() else f"there is neither {VOICES} in the run nor {manifest}"


def _voice_recordings(config: ExperimentConfig) -> Path | None:
    """What the first stage of the voice is trained on."""
    stages = [stage for stage in config.stages if stage.objective in SPEECH_OBJECTIVES]
    return data_folder(config) / stages[0].sources[0].path if stages else None


def trained_voices(config: ExperimentConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Language -> (g,) int32 codes of its first recording among those that the voice was trained on.

    Raises:
      UserError: no stage trains a voice, its recordings are not there, or the model has no codec.
    """
    recordings = _voice_recordings(config)
    if recordings is None:
        raise UserError(f"no voice: {why_no_voices(config)}")
    if config.model.codec is None:
        raise UserError("a voice needs a codec; set the model config's `codec`")
    found: dict[str, np.ndarray] = {}
    for pair in read_manifest(recordings):
        language = language_of(pair.text)
        if language not in found:
            found[language] = voice_of(config.model, params, read_wave(pair.audio, config.model.codec.sampling_rate))
    return found


def save_voices(config: ExperimentConfig, found: Mapping[str, np.ndarray]) -> Path:
    """Writes `<run_dir>/voices.json`. Returns its path. Raises UserError if it cannot be written."""
    path = Path(config.run_dir) / VOICES
    try:
        path.write_text(json.dumps({name: codes.tolist() for name, codes in found.items()}) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
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
