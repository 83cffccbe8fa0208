"""Conversations that share an engine say what each says alone; nothing is computed twice or compiled on the way."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.errors import UserError
from vita_jax.inference.engine import AnswerOptions, Engine
from vita_jax.inference.generate import decode_step, generate, prefill
from vita_jax.inference.prefix import BLOCK_LENGTHS, Prompt, blocks, common_length, text_prompt
from vita_jax.inference.row_sampling import Penalties
from vita_jax.inference.sampling import Filtered, Greedy, Temperature, TopK, TopP
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.int8 import change_params, int8_weights
from vita_jax.models.language.decoder import DecoderConfig, make_cache
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.models.vision.internvit import InternViTConfig
from vita_jax.models.vita import Vita, VitaConfig, text_inputs

SIDE, VOCABULARY, WIDTH, SLOTS = 16, 61, 16, 128
CONFIG = VitaConfig(
    vision=InternViTConfig(8, 1, 2, 8, image_size=SIDE, patch_size=4),
    projector=ProjectorConfig("mlp2x_gelu", input_size=32, output_size=WIDTH),
    language=DecoderConfig(VOCABULARY, WIDTH, 2, 2, 1, 8, 16),
)
MODEL = Vita(CONFIG)
SYSTEM = [7, 3, 50, 12, 9, 31, 2]


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict:
    variables = jax.jit(MODEL.init)(jax.random.key(3), text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, nn.unbox(variables)["params"])


@pytest.fixture(scope="module")
def warm(params) -> Engine:
    engine = Engine(MODEL, params, num_rows=3, num_slots=SLOTS)
    engine.warm_up()
    return engine


@jax.jit
def _prefill(params, embeds, real, cache):
    positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), real.shape)
    return prefill(MODEL.decoder, params, embeds, positions, real, cache)


@jax.jit
def _decode(params, token, cache):
    return decode_step(MODEL.decoder, params, token, cache)


def alone(
    params: dict, prompt: list[int] | np.ndarray, options: AnswerOptions, dtype: jnp.dtype = jnp.float32
) -> list[int]:
    """The answer by prefill and decoding of one row, without an engine; a prompt of ids, or of embeddings (s d).

    dtype: of the cache.
    """
    assert options.penalties == Penalties()
    language = params["language"]
    if isinstance(prompt, list):
        prompt = language["embed_tokens"]["embedding"][np.asarray(prompt)]
    room = -len(prompt) % 64
    embeds, real = jnp.pad(prompt, ((0, room), (0, 0)))[None], np.ones((1, len(prompt) + room), np.int32)
    real[0, len(prompt) :] = 0
    cache = make_cache(CONFIG.language, 1, embeds.shape[1] + 64, dtype)
    logits, cache = _prefill(language, embeds, real, cache)
    said = []
    for step in range(options.max_new_tokens):
        token = options.sampler(logits, jax.random.fold_in(jax.random.key(options.seed or 0), step))
        if int(token[0]) in options.stop_tokens:
            break
        said.append(int(token[0]))
        logits, cache = _decode(language, token, cache)
    return said


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [SYSTEM + rng.integers(0, VOCABULARY, rng.integers(1, 40)).tolist() for _ in range(count)]


OPTIONS = [
    AnswerOptions(12),
    AnswerOptions(9, sampler=Temperature(0.8), seed=5),
    AnswerOptions(15, sampler=TopK(5, 1.2), seed=6),
    AnswerOptions(6, sampler=TopP(0.7), seed=5),
    AnswerOptions(10, sampler=Filtered(0.9, 6, 0.8), seed=1),
    AnswerOptions(14, sampler=Greedy()),
    AnswerOptions(11, sampler=Temperature(1.5), seed=8),
]


def test_each_of_many_says_what_it_says_alone(warm, params):
    """Seven conversations on three rows; they begin at different times and end for themselves."""
    asked = prompts(len(OPTIONS))
    first = [alone(params, ids, option) for ids, option in zip(asked, OPTIONS, strict=True)]
    # Tokens that are said become stop tokens of every second one.
    options = [
        replace(option, stop_tokens=(said[len(said) // 2], 60)) if i % 2 else option
        for i, (option, said) in enumerate(zip(OPTIONS, first, strict=True))
    ]
    want = [alone(params, ids, option) for ids, option in zip(asked, options, strict=True)]
    assert sum(len(said) for said in want) < sum(len(said) for said in first)
    seats = [warm.join() for _ in asked]
    answers = []
    for seat, ids, option in zip(seats, asked, options, strict=True):
        answers.append(seat.answer(text_prompt(ids), option))
        if len(answers) > 2:
            next(answers[-3], None)  # goes on while others join
    assert [[*answer] and answer.tokens for answer in answers] == want
    ends = [
        "stop" if len(said) < option.max_new_tokens else "length" for said, option in zip(want, options, strict=True)
    ]
    assert [answer.reason for answer in answers] == ends and set(ends) == {"stop", "length"}
    for seat in seats:
        seat.leave()


def test_nothing_is_compiled_in_a_conversation(warm):
    compiled = []

    def listener(event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x * 3 + 1)(np.float32(2))
        assert compiled  # the listener hears
        compiled.clear()
        one, two, said = warm.join(), warm.join(), list(SYSTEM)
        for length in (1, 5, 17, 30):
            said += list(range(length))
            other = two.answer(text_prompt(said[:10]), OPTIONS[1])
            said += list(one.answer(text_prompt(said), OPTIONS[length % 3]))
            next(other, None)
            two.interrupt()
        one.leave(), two.leave()
        assert len(said) > 90 and not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_a_turn_computes_only_what_is_new(params):
    engine = Engine(MODEL, params, num_rows=2, num_slots=SLOTS)
    seat, history = engine.join(), prompts(1)[0]
    for turn in range(3):
        answer = seat.answer(text_prompt(history), OPTIONS[0])
        said = list(answer)
        assert said == alone(params, history, OPTIONS[0])
        assert answer.reused + answer.computed == len(history)
        # Of the second turn on: what is new, and the token drawn last, which had not been fed yet.
        assert answer.computed == (4 if turn else len(history))
        history = [*history, *said, turn, 4, 5]
    # Another conversation shares the beginning, though not the row.
    other = engine.join()
    answer = other.answer(text_prompt([*SYSTEM, 1, 2]), OPTIONS[0])
    assert list(answer) == alone(params, [*SYSTEM, 1, 2], OPTIONS[0])
    assert (answer.reused, answer.computed) == (len(SYSTEM), 2)
    assert seat.row != other.row and len(engine.contents(seat)) > len(SYSTEM)


def test_a_prompt_may_be_fed_ahead(params):
    engine, ids = Engine(MODEL, params, num_slots=SLOTS), prompts(1)[0]
    seat = engine.join()
    assert [seat.feed(text_prompt(ids[:n])).computed for n in (4, 4, 9)] == [4, 0, 5]
    answer = seat.answer(text_prompt(ids), OPTIONS[0])
    assert list(answer) == alone(params, ids, OPTIONS[0]) and answer.computed == len(ids) - 9
    assert seat.answer(text_prompt(ids), OPTIONS[0]).tokens == [] and seat.work is not None
    with pytest.raises(UserError, match="still being answered"):
        seat.feed(text_prompt(ids))


def test_a_prepared_prompt_has_its_last_hidden_state(params):
    """Also where the row holds all of it; nothing is computed until the rounds do it."""
    engine = Engine(MODEL, params, num_rows=1, num_slots=SLOTS)
    seat, ids = engine.join(), prompts(1, seed=4)[0]
    want = MODEL.apply({"params": params}, text_inputs(jnp.asarray([ids]), image_size=SIDE))[:, -1]
    for computed in (len(ids), 1):
        work = seat.prepare(text_prompt(ids), needs_last=True)
        assert work.hidden is None and work.reason is None and not engine.contents(seat)[len(ids) :]
        while work.reason is None:
            assert engine.step()
        assert (work.reason, work.computed, work.tokens) == ("stop", computed, [])
        np.testing.assert_allclose(work.hidden, want, atol=2e-5)
    assert seat.feed(text_prompt(ids)).hidden is None  # nothing had to be fed


@pytest.mark.parametrize("heard", [0, 2, 5])
def test_an_interrupted_answer_goes_on_from_what_was_heard(params, heard):
    """The row is cut, and the continuation is that of a fresh conversation with the shortened history."""
    engine, ids = Engine(MODEL, params, num_rows=2, num_slots=SLOTS), prompts(1)[0]
    seat, other = engine.join(), engine.join()
    elsewhere = other.answer(text_prompt([5, 6]), OPTIONS[5])
    answer = seat.answer(text_prompt(ids), OPTIONS[0])
    said = [next(answer) for _ in range(5)]
    seat.interrupt()
    assert answer.reason == "interrupted" and list(answer) == []
    history = [*ids, *said[:heard], 11, 12]
    after = seat.answer(text_prompt(history), OPTIONS[0])
    assert list(after) == alone(params, history, OPTIONS[0])
    assert after.computed == (3 if heard == 5 else 2)  # the fifth token was drawn but not fed
    assert engine.contents(seat) == tuple(history + after.tokens[:-1])
    assert list(elsewhere) and elsewhere.tokens == alone(params, [5, 6], OPTIONS[5])


def test_an_idle_conversation_gives_its_row_away_and_comes_back(params):
    engine = Engine(MODEL, params, num_rows=1, num_slots=SLOTS)
    seats, histories = [engine.join() for _ in range(3)], prompts(3)
    for turn in range(2):
        for seat, history in zip(seats, histories, strict=True):
            answer = seat.answer(text_prompt(history), OPTIONS[1])
            assert list(answer) == alone(params, history, OPTIONS[1])
            assert answer.reused == (0 if (turn, history) == (0, histories[0]) else len(SYSTEM))
            history += [*answer.tokens, turn]
    assert [seat.row for seat in seats] == [None, None, 0]


def test_positions_of_media_are_features(params):
    """As `extra_features` of the whole model are; what is there is told by name and part."""
    features = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    index = [-1, -1, 0, 1, 2, 3, 4, -1]
    inputs = text_inputs(np.asarray([[3, 4, 0, 0, 0, 0, 0, 5]], np.int32), image_size=SIDE)
    inputs = replace(inputs, feature_index=np.asarray([index]), extra_features=features[None])
    want = alone(params, MODEL.apply({"params": params}, inputs, method="embed_inputs")[0], AnswerOptions(8))
    name = ("clip", "a")
    keys = (3, 4, *((name, i) for i in range(5)), 5)
    prompt = Prompt(keys, np.arange(8, dtype=np.int32), {name: features})
    engine = Engine(MODEL, params, num_slots=SLOTS)
    seat = engine.join()
    for part in (3, 6):
        seat.feed(prompt.cut(part))
    answer = seat.answer(prompt, AnswerOptions(8))
    assert list(answer) == want and answer.computed == 2
    with pytest.raises(UserError, match="features of 1 media"):
        engine.join().answer(replace(prompt, features={}))


def test_long_prompts_are_fed_in_blocks_between_the_steps_of_others(params):
    engine = Engine(MODEL, params, num_rows=2, num_slots=2048)
    long = (np.arange(1200) % VOCABULARY).tolist()
    made = blocks(text_prompt(long), 3, WIDTH, np.float32, 2048)
    assert [(start, b.tokens.shape[1], int(b.real.sum())) for start, b in made] == [
        (3, 512, 512), (515, 512, 512), (1027, 256, 173),
    ]  # fmt: skip
    short = engine.join().answer(text_prompt([4, 5]), OPTIONS[0])
    next(short)
    answer = engine.join().answer(text_prompt(long), OPTIONS[0])
    next(answer)
    assert len(short.tokens) == 1 + 3  # one more token for every block
    assert list(answer) and answer.tokens == alone(params, long, OPTIONS[0])
    assert BLOCK_LENGTHS == tuple(sorted(BLOCK_LENGTHS)) and common_length("abc", "abd") == 2


def test_experts_serve_rows(params):
    """A mixture of experts: each of three says what it says alone in the same engine, in floats and in int8."""
    config = replace(CONFIG, language=replace(CONFIG.language, num_experts=4, qkv_bias=False))
    model = Vita(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), text_inputs(np.zeros((1, 2), np.int32), image_size=SIDE))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), nn.unbox(shapes)["params"]["language"]
    )
    rounded = change_params(drawn, int8_weights(weight_table(config.language)))
    for language, dtype in ((drawn, None), (rounded, jnp.int8)):
        engine = Engine(model, {"language": language}, num_rows=2, num_slots=64, cache_dtype=dtype)
        alone = []
        for ids in prompts(3):
            seat = engine.join()
            alone.append(list(seat.answer(text_prompt(ids), AnswerOptions(6))))
            seat.leave()
        answers = [engine.join().answer(text_prompt(ids), AnswerOptions(6)) for ids in prompts(3)]
        assert [list(answer) for answer in answers] == alone and len({i for said in alone for i in said}) > 3


@pytest.fixture(scope="module")
def integers(params) -> dict:
    """The model with the language model's weights in int8."""
    return {**params, "language": change_params(params["language"], int8_weights(weight_table(CONFIG.language)))}


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_answers_with_an_int8_cache_are_those_of_generate(params, integers, weights):
    """Rows that begin, are cut, copied and given away, in blocks or as a whole: every position is rounded alike."""
    params = integers if weights == "int8" else params
    asked, engine = prompts(5, seed=2), Engine(MODEL, params, num_rows=2, num_slots=SLOTS, cache_dtype=jnp.int8)
    want = [alone(params, ids, option, jnp.int8) for ids, option in zip(asked, OPTIONS, strict=False)]
    seats = [engine.join() for _ in asked]
    answers = [seat.answer(text_prompt(ids), o) for seat, ids, o in zip(seats, asked, OPTIONS, strict=False)]
    assert [list(answer) for answer in answers] == want
    assert answers[-1].reused == len(SYSTEM)  # copied from another row
    # Fed ahead in pieces; cut where an answer was broken off.
    for part in (3, 11):
        seats[0].feed(text_prompt(asked[0][:part]))
    answer = seats[0].answer(text_prompt(asked[0]), OPTIONS[0])
    assert [next(answer) for _ in range(4)] == want[0][:4]
    seats[0].interrupt()
    history = [*asked[0], *want[0][:2], (want[0][2] + 1) % VOCABULARY]
    after = seats[0].answer(text_prompt(history), OPTIONS[1])
    assert list(after) == alone(params, history, OPTIONS[1], jnp.int8) and after.computed == 1
    inputs = text_inputs(np.asarray([asked[0]]), image_size=SIDE)
    whole = generate(MODEL, params, inputs, max_new_tokens=OPTIONS[0].max_new_tokens, cache_dtype=jnp.dtype(jnp.int8))
    assert whole.tokens[0].tolist() == want[0]


