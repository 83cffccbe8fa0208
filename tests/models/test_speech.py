"""Properties of the speech decoders and the state heads: who sees whom, cache, prefix, sampling, tables."""

from __future__ import annotations

import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vita_jax.conversion.tables import export_params, flatten, import_params
from vita_jax.errors import UserError
from vita_jax.inference.speech_tokens import (
    SpeechSampling,
    next_token_probabilities,
    speech_steps,
    start_speech,
    stream_speech_tokens,
)
from vita_jax.models import state_head
from vita_jax.models.speech.config import (
    SpeechDecoderConfig,
    config_from_published,
    config_from_shapes,
    speech_small,
    vita_1_5_speech,
)
from vita_jax.models.speech.nar_decoder import NarDecoder, initial_distribution_loss, text_rows
from vita_jax.models.speech.speech_decoder import SpeechBatch, SpeechDecoder, speech_labels, speech_loss
from vita_jax.models.speech.speech_decoder_weights import weight_table
from vita_jax.ops.sampling_filters import filtered_probabilities, repetition_penalty

CONFIG = SpeechDecoderConfig(
    num_codes=11,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_layers=2,
    prefix=True,
    contiguous_positions=True,
)
WIDTH, ROWS, STEPS, PREFIX = CONFIG.hidden_size, 6, 5, 4


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def make_batch(seed: int = 0, prefix: bool = True) -> SpeechBatch:
    rng = np.random.default_rng(seed)
    fields = {}
    if prefix:
        fields = {
            "prefix": rng.normal(size=(2, PREFIX, WIDTH)).astype(np.float32),
            "prefix_lengths": np.asarray([PREFIX, 2], np.int32),
        }
    return SpeechBatch(
        features=rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32),
        feature_lengths=np.asarray([ROWS, 3], np.int32),
        codes=rng.integers(0, CONFIG.num_codes, (2, STEPS)).astype(np.int32),
        code_lengths=np.asarray([STEPS, 2], np.int32),
        **fields,
    )


@pytest.fixture(scope="module")
def params():
    return nn.unbox(SpeechDecoder(CONFIG).init(jax.random.key(0), make_batch())["params"])


def speech_logits(params, batch: SpeechBatch, config: SpeechDecoderConfig = CONFIG) -> np.ndarray:
    model = SpeechDecoder(config)
    normed = model.apply({"params": params}, batch)[:, batch.features.shape[1] + 1 :]
    return np.asarray(model.apply({"params": params}, normed, method=SpeechDecoder.logits))


def test_nar_sees_both_ways_and_no_padding(params) -> None:
    batch, nar = make_batch(), NarDecoder(CONFIG)
    out = nar.apply({"params": params["nar"]}, batch.features, batch.feature_lengths)
    alone = nar.apply({"params": params["nar"]}, batch.features[1:, :3], batch.feature_lengths[1:])
    np.testing.assert_allclose(out[1:, :3], alone, atol=1e-5)
    other = batch.features + np.float32(1.0) * (np.arange(ROWS) == ROWS - 1)[:, None]
    changed = nar.apply({"params": params["nar"]}, other.astype(np.float32), batch.feature_lengths)
    assert np.abs(changed[0, 0] - out[0, 0]).max() > 1e-4


def test_speech_is_causal_and_text_does_not_see_it(params) -> None:
    batch = make_batch()
    model, variables = SpeechDecoder(CONFIG), {"params": params}
    at = 2
    codes = batch.codes.copy()
    codes[0, at] = (codes[0, at] + 1) % CONFIG.num_codes
    before = np.asarray(model.apply(variables, batch)[0])
    after = np.asarray(model.apply(variables, batch.replace(codes=codes))[0])
    first = ROWS + 1 + 1 + at  # BOS, text, SOS, then the codes
    np.testing.assert_array_equal(before[:first], after[:first])
    assert np.abs(before[first:] - after[first:]).max(axis=-1).min() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [False, True])
