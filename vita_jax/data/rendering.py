"""A conversation as spans of text: how VITA's templates write their turns, and which parts of them are supervised.

Spans know who wrote them (see `prompt_tokens.Span`), so a marker inside a user's text stays text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vita_jax.data.prompt_tokens import IMAGE, Span
from vita_jax.data.templates import Template
from vita_jax.errors import UnsupportedOption, UserError

Message = Mapping[str, str]


@dataclass(frozen=True)
class Sentence:
    """A prepared message; `symbol` is the state symbol in front of an answer."""

    role: str  # "human" or "gpt"
    text: str
    symbol: str = ""

    @property
    def value(self) -> str:
        return self.symbol + self.text


def checked(message: Message, position: int) -> tuple[str, str]:
    """(role, value) of a message."""
    role, value = message.get("from"), message.get("value")
    if role not in ("human", "gpt"):
        raise UserError(f'message {position}: "from" must be "human" or "gpt", got {role!r}')
    if not isinstance(value, str):
        raise UserError(f'message {position}: "value" must be text, got {type(value).__name__}')
    return role, value


def alternating(sentences: Sequence[Sentence]) -> list[Sentence]:
    """Without a leading answer; roles must then alternate, human first."""
    kept = list(sentences[1:] if sentences and sentences[0].role == "gpt" else sentences)
    if not kept:
        raise UserError('a conversation needs at least one message from "human"')
    for position, sentence in enumerate(kept):
        expected = ("human", "gpt")[position % 2]
        if sentence.role != expected:
            raise UserError(
                f'turns must alternate: expected "{expected}" at message '
                f'{position + len(sentences) - len(kept)}, got "{sentence.role}"'
            )
    return kept


def render_spans(
    template: Template, system: str, sentences: Sequence[Sentence], *, open_turn: bool, end_tag: bool
) -> list[Span]:
    """A conversation in one of VITA's templates.

    Args:
      template: how turns are written.
      system: the system text.
      sentences: alternating, human first.
      open_turn: end with the header of an answer still to come.
      end_tag: False leaves the last end marker out.

    Raises:
      UnsupportedOption: a template of another style.
    """
    if template.style == "Qwen2p5Instruct":
        spans = list(_qwen_spans(template, system, sentences, open_turn))
    elif template.style in ("MixtralTwo", "MixtralZh"):
        spans = list(_mixtral_spans(template, system, sentences, open_turn))
    elif template.style == "PLAIN":
        return list(plain_spans(template, sentences, open_turn))
    else:
        raise UnsupportedOption(
            f"prompts of template {template.name!r} (style {template.style}) are not offered; use qwen2p5_instruct, "
            "mixtral_two, mixtral_zh or plain, and vita_jax.data.llava_prompts for LLaVA's"
        )
    return spans if end_tag else spans[:-1]  # the last span is the last end marker


def _qwen_spans(template: Template, system: str, sentences: Sequence[Sentence], open_turn: bool) -> Iterator[Span]:
    start, end = template.sep, template.end_marker
    yield Span(f"{start}system\n", trusted=True)
    yield Span(system)
    yield Span(end, trusted=True)
    for sentence in sentences:
        yield Span(f"\n{start}{_role(template, sentence)}\n", trusted=True)
        yield from _content(sentence, end)
    if open_turn:
        yield Span(f"\n{start}{template.roles[1]}\n", trusted=True)


def _mixtral_spans(template: Template, system: str, sentences: Sequence[Sentence], open_turn: bool) -> Iterator[Span]:
    end = template.end_marker
    yield Span("system:", trusted=True)
    yield Span(system)
    yield Span(end, trusted=True)
    for sentence in sentences:
        yield Span(f"\n{_role(template, sentence)}:", trusted=True)
        yield from _content(sentence, end)
    if open_turn:
        yield Span(f"\n{template.roles[1]}:", trusted=True)


def _content(sentence: Sentence, end: str) -> Iterator[Span]:
    answer = sentence.role == "gpt"
    yield Span(sentence.symbol, trusted=True, supervised=answer)
    yield Span(sentence.text, supervised=answer)
    yield Span(end, trusted=True, supervised=answer)


def plain_spans(template: Template, sentences: Sequence[Sentence], open_turn: bool) -> Iterator[Span]:
    """Pictures and their caption, nothing else (a form of pre-training that the released models do not use)."""
    if len(sentences) > 2 or (len(sentences) == 2) == open_turn:
        raise UserError(
            f"template {template.name!r} takes one picture message and one caption, got {len(sentences)} messages"
        )
    yield Span(IMAGE * sentences[0].text.count(IMAGE))
    for caption in sentences[1:]:
        yield Span(caption.text, supervised=True)
        yield Span(template.sep, trusted=True, supervised=True)


def _role(template: Template, sentence: Sentence) -> str:
    return template.roles[sentence.role == "gpt"]
