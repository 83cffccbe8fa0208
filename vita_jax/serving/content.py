"""Messages of a chat request as turns of a conversation and its files. Nothing is ever fetched for a client."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vita_jax.data.images import picture_size
from vita_jax.data.prompts import with_media
from vita_jax.data.records import PLACEHOLDERS, Media
from vita_jax.errors import UserError
from vita_jax.serving.fields import Fields, type_name, whole_text
from vita_jax.serving.limits import Limits
from vita_jax.serving.problems import Problem, invalid, not_supported

SYSTEM_ROLES = ("system", "developer")
SOUND_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "webm", "aac")  # as in audio.CONTAINERS


@dataclass
class Said:
    """What one message says and shows.

    Attributes:
      texts: in order; they are joined by newlines.
      images, sounds: its files.
    """

    texts: list[str] = field(default_factory=list)
    images: list[Media] = field(default_factory=list)
    sounds: list[Media] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def turn(self) -> dict[str, str]:
        """As a turn of the user, with placeholders for its files."""
        return {"from": "human", "value": with_media(self.text, len(self.images), 0, len(self.sounds))}


@dataclass(frozen=True)
class Conversation:
    """What is asked.

    Attributes:
      system: text that replaces the model's own system text; None leaves that.
      turns, media: what has been said before, as `Session` has it.
      question: the last message.
    """

    system: str | None
    turns: list[dict[str, str]]
    media: list[Media]
    question: Said

    @property
    def files(self) -> list[Media]:
        """All of them."""
        return [*self.media, *self.question.images, *self.question.sounds]


class _Budget:
    """What is left of the limits of a request."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._used = limits, {"text_characters": 0, "images": 0, "sounds": 0}

    def use(self, name: str, param: str, count: int = 1) -> None:
        """Raises `Problem` if that is too much."""
        self._used[name] += count
        most = getattr(self._limits, name)
        if self._used[name] > most:
            raise Problem(
                400,
                f"{self._used[name]} {name.replace('_', ' ')} in one request, {most} are allowed (limit {name})",
                code="limit_exceeded",
                param=param,
            )


def read_conversation(messages: Any, limits: Limits) -> Conversation:
    """The messages of a chat request.

    Args:
      messages: a list of objects with role and content.
      limits: `messages`, `text_characters`, `images`, `sounds` and `image_pixels` count.

    Raises:
      Problem: 400, with the place of what is wrong.
    """
    if not messages:
        raise invalid("messages is empty; write at least one of the user", "messages")
    if len(messages) > limits.messages:
        raise Problem(
            400,
            f"{len(messages)} messages, {limits.messages} are allowed (limit messages)",
            code="limit_exceeded",
            param="messages",
        )
    budget, system, spoken = _Budget(limits), [], []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        fields = Fields(message, where)
        role = fields.text("role", choices=(*SYSTEM_ROLES, "user", "assistant"))
        fields.ignore("name", "refusal")
        fields.only("tool_calls", [])
        fields.only("function_call")
        if fields.take("audio", None) is not None:
            raise not_supported("earlier audio is not kept; send its transcript as content", f"{where}.audio")
        said = read_content(fields.take("content"), f"{where}.content", limits, budget, only_text=role != "user")
        fields.finish()
        if role not in SYSTEM_ROLES:
            spoken.append((role, said))
        elif spoken:
            raise invalid(f"{where} is a {role} message behind others; put it first", f"{where}.role")
        else:
            system.append(said.text)
    return _conversation("\n".join(system) if system else None, _joined(spoken))


def _joined(spoken: Sequence[tuple[str, Said]]) -> list[tuple[str, Said]]:
    """Messages of one speaker that follow each other as one."""
    joined: list[tuple[str, Said]] = []
    for role, said in spoken:
        if joined and joined[-1][0] == role:
            last = joined[-1][1]
            joined[-1] = (
                role,
                Said(last.texts + said.texts, last.images + said.images, last.sounds + said.sounds),
            )
        else:
            joined.append((role, said))
    return joined


def _conversation(system: str | None, spoken: list[tuple[str, Said]]) -> Conversation:
    if not spoken or spoken[-1][0] != "user":
        raise invalid("the last message must be of the user: there is nothing to answer", "messages")
    if spoken[0][0] != "user":
        raise invalid("the first message besides the system's must be of the user", "messages")
    turns, media = [], []
    for role, said in spoken[:-1]:
        turns.append(said.turn if role == "user" else {"from": "gpt", "value": said.text})
        media += [*said.images, *said.sounds]
    return Conversation(system, turns, media, spoken[-1][1])


def read_content(content: Any, where: str, limits: Limits, budget: _Budget, *, only_text: bool = False) -> Said:
    """The content of one message: text, or a list of parts. Raises `Problem`."""
    said = Said()
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise invalid(f"{where} is {type_name(content)}; expected text or a list of parts", where)
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        fields = Fields(part, place)
        kinds = ("text",) if only_text else ("text", "image_url", "input_audio")
        kind = fields.text("type", choices=kinds)
        if kind == "text":
            said.texts.append(plain_text(fields.text("text"), f"{place}.text"))
            budget.use("text_characters", f"{place}.text", len(said.texts[-1]))
        elif kind == "image_url":
            budget.use("images", place)
            image = Fields(fields.take("image_url"), f"{place}.image_url")
            image.ignore("detail")  # the model decides by the picture's shape
            said.images.append(picture(image.text("url"), f"{place}.image_url.url", limits))
            image.finish()
        else:
            budget.use("sounds", place)
            sound = Fields(fields.take("input_audio"), f"{place}.input_audio")
            sound.text("format", choices=SOUND_FORMATS)
            data = decoded(sound.text("data"), f"{place}.input_audio.data")
            said.sounds.append(Media("audio", f"{place}.input_audio", data))
            sound.finish()
        fields.finish()
    return said


def plain_text(text: str, param: str) -> str:
    """The text, if it has no placeholder in it. Raises `Problem`."""
    for kind, placeholder in PLACEHOLDERS.items():
        if placeholder in text:
            raise invalid(
                f"{param} holds {placeholder}, which stands for a file; write it otherwise, and send "
                f"{kind} files as parts of their own",
                param,
            )
    return text


def picture(url: str, param: str, limits: Limits) -> Media:
    """The picture of a data URL, not decoded yet. Raises `Problem`."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        raise invalid(
            f"{param} is no data URL; this server fetches nothing: send the picture itself, as "
            "data:image/png;base64,...",
            param,
            "invalid_image_url",
        )
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise invalid(f"{param} must begin like data:image/png;base64,", param, "invalid_image_url")
    media = Media("image", param, decoded(data, param))
    try:
        width, height = picture_size(media.data, name=param)
    except UserError as error:
        raise invalid(str(error), param, "invalid_image") from None
    if width * height > limits.image_pixels:
        raise Problem(
            400,
            f"{param}: {width} x {height} pixels, {limits.image_pixels} are allowed (limit image_pixels); scale it "
            "down",
            code="limit_exceeded",
            param=param,
        )
    return media


def decoded(text: str, param: str) -> bytes:
    """The bytes of base64. Raises `Problem`."""
    try:
        data = base64.b64decode(whole_text(text, param), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param} is not base64: {error}", param, "invalid_base64") from None
    if not data:
        raise invalid(f"{param} is empty", param)
    return data