def test_steps_with_a_cache_equal_teacher_forcing(params, prefix: bool) -> None:
    batch = make_batch(prefix=prefix)
    want = speech_logits(params, batch)
    model, variables = SpeechDecoder(CONFIG), {"params": params}
    slots = ROWS + 1 + STEPS + 1 + (PREFIX if prefix else 0)
    cache, prompt, _ = model.apply(
        variables,
        batch.features,
        batch.feature_lengths,
        slots,
        batch.prefix,
        batch.prefix_lengths,
        method=SpeechDecoder.start,
    )
    assert prompt.shape == (2, ROWS + 1, WIDTH)
    np.testing.assert_array_equal(cache.next_position, batch.feature_lengths + 1)
    fed = np.concatenate([np.full((2, 1), CONFIG.sos, np.int32), batch.codes], axis=1)
    for step in range(STEPS + 1):
        cache, hidden = model.apply(variables, cache, jnp.asarray(fed[:, step]), method=SpeechDecoder.step)
        normed = model.apply(variables, hidden, method=SpeechDecoder.normalise)
        got = np.asarray(model.apply(variables, normed, method=SpeechDecoder.logits))[:, 0]
        for row in range(2):
            if step <= batch.code_lengths[row]:
                np.testing.assert_allclose(got[row], want[row, step], atol=2e-5)


def test_original_positions_follow_the_padded_text(params) -> None:
    original = replace(CONFIG, contiguous_positions=False)
    batch = make_batch()
    ours, theirs = speech_logits(params, batch), speech_logits(params, batch, original)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)  # the full row has no gap
    assert np.abs(ours[1, :3] - theirs[1, :3]).max() > 1e-4


def test_labels_and_loss_ignore_padding(params) -> None:
    batch = make_batch()
    labels = speech_labels(batch.codes, batch.code_lengths, CONFIG)
    assert labels[1].tolist() == [*batch.codes[1, :2].tolist(), CONFIG.eos, CONFIG.pad, CONFIG.pad, CONFIG.pad]
    total, count = speech_loss(speech_logits(params, batch), labels, CONFIG)
    assert count == STEPS + 1 + 3
    other = batch.replace(codes=np.where(np.arange(STEPS) < batch.code_lengths[:, None], batch.codes, 7))
    np.testing.assert_allclose(total, speech_loss(speech_logits(params, other), labels, CONFIG)[0], rtol=1e-6)


def test_prefix_changes_the_speech_and_needs_its_stack(params) -> None:
    batch = make_batch()
    with_prefix = speech_logits(params, batch)
    without = speech_logits(params, batch.replace(prefix=None, prefix_lengths=None))
    assert np.abs(with_prefix - without).max() > 1e-3
    with pytest.raises(UserError, match="no prefix stack"):
        speech_logits(params, batch, replace(CONFIG, prefix=False))


@pytest.mark.slow
def test_training_learns_a_sentence() -> None:
    config = speech_small(num_codes=8, width=32, num_layers=2)
    batch = SpeechBatch(
        features=np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32),
        feature_lengths=np.asarray([4], np.int32),
        codes=np.asarray([[3, 1, 4, 1, 5]], np.int32),
        code_lengths=np.asarray([5], np.int32),
    )
    model = SpeechDecoder(config)
    params = nn.unbox(model.init(jax.random.key(0), batch)["params"])
    optimizer = optax.adam(3e-3)

    def loss_fn(params):
        normed = model.apply({"params": params}, batch)[:, 5:]
        logits = model.apply({"params": params}, normed, method=SpeechDecoder.logits)
        total, count = speech_loss(logits, speech_labels(batch.codes, batch.code_lengths, config), config)
        return total / count

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(60):
        params, state, loss = step(params, state)
    assert loss < 0.1
    sampling = SpeechSampling(greedy=True)
    spoken = stream_speech_tokens(
        model, params, batch.features, batch.feature_lengths, key=jax.random.key(0), max_tokens=20, sampling=sampling
    )
    assert list(spoken) == [3, 1, 4, 1, 5]  # and EOS ends it


