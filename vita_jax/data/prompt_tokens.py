"""From a rendered prompt to token ids and labels, with placeholders for the media.

Two ways, equal on ordinary records:

- `encode_spans` (the default) knows which parts of a prompt the template wrote and which parts a user wrote. Only the
  template's parts can be special tokens, and labels follow the answers themselves.
- `encode_string` repeats what the original does (`vita/util/mm_utils.py`, `data_utils_video_audio_neg_patch.py`): it
  tokenises the finished string, then finds the answers again by splitting it into rounds and counting their tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vita_jax.data.templates import Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UnsupportedOption, UserError

IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"
IMAGE_TOKEN, AUDIO_TOKEN, IGNORE = -200, -500, -100

_PLACEHOLDER_IDS = {IMAGE: IMAGE_TOKEN, AUDIO: AUDIO_TOKEN}
_PLACEHOLDERS = re.compile(f"({IMAGE}|{AUDIO})")


@dataclass(frozen=True)
class Span:
    """A piece of a prompt. trusted: written by the template; supervised: part of an answer or its end marker."""

    text: str
    trusted: bool = False
    supervised: bool = False


def encode_spans(spans: Sequence[Span], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt given as spans.

    Text between two special tokens or placeholders is tokenised as one piece, so ids are those of the whole string,
    except that an answer always starts with a token of its own: at inference the model continues after the open
    turn, whose tokens cannot change any more.

    Returns (ids, labels), equally long; labels are the ids where supervised and -100 elsewhere and at placeholders.
    """
    ids = tokenizer.encode("")  # the BOS, if there is one
    labels = [IGNORE] * len(ids)
    run: list[Span] = []

    def close_run() -> None:
        for piece, supervised in _encode_run(run, tokenizer):
            ids.extend(piece)
            labels.extend(piece if supervised else [IGNORE] * len(piece))
        run.clear()

    for token, span in _split_spans(spans, tokenizer):
        if token is None:
            run.append(span)
            continue
        close_run()
        ids.append(token)
        labels.append(token if span.supervised and token >= 0 else IGNORE)
    close_run()
    return ids, labels


def _split_spans(spans: Sequence[Span], tokenizer: Tokenizer) -> Iterator[tuple[int | None, Span]]:
    """Spans cut at placeholders and, where trusted, at special tokens; the id comes along for these two."""
    special = tokenizer.special_tokens
    markers = sorted(special, key=len, reverse=True)
    special_pattern = re.compile(f"({'|'.join(map(re.escape, markers))})") if markers else None
    for span in spans:
        for part in _PLACEHOLDERS.split(span.text):
            pieces = [part]
            if part in _PLACEHOLDER_IDS:
                yield _PLACEHOLDER_IDS[part], span
                continue
            if span.trusted and special_pattern is not None:
                pieces = special_pattern.split(part)
            for piece in filter(None, pieces):
                token = special.get(piece) if span.trusted else None
                yield token, Span(piece, span.trusted, span.supervised)


def _encode_run(run: Sequence[Span], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Ids of adjacent ordinary text, in groups of equal supervision."""
    groups: list[tuple[str, bool]] = []
    for span in run:
        if groups and groups[-1][1] == span.supervised:
            groups[-1] = (groups[-1][0] + span.text, span.supervised)
        else:
            groups.append((span.text, span.supervised))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, allow_special=False, add_bos=False)

    if len(groups) == 2:
        (first, supervised), (second, second_supervised) = groups
        head, whole = encode(first), encode(first + second)
        # Tokenising both together avoids the space that some tokenizers put in front of every separate piece.
        if whole[: len(head)] == head:
            return [(head, supervised), (whole[len(head) :], second_supervised)]
    return [(encode(text), supervised) for text, supervised in groups]


def tokenize_with_placeholders(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a finished prompt string: every stretch between `<image>`s and `<audio>`s is tokenised separately.

    Special tokens anywhere in the text take effect. The BOS, if any, stands once, in front.
    """
    ids = tokenizer.encode("")
    for chunk in _PLACEHOLDERS.split(text):
        if chunk in _PLACEHOLDER_IDS:
            ids.append(_PLACEHOLDER_IDS[chunk])
        else:
            ids.extend(tokenizer.encode(chunk, add_bos=False))
    return ids


@dataclass(frozen=True)
class _Rounds:
    """How the original finds the rounds of a prompt again.

    between: string that separates rounds; restored: what it puts back in front of every later round; answer: string
    that ends the instruction of a round; start: tokens before the first round (the BOS).
    """

    between: str
    restored: str
    answer: str
    start: int


def _rounds_of(template: Template) -> _Rounds:
    user, assistant = template.roles
    if template.style == "Qwen2p5Instruct":
        between = f"\n{template.sep2}{user}\n"
        return _Rounds(between, between, f"\n{template.sep}{assistant}\n", 0)
    if template.style in ("MixtralTwo", "MixtralZh"):
        # The </s> in front of a later round is not put back: the BOS that tokenising the round adds stands in for it.
        return _Rounds(f"{template.sep2}\n{user}:", f"\n{user}:", f"{template.sep}\n{assistant}:", 1)
    raise UnsupportedOption(
        f"labels by recounting rounds are not offered for template {template.name!r}; use "
        "retokenise_rounds=False with qwen2p5_instruct, mixtral_two or mixtral_zh"
    )


def encode_string(
    prompt: str, template: Template, tokenizer: Tokenizer, max_length: int | None = None
) -> tuple[list[int], list[int], bool]:
    """Ids and labels of a finished prompt string, counted as the original counts them, quirks included.

    Quirks: special tokens in a user's text take effect; a text-only mixtral sample also supervises the ":" of "bot:";
    when the counts of the rounds do not add up the whole sample is ignored.

    max_length: text-only samples are cut to it; longer samples are not checked for miscounts.
    Returns (ids, labels, miscounted).
    """
    rule = _rounds_of(template)
    text_only = _PLACEHOLDERS.search(prompt) is None
    ids = tokenize_with_placeholders(prompt, tokenizer)
    if text_only and max_length is not None:
        ids = ids[:max_length]
    first, *later = prompt.split(rule.between)
    if not later:
        raise UserError(f"a prompt of template {template.name!r} has no user turn: {prompt!r}")
    rounds = [first + rule.between + later[0], *(rule.restored + text for text in later[1:])]

    labels = list(ids)
    labels[: rule.start] = [IGNORE] * rule.start
    position = rule.start
    for text in rounds:
        parts = text.split(rule.answer)
        if len(parts) != 2:
            break
        instruction = len(tokenize_with_placeholders(parts[0] + rule.answer, tokenizer)) - rule.start
        if text_only:
            instruction -= rule.start
        _ignore(labels, position, position + max(instruction, 0))
        position += len(tokenize_with_placeholders(text, tokenizer))
    position -= rule.start
    _ignore(labels, position, len(labels))
    counted = sum(id_ != tokenizer.pad_id for id_ in ids)
    miscounted = position != counted and (max_length is None or position < max_length)
    return ids, [IGNORE] * len(ids) if miscounted else labels, miscounted


def _ignore(labels: list[int], start: int, stop: int) -> None:
    stop = min(stop, len(labels))
    labels[start:stop] = [IGNORE] * max(stop - start, 0)
