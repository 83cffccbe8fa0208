"""One model, several conversations: continuous batching over the rows of one cache, with what is known kept.

    engine = Engine(model, params, num_rows=4)
    seat = engine.join()
    for token in seat.answer(prompt, max_new_tokens=64, stop_tokens=stops): ...

Conversations take turns without waiting for each other: every round (`Engine.step`) moves all running answers on by one
token and feeds one block of one prompt, and whoever reads an answer drives the rounds. A conversation keeps its row
while it is idle; its next turn computes only what the row does not hold yet. With more conversations than rows the
one that was idle longest gives its row away and is computed again when it comes back. Nothing here starts threads, and
an engine belongs to one.

Every length that a conversation can meet is one of a few (`prefix.BLOCK_LENGTHS`), so after `warm_up` nothing is
compiled any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError
from vita_jax.inference import rows as device
from vita_jax.inference.prefix import BLOCK_LENGTHS, Key, Prompt, blocks, common_length, text_prompt
from vita_jax.inference.row_sampling import NO_PENALTIES, Penalties, row_sampling
from vita_jax.inference.rows import MAX_STOPS, NO_STOP, Answering, Block
from vita_jax.inference.sampling import GREEDY, Greedy, Sampler
from vita_jax.training.families import Model

_compiled = partial(partial, jax.jit, donate_argnames="rows")
_prefill = _compiled(static_argnames="decoder")(device.prefill_row)
_step = _compiled(static_argnames="decoder")(device.step_rows)
_begin, _copy, _stop = (_compiled()(call) for call in (device.begin_row, device.copy_row, device.stop_row))

STOPPED, FULL, INTERRUPTED = "stop", "length", "interrupted"


@dataclass(frozen=True)
class AnswerOptions:
    """How one answer is drawn.

    Attributes:
      max_new_tokens: the longest answer; shorter where the row ends before.
      stop_tokens: ids that end it, at most `MAX_STOPS`.
      sampler, penalties: how tokens are chosen.
      seed: of the draws; token i is drawn with `fold_in(key(seed), i)`, so an answer does not depend on what else the
        engine does. Needed unless the sampler is `Greedy`.
    """

    max_new_tokens: int = 256
    stop_tokens: tuple[int, ...] = ()
    sampler: Sampler = GREEDY
    penalties: Penalties = NO_PENALTIES
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if len(self.stop_tokens) > MAX_STOPS:
            raise UserError(f"{len(self.stop_tokens)} stop tokens, but an answer has at most {MAX_STOPS}")
        if self.seed is None and not isinstance(self.sampler, Greedy):
            raise UserError(f"{self.sampler} draws at random; give a seed")


@dataclass(eq=False)
class Answer:
    """The tokens of an answer as they are drawn, without the stop token; reading it drives the engine.

    Attributes:
      tokens: so far.
      reason: why it ended: "stop", "length", or "interrupted"; None while it runs.
      computed, reused: positions of the prompt that were fed, and that the row held already.
      hidden: (1 d), the model's state at the prompt's last position, after the final norm; None until that has been
        fed, or if nothing had to be.
      needs_last: whether the prompt's last position is fed although the row holds it.
    """

    engine: Engine
    prompt: Prompt
    options: AnswerOptions | None
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    computed: int = 0
    reused: int = 0
    hidden: jax.Array | None = None
    needs_last: bool = True
    _blocks: deque[tuple[int, Block]] = field(default_factory=deque)
    _read: int = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while self._read == len(self.tokens) and self.reason is None:
            self.engine.step()
        if self._read == len(self.tokens):
            raise StopIteration
        self._read += 1
        return self.tokens[self._read - 1]

    @property
    def answering(self) -> bool:
        """Whether its prompt has been fed and tokens are being drawn."""
        return self.reason is None and bool(self.tokens)

    def _receive(self, token: int, limit: int) -> None:
        if token in self.options.stop_tokens:
            self.reason = STOPPED
            return
        self.tokens.append(token)
        if len(self.tokens) >= limit:
            self.reason = FULL


@dataclass(eq=False)
class Seat:
    """A conversation's place at an engine; see `Engine.join`.

    Attributes:
      row: the row that it has, or None while it has none.
      work: what it waits for.
    """

    engine: Engine
    row: int | None = None
    work: Answer | None = None

    def answer(self, prompt: Prompt, options: AnswerOptions = AnswerOptions()) -> Answer:  # noqa: B008 (frozen)
        """Begins an answer to a prompt, which the row holds afterwards as far as it has been answered.

        Raises:
          UserError: the prompt is empty, too long for a row or lacks features, or the conversation waits for another
            answer.
        """
        self._check(prompt, room=1)
        return self._ask(Answer(self.engine, prompt, options))

    def prepare(self, prompt: Prompt, *, needs_last: bool = False) -> Answer:
        """Begins to compute a prompt ahead of its question, such as speech while it is spoken; the next rounds do it.

        Args:
          prompt: what is known of it.
          needs_last: see `Answer`: for somebody who wants its `hidden`.

        Raises:
          UserError: as `answer`.
        """
        self._check(prompt, room=0)
        return self._ask(Answer(self.engine, prompt, None, needs_last=needs_last))

    def feed(self, prompt: Prompt) -> Answer:
        """`prepare`, and waits until it is done. Raises as `answer`."""
        done = self.prepare(prompt)
        for _ in done:  # without options there are no tokens
            raise AssertionError
        return done

    def interrupt(self) -> None:
        """Ends the running answer, if there is one, where it is. The next prompt says how much of it counts."""
        if self.work is not None:
            self.engine._end(self, INTERRUPTED)

    def leave(self) -> None:
        """Gives the place back."""
        self.interrupt()
        self.engine._leave(self)

    def _check(self, prompt: Prompt, room: int) -> None:
        if self.work is not None:
            raise UserError("this conversation is still being answered; read the answer to its end or interrupt it")
        if not len(prompt):
            raise UserError("the prompt is empty; give it at least one position")
        missing = {key[0] for key in prompt.keys if not isinstance(key, int)} - set(prompt.features)
        if missing:
            raise UserError(
                f"the features of {len(missing)} media of the prompt are missing, one of them {missing.pop()}"
            )
        if len(prompt) + room > self.engine.num_slots:
            raise UserError(
                f"the conversation has {len(prompt)} positions, the model has room for "
                f"{self.engine.num_slots - room}; start a new one"
            )

    def _ask(self, work: Answer) -> Answer:
        self.work = work
        self.engine._waiting.append(self)
        return work


class Engine:
    """Serves several conversations with one model."""

    def __init__(
        self,
        model: Model,
        params: Mapping[str, Any],
        *,
        num_rows: int = 1,
        num_slots: int = 2048,
        cache_dtype: jnp.dtype | None = None,
    ) -> None:
        """
        Args:
          model, params: the whole model; only its language model runs here.
          num_rows: conversations that are in the cache at a time.
          num_slots: positions that each has room for, prompt and answer together.
          cache_dtype: of keys and values, such as int8; None = what the model computes in.

        Raises:
          UserError: a size below 1.
        """
        for name, value in (("num_rows", num_rows), ("num_slots", num_slots)):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        self.decoder, self.num_rows, self.num_slots = model.decoder, num_rows, num_slots
        self.cache_dtype = cache_dtype
        self._params = jax.tree.map(jnp.asarray, params["language"])
        self._waiting: deque[Seat] = deque()
        self._empty()

    def _empty(self) -> None:
        self._rows = device.empty_rows(self.decoder, self.num_rows, self.num_slots, self.cache_dtype)
        self._contents: list[list[Key]] = [[] for _ in range(self.num_rows)]  # what the cache holds
        self._seats: list[Seat | None] = [None] * self.num_rows
        self._used = [0] * self.num_rows  # round in which each row was used last
        self._round = 0

    # ---- conversations ----------------------------------------------------------------------------------------------

    def join(self) -> Seat:
        """A place for one more conversation. It has no row yet, so there can be more of them than rows."""
        return Seat(self)

    def contents(self, seat: Seat) -> tuple[Key, ...]:
        """What the row of a conversation holds; nothing while it has none."""
        return () if seat.row is None else tuple(self._contents[seat.row])

    def warm_up(self) -> None:
        """Compiles everything that conversations will run, in a conversation that leaves nothing behind."""
        for number, (shorter, length) in enumerate(zip((0, *BLOCK_LENGTHS), BLOCK_LENGTHS, strict=False)):
            length = min(length, self.num_slots - 1)
            if length > shorter:
                seat = self.join()
                # Another token each time, so that nothing is reused.
                list(seat.answer(text_prompt([number % self.decoder.config.vocab_size] * length), AnswerOptions(2)))
                seat.leave()
        if self.num_rows > 1:
            self._rows = _copy(self._rows, np.int32(0), np.int32(1))
        self._rows = _stop(self._rows, np.int32(0))
        self._empty()

    # ---- rounds -----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round: a token of every running answer, and a block of the prompt that waits longest.

        Returns:
          Whether there was anything to do.
        """
        self._round += 1
        try:
            answered = self._draw()
            return self._feed() or answered
        except BaseException:
            # It is not known what the device did; whoever goes on computes again.
            for seat in {id(s): s for s in (*self._waiting, *self._seats) if s is not None}.values():
                seat.row = None
                if seat.work is not None:
                    seat.work.reason, seat.work = INTERRUPTED, None
            self._waiting.clear()
            self._empty()
            raise

    def _draw(self) -> bool:
        running = [(row, s.work) for row, s in enumerate(self._seats) if s and s.work and s.work.answering]
        if not running:
            return False
        tokens, self._rows = _step(self.decoder, self._params, self._rows)
        for row, answer in running:
            self._contents[row].append(answer.tokens[-1])
        drawn = np.asarray(tokens)
        for row, answer in running:
            self._used[row] = self._round
            answer._receive(int(drawn[row]), self._limit(answer))
            if answer.reason is not None:
                self._seats[row].work = None
        return True

    def _feed(self) -> bool:
        seat = next((seat for seat in self._waiting if self._take_row(seat)), None)
        if seat is None:
            return False
        self._waiting.remove(seat)
        work, row = seat.work, seat.row
        if work._blocks:
            start, block = work._blocks.popleft()
            stop = start + int(block.real.sum())
            place = np.int32(row), np.int32(start)
            hidden, logits, self._rows = _prefill(self.decoder, self._params, self._rows, *place, block)
            self._contents[row] = list(work.prompt.keys[:stop])
            self._used[row] = self._round
            if work._blocks:
                self._waiting.append(seat)  # the others' turn
                return True
            work.hidden = hidden
            if work.options is not None:
                token, self._rows = _begin(self._rows, np.int32(row), logits, self._answering(work))
                work._receive(int(token), self._limit(work))
        if work.options is None:
            work.reason = STOPPED
        if work.reason is not None:
            seat.work = None
        return True

    def _take_row(self, seat: Seat) -> bool:
        """Gives a waiting conversation a row, and finds what of its prompt is known. False: no row is free."""
        work = seat.work
        if work._blocks:
            return True
        keys = work.prompt.keys
        if seat.row is None:
            free = [row for row, other in enumerate(self._seats) if other is None or other.work is None]
            if not free:
                return False
            seat.row = min(free, key=lambda row: (self._seats[row] is not None, self._used[row]))
            if self._seats[seat.row] is not None:
                self._seats[seat.row].row = None
            self._seats[seat.row] = seat
        known = [common_length(contents, keys) for contents in self._contents]
        best = max(range(self.num_rows), key=lambda row: (known[row], row == seat.row))
        if known[best] > known[seat.row]:
            self._rows = _copy(self._rows, np.int32(best), np.int32(seat.row))
            self._contents[seat.row] = list(self._contents[best])
        # An answer needs what follows the last position, so that one is always fed.
        work.reused = min(known[best], len(keys) - work.needs_last)
        work.computed = len(keys) - work.reused
        width, dtype = self.decoder.config.hidden_size, np.dtype(jnp.dtype(self.decoder.dtype))
        work._blocks.extend(blocks(work.prompt, work.reused, width, dtype, self.num_slots))
        return True

    def _limit(self, answer: Answer) -> int:
        """The most tokens: the one drawn last needs no slot."""
        return min(answer.options.max_new_tokens, self.num_slots - len(answer.prompt) + 1)

    def _answering(self, answer: Answer) -> Answering:
        options = answer.options
        stops = np.full((MAX_STOPS,), NO_STOP, np.int32)
        stops[: len(options.stop_tokens)] = options.stop_tokens
        return Answering(
            limit=np.int32(self._limit(answer)),
            stops=stops,
            key=jax.random.key(options.seed or 0),
            sampling=row_sampling(options.sampler, options.penalties),
        )

    def _end(self, seat: Seat, reason: str) -> None:
        if seat in self._waiting:
            self._waiting.remove(seat)
        if seat.work.answering:
            self._rows = _stop(self._rows, np.int32(seat.row))
        seat.work.reason, seat.work = reason, None

    def _leave(self, seat: Seat) -> None:
        if seat.row is not None:
            self._seats[seat.row], seat.row = None, None
