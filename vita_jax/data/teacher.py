"""A language model somewhere else, asked over HTTP: it writes training data, or judges answers.

Anything that speaks OpenAI's chat completions will do: a model that vLLM, llama.cpp or Ollama serves, a hosted one, or
`vita_jax.serve`. Nothing is asked unless its address is given. The key, where one is needed, is read from the
environment variable VITA_JAX_TEACHER_KEY, so that it is in no command line, file or checkpoint.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vita_jax.errors import UserError

KEY_VARIABLE = "VITA_JAX_TEACHER_KEY"
# What a server says of one request, and not of all.
OF_ONE_REQUEST = (400, 413, 422)

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Teacher:
    """Who is asked, and how.

    Attributes:
      url: where the API begins, for example http://localhost:8000/v1.
      model: the name by which the server knows the model.
      temperature: 0 takes the most probable tokens.
      max_tokens: of a reply.
      timeout_seconds: of a request.
      retries: of a request that the server did not answer or was too busy for, with growing pauses.
    """

    url: str
    model: str
    temperature: float = 0.7
    max_tokens: int = 1024
    timeout_seconds: float = 120.0
    retries: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"teacher {self.url!r} must be a URL such as http://localhost:8000/v1")
        if not self.model:
            raise UserError(f"teacher {self.url} needs the name of a model, as its /models lists them")
        if not 0 <= self.temperature <= 2:
            raise UserError(f"teacher temperature {self.temperature} must be between 0 and 2")
        if self.max_tokens < 1:
            raise UserError(f"teacher max_tokens {self.max_tokens} must be at least 1")


class ReplyError(Exception):
    """One request has no reply that can be used; others may have one."""


def ask(teacher: Teacher, messages: Sequence[Message]) -> str:
    """The reply to a conversation, without space around it. May be called by several threads.

    Raises:
      ReplyError: this request was refused, or its reply is empty or was cut off.
      UserError: the server cannot be reached, is too busy after all retries, or does not know the key or the model; the
        client is not installed.
    """
    check_client()
    import openai

    try:
        completion = _client(teacher.url, teacher.timeout_seconds, teacher.retries).chat.completions.create(
            model=teacher.model,
            messages=[dict(message) for message in messages],
            temperature=teacher.temperature,
            max_tokens=teacher.max_tokens,
        )
    except openai.APIStatusError as error:
        said = f"{error.status_code} {error.message}"
        if error.status_code in OF_ONE_REQUEST:
            raise ReplyError(f"the teacher refused: {said}") from error
        hint = f"; its key is read from {KEY_VARIABLE}" if error.status_code in (401, 403) else ""
        raise UserError(f"teacher {teacher.url}, model {teacher.model}: {said}{hint}") from error
    except openai.OpenAIError as error:
        raise UserError(f"teacher {teacher.url} cannot be reached: {error}") from error
    return _text_of(completion, teacher)


def _text_of(completion: Any, teacher: Teacher) -> str:
    if not completion.choices:
        raise ReplyError("the teacher sent no reply")
    choice = completion.choices[0]
    if choice.finish_reason == "length":
        raise ReplyError(f"the reply was cut off at {teacher.max_tokens} tokens")
    text = (choice.message.content or "").strip()
    if not text:
        raise ReplyError("the reply is empty")
    return text


def check_client() -> None:
    """Raises UserError if the client library is not installed."""
    try:
        import openai  # noqa: F401
    except ImportError:
        raise UserError("asking a teacher needs the client `openai`: pip install 'vita_jax[teacher]'") from None


@functools.lru_cache(maxsize=8)
def _client(url: str, timeout_seconds: float, retries: int) -> Any:
    """One for all threads: it keeps connections open."""
    from openai import OpenAI

    key = os.environ.get(KEY_VARIABLE) or "none"  # the library wants one
    return OpenAI(base_url=url, api_key=key, timeout=timeout_seconds, max_retries=retries)
