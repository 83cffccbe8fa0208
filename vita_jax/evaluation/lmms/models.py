"""The classes that lmms-eval loads for `--model vita_jax`; imported by it alone.

`--model_args checkpoint=DIR` and, joined by commas: `answers=FILE.jsonl` keeps every answer and likelihood, so that the
same command goes on after a stop; `int8=weights+cache`; `mesh=fsdp:4+tensor:2`. `--batch_size` is that of a call, over
all devices.

lmms-eval asks a chat model by messages. Those that a task does not write itself it makes of the task's text and files,
whereby it loses few-shot examples and the samples of decoded sounds; so text and files are taken from the task instead.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.evaluation.answer_lines import Question, answer_line
from vita_jax.evaluation.asking import AskOptions, KeptAnswers, Line, answers_to
from vita_jax.evaluation.likelihoods import likelihoods
from vita_jax.evaluation.lmms.requests import (
    Files,
    Generation,
    generation,
    mark_of,
    question_of,
    question_of_messages,
)
from vita_jax.evaluation.opening import BATCH_SIZE, identity, mesh_config, open_subject
from vita_jax.inference.quantization import int8_parts
from vita_jax.parallel.process import prepare_process

# Requests whose files are on the disk at a time.
AT_ONCE = 256


@dataclass(frozen=True)
class _Asked:
    """A request: `make` writes its files and gives its question; `name` and `mark` find its answer again."""

    name: str
    mark: str
    text: str
    options: Generation
    make: Callable[[Files], Question]


class _VitaJax(lmms):
    """What both kinds of models share."""

    def __init__(
        self,
        checkpoint: str,
        answers: str = "",
        int8: str = "",
        mesh: str = "",
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """See the top of the file.

        Raises:
          UserError: an argument that is not known, or as `open_subject`.
        """
        super().__init__()
        if unknown or device is not None or max_batch_size is not None:
            given = [*unknown, *(("device",) if device else ()), *(("max_batch_size",) if max_batch_size else ())]
            raise UserError(
                f"model_args {', '.join(given)}: known are checkpoint, answers, int8, mesh and --batch_size"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: expected a number of questions, such as {BATCH_SIZE}")
        prepare_process()
        chosen = [part for part in int8.split("+") if part]
        parts = int8_parts(chosen)
        sizes = mesh_config([axis.replace(":", "=") for axis in mesh.split("+") if axis])
        self.subject, loaded = open_subject(str(checkpoint), mesh=sizes, quantization=parts, batch_size=int(batch_size))
        self._cache_dtype = parts.cache_dtype
        self._identity = identity(loaded, chosen)
        self._model_name = str(checkpoint)
        self._kept = KeptAnswers(answers, str(checkpoint)) if answers else None

    @property
    def batch_size(self) -> int:
        """Questions of a call."""
        return self.subject.batch_size

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise UnsupportedOption("tasks of several rounds (generate_until_multi_round) are not offered")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not of chat models."""
        raise UnsupportedOption("options are ranked by likelihood with --force_simple")

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _answers(self, asked: Sequence[_Asked]) -> list[str]:
        """The answers, in the order of the requests; kept ones are not asked again."""
        found: list[str | None] = [None] * len(asked)
        bar = tqdm(total=len(asked), desc="vita_jax answers", disable=self.rank != 0)
        for place, one in enumerate(asked):
            line = None if self._kept is None else self._kept.find(one.name, one.mark)
            if line is not None:
                found[place] = line["text"]
                bar.update()
        left = [place for place, answer in enumerate(found) if answer is None]
        for places in _parts(asked, left):
            for place, line in zip(places, self._ask([asked[place] for place in places]), strict=True):
                found[place] = line["text"]
            bar.update(len(places))
        bar.close()
        return found

    def _ask(self, asked: Sequence[_Asked]) -> list[Line]:
        """The lines of requests with the same options."""
        options = asked[0].options
        settings = AskOptions(options.max_new_tokens, options.sampler, cache_dtype=self._cache_dtype)
        with tempfile.TemporaryDirectory() as folder:
            files = Files(Path(folder))
            questions = [one.make(files) for one in asked]
            said = answers_to(self.subject, questions, folder, settings)
        lines = [
            answer_line(question, options.cut(text), self._model_name, state=state, asked=one.mark)
            for one, question, (state, text) in zip(asked, questions, said, strict=True)
        ]
        if self._kept is not None:
            self._kept.add(lines)
        return lines


