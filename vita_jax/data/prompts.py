"""Conversations to prompts, token ids and labels: one path for training and for inference.

A record's turns are prepared (placeholders tidied and repeated once per tile or frame, a state symbol in front of every
answer), rendered with a template and one of three system texts, and tokenised with -200 for every picture tile or video
frame and -500 for every sound. Follows `preprocess_multimodal` and the templates' preprocessing in
`vita/util/data_utils_video_audio_neg_patch.py`; where the original has a bug the default is the right thing and
`ORIGINAL_QUIRKS` gives the original's result.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from vita_jax.data.prompt_tokens import (
    AUDIO,
    AUDIO_TOKEN,
    IGNORE,
    IMAGE,
    IMAGE_TOKEN,
    VIDEO,
    encode_spans,
    encode_string,
    tokenize_with_placeholders,
)
from vita_jax.data.rendering import Message, Sentence, alternating, checked, render_spans
from vita_jax.data.templates import MODALITIES, SystemTexts, Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError

__all__ = [
    "AUDIO",
    "AUDIO_TOKEN",
    "IGNORE",
    "IMAGE",
    "IMAGE_TOKEN",
    "ORIGINAL_QUIRKS",
    "STATE_LABELS",
    "VIDEO",
    "EncodedConversation",
    "EncodedPrompt",
    "MediaSlot",
    "PromptOptions",
    "answer_states",
    "count_placeholders",
    "encode_conversation",
    "encode_prompt",
    "modality_of",
    "preprocess_multimodal",
    "render",
    "split_state_symbol",
    "state_labels",
    "state_symbol_ids",
    "stop_ids",
    "stop_text",
    "with_media",
]

# What a state head has to say: `vita_jax.models.state_head` numbers its classes so.
STATE_LABELS = {"audio": -101, "noise": -102, "text": -103}
_MEDIA = re.compile(f"{IMAGE}|{VIDEO}")


@dataclass(frozen=True)
class PromptOptions:
    """Where the originals' data variants differ, or are wrong.

    state_symbols: put one in front of every answer (the variants without it train no state).
    tiles_per: "image" = every `<image>` has its own tile count. "sentence" = the original's bugs: all `<image>`s of a
        sentence take one count, and a scattered run at the end of a sentence is doubled instead of left alone.
    retokenise_rounds: find the answers by re-tokenising rounds of the finished string; see prompt_tokens.encode_string.
    """

    state_symbols: bool = True
    tiles_per: Literal["image", "sentence"] = "image"
    retokenise_rounds: bool = False


ORIGINAL_QUIRKS = PromptOptions(tiles_per="sentence", retokenise_rounds=True)


@dataclass(frozen=True)
class MediaSlot:
    """One `<image>` or `<video>` of a record, in the order of its placeholders in the ids.

    index: which `<image>` (or `<video>`) of the record, in text order; tiles: how many placeholders it got.
    """

    kind: Literal["image", "video"]
    index: int
    tiles: int


@dataclass(frozen=True)
class EncodedConversation:
    """A training sample: input_ids (s,) int32 with -200 and -500, labels (s,) int32 with -100, aligned with the ids."""

    input_ids: np.ndarray
    labels: np.ndarray
    prompt: str
    modality: str
    media: tuple[MediaSlot, ...]
    miscounted: bool = False


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt that ends with an open answer: input_ids (s,) int32 with -200 and -500."""

    input_ids: np.ndarray
    prompt: str
    modality: str
    media: tuple[MediaSlot, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Questions about a conversation


def modality_of(conversations: Sequence[Message]) -> str:
    """ "video" if any message has a `<video>`, else "image" if any has an `<image>`, else "lang" (sound included)."""
    images, videos, _ = count_placeholders(conversations)
    return "video" if videos else "image" if images else "lang"


def count_placeholders(conversations: Sequence[Message]) -> tuple[int, int, int]:
    """Numbers of `<image>`, `<video>` and `<audio>` in all messages."""
    values = [checked(message, position)[1] for position, message in enumerate(conversations)]
    return tuple(sum(value.count(marker) for value in values) for marker in (IMAGE, VIDEO, AUDIO))


def with_media(question: str, images: int = 0, videos: int = 0, audios: int = 0) -> str:
    """The question with placeholders in front, one per line: pictures, then videos, then sounds.

    A question that is only spoken is "" with one sound.
    """
    return f"{IMAGE}\n" * images + f"{VIDEO}\n" * videos + f"{AUDIO}\n" * audios + question


def split_state_symbol(text: str, template: Template) -> tuple[str | None, str]:
    """An answer as (state, rest): "☜It is 7." -> ("text", "It is 7."); state is None where there is no symbol."""
    for state, symbol in _symbols(template).items():
        if text.startswith(symbol):
            return state, text[len(symbol) :]
    return None, text


def join_state_symbol(state: str | None, text: str, template: Template) -> str:
    """The inverse of `split_state_symbol`."""
    return text if state is None else _symbols(template)[state] + text


def state_symbol_ids(tokenizer: Tokenizer, template: Template) -> dict[int, str]:
    """Token id of each state symbol -> "audio", "noise" or "text". Raises UserError if one is not a single token."""
    return {_single_id(tokenizer, symbol): state for state, symbol in _symbols(template).items()}


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Ids that end an answer: the template's end marker and the tokenizer's eos."""
    marker = tokenizer.special_tokens.get(template.end_marker)
    return tuple(dict.fromkeys(id_ for id_ in (marker, tokenizer.eos_id) if id_ is not None))


def stop_text(tokenizer: Tokenizer, template: Template) -> str | None:
    """The text that ends an answer where the template's end marker is no token of its own; None where it is one."""
    return None if template.end_marker in tokenizer.special_tokens else template.end_marker


def state_labels(conversations: Sequence[Message], inserted_id: int | None = None) -> list[int]:
    """State-head variant: one label per `<audio>`, -101 effective, -102 where the next message is the inserted one."""
    labels: list[int] = []
    for position, message in enumerate(conversations):
        label = STATE_LABELS["noise" if position + 1 == inserted_id else "audio"]
        labels += [label] * checked(message, position)[1].count(AUDIO)
    return labels


def answer_states(conversations: Sequence[Message], inserted_id: int | None = None) -> list[str]:
    """What each answer but a leading one answers: "noise" at `inserted_id`, "audio" after an `<audio>`, or "text"."""
    messages = [checked(message, position) for position, message in enumerate(conversations)]
    return [_state(messages, i, inserted_id) for i, (role, _) in enumerate(messages) if i and role == "gpt"]


def _state(messages: Sequence[tuple[str, str]], position: int, inserted_id: int | None) -> str:
    if position == inserted_id:
        return "noise"
    return "audio" if position > 0 and AUDIO in messages[position - 1][1] else "text"


# ---------------------------------------------------------------------------------------------------------------------
# The two entry points


def encode_conversation(
    conversations: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: Template,
    system_texts: SystemTexts,
    tile_counts: Sequence[int] = (),
    frame_counts: Sequence[int] = (),
    modality: str | None = None,
    inserted_id: int | None = None,
    end_tag: bool = True,
    max_length: int | None = None,
    options: PromptOptions = PromptOptions(),  # noqa: B008 (frozen)
) -> EncodedConversation:
    """A record's turns as ids and labels: every answer with its state symbol and end marker is supervised.

    conversations: [{"from": "human" | "gpt", "value": text}, ...]; a leading answer is dropped.
    tile_counts, frame_counts: tiles of every `<image>` and frames of every `<video>`, in text order.
    modality: which system text; default `modality_of`. inserted_id: index of the answer to a noise query.
    end_tag: False for an interrupted answer: the last end marker is neither written nor supervised.
    max_length: text-only samples are cut to it (the length of others is known only once media are expanded).
    Raises UserError for turns that do not alternate, wrong counts, a modality that does not fit, and a tokenizer that
    lacks the template's markers.
    """
    sentences, media = _prepare(conversations, template, tile_counts, frame_counts, inserted_id, options)
    sentences = alternating(sentences)
    if modality is None:
        modality = modality_of(conversations)
    system = _system_text(template, system_texts, modality, sentences)
    spans = render_spans(template, system, sentences, open_turn=False, end_tag=end_tag)
    prompt = "".join(span.text for span in spans)
    miscounted = False
    if options.retokenise_rounds:
        ids, labels, miscounted = encode_string(prompt, template, tokenizer, max_length)
    else:
        _check_tokenizer(tokenizer, template, options.state_symbols)
        ids, labels = encode_spans(spans, tokenizer)
        if max_length is not None and not {IMAGE_TOKEN, AUDIO_TOKEN} & set(ids):
            ids, labels = ids[:max_length], labels[:max_length]
    return EncodedConversation(
        np.asarray(ids, np.int32), np.asarray(labels, np.int32), prompt, modality, media, miscounted
    )


def encode_prompt(
    conversations: str | Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: Template,
    system_texts: SystemTexts,
    tile_counts: Sequence[int] = (),
    frame_counts: Sequence[int] = (),
    modality: str | None = None,
    prepared: bool = False,
    options: PromptOptions = PromptOptions(),  # noqa: B008 (frozen)
) -> EncodedPrompt:
    """A question, alone or after earlier turns, as the ids of a prompt that ends with the open answer.

    conversations: the question, or turns of which the last is from "human". Earlier answers keep the state symbol they
    were generated with; one without gets the symbol that training would put there.
    prepared: the text holds one `<image>` per tile already and is used as it stands (then the media are empty).
    Otherwise arguments and errors as in `encode_conversation`.
    """
    if isinstance(conversations, str):
        conversations = [{"from": "human", "value": conversations}]
    if prepared:
        sentences, media = [Sentence(*checked(message, i)) for i, message in enumerate(conversations)], ()
    else:
        sentences, media = _prepare(
            conversations, template, tile_counts, frame_counts, None, options, answers_have_symbols=True
        )
    sentences = alternating(sentences)
    if sentences[-1].role != "human":
        raise UserError('the last message of a prompt must be from "human": there is nothing to answer')
    if modality is None:
        modality = modality_of(conversations)
    system = _system_text(template, system_texts, modality, sentences)
    spans = render_spans(template, system, sentences, open_turn=True, end_tag=True)
    prompt = "".join(span.text for span in spans)
    if options.retokenise_rounds:
        ids = tokenize_with_placeholders(prompt, tokenizer)
    else:
        _check_tokenizer(tokenizer, template, options.state_symbols)
        ids, _ = encode_spans(spans, tokenizer)
    return EncodedPrompt(np.asarray(ids, np.int32), prompt, modality, media)


def preprocess_multimodal(
    conversations: Sequence[Message],
    template: Template,
    tile_counts: Sequence[int] = (),
    frame_counts: Sequence[int] = (),
    inserted_id: int | None = None,
    options: PromptOptions = PromptOptions(),  # noqa: B008 (frozen)
) -> list[dict[str, str]]:
    """The prepared messages as {"from", "value"}, a leading answer included. Arguments as in `encode_conversation`."""
    sentences, _ = _prepare(conversations, template, tile_counts, frame_counts, inserted_id, options)
    return [{"from": sentence.role, "value": sentence.value} for sentence in sentences]


def render(
    conversations: Sequence[Message], template: Template, system: str, *, open_turn: bool = False, end_tag: bool = True
) -> str:
    """The prompt string of prepared messages. open_turn: end with the header of an answer still to come."""
    sentences = alternating([Sentence(*checked(message, i)) for i, message in enumerate(conversations)])
    spans = render_spans(template, system, sentences, open_turn=open_turn, end_tag=end_tag)
    return "".join(span.text for span in spans)


# ---------------------------------------------------------------------------------------------------------------------
# Preparation of a record


def _prepare(
    conversations: Sequence[Message],
    template: Template,
    tile_counts: Sequence[int],
    frame_counts: Sequence[int],
    inserted_id: int | None,
    options: PromptOptions,
    answers_have_symbols: bool = False,
) -> tuple[list[Sentence], tuple[MediaSlot, ...]]:
    messages = [checked(message, position) for position, message in enumerate(conversations)]
    if inserted_id is not None and not (0 <= inserted_id < len(messages) and messages[inserted_id][0] == "gpt"):
        raise UserError(
            f'inserted_id {inserted_id} is not the index of a message from "gpt" ({len(messages)} messages)'
        )
    per_sentence = options.tiles_per == "sentence"
    values = [_tidied(value, double_scattered=per_sentence) for _, value in messages]
    counts = _MediaCounts(values, tile_counts, frame_counts, per_sentence)
    symbols = template.state_symbols if options.state_symbols else None
    sentences, media = [], []
    for position, ((role, _), value) in enumerate(zip(messages, values, strict=True)):
        value, slots = counts.expand(value, position)
        if slots and position == 0 and role == "gpt" and not per_sentence:
            raise UserError(
                'the first message is from "gpt" and is dropped, but it holds media placeholders; '
                'move them to the first message from "human"'
            )
        media += slots
        value = value.replace(f"{AUDIO}\n", AUDIO).replace("\n\n", "\n")
        symbol = ""
        if symbols is not None and role == "gpt":
            state, rest = split_state_symbol(value, template) if answers_have_symbols else (None, value)
            if state is None:
                state = _state(messages, position, inserted_id)
            symbol, value = getattr(symbols, state), rest
        sentences.append(Sentence(role, value, symbol))
    return sentences, tuple(media)


def _tidied(value: str, double_scattered: bool) -> str:
    """Pictures stand without newlines around them, and before the text when they came after it."""
    if _MEDIA.search(value) is None:
        return value
    value = value.replace(f"{IMAGE}\n", IMAGE).strip().replace(f"\n{IMAGE}", IMAGE).strip()
    for marker in (IMAGE, VIDEO):
        if value.endswith(marker):
            run = marker * value.count(marker)
            if run in value or double_scattered:
                value = (run + value.replace(run, "").strip()).strip()
    return value


class _MediaCounts:
    """Hands out tile and frame counts to placeholders in text order, and checks that the numbers agree."""

    def __init__(
        self, values: Sequence[str], tile_counts: Sequence[int], frame_counts: Sequence[int], per_sentence: bool
    ):
        images = sum((IMAGE in value) if per_sentence else value.count(IMAGE) for value in values)
        videos = sum(value.count(VIDEO) for value in values)
        # Counts beyond the last sentence with a picture are left unused by the original.
        given_tiles = list(tile_counts)[:images] if per_sentence else list(tile_counts)
        for marker, needed, given, name in (
            (IMAGE, images, given_tiles, "tile_counts"),
            (VIDEO, videos, list(frame_counts), "frame_counts"),
        ):
            if len(given) != needed:
                raise UserError(
                    f"the messages need {needed} {name} (one for each {marker}), got {len(given)}: give "
                    f"as many files as there are {marker} placeholders"
                )
            for count in given:
                if count < 1:
                    raise UserError(f"{name} must be at least 1 each, got {count}")
        self._tiles, self._frames = iter(given_tiles), iter(frame_counts)
        self._images, self._videos, self._per_sentence = 0, 0, per_sentence

    def expand(self, value: str, position: int) -> tuple[str, list[MediaSlot]]:
        """The text with `<image>` repeated for every tile or frame and a newline behind, and the slots it used."""
        shared = next(self._tiles) if self._per_sentence and IMAGE in value else None
        slots: list[MediaSlot] = []

        def repeat(match: re.Match[str]) -> str:
            if match[0] == IMAGE:
                tiles = next(self._tiles) if shared is None else shared
                slots.append(MediaSlot("image", self._images, tiles))
                self._images += 1
            else:
                tiles = next(self._frames)
                slots.append(MediaSlot("video", self._videos, tiles))
                self._videos += 1
            return IMAGE * tiles + "\n"

        return _MEDIA.sub(repeat, value), slots


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def _system_text(template: Template, system_texts: SystemTexts, modality: str, sentences: Sequence[Sentence]) -> str:
    """The system text for the modality. Templates with one slot take `lang`, those with none take nothing."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r} is unknown; expected one of {', '.join(MODALITIES)}")
    has_picture = any(IMAGE in sentence.text for sentence in sentences)
    if (modality != "lang") != has_picture:
        raise UserError(
            f"modality {modality!r} does not fit messages {'with' if has_picture else 'without'} "
            f"{IMAGE} or {VIDEO}; use {'image or video' if has_picture else 'lang'}"
        )
    if template.system_slots == 0:
        return ""
    system = system_texts.select(modality if template.system_slots == 3 else "lang")
    if any(marker in system for marker in (IMAGE, VIDEO, AUDIO)):
        raise UserError(f"the system text for {modality!r} holds a media placeholder; media belong into messages")
    return system


# ---------------------------------------------------------------------------------------------------------------------
# What the tokenizer must offer


def _symbols(template: Template) -> dict[str, str]:
    symbols = template.state_symbols
    return {} if symbols is None else {"audio": symbols.audio, "noise": symbols.noise, "text": symbols.text}


def _single_id(tokenizer: Tokenizer, symbol: str) -> int:
    ids = tokenizer.encode(symbol, add_bos=False)
    if len(ids) != 1:
        raise UserError(
            f"the tokenizer writes the state symbol {symbol!r} as {len(ids)} tokens; it must be a single "
            "one: use the tokenizer that belongs to the template, or state_symbols=False"
        )
    return ids[0]


@lru_cache(maxsize=64)
def _check_tokenizer(tokenizer: Tokenizer, template: Template, state_symbols: bool) -> None:
    """Raises UserError unless the template's markers are special tokens and its state symbols single tokens."""
    if template.style != "PLAIN":
        markers = {template.end_marker} | ({template.sep} if template.style == "Qwen2p5Instruct" else set())
        missing = sorted(markers - set(tokenizer.special_tokens))
        if missing:
            raise UserError(
                f"template {template.name!r} needs {missing[0]!r} as a special token of the tokenizer; use "
                "a template made for this tokenizer (qwen2p5_instruct for our own models)"
            )
    if state_symbols:
        state_symbol_ids(tokenizer, template)
