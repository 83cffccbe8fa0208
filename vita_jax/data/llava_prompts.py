"""LLaVA's conversations to prompts, token ids and labels (arXiv 2304.08485, section 4.2; `llava/conversation.py`,
`llava/train/train.py`).

Templates, in `templates.py`: `vicuna_v1` (also `v1`, `llava_v1`), `llava_v0`, `llava_llama_2`, and `plain` for the
captions of stage 1. The system text is an argument; None leaves it out, as the model card of v1.5 does. What is
supervised is every answer with the space before it and the end marker behind it. An image is one -200, which
`vita_jax.data.splice` expands.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vita_jax.data.prompt_tokens import (
    IGNORE,
    IMAGE,
    IMAGE_TOKEN,
    Span,
    encode_spans,
    tokenize_with_placeholders,
)
from vita_jax.data.prompts import EncodedConversation, EncodedPrompt, MediaSlot
from vita_jax.data.rendering import Message, Sentence, alternating, checked, plain_spans
from vita_jax.data.templates import Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UnsupportedOption, UserError

STYLES = ("TWO", "SINGLE", "LLAMA_2", "PLAIN")
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"


@dataclass(frozen=True)
class LlavaPromptOptions:
    """Choices of LLaVA's prompts.

    Attributes:
      image_order: "first" puts a message's images in front of its text, as the original's code always does. "random" is
        the paper's rule: in the first turn image and question change places with probability 1/2.
      image_markers: `<im_start>` and `<im_end>` around every image; the tokenizer must have both.
      one_image: several images of one message become one, as in the original.
      count_rounds: find the answers by counting tokens of the finished string, as in the original; see `_count_rounds`.
    """

    image_order: Literal["first", "random"] = "first"
    image_markers: bool = False
    one_image: bool = False
    count_rounds: bool = False


ORIGINAL_QUIRKS = LlavaPromptOptions(one_image=True, count_rounds=True)


def prepare(
    conversations: Sequence[Message],
    options: LlavaPromptOptions = LlavaPromptOptions(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> list[dict[str, str]]:
    """The messages with their images where they belong, as {"from", "value"}, a leading answer included.

    seed: of the record, for `image_order="random"`.
    """
    question_first = options.image_order == "random" and bool(np.random.default_rng(seed).integers(2))
    return [
        {"from": sentence.role, "value": _marked(sentence.text, options)}
        for sentence in _sentences(conversations, options, question_first)
    ]


def encode_conversation(
    conversations: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: Template,
    system: str | None = None,
    options: LlavaPromptOptions = LlavaPromptOptions(),  # noqa: B008 (frozen)
    seed: int = 0,
    max_length: int | None = None,
) -> EncodedConversation:
    """A record's turns as ids and labels.

    Args:
      conversations: [{"from": "human" | "gpt", "value": text}, ...]; a leading answer is dropped.
      tokenizer, template: what writes the text, and how turns are written.
      system: the system text; None for none.
      options, seed: see `prepare`.
      max_length: text-only samples are cut to it (the length of others is known only once images are expanded).

    Raises:
      UserError: turns that do not alternate, or a dropped message with an image.
      UnsupportedOption: a template of another style, or counting rounds where the original's way is not known.
    """
    question_first = options.image_order == "random" and bool(np.random.default_rng(seed).integers(2))
    prepared = _sentences(conversations, options, question_first)
    _check_dropped(prepared)
    sentences = alternating(prepared)
    spans = list(_spans(template, system, sentences, options, open_turn=False))
    prompt = "".join(span.text for span in spans)
    miscounted = False
    if options.count_rounds and template.style != "PLAIN":
        ids, labels, miscounted = _count_rounds(prompt, template, tokenizer, max_length)
    else:
        ids, labels = encode_spans(spans, tokenizer)
        if max_length is not None and IMAGE_TOKEN not in ids:
            ids, labels = ids[:max_length], labels[:max_length]
    media = _media(sentences)
    arrays = np.asarray(ids, np.int32), np.asarray(labels, np.int32)
    return EncodedConversation(*arrays, prompt, "image" if media else "lang", media, miscounted)


def encode_prompt(
    conversations: str | Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: Template,
    system: str | None = None,
    options: LlavaPromptOptions = LlavaPromptOptions(),  # noqa: B008 (frozen)
) -> EncodedPrompt:
    """A question, alone or after earlier turns, as the ids of a prompt that ends with the open answer.

    Arguments and errors as in `encode_conversation`; the last message is from "human". Images stand first.
    """
    if isinstance(conversations, str):
        conversations = [{"from": "human", "value": conversations}]
    sentences = alternating(_sentences(conversations, options, question_first=False))
    if sentences[-1].role != "human":
        raise UserError('the last message of a prompt must be from "human": there is nothing to answer')
    spans = list(_spans(template, system, sentences, options, open_turn=True))
    ids, _ = encode_spans(spans, tokenizer)
    media = _media(sentences)
    prompt = "".join(span.text for span in spans)
    return EncodedPrompt(np.asarray(ids, np.int32), prompt, "image" if media else "lang", media)


def render(conversations: Sequence[Message], template: Template, system: str | None, *, open_turn: bool) -> str:
    """The prompt string of messages that are used as they stand.

    open_turn: end with the header of an answer still to come.
    """
    sentences = alternating([Sentence(*checked(message, i)) for i, message in enumerate(conversations)])
    spans = _spans(template, system, sentences, LlavaPromptOptions(), open_turn=open_turn)
    return "".join(span.text for span in spans)


# ---------------------------------------------------------------------------------------------------------------------
# Preparation of a record


def _sentences(conversations: Sequence[Message], options: LlavaPromptOptions, question_first: bool) -> list[Sentence]:
    sentences = [Sentence(*checked(message, position)) for position, message in enumerate(conversations)]
    first = next((i for i, sentence in enumerate(sentences) if sentence.role == "human"), None)
    return [
        Sentence(sentence.role, _with_images_moved(sentence.text, options, question_first and i == first))
        for i, sentence in enumerate(sentences)
    ]


def _with_images_moved(text: str, options: LlavaPromptOptions, question_first: bool) -> str:
    number = text.count(IMAGE)
    if not number:
        return text
    rest = text.replace(IMAGE, "").strip()
    images = [IMAGE] * (1 if options.one_image else number)
    return "\n".join([rest, *images] if question_first else [*images, rest]).strip()


def _marked(text: str, options: LlavaPromptOptions) -> str:
    return text.replace(IMAGE, f"{IMAGE_START}{IMAGE}{IMAGE_END}") if options.image_markers else text


def _check_dropped(sentences: Sequence[Sentence]) -> None:
    if sentences and sentences[0].role == "gpt" and IMAGE in sentences[0].text:
        raise UserError(
            'the first message is from "gpt" and is dropped, but it holds an image; move it to the first message from '
            '"human"'
        )


def _media(sentences: Sequence[Sentence]) -> tuple[MediaSlot, ...]:
    number = sum(sentence.text.count(IMAGE) for sentence in sentences)
    return tuple(MediaSlot("image", index, 1) for index in range(number))


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def _spans(
    template: Template,
    system: str | None,
    sentences: Sequence[Sentence],
    options: LlavaPromptOptions,
    *,
    open_turn: bool,
) -> Iterator[Span]:
    match template.style:
        case "TWO" | "SINGLE":
            yield from _separated_spans(template, system, sentences, options, open_turn)
        case "LLAMA_2":
            yield from _llama_2_spans(template, system, sentences, options)
        case "PLAIN" if open_turn:
            yield from _text_spans(sentences[0].text, options)
            yield Span(template.sep, trusted=True)
        case "PLAIN":
            yield from plain_spans(template, sentences, open_turn)
        case _:
            raise UnsupportedOption(
                f"template {template.name!r} (style {template.style}) is none of LLaVA's that are offered; use "
                "vicuna_v1, llava_v0, llava_llama_2 or plain"
            )


def _separated_spans(
    template: Template, system: str | None, sentences: Sequence[Sentence], options: LlavaPromptOptions, open_turn: bool
) -> Iterator[Span]:
    """`system sep role: text sep role: text sep2 ...`; without a second separator the first one ends every turn."""
    user, assistant = template.roles
    if system is not None:
        yield Span(system)
        yield Span(template.sep, trusted=True)
    for sentence in sentences:
        if sentence.role == "human":
            yield Span(f"{user}: ", trusted=True)
            yield from _text_spans(sentence.text, options)
            yield Span(template.sep, trusted=True)
        else:
            yield Span(f"{assistant}:", trusted=True)
            yield from _answer_spans(f" {sentence.text}", template)
    if open_turn:
        yield Span(f"{assistant}:", trusted=True)


def _llama_2_spans(
    template: Template, system: str | None, sentences: Sequence[Sentence], options: LlavaPromptOptions
) -> Iterator[Span]:
    """Every instruction in brackets; the system text belongs to the first one. Nothing opens an answer."""
    for i, sentence in enumerate(sentences):
        if sentence.role == "gpt":
            yield from _answer_spans(f" {sentence.text} ", template)
            continue
        # The tokenizer begins the first turn.
        yield Span("[INST] " if i == 0 else f"{template.sep}[INST] ", trusted=True)
        if i == 0 and system:
            yield Span("<<SYS>>\n", trusted=True)
            yield Span(system)
            yield Span("\n<</SYS>>\n\n", trusted=True)
        yield from _text_spans(sentence.text, options)
        yield Span(" [/INST]", trusted=True)


def _answer_spans(text: str, template: Template) -> Iterator[Span]:
    yield Span(text, supervised=True)
    yield Span(template.end_marker, trusted=True, supervised=True)


def _text_spans(text: str, options: LlavaPromptOptions) -> Iterator[Span]:
    """A user's text; markers around an image are the template's, whatever else the text holds."""
    if not options.image_markers:
        yield Span(text)
        return
    for part in re.split(f"({IMAGE})", text):
        if part == IMAGE:
            yield Span(IMAGE_START, trusted=True)
            yield Span(IMAGE)
            yield Span(IMAGE_END, trusted=True)
        elif part:
            yield Span(part)


# ---------------------------------------------------------------------------------------------------------------------
# The original's labels


def _count_rounds(
    prompt: str, template: Template, tokenizer: Tokenizer, max_length: int | None
) -> tuple[list[int], list[int], bool]:
    """Ids and labels of a finished prompt string, counted as the original counts them, quirks included.

    The string is cut at end markers; every round is tokenised again, with a BOS that stands for the marker, and cut at
    the string that opens an answer. Quirks: an answer that holds that string, or special tokens in a user's text, make
    the count go wrong, and then the whole sample is ignored.

    Returns:
      (ids, labels, miscounted).
    """
    openings = {"TWO": f"{template.sep}{template.roles[1]}: ", "LLAMA_2": "[/INST] "}
    if template.style not in openings:
        raise UnsupportedOption(
            f"labels by counting rounds are not offered for template {template.name!r}; use count_rounds=False"
        )
    opening = openings[template.style]
    ids = tokenize_with_placeholders(prompt, tokenizer)
    if max_length is not None and IMAGE not in prompt:
        ids = ids[:max_length]
    labels, position = [IGNORE, *ids[1:]], 1
    for text in prompt.split(template.end_marker):
        parts = text.split(opening)
        if len(parts) != 2:
            break
        # Without the BOS, and without the space that is counted to the answer.
        instruction = len(tokenize_with_placeholders(parts[0] + opening, tokenizer)) - 2
        _ignore(labels, position, position + instruction)
        position += len(tokenize_with_placeholders(text, tokenizer))
    _ignore(labels, position, len(labels))
    counted = sum(id_ != tokenizer.pad_id for id_ in ids)
    miscounted = position != counted and (max_length is None or position < max_length)
    return ids, [IGNORE] * len(ids) if miscounted else labels, miscounted


def _ignore(labels: list[int], start: int, stop: int) -> None:
    stop = min(stop, len(labels))
    labels[start:stop] = [IGNORE] * max(stop - start, 0)
