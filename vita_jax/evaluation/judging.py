"""Many questions to a judge at a time; what it said is kept line by line, so that nothing is asked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from vita_jax.data.json_lines import drop_cut_line
from vita_jax.data.teacher import Message, ReplyError, Teacher, ask
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import objects

Progress = Callable[[int, int], None]


def replies(
    teacher: Teacher,
    asked: Mapping[str, list[Message]],
    file: str | os.PathLike[str],
    *,
    requests: int = 8,
    progress: Progress | None = None,
) -> dict[str, str]:
    """What a judge says to every conversation.

    Args:
      teacher: who is asked.
      asked: conversations by name.
      file: keeps {"name", "asked", "reply"}, a line each; those of an earlier attempt are taken from it where they are
        replies to the same conversation.
      requests: at a time.
      progress: called with (replied, total).

    Raises:
      UserError: the judge cannot be asked; some have no reply that can be used (the same call asks for these again); a
        file that was not written here.
    """
    if requests < 1:
        raise UserError(f"requests {requests} must be at least 1")
    kept = _kept(file, asked)
    left = [name for name in asked if name not in kept]
    failed: dict[str, str] = {}

    def one(name: str) -> tuple[str, str | None]:
        try:
            return name, ask(teacher, asked[name])
        except ReplyError as error:
            failed[name] = str(error)
            return name, None

    try:
        with open(file, "a", encoding="utf-8") as lines, ThreadPoolExecutor(requests) as pool:
            try:
                for done, (name, reply) in enumerate(pool.map(one, left), len(kept) + 1):
                    if reply is not None:
                        kept[name] = reply
                        line = {"name": name, "asked": asked[name], "reply": reply}
                        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                        lines.flush()
                    if progress is not None:
                        progress(done, len(asked))
            except UserError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except OSError as error:
        raise UserError(f"{os.fspath(file)} cannot be written: {error.strerror}; choose another file") from error
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(asked)} questions have no reply of {teacher.model}, such as {name}: {reason}; "
            f"the others are kept in {os.fspath(file)}, run the same command again"
        )
    return {name: kept[name] for name in asked}


def _kept(file: str | os.PathLike[str], asked: Mapping[str, list[Message]]) -> dict[str, str]:
    """Replies of an earlier attempt; a line that was being written when it ended is dropped from the file."""
    found: dict[str, str] = {}
    if not drop_cut_line(file):
        return found
    for where, entry in objects(file):
        if not {"name", "asked", "reply"} <= set(entry):
            raise UserError(f"{where}: is no reply of a judge; choose another file")
        if asked.get(entry["name"]) == entry["asked"]:
            found[entry["name"]] = entry["reply"]
    return found


def question_to(system: str, user: str) -> list[Message]:
    """A conversation of two turns."""
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
