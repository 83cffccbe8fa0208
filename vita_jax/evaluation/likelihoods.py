"""How likely a model finds given answers, for benchmarks that rank options by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.prompts import state_symbol_ids
from vita_jax.errors import UserError
from vita_jax.evaluation.answer_lines import Question
from vita_jax.evaluation.answering import Progress, on_mesh, question_batches, spread
from vita_jax.evaluation.subject import Subject
from vita_jax.inference.generate import Params, bucket
from vita_jax.models.vita import VitaInputs
from vita_jax.training.families import Model

# Round numbers of tokens of an answer.
ANSWER_BUCKETS = (2, 4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one given answer: the mean loss of its tokens (nats), and whether each of them is the likeliest one."""

    loss: float
    is_greedy: bool


def likelihoods(
    subject: Subject,
    questions: Sequence[Question],
    answers: Sequence[str],
    root: str | Path,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """How likely each answer is after its question, in their order.

    The question is written as in a chat, so that the answer begins where the model's own would; where those begin with
    a state symbol, it stands in front of the given one and is not counted. Space around an answer is not either.

    Args:
      subject: who is asked.
      questions, answers: (n,) each.
      root: the folder that the files of questions start from.
      progress: called with (done, total).

    Raises:
      UserError: an answer is empty; or as `question_batches`.
    """
    given = [_tokens(subject, question, answer) for question, answer in zip(questions, answers, strict=True)]
    found: list[Likelihood | None] = [None] * len(questions)
    done = 0
    with on_mesh(subject.mesh):
        for places, inputs in _batches(subject, questions, root):
            rows = [given[place] for place in places]
            length = bucket(max(len(ids) for _, ids in rows), ANSWER_BUCKETS)
            extended, labels = _with_answers(jax.device_get(inputs), rows, length)
            extended, labels = spread(extended, subject.mesh), spread(labels, subject.mesh)
            loss, greedy = jax.device_get(_score(subject.model, subject.params, extended, labels))
            for row, place in enumerate(places):
                found[place] = Likelihood(float(loss[row]), bool(greedy[row]))
            done += len(places)
            if progress is not None:
                progress(done, len(questions))
    return found


def _batches(
    subject: Subject, questions: Sequence[Question], root: str | Path
) -> Iterator[tuple[list[int], VitaInputs]]:
    return question_batches(
        subject.model, subject.params, subject.context, questions, root, subject.batch_size, subject.mesh
    )


def _tokens(subject: Subject, question: Question, answer: str) -> tuple[int, np.ndarray]:
    """(how many ids in front are not counted, ids): of the state symbol and of the answer."""
    context = subject.context
    ids = context.tokenizer.encode(answer.strip(), allow_special=False, add_bos=False)
    if not len(ids):
        raise UserError(f"question {question.id}: the answer {answer!r} that is to be ranked is empty")
    symbol: list[int] = []
    if getattr(context.options, "state_symbols", False) and context.template.state_symbols is not None:
        state = "audio" if any(kind == "audio" for kind, _ in question.media) else "text"
        symbols = state_symbol_ids(context.tokenizer, context.template)
        symbol = [next(number for number, meaning in symbols.items() if meaning == state)]
    return len(symbol), np.asarray([*symbol, *ids], np.int32)


def _with_answers(
    inputs: VitaInputs, rows: Sequence[tuple[int, np.ndarray]], length: int
) -> tuple[VitaInputs, np.ndarray]:
    """Prompts (b s) with answers behind them, (b s+length), and the ids that are counted, (b length), -1 elsewhere.

    Labels stand in the order of the answer: label j is what follows position `prompt + j - 1`.
    """
    arrays = {name: np.asarray(getattr(inputs, name)) for name in ("tokens", "positions", "segment_ids")}
    index = np.asarray(inputs.feature_index)
    arrays = {name: np.pad(values, ((0, 0), (0, length))) for name, values in arrays.items()}
    labels = np.full((len(index), length), -1, np.int32)
    for row, (uncounted, ids) in enumerate(rows):
        used = int((arrays["segment_ids"][row] > 0).sum())
        place = slice(used, used + len(ids))
        arrays["tokens"][row, place], arrays["segment_ids"][row, place] = ids, 1
        arrays["positions"][row, place] = arrays["positions"][row, used - 1] + 1 + np.arange(len(ids))
        labels[row, uncounted : len(ids)] = ids[uncounted:]
    index = np.pad(index, ((0, 0), (0, length)), constant_values=-1)
    return inputs.replace(**arrays, feature_index=index), labels


@partial(jax.jit, static_argnames="model")
def _score(model: Model, params: Params, inputs: VitaInputs, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss (b,) float32 and greediness (b,) bool of the labels (b n); of rows without any 0 and True."""
    hidden = model.apply({"params": params}, inputs)
    counted = labels >= 0
    # The answer's last position is the row's; label j is read from the position before token j.
    total = jnp.sum(inputs.segment_ids > 0, axis=1)
    answer = total - jnp.max(jnp.where(counted, jnp.arange(labels.shape[1]) + 1, 0), axis=1)
    places = jnp.clip(answer[:, None] + jnp.arange(labels.shape[1]) - 1, 0, hidden.shape[1] - 1)
    chosen = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits = model.decoder.apply({"params": params["language"]}, chosen, method="logits").astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.sum(jnp.where(counted, losses, 0.0), axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1)
    return loss, jnp.all((jnp.argmax(logits, axis=-1) == labels) | ~counted, axis=1)