def test_an_int8_cache_is_not_one_of_floats(params):
    """It is used: what follows a prompt is not the same to the last bit, and nearly."""
    ids, language = jnp.asarray([prompts(1)[0]]), params["language"]
    embeds, real = language["embed_tokens"]["embedding"][ids], jnp.ones_like(ids)
    (floats, _), (integers, cache) = (
        _prefill(language, embeds, real, make_cache(CONFIG.language, 1, ids.shape[1], dtype))
        for dtype in (jnp.float32, jnp.int8)
    )
    difference = float(jnp.abs(floats - integers).max())
    assert 1e-5 < difference < 0.1 * float(jnp.abs(floats).max()) and cache.k.values.dtype == jnp.int8


def test_a_full_row_ends_an_answer(params):
    engine = Engine(MODEL, params, num_slots=12)
    ids = prompts(1)[0][:9]
    answer = engine.join().answer(text_prompt(ids), AnswerOptions(50))
    assert list(answer) == alone(params, ids, AnswerOptions(4)) and answer.reason == "length"
    with pytest.raises(UserError, match="has 12 positions, the model has room for 11"):
        engine.join().answer(text_prompt(range(12)))


def test_penalties_are_those_of_the_own_answer(params):
    engine = Engine(MODEL, params, num_rows=2, num_slots=SLOTS)
    ids = prompts(1)[0]
    option = AnswerOptions(40, penalties=Penalties(frequency=1e4))
    answers = [engine.join().answer(text_prompt(ids), o) for o in (option, AnswerOptions(40))]
    varied, plain = (list(answer) for answer in answers)
    assert len(set(varied)) == 40 and plain == alone(params, ids, AnswerOptions(40)) and len(set(plain)) < 40


def test_a_failure_ends_what_runs_and_leaves_an_engine_that_works(params, monkeypatch):
    engine, ids = Engine(MODEL, params, num_rows=2, num_slots=SLOTS), prompts(1)[0]
    answer = engine.join().answer(text_prompt(ids), OPTIONS[0])
    next(answer)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_draw", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(answer)
    assert answer.reason == "interrupted"
    again = engine.join().answer(text_prompt(ids), OPTIONS[0])
    assert list(again) == alone(params, ids, OPTIONS[0]) and again.reused == 0


def test_bad_requests(params):
    seat = Engine(MODEL, params, num_slots=SLOTS).join()
    for wrong, message in (
        (lambda: AnswerOptions(0), "max_new_tokens 0"),
        (lambda: AnswerOptions(sampler=TopK(3)), "draws at random"),
        (lambda: AnswerOptions(stop_tokens=(1, 2, 3, 4, 5)), "at most 4"),
        (lambda: seat.answer(text_prompt([])), "prompt is empty"),
        (lambda: Engine(MODEL, params, num_rows=0), "num_rows 0"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
