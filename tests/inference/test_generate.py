"""Generation against the full forward pass, and the sampling methods."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.data.splice import FeatureLayout, expand_placeholders, pad_rows
from vita_jax.errors import UserError
from vita_jax.inference.generate import bucket, decode_step, generate, prefill
from vita_jax.inference.sampling import Greedy, Temperature, TopK, TopP, keep_top_k, keep_top_p
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language.decoder import DecoderConfig, make_cache
from vita_jax.models.vision.internvit import InternViTConfig
from vita_jax.models.vita import Vita, VitaConfig, VitaInputs, text_inputs

SIDE, STEPS = 16, 6
CONFIG = VitaConfig(
    vision=InternViTConfig(8, 1, 2, 8, image_size=SIDE, patch_size=4, embedding_init_stddev=0.02),
    projector=ProjectorConfig("mlp2x_gelu", input_size=32, output_size=16),
    language=DecoderConfig(
        vocab_size=29, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16
    ),
)
MODEL, IMAGE = Vita(CONFIG), -200
PROMPTS = [[3, 1, IMAGE, 4, 1, 5], [IMAGE, 9, IMAGE, 2], [6, 5, 3]]


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params() -> dict:
    variables = jax.jit(MODEL.init)(jax.random.key(3), text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=SIDE))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, nn.unbox(variables)["params"])


def make_inputs(prompts: list[list[int]], side: str = "right") -> VitaInputs:
    layout = FeatureLayout(CONFIG.tokens_per_tile)
    counts = [prompt.count(IMAGE) for prompt in prompts]
    rows = [
        expand_placeholders(prompt, None, [layout.tile_span(slot) for slot in range(count)])
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    padded = pad_rows(rows, side=side)
    padded.pop("labels")
    tiles = np.random.default_rng(0).integers(0, 256, (len(prompts), max(counts), SIDE, SIDE, 3), dtype=np.uint8)
    return VitaInputs(tiles=tiles, **padded)


def one(inputs: VitaInputs, row: int) -> VitaInputs:
    return jax.tree.map(lambda x: x[row : row + 1], inputs)


def greedy_by_full_forward(params: dict, inputs: VitaInputs) -> list[list[int]]:
    """Row by row, the whole sequence again for every token."""

    @jax.jit
    def forward(batch: VitaInputs) -> jax.Array:
        return MODEL.apply({"params": params}, MODEL.apply({"params": params}, batch), method="logits")

    answers = []
    for row in range(inputs.tokens.shape[0]):
        batch, length, answer = one(inputs, row), int(np.sum(inputs.segment_ids[row])), []
        room = ((0, 0), (0, STEPS))
        grown = {name: np.pad(getattr(batch, name), room) for name in ("tokens", "segment_ids")}
        grown["feature_index"] = np.pad(batch.feature_index, room, constant_values=-1)
        grown["positions"] = np.arange(grown["tokens"].shape[1])[None]
        for i in range(STEPS):
            answer.append(int(jnp.argmax(forward(replace(batch, **grown))[0, length + i - 1])))
            grown["tokens"][0, length + i] = answer[-1]
            grown["segment_ids"][0, length + i] = 1
        answers.append(answer)
    return answers


@pytest.fixture(scope="module")
def answers(params) -> list[list[int]]:
    return greedy_by_full_forward(params, make_inputs(PROMPTS))


@pytest.mark.parametrize("side", ["right", "left"])
def test_greedy_is_the_argmax_of_the_full_forward(params, answers, side):
    got = generate(MODEL, params, make_inputs(PROMPTS, side), max_new_tokens=STEPS)
    assert got.tokens.tolist() == answers
    assert got.lengths.tolist() == [STEPS] * len(PROMPTS)
    assert len({token for answer in answers for token in answer}) > 3  # not a constant answer


def test_each_row_stops_for_itself(params, answers):
    stop = answers[0][2]
    got = generate(MODEL, params, make_inputs(PROMPTS), max_new_tokens=STEPS, stop_tokens=(stop, 28), pad_token=7)
    for row, answer in enumerate(answers):
        cut = [i for i, token in enumerate(answer) if token in (stop, 28)]
        length = cut[0] if cut else STEPS
        assert int(got.lengths[row]) == length
        assert got.tokens[row].tolist() == answer[:length] + [7] * (STEPS - length)


def test_rows_of_padding_stay_empty(params, answers):
    inputs = make_inputs(PROMPTS)
    inputs = replace(inputs, segment_ids=inputs.segment_ids * np.array([[1], [0], [1]]))
    got = generate(MODEL, params, inputs, max_new_tokens=STEPS)
    assert got.lengths.tolist() == [STEPS, 0, STEPS]
    assert got.tokens[0].tolist() == answers[0] and got.tokens[2].tolist() == answers[2]


def test_buckets():
    assert [bucket(size, (2, 4)) for size in (0, 2, 3, 4, 5, 9)] == [2, 2, 4, 4, 8, 12]


def test_a_second_turn_goes_on_from_the_cache(params):
    """Prefill, decode, prefill again: the same logits as the whole conversation at once."""
    decoder, language = MODEL.decoder, params["language"]
    tokens = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    embeds = decoder.apply({"params": language}, tokens, method="embed")
    positions, segments = jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32)

    run = jax.jit(partial(prefill, decoder))

    def feed(at, cache):
        return run(language, embeds[:, at], positions[:, at], segments[:, at], cache)

    want, _ = feed(slice(0, 8), make_cache(CONFIG.language, 1, 8))
    _, cache = feed(slice(0, 4), make_cache(CONFIG.language, 1, 8))
    _, cache = jax.jit(partial(decode_step, decoder))(language, tokens[:, 4], cache)
    got, cache = feed(slice(5, 8), cache)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert int(cache.end) == int(cache.next_position[0]) == 8


def test_sampling_repeats_with_its_key(params):
    inputs = make_inputs(PROMPTS)

    def draw(seed: int) -> list:
        options = {"max_new_tokens": STEPS, "sampler": Temperature(2.0), "key": jax.random.key(seed)}
        return generate(MODEL, params, inputs, **options).tokens.tolist()

    assert draw(0) == draw(0) != draw(1)
    with pytest.raises(UserError, match="random key"):
        generate(MODEL, params, inputs, max_new_tokens=STEPS, sampler=TopK(3))


def test_filters_keep_the_most_probable():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    np.testing.assert_array_equal(jnp.isfinite(keep_top_k(logits[:1], 2)), [[False, True, False, True]])
    want = [[False, True, False, True], [True, False, False, False]]
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(logits, 0.7)), want)
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(logits, 1.0)), np.ones((2, 4), bool))
    assert bool(jnp.isfinite(keep_top_k(logits, 9)).all())


@pytest.mark.parametrize(
    ("sampler", "allowed"), [(Greedy(), {1}), (TopK(2), {1, 3}), (TopP(0.7), {1, 3}), (Temperature(0.01), {1})]
)
def test_samplers_draw_from_what_they_keep(sampler, allowed):
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25])), (200, 4))
    assert set(sampler(logits, jax.random.key(0)).tolist()) == allowed


def test_temperature_draws_in_proportion():
    probabilities = jnp.array([0.1, 0.6, 0.3])
    drawn = Temperature()(jnp.broadcast_to(jnp.log(probabilities), (4000, 3)), jax.random.key(1))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, probabilities, atol=0.04)


@pytest.mark.parametrize("make", [lambda: Temperature(0.0), lambda: TopK(0), lambda: TopP(0.0), lambda: TopP(1.5)])
def test_bad_sampling_settings(make):
    with pytest.raises(UserError):
        make()
