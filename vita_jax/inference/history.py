"""The prompt of a duplex turn: past exchanges, then the current request (`merge_current_and_history` of the demos).

Past turns keep their sound and their answers but lose pictures; all image placeholders of the current request stand at
the beginning of the first user turn. How the released servers assemble it has two quirks, which their models have
seen at run time and which are kept: VITA-1.5 removes every later user header, VITA-1.0 strips leading letters of the
header from the first user text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vita_jax.errors import UserError

IMAGE, VIDEO = "<image>", "<video>"
MODALITIES = ("image", "audio", "video")
MAX_PAST_EXCHANGES = 1  # the released servers look back no further


@dataclass(frozen=True)
class DuplexFormat:
    """How turns are written for one release.

    Attributes:
      system: around the system text, which stands at `{}`.
      user, assistant: headers of the turns.
      end: after each turn.
      state_symbols: a space after these is removed.
      strip_letters: the 1.0 quirk instead of the 1.5 one.
    """

    system: str
    user: str
    assistant: str
    end: str
    state_symbols: tuple[str, ...]
    strip_letters: bool = False


FORMATS: Mapping[str, DuplexFormat] = {
    "vita_1_5": DuplexFormat(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>\n",
        state_symbols=("☞", "☟"),
    ),
    "vita_1_0": DuplexFormat(
        system="system:{}</s>\n",
        user="user:",
        assistant="bot:",
        end="</s>\n",
        state_symbols=("<1>", "<2>"),
        strip_letters=True,
    ),
}


@dataclass(frozen=True)
class Request:
    """What a user said and showed.

    Attributes:
      prompt: text with one placeholder for each medium.
      media: "image", "audio", "video" -> what the placeholders stand for, in order.
      response: the answer given, for a past request; None for the current one.
    """

    prompt: str
    media: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    response: str | None = None


def duplex_format(name: str) -> DuplexFormat:
    """The format of a release. Raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"duplex format {name!r} is unknown; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def heard_text(spoken: Sequence[tuple[str, float]], played: float) -> str:
    """What a listener has heard of an answer that was broken off: that much of it belongs in the history.

    Of the piece that was being played, as many words count (characters, in Chinese) as its share of the time, rounded
    down.

    Args:
      spoken: pieces of text with the seconds of sound that each became, in order.
      played: seconds until the break.
    """
    heard, left = "", played
    for text, seconds in spoken:
        if left >= seconds:
            heard, left = heard + text, left - seconds
            continue
        parts = re.findall(r"[\u3400-\u9fff]|\s*[^\s\u3400-\u9fff]+\s*", text)
        return heard + "".join(parts[: int(len(parts) * max(left, 0.0) / seconds)])
    return heard


def system_modality(current: Request) -> str:
    """Which system text a request is answered under: "video" with pictures of any kind, else "lang"."""
    return "video" if "video" in current.media or "image" in current.media else "lang"


def merge_history(
    past: Sequence[Request], current: Request, system_text: str, style: DuplexFormat
) -> tuple[str, dict[str, list[Any]]]:
    """The prompt with an open assistant turn, and the media that its placeholders stand for.

    Args:
      past: earlier requests with their responses, oldest first; the caller keeps the last few.
      current: the request to be answered.
      system_text: the one selected for `current`.
      style: how turns are written.

    Raises:
      UserError: a past request without a response.
    """
    system = style.system.format(system_text)
    if not past:
        prompt = system + style.user + current.prompt + style.end + style.assistant
        return _join_symbols(prompt, style), {name: list(items) for name, items in current.media.items()}
    turns, media = "", {name: [] for name in MODALITIES}
    for number, request in enumerate(past):
        if request.response is None:
            raise UserError(f"past request {number} has no response; only answered ones belong in the history")
        said = request.prompt.replace(IMAGE, "").replace(VIDEO, "")
        turns += style.user + said + style.end + style.assistant + request.response + style.end
        media["audio"] += request.media.get("audio", ())
    turns += style.user + current.prompt + style.end + style.assistant
    for name in MODALITIES:
        media[name] += current.media.get(name, ())
    images = turns.count(IMAGE)
    turns = turns.replace(IMAGE, "")
    turns = turns.lstrip(style.user) if style.strip_letters else turns.replace(style.user, "")
    prompt = system + style.user + IMAGE * images + turns
    return _join_symbols(prompt, style), {name: items for name, items in media.items() if items}


def _join_symbols(prompt: str, style: DuplexFormat) -> str:
    for symbol in style.state_symbols:
        prompt = prompt.replace(f"{symbol} ", symbol)
    return prompt