@pytest.mark.slow
def test_streamed_tokens_equal_steps_at_once(params) -> None:
    batch, model, key = make_batch(), SpeechDecoder(CONFIG), jax.random.key(3)
    features, lengths = batch.features[:1], batch.feature_lengths[:1]
    sampling = SpeechSampling(top_k=3, penalty=1.2, penalty_window=4)
    state = start_speech(model, params, features, lengths, key=key, max_tokens=12, sampling=sampling)
    _, tokens = speech_steps(model, params, state, sampling, 12)
    want = tokens[0].tolist()
    want = want[: want.index(CONFIG.eos)] if CONFIG.eos in want else want
    for per_call in (1, 5, 12):
        got = list(
            stream_speech_tokens(
                model, params, features, lengths, key=key, max_tokens=12, sampling=sampling, steps_per_call=per_call
            )
        )
        assert got == want
        assert all(token < CONFIG.num_codes for token in got)


def test_special_ids_are_never_drawn_unless_allowed() -> None:
    logits = jnp.zeros((1, CONFIG.vocab_size)).at[0, CONFIG.bos].set(9.0).at[0, CONFIG.pad].set(8.0).at[0, 4].set(1.0)
    kept = next_token_probabilities(logits, SpeechSampling(top_k=1), CONFIG)
    assert int(kept.argmax()) == 4
    allowed = next_token_probabilities(logits, SpeechSampling(top_k=1, forbid_special=False), CONFIG)
    assert int(allowed.argmax()) == CONFIG.bos


def test_repetition_penalty_counts_every_occurrence() -> None:
    logits = jnp.asarray([[2.0, -2.0, 4.0]])
    recent = jnp.asarray([[0, 0, 1, -1]])
    np.testing.assert_allclose(repetition_penalty(logits, recent, 2.0), [[0.5, -1.0, 4.0]])