def _names(requests: Sequence[Instance]) -> Iterator[str]:
    """TASK:SPLIT:NUMBER:REPETITION of every request; a task may ask the same several times."""
    seen: Counter[tuple] = Counter()
    for request in requests:
        number, task, split = place = request.args[-3:]
        yield f"{task}:{split}:{number}:{seen[place]}"
        seen[place] += 1


def _parts(asked: Sequence[_Asked], places: Sequence[int]) -> Iterator[list[int]]:
    """Places of requests with the same options, at most AT_ONCE of them."""
    by_options: dict[Generation, list[int]] = {}
    for place in places:
        by_options.setdefault(asked[place].options, []).append(place)
    for group in by_options.values():
        for start in range(0, len(group), AT_ONCE):
            yield group[start : start + AT_ONCE]


class VitaJaxChat(_VitaJax):
    """Asked by messages, where the task has some."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers of every request, (context, doc_to_messages, options, number, task, split) each."""
        names = _names(requests)
        return self._answers([self._asked(name, *request.args) for name, request in zip(names, requests, strict=True)])

    def _asked(
        self, name: str, context: str, messages: Any, options: dict, number: int, task: str, split: str
    ) -> _Asked:
        owner = messages.__self__  # the task

        def make(files: Files) -> Question:
            document = self._document(task, split, number)
            if callable(owner.config.doc_to_messages):
                return question_of_messages(name, messages(document), files)
            return question_of(name, context, owner.doc_to_visual(document), files)

        mark = mark_of(context, options, self._identity, "chat")
        return _Asked(name, mark, context, generation(options), make)


class VitaJaxSimple(_VitaJax):
    """Asked by a text and what is shown before it; also ranks options."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers of every request, (context, options, doc_to_visual, number, task, split) each."""
        names = _names(requests)
        return self._answers([self._asked(name, *request.args) for name, request in zip(names, requests, strict=True)])

    def _asked(self, name: str, context: str, options: dict, visual: Any, number: int, task: str, split: str) -> _Asked:
        def make(files: Files) -> Question:
            return question_of(name, context, visual(self._document(task, split, number)), files)

        return _Asked(name, mark_of(context, options, self._identity, "simple"), context, generation(options), make)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean loss of the answer's tokens, whether they are the likeliest) of every request; the least loss is the
        best option, as lmms-eval has it.

        lmms-eval 0.7.3 turns whatever it does not know into text, pairs of numbers, too, which its tasks then cannot
        read; the content of a `GenerationResult` it passes on as it is.
        """
        if any(len(request.args) != 6 for request in requests):
            raise UnsupportedOption("likelihoods without a question (acc_mutual_info) are not offered")
        found: list[GenerationResult] = []
        bar = tqdm(total=len(requests), desc="vita_jax ranks", disable=self.rank != 0)
        named = list(zip(_names(requests), requests, strict=True))
        for start in range(0, len(named), AT_ONCE):
            lines = self._ranked(named[start : start + AT_ONCE])
            found += [GenerationResult((line["loss"], line["is_greedy"])) for line in lines]
            bar.update(len(lines))
        bar.close()
        return found

    def _ranked(self, named: Sequence[tuple[str, Instance]]) -> list[Line]:
        """The lines of requests with their names, in their order; kept ones are not computed again."""
        lines: list[Line | None] = []
        left: list[tuple[int, Question, str, str]] = []
        with tempfile.TemporaryDirectory() as folder:
            files = Files(Path(folder))
            for place, (name, request) in enumerate(named):
                context, answer, visual, number, task, split = request.args
                document = self._document(task, split, number)
                text = answer(document) if callable(answer) else answer
                mark = mark_of(context, text, self._identity, "likelihood")
                lines.append(None if self._kept is None else self._kept.find(name, mark))
                if lines[-1] is None:
                    left.append((place, question_of(name, context, visual(document), files), text, mark))
            asked = [question for _, question, _, _ in left]
            ranked = likelihoods(self.subject, asked, [text for _, _, text, _ in left], folder)
        for (place, question, text, mark), one in zip(left, ranked, strict=True):
            more = {"loss": one.loss, "is_greedy": one.is_greedy, "asked": mark}
            lines[place] = answer_line(question, text, self._model_name, **more)
        if self._kept is not None:
            self._kept.add([lines[place] for place, *_ in left])
        return lines
