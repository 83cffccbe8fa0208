"""What an arm of the study says, how it is read back, and how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vita_jax.data.spoken_words import answer_aloud
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.bootstrap import interval, rate_interval
from vita_jax.evaluation.items import ITEMS, read_items, stratified
from vita_jax.evaluation.recognition import Recogniser
from vita_jax.evaluation.scoring import character_errors, error_rate
from vita_jax.evaluation.sets import evenly
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.evaluation.voice import TEXTS, read_texts
from vita_jax.evaluation.waves import mel_distances
from vita_jax.inference.codec_stream import CodecStreamer
from vita_jax.inference.speak import Speaker, SpeakOptions, piece_ids
from vita_jax.inference.timings import AR_DECODER, CODEC, FIRST_SAMPLE, SPEECH_ENDS, Timeline
from vita_jax.models.codec.codec import Codec
from vita_jax.models.vita import VitaConfig
from vita_jax.training.experiment import ExperimentConfig

BENCHMARK, SPOKEN = "speech", "spoken"  # the benchmark, and its questions whose answers are said
ANSWERS, HELD_OUT = GROUPS = ("answers", "held-out texts")
SEED = 0  # of the bootstrap
AS_SERVED = SpeakOptions()

Speakers = Mapping[str, Speaker]  # by language


@dataclasses.dataclass(frozen=True)
class Text:
    """Something to say: `text` as it is said, `group` one of `GROUPS`."""

    id: str
    group: str
    language: str
    text: str


def texts_of(config: ExperimentConfig, per_kind: int) -> list[Text]:
    """True answers to the benchmark's spoken questions, `per_kind` of each kind of question, and at most as many texts
    that no training of the voice has.

    Raises:
      UserError: the run's data has no such benchmark.
    """
    root = benchmark_folder(config, BENCHMARK)
    items = stratified([item for item in read_items(root / ITEMS) if item.group == SPOKEN], per_kind)
    answers = [Text(i.id, ANSWERS, i.language, answer_aloud(i.answer, i.language)) for i in items]
    held_out = evenly(read_texts(root / TEXTS), len(answers))
    return answers + [Text(entry.id, HELD_OUT, entry.language, entry.text) for entry in held_out]


def make_speakers(
    config: VitaConfig,
    params: Mapping[str, Any],
    voices: Mapping[str, np.ndarray],
    options: SpeakOptions = AS_SERVED,
) -> dict[str, Speaker]:
    """One for each voice, see `Speaker`."""
    return {language: Speaker(config, params, voice, options) for language, voice in voices.items()}


def speaker_of(speakers: Speakers, text: Text) -> Speaker:
    """That of the text's language. Raises UserError if there is none."""
    if text.language not in speakers:
        raise UserError(f"the run has no voice for language {text.language!r}; it has {', '.join(speakers)}")
    return speakers[text.language]