def test_original_top_p_drops_the_token_that_crosses() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    np.testing.assert_allclose(filtered_probabilities(logits, top_p=0.7), [[1.0, 0.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(filtered_probabilities(logits, top_p=0.85), [[0.625, 0.375, 0.0]], atol=1e-6)
    np.testing.assert_allclose(filtered_probabilities(logits, top_p=0.3), [[1.0, 0.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(filtered_probabilities(logits, 1.0, 2), [[0.625, 0.375, 0.0]], atol=1e-6)


def test_initial_head_is_optional_and_learns_the_tokens_under_a_row(params) -> None:
    assert "initial_head" not in params["nar"]
    config = replace(CONFIG, initial_head=True)
    batch, model = make_batch(), SpeechDecoder(config)
    own = nn.unbox(model.init(jax.random.key(0), batch)["params"])
    logits = model.apply({"params": own}, batch.features, batch.feature_lengths, method=SpeechDecoder.initial_logits)
    assert logits.shape == (2, ROWS, CONFIG.num_codes)
    codes, lengths = jnp.asarray([[5, 6, 7, 8]]), jnp.asarray([2])
    right = jnp.zeros((1, 3, 11)).at[0, 0, jnp.asarray([5, 6])].set(30.0).at[0, 1, jnp.asarray([7, 8])].set(30.0)
    total, count = initial_distribution_loss(right, lengths, codes, jnp.asarray([4]))
    np.testing.assert_allclose(total / count, math.log(2), rtol=1e-4)  # two tokens share each row


def test_text_vectors_become_consecutive_rows() -> None:
    rows = text_rows(jnp.arange(16.0).reshape(1, 2, 8), 4)
    assert rows.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]]
    with pytest.raises(ValueError, match="rows of 3"):
        text_rows(jnp.zeros((1, 2, 8)), 3)


@pytest.mark.parametrize(
    "config", [vita_1_5_speech(), vita_1_5_speech(nar_layers=4, prefix=True), vita_1_5_speech(nar_layers=0)]
)
def test_full_size_table_covers_every_parameter(config: SpeechDecoderConfig) -> None:
    one = jnp.zeros((1,), jnp.int32)
    batch = SpeechBatch(jnp.zeros((1, 2, config.hidden_size)), one + 2, jnp.zeros((1, 2), jnp.int32), one + 2)
    shapes = flatten(nn.unbox(jax.eval_shape(SpeechDecoder(config).init, jax.random.key(0), batch)["params"]))
    table = weight_table(config)
    ruled = {r.path: (r.param_shape if r.layers is None else (r.layers, *r.param_shape)) for r in table.rules}
    assert {path: x.shape for path, x in shapes.items()} == ruled
    torch = {name: rule.torch_shape for rule in table.rules for name in rule.names}
    assert config_from_shapes(torch, num_heads=14) == config
    if config.num_nar_layers == 4 and config.prefix:
        without_prefix = sum(math.prod(s) for path, s in ruled.items() if not path.startswith("prefix/"))
        assert without_prefix == pytest.approx(115.6e6, rel=2e-3)  # the papers say about 120 M


def test_weights_round_trip_bit_exactly(params) -> None:
    table = weight_table(CONFIG)
    tensors = export_params(table, params)
    assert "layers_prefix.1.mlp.up_proj.weight" in tensors
    again = flatten(import_params(table, tensors))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value)


def test_published_config_is_read() -> None:
    args = {
        "transformer_attention_dim": 896,
        "transformer_linear_units": 4096,
        "transformer_attention_heads": 14,
        "transformer_num_blocks": 4,
        "odim": 1024,
        "idim": 896,
        "encoder_output_dim": 896,
    }
    assert config_from_published([896, 1024, args]) == vita_1_5_speech()
    with pytest.raises(UserError, match="idim is 512"):
        config_from_published([512, 1024, args | {"idim": 512}])
    with pytest.raises(UserError, match="list of three"):
        config_from_published([args])
    sizes = {"num_codes": 4, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_layers": 1}
    for wrong in ({}, {"nar_layers": -1}):
        with pytest.raises(UserError, match="nar_layers"):
            SpeechDecoderConfig(**sizes, **wrong)
    with pytest.raises(UserError, match="initial_head"):
        SpeechDecoderConfig(**sizes, nar_layers=0, initial_head=True)


def test_without_nar_layers_the_text_itself_is_the_prompt() -> None:
    config = replace(CONFIG, nar_layers=0)
    batch, model = make_batch(), SpeechDecoder(config)
    own = nn.unbox(model.init(jax.random.key(0), batch)["params"])
    assert "nar" not in own
    prompt = model.apply({"params": own}, batch.features, batch.feature_lengths, method=SpeechDecoder.prompt)
    np.testing.assert_array_equal(prompt[:, 1:], batch.features)
    np.testing.assert_array_equal(prompt[0, 0], own["ar"]["embed_tokens"]["embedding"][config.bos])


def test_state_labels_lie_beyond_the_ignored_value() -> None:
    config = state_head.StateHeadConfig(hidden_size=4)
    labels = jnp.asarray([[-100, -101, 5, -102, -103]])
    assert state_head.language_labels(labels).tolist() == [[-100, -100, 5, -100, -100]]
    sure = 40.0 * jax.nn.one_hot(jnp.asarray([[2, 0, 2, 1, 2]]), 3)
    total, weight = state_head.state_loss(sure, labels, config)
    assert weight == 3
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    two = jnp.asarray([[-100, -101, 5, -102, -100]])
    weighted = state_head.state_loss(jnp.zeros((1, 5, 3)), two, state_head.two_class_head(4))
    np.testing.assert_allclose(weighted[0] / weighted[1], math.log(3), rtol=1e-6)
    assert weighted[1] == 6  # 1 for effective audio, 5 for noise


def test_dialogue_states_leave_the_last_class_out() -> None:
    logits = jnp.asarray([[0, 9, 0, 50.0], [0, 0, 9, 50.0], [1, 1, 1, 0.0]])
    probabilities, states = state_head.dialogue_states(logits)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=1e-6)
    assert [state_head.DIALOGUE_STATES[i] for i in states] == ["ss", "el", "cl"]
    with pytest.raises(UserError, match="at least 4 classes"):
        state_head.dialogue_states(logits[:, :3])
    with pytest.raises(UserError, match="class_weights"):
        state_head.StateHeadConfig(4, 3, (1.0, 2.0))
