"""Chats as they are published -> the public record format: text without media, for stages that only read and write.

    messages   {"messages": [{"role": "user" | "assistant", "content": text}, ...]}, also as "conversations"
    sharegpt   {"conversations": [{"from": "human" | "user" | "gpt" | "assistant", "value": text}, ...]}
    alpaca     {"instruction": text, "input": text or absent, "output": text}

What such a file says beside that and its `id` is left alone. A system message is an error, since the system prompt
belongs to the stage: take it out of the data, or write it into the first question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vita_jax.data.records import PLACEHOLDERS, RecordError

ROLES = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "bot": "gpt"}


def _turn(turn: Any, place: str, where: str, role_field: str, text_field: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or role_field not in turn or text_field not in turn:
        raise RecordError(where, place, f"must be an object with {role_field!r} and {text_field!r}")
    role = turn[role_field]
    if role == "system":
        raise RecordError(
            where, place, "is a system message; the stage gives those, take it out of the data", "system message"
        )
    if role not in ROLES:
        raise RecordError(where, f"{place}.{role_field}", f"is {role!r}; known: {', '.join(ROLES)}, system")
    text = turn[text_field]
    for placeholder in PLACEHOLDERS.values():
        if isinstance(text, str) and placeholder in text:
            raise RecordError(
                where, f"{place}.{text_field}", f"holds {placeholder}, but chats are text", "placeholders"
            )
    return {"from": ROLES[role], "value": text}


def _turns(entry: dict[str, Any], field: str, where: str, role_field: str, text_field: str) -> list[dict[str, Any]]:
    turns = entry.get(field)
    if not isinstance(turns, list):
        raise RecordError(where, field, "must be a list of turns")
    return [_turn(turn, f"{field}[{i}]", where, role_field, text_field) for i, turn in enumerate(turns)]


def _messages(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    field = "messages" if "messages" in entry else "conversations"
    return _turns(entry, field, where, "role", "content")


def _sharegpt(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    return _turns(entry, "conversations", where, "from", "value")


def _alpaca(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    for field in ("instruction", "output"):
        if not isinstance(entry.get(field), str):
            raise RecordError(where, field, "must be text")
    more = entry.get("input") or ""
    if not isinstance(more, str):
        raise RecordError(where, "input", "must be text, or left out")
    asked = "\n".join(part for part in (entry["instruction"], more) if part.strip())
    turns = {"instruction": {"from": "human", "value": asked}, "output": {"from": "gpt", "value": entry["output"]}}
    return [_turn(turn, field, where, "from", "value") for field, turn in turns.items()]


CHAT_LAYOUTS: dict[str, Callable[[dict[str, Any], str], list[dict[str, Any]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def public_record(entry: Any, layout: str, where: str) -> dict[str, Any]:
    """A chat as a record in the public format; its turns are not checked beyond their shape.

    Args:
      entry: the decoded JSON.
      layout: one of `CHAT_LAYOUTS`.
      where: names the entry in messages.

    Raises:
      RecordError: another shape, a system message, an unknown role, or a placeholder of a medium.
    """
    if not isinstance(entry, dict):
        raise RecordError(where, "", f"must be an object in the layout {layout!r}")
    identity = {"id": entry["id"]} if "id" in entry else {}
    return {**identity, "conversations": CHAT_LAYOUTS[layout](entry, where)}