def speak(speakers: Speakers, texts: Sequence[Text], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Every text at once, (n,) samples each."""
    waves: dict[str, np.ndarray] = {}
    for language in dict.fromkeys(text.language for text in texts):
        mine = [text for text in texts if text.language == language]
        said = speaker_of(speakers, mine[0]).speak_many([text.text for text in mine], tokenizer)
        waves |= {text.id: wave for text, wave in zip(mine, said, strict=True)}
    return [waves[text.id] for text in texts]


# ---- reading back ---------------------------------------------------------------------------------------------------


def read_back(
    texts: Sequence[Text], waves: Sequence[np.ndarray], recogniser: Recogniser, sampling_rate: int
) -> dict[str, dict[str, Any]]:
    """What the recogniser makes of some waves, by group of their texts.

    Returns:
      Group -> {"title", "n", "accuracy" (share read back without any error), "low", "high" (95 % interval), "misread":
      {"rate" (wrong characters by all), "low", "high"}, "outcomes": {group: {id: exact}}}.
    """
    heard = recogniser.hear(waves, sampling_rate)
    errors = np.array([character_errors(read, text.text) for read, text in zip(heard, texts, strict=True)])
    exact = np.array([wrong == 0 and len(wave) > 0 for (wrong, _), wave in zip(errors, waves, strict=True)])
    figures = {}
    for group in dict.fromkeys(text.group for text in texts):
        mine = [number for number, text in enumerate(texts) if text.group == group]
        low, high = interval([exact[mine].astype(float)], SEED)
        misread_low, misread_high = rate_interval(errors[mine, 0], errors[mine, 1], SEED)
        rate = error_rate((int(wrong), int(total)) for wrong, total in errors[mine])
        figures[group] = {
            "title": group,
            "n": len(mine),
            "accuracy": float(exact[mine].mean()),
            "low": low,
            "high": high,
            "misread": {"rate": rate, "low": misread_low, "high": misread_high},
            "outcomes": {group: {texts[number].id: bool(exact[number]) for number in mine}},
        }
    return figures


# ---- streaming ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A text as it was streamed.

    Attributes:
      wave: (n,) samples of all segments.
      first, total: seconds from the text to the first segment and to the last; `first` is None without a sound.
      decoder, codec: seconds that either worked.
    """

    wave: np.ndarray
    first: float | None
    total: float
    decoder: float
    codec: float


def stream(speaker: Speaker, text: Text, tokenizer: Tokenizer) -> Streamed:
    """Streams a text as the beginning of a reply, as fast as it goes."""
    timeline = speaker.timeline = Timeline()
    segments = [np.zeros((0,), np.float32)]
    timeline.mark(SPEECH_ENDS)
    for segment in speaker.stream_ids(piece_ids(text.text, tokenizer, None), opening=True):
        timeline.mark(FIRST_SAMPLE)
        segments.append(segment)
    total = timeline.clock() - timeline.marks[SPEECH_ENDS]
    worked = (timeline.worked.get(part, 0.0) for part in (AR_DECODER, CODEC))
    return Streamed(np.concatenate(segments), timeline.since(FIRST_SAMPLE), total, *worked)


def stream_all(speakers: Speakers, texts: Sequence[Text], tokenizer: Tokenizer) -> list[Streamed]:
    """Streams every text, after the longest of each compiled size, with which everything is compiled."""
    sizes = {text.id: len(piece_ids(text.text, tokenizer, None)) for text in texts}
    longest: dict[int, Text] = {}
    for text in sorted(texts, key=lambda text: sizes[text.id]):
        longest[-(-sizes[text.id] // speaker_of(speakers, text).options.bucket)] = text
    for text in longest.values():
        stream(speaker_of(speakers, text), text, tokenizer)
    return [stream(speaker_of(speakers, text), text, tokenizer) for text in texts]


def latency_figures(streamed: Sequence[Streamed], sampling_rate: int) -> dict[str, float | None]:
    """Over all texts that gave a sound.

    Returns:
      {"first_ms": median milliseconds to the first segment, None without any sound, "first_ms_most": the longest,
      "real_time_factor": seconds of work by seconds of sound, "decoder", "codec": their parts of it}.
    """
    said = [entry for entry in streamed if entry.first is not None]
    seconds = sum(len(entry.wave) for entry in said) / sampling_rate
    if not seconds:
        return dict.fromkeys(("first_ms", "first_ms_most", "real_time_factor", "decoder", "codec"))
    firsts = [1000 * entry.first for entry in said]
    return {
        "first_ms": float(np.median(firsts)),
        "first_ms_most": max(firsts),
        "real_time_factor": sum(entry.total for entry in said) / seconds,
        "decoder": sum(entry.decoder for entry in said) / seconds,
        "codec": sum(entry.codec for entry in said) / seconds,
    }


def decode_at_once(
    config: VitaConfig,
    params: Mapping[str, Any],
    voices: Mapping[str, np.ndarray],
    texts: Sequence[Text],
    tokenizer: Tokenizer,
) -> list[np.ndarray]:
    """The tokens that are streamed, all of a text decoded together: (n,) samples of every text."""
    speakers, waves = make_speakers(config, params, voices), {}
    for language, voice in voices.items():
        mine = [text for text in texts if text.language == language]
        tokens = [list(speakers[language].tokens(piece_ids(text.text, tokenizer, None))) for text in mine]
        decoder = CodecStreamer(Codec(config.codec), params["codec"], voice)
        decoded = decoder.decode_many([np.asarray(ids, np.int32) for ids in tokens])
        waves |= {text.id: wave for text, wave in zip(mine, decoded, strict=True)}
    return [waves[text.id] for text in texts]


def stream_figures(
    config: VitaConfig,
    params: Mapping[str, Any],
    voices: Mapping[str, np.ndarray],
    settings: Mapping[str, SpeakOptions],
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    recogniser: Recogniser,
) -> dict[str, dict[str, Any]]:
    """Streams the texts in every setting.

    Args:
      settings: name -> how tokens are drawn and the sound is cut.

    Returns:
      Name -> `latency_figures`, "read": see `read_back`; and beside the same texts decoded at once "largest": the
      largest difference of two samples, "mel_distance": mean over the texts, of log-mel spectra.
    """
    whole = decode_at_once(config, params, voices, texts, tokenizer)
    rate, losses = config.codec.sampling_rate, config.codec_training.losses
    figures = {}
    for name, options in settings.items():
        speakers = make_speakers(config, params, voices, options)
        streamed = stream_all(speakers, texts, tokenizer)
        waves = [entry.wave for entry in streamed]
        pairs = [(one, other) for one, other in zip(whole, waves, strict=True) if len(one)]
        distances = mel_distances(*zip(*pairs, strict=True), rate, losses) if pairs else [0.0]
        figures[name] = {
            **latency_figures(streamed, rate),
            "largest": max((float(np.abs(one - other).max()) for one, other in pairs), default=0.0),
            "mel_distance": float(np.mean(distances)),
            "read": read_back(texts, waves, recogniser, rate),
        }
    return figures
