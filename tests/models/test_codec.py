"""Properties of the codec: forms of convolutions, weight norm, quantiser, streaming, tables, and its training parts."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.conversion.tables import export_params, flatten, import_params
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.inference.codec_stream import (
    CodecStreamer,
    StreamOptions,
    cut_leading_silence,
    split_at_quiet,
    stream_chunks,
    to_pcm16,
)
from vita_jax.models.codec.codec import Codec, consistency_loss
from vita_jax.models.codec.codec_weights import weight_table
from vita_jax.models.codec.config import (
    CodecConfig,
    codec_small,
    config_from_published,
    ticodec_24k_320,
    vita_1_5_codec,
)
from vita_jax.models.codec.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    SpectralConv,
    discriminators_small,
    halve_rate,
)
from vita_jax.models.codec.generator import context_frames
from vita_jax.models.codec.global_encoder import BatchNorm, apply_updates
from vita_jax.models.codec.losses import codec_losses, discriminator_loss
from vita_jax.models.codec.quantizer import Quantizer
from vita_jax.nn.convolution import fold_weight_norm, split_weight_norm
from vita_jax.ops import convolution
from vita_jax.ops.spectrogram import log_mel, slaney_mel_bands, spectrum

CONFIG = CodecConfig(
    upsample_rates=(4, 3),
    upsample_kernel_sizes=(8, 7),
    upsample_initial_channel=16,
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3), (1, 2)),
    latent_dim=16,
    base_channels=4,
    global_feature_conv=(8, 6, 8, 3, 1),
    group_norm_channels=4,
    num_codes=23,
    num_global_codes=2,
)


@pytest.fixture(scope="module", autouse=True)
def _precise():
    with jax.default_matmul_precision("highest"):
        yield


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def params():
    wave = jnp.zeros((2, 10 * CONFIG.hop))
    fresh = nn.unbox(jax.jit(Codec(CONFIG).init)(jax.random.key(0), wave, wave)["params"])
    # Larger codebooks than at the start of training, so that codes matter.
    fresh["quantizer"] = jax.tree.map(lambda x: 20 * x, fresh["quantizer"])
    return fresh


def same_with_gradients(ours, direct, *arguments: jax.Array) -> None:
    weights = random(9, *ours(*arguments).shape)
    numbers = tuple(range(len(arguments)))
    for function in (lambda f: f, lambda f: jax.grad(lambda *a: jnp.sum(f(*a) * weights), numbers)):
        for got, want in zip(
            jax.tree.leaves(jax.jit(function(ours))(*arguments)),
            jax.tree.leaves(jax.jit(function(direct))(*arguments)),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("taps", "stride", "padding", "groups", "length"),
    [(5, 2, 2, 1, 17), (16, 8, 4, 1, 40), (4, 2, 1, 2, 12), (7, 3, 2, 4, 31), (3, 5, 0, 1, 11), (41, 4, 20, 2, 64)],
)
def test_strided_convolution_equals_the_direct_one(taps, stride, padding, groups, length) -> None:
    x, kernel = random(0, 2, length, 8), random(1, taps, 8 // groups, 4)

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride,),
            [(padding, padding)],
            dimension_numbers=convolution.DIMENSIONS,
            feature_group_count=groups,
        )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution.conv1d(x, kernel, stride=stride, padding=padding, groups=groups)

    assert ours(x, kernel).shape[1] == convolution.output_length(length, taps, stride, padding)
    same_with_gradients(ours, direct, x, kernel)


def test_what_accelerators_compute_equals_what_cpus_do() -> None:
    """A grouped convolution as one, and one of a single channel as a product."""
    x, kernel = random(0, 2, 31, 8), random(1, 7, 2, 12)
    grouped = functools.partial(convolution._direct, stride=3, padding=2, dilation=1, groups=4)
    ours = functools.partial(convolution.conv1d, stride=3, padding=2, groups=4)
    same_with_gradients(grouped, ours, x, kernel)
    for platform, convolutions in (("cpu", 4), ("tpu", 1)):
        lowered = jax.jit(ours).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert lowered.count("stablehlo.convolution") == convolutions, platform
    x, kernel = random(0, 2, 31, 1), random(1, 7, 1, 12)
    product = functools.partial(convolution._single_channel, padding=3)
    same_with_gradients(product, functools.partial(convolution.conv1d, padding=3), x, kernel)


@pytest.mark.parametrize(("taps", "stride", "padding"), [(16, 8, 4), (11, 5, 3), (7, 3, 2), (8, 3, 2), (3, 4, 0)])
def test_sub_pixel_form_equals_the_transposed_convolution(taps, stride, padding) -> None:
    x, kernel = random(0, 2, 9, 6), random(1, taps, 6, 5)

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        edge = taps - 1 - padding
        return jax.lax.conv_general_dilated(
            x,
            kernel[::-1],
            (1,),
            [(edge, edge)],
            lhs_dilation=(stride,),
            dimension_numbers=convolution.DIMENSIONS,
        )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution.conv_transpose1d(x, kernel, stride=stride, padding=padding)

    assert ours(x, kernel).shape[1] == convolution.transposed_length(9, taps, stride, padding)
    same_with_gradients(ours, direct, x, kernel)


def test_strided_convolution_over_frequency_equals_the_direct_one() -> None:
    x, kernel = random(0, 2, 7, 33, 3), random(1, 3, 9, 3, 4)

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 2),
            [(2, 2), (4, 4)],
            rhs_dilation=(2, 1),
            dimension_numbers=convolution.DIMENSIONS_2D,
        )

    same_with_gradients(
        lambda x, kernel: convolution.conv2d(x, kernel, stride=2, padding=(2, 4), dilation=2), direct, x, kernel
    )


def test_convolution_errors_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match="needs at least 5 samples, got 4"):
        convolution.conv1d(jnp.zeros((1, 4, 1)), jnp.zeros((5, 1, 1)))
    with pytest.raises(UserError, match="stride 2 and dilation 3"):
        convolution.conv1d(jnp.zeros((1, 40, 1)), jnp.zeros((5, 1, 1)), stride=2, dilation=3)


@pytest.mark.slow
def test_weight_norm_folds_and_splits(params) -> None:
    plain = Codec(replace(CONFIG, weight_norm=False))
    folded = fold_weight_norm(params)
    wave = random(1, 2, 10 * CONFIG.hop)
    shapes = nn.unbox(jax.eval_shape(plain.init, jax.random.key(0), wave, wave)["params"])
    assert {p: x.shape for p, x in flatten(folded).items()} == {p: x.shape for p, x in flatten(shapes).items()}
    a = Codec(CONFIG).apply({"params": params}, wave, wave, train=False)
    b = plain.apply({"params": folded}, wave, wave, train=False)
    np.testing.assert_allclose(a.wave, b.wave, atol=1e-6)
    again = fold_weight_norm(split_weight_norm(folded, params))
    for path, value in flatten(folded).items():
        np.testing.assert_allclose(flatten(again)[path], value, atol=1e-7)
    # Right after initialisation the direction is the kernel itself, so splitting gives it back.
    np.testing.assert_allclose(
        split_weight_norm(folded, params)["generator"]["ups_0"]["kernel_v"],
        params["generator"]["ups_0"]["kernel_v"],
        atol=1e-6,
    )


@pytest.mark.parametrize(("groups", "layers"), [(1, 1), (2, 2), (1, 4)])
def test_quantiser_keeps_what_it_has_quantised(groups: int, layers: int) -> None:
    config = replace(CONFIG, num_code_groups=groups, num_residual_layers=layers)
    model = Quantizer(config)
    latent, vector = random(0, 2, 7, 16), random(1, 2, 8)
    variables = nn.unbox(model.init(jax.random.key(0), latent, vector))
    variables = jax.tree.map(lambda x: 20 * x, variables)
    out = model.apply(variables, latent, vector)
    assert out.codes.shape == (2, 7, groups * layers)
    embedded = model.apply(variables, out.codes, method=Quantizer.embed)
    np.testing.assert_allclose(out.latent, embedded, atol=1e-5)
    if layers == 1:  # an entry of a codebook is its own nearest one
        again = model.apply(
            variables, embedded, model.apply(variables, out.global_codes, method=Quantizer.embed_global)
        )
        np.testing.assert_array_equal(again.codes, out.codes)
        np.testing.assert_array_equal(again.global_codes, out.global_codes)
    passed = jax.grad(lambda x: jnp.sum(model.apply(variables, x, vector).latent * latent))(latent)
    if layers == 1:
        np.testing.assert_allclose(passed, latent, rtol=1e-6)  # straight through
    with pytest.raises(UnsupportedOption, match="num_residual_layers 3"):
        replace(config, num_residual_layers=3)


def test_context_is_exactly_what_the_generator_sees(params) -> None:
    reach, frames = context_frames(CONFIG), 40
    codes = np.zeros((1, frames, 1), np.int32)
    voice = np.zeros((1, 2), np.int32)
    decode = jax.jit(lambda codes: Codec(CONFIG).apply({"params": params}, codes, voice, method=Codec.decode))
    # A frame in the middle changes its own samples and those of `reach` frames on either side, no others.
    changed = codes.copy()
    changed[0, 20] = 3
    moved = np.abs(np.asarray(decode(codes)[0] - decode(changed)[0])).reshape(frames, -1).max(axis=1)
    touched = np.flatnonzero(moved > 0)
    assert touched.min() >= 20 - reach and touched.max() <= 20 + reach
    assert max(20 - touched.min(), touched.max() - 20) == reach
    assert [context_frames(c) for c in (ticodec_24k_320(), vita_1_5_codec())] == [14, 13]
    with pytest.raises(UserError, match="must be even"):
        context_frames(replace(CONFIG, upsample_kernel_sizes=(7, 7)))


def test_padding_changes_nothing(params) -> None:
    rng = np.random.default_rng(0)
    codes, voice = rng.integers(0, 23, (2, 9, 1)).astype(np.int32), np.asarray([[1, 2], [3, 4]], np.int32)
    decode = jax.jit(lambda *a: Codec(CONFIG).apply({"params": params}, *a, method=Codec.decode))
    padded = np.asarray(decode(codes, voice, jnp.asarray([9, 4])))
    np.testing.assert_allclose(padded[1, : 4 * CONFIG.hop], decode(codes[1:, :4], voice[1:])[0], atol=1e-6)
    np.testing.assert_array_equal(padded[1, 4 * CONFIG.hop :], 0)
    with pytest.raises(UserError, match="3 codes of the utterance, but this codec has 2"):
        decode(codes, np.zeros((2, 3), np.int32))


@pytest.mark.parametrize(("count", "chunk"), [(0, 4), (1, 4), (7, 4), (30, 4), (33, 8), (40, 40)])
def test_streamed_equals_offline(params, count: int, chunk: int) -> None:
    streamer = CodecStreamer(Codec(CONFIG), params, np.asarray([3, 4]))
    tokens = np.random.default_rng(count).integers(0, 23, count)
    options = StreamOptions(chunk=chunk, quiet_window=25, quiet_level=0.02)
    segments = list(streamer.segments(tokens.tolist(), options))
    if count == 0:
        assert segments == []
        return
    np.testing.assert_allclose(np.concatenate(segments), streamer.decode(tokens), atol=1e-6)


@pytest.mark.parametrize("count", [0, 3, 9, 50])
def test_a_reply_begins_with_short_chunks(params, count: int) -> None:
    streamer = CodecStreamer(Codec(CONFIG), params, np.asarray([3, 4]))
    tokens = np.random.default_rng(count).integers(0, 23, count)
    options = StreamOptions(chunk=8, quiet_level=None, first_chunk=2)
    segments = list(streamer.segments(tokens.tolist(), options, opening=True))
    assert options.first_chunks == (2, 4)
    if count == 50:
        assert [len(segment) // CONFIG.hop for segment in segments[:4]] == [2, 4, 8, 8]
    np.testing.assert_allclose(np.concatenate([np.zeros(0), *segments]), streamer.decode(tokens), atol=1e-6)


def test_a_small_context_is_an_option_and_no_context_works(params) -> None:
    streamer = CodecStreamer(Codec(CONFIG), params, np.asarray([3, 4]))
    tokens = np.random.default_rng(0).integers(0, 23, 24)
    whole = streamer.decode(tokens)
    for context in (0, 1):
        options = StreamOptions(chunk=4, context=context, quiet_window=25)
        streamed = np.concatenate(list(streamer.segments(tokens.tolist(), options)))
        assert streamed.shape == whole.shape
        assert np.abs(streamed - whole).max() > 1e-5
    with pytest.raises(UserError, match="longer than a chunk"):
        next(streamer.segments([1], StreamOptions(chunk=1, quiet_window=25)))
    with pytest.raises(UserError, match="3 codes for the voice"):
        CodecStreamer(Codec(CONFIG), params, np.asarray([3, 4, 5]))
    with pytest.raises(UserError, match="chunk 0"):
        StreamOptions(chunk=0)


def test_windows_overlap_as_in_the_original() -> None:
    windows = []

    def decode(window: np.ndarray) -> np.ndarray:
        windows.append(window.tolist())
        return np.repeat(window, 2).astype(np.float32)

    chunks = list(stream_chunks(range(12), decode, hop=2, chunk=4, context=2))
    assert windows == [list(range(6)), list(range(2, 10)), list(range(6, 12))]
    assert [last for _, last in chunks] == [False, False, True]
    np.testing.assert_array_equal(np.concatenate([wave for wave, _ in chunks]), np.repeat(np.arange(12), 2))


def test_cut_is_at_the_quiet_place_or_nowhere() -> None:
    wave = np.ones(100, np.float32)
    wave[70:80] = 0.01
    wave[75] = 0.0
    held, segment = split_at_quiet(np.full(3, 0.5, np.float32), wave, 10, 0.05)
    assert segment is not None and len(segment) == 3 + 75 and len(held) == 25
    held, segment = split_at_quiet(np.zeros(3, np.float32), wave, 10, 0.001)
    assert segment is None and len(held) == 103
    with pytest.raises(UserError, match="shorter than quiet_window"):
        split_at_quiet(held, wave, 101, 0.1)


def test_ends_of_what_is_played() -> None:
    wave = np.asarray([0.0, 0.01, 0.5, 0.0], np.float32)
    assert cut_leading_silence(wave).tolist() == [0.5, 0.0]
    assert len(cut_leading_silence(wave[:2])) == 2
    assert to_pcm16(np.asarray([0.5, 1.5, -2.0])).tolist() == [16384, 32767, -32768]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        # Running statistics are parameters here: 2 * 128 more than the 47,323,680 that the original counts.
        (ticodec_24k_320(), {"encoder": 47_323_680 + 256, "generator": 15_353_346, "quantizer": 655_360}),
        (vita_1_5_codec(), {}),
        (replace(codec_small(), resblock="2", weight_norm=False), {}),
    ],
    ids=["ticodec", "vita_1_5", "small"],
)
def test_table_covers_every_parameter(config: CodecConfig, sizes: dict[str, int]) -> None:
    wave = jnp.zeros((2, 4 * config.hop))
    shapes = nn.unbox(jax.eval_shape(Codec(config).init, jax.random.key(0), wave, wave)["params"])
    ruled = {rule.path: rule.param_shape for rule in weight_table(config).rules}
    assert {path: x.shape for path, x in flatten(shapes).items()} == ruled
    for part, size in sizes.items():
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes[part])) == size


def test_weights_round_trip_bit_exactly(params) -> None:
    table = weight_table(CONFIG)
    tensors = export_params(table, params)
    assert tensors["generator.ups.0.weight_g"].shape == (16, 1, 1)  # per input channel
    assert tensors["encoder.ups.0.weight_g"].shape == (8, 1, 1)  # per output channel
    counter = {"encoder.GlobalTokenEncoder.fn.2.num_batches_tracked": np.zeros((), np.int64)}
    again = flatten(import_params(table, tensors | counter))
    for path, value in flatten(params).items():
        np.testing.assert_array_equal(again[path], value)


def test_config_errors_name_the_fields() -> None:
    with pytest.raises(UserError, match="latent_dim is 32"):
        replace(CONFIG, latent_dim=32).check_encoder()
    with pytest.raises(UserError, match="starts with 6 channels"):
        replace(CONFIG, global_feature_conv=(6, 6, 8, 3, 1)).check_encoder()
    with pytest.raises(UserError, match="upsample_kernel_sizes has 1 entries"):
        replace(CONFIG, upsample_kernel_sizes=(8,))
    with pytest.raises(UserError, match="resblock '3'"):
        replace(CONFIG, resblock="3")
    published = {
        "upsample_rates": [8, 5, 4, 2],
        "upsample_kernel_sizes": [16, 11, 8, 4],
        "upsample_initial_channel": 512,
        "resblock": "1",
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    }
    assert config_from_published(published) == ticodec_24k_320()


def test_batch_norm_keeps_running_statistics_without_gradient() -> None:
    x, norm = 3 + 2 * random(0, 6, 4), BatchNorm()
    params = nn.unbox(norm.init(jax.random.key(0), x)["params"])
    out, kept = norm.apply({"params": params}, x, train=True, mutable=["updates"])
    np.testing.assert_allclose(jnp.mean(out, 0), 0, atol=1e-5)
    new = apply_updates(params, kept["updates"])
    np.testing.assert_allclose(new["running_mean"], 0.1 * jnp.mean(x, 0), rtol=1e-5)
    np.testing.assert_allclose(new["running_var"], 0.9 + 0.1 * jnp.var(x, 0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(new["scale"], params["scale"])
    grads = jax.grad(lambda p: jnp.sum(norm.apply({"params": p}, x) ** 2))(params)
    assert not np.any(grads["running_mean"]) and np.any(grads["scale"])
    with pytest.raises(UserError, match="at least 2 rows"):
        norm.apply({"params": params}, x[:1], train=True, mutable=["updates"])


def test_discriminators_have_the_published_sizes() -> None:
    shapes = jax.eval_shape(Discriminators(DiscriminatorConfig()).init, jax.random.key(0), jnp.zeros((1, 8192)))
    shapes = nn.unbox(shapes["params"])

    def millions(kind: str) -> float:
        return sum(
            math.prod(x.shape) for name in shapes if name.startswith(kind) for x in jax.tree.leaves(shapes[name])
        )

    assert millions("period") / 1e6 == pytest.approx(41.1, abs=0.05)
    assert millions("scale") / 1e6 == pytest.approx(29.6, abs=0.05)


def test_spectral_norm_converges_to_the_largest_singular_value() -> None:
    x, layer = random(0, 1, 9, 6), SpectralConv(5, 3)
    params = nn.unbox(layer.init(jax.random.key(0), x)["params"])
    step = jax.jit(lambda p: apply_updates(p, layer.apply({"params": p}, x, mutable=["updates"])[1]["updates"]))
    for _ in range(300):
        params = step(params)
    largest = np.linalg.svd(np.asarray(params["kernel"]).reshape(-1, 5), compute_uv=False)[0]
    want = convolution.conv1d(x, params["kernel"] / largest, params["bias"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, atol=1e-4)


@pytest.mark.slow
def test_one_training_step_has_finite_gradients_everywhere() -> None:
    config = codec_small(base_channels=2, upsample_rates=(5, 4), num_codes=16)
    model = Codec(config)
    judge = Discriminators(replace(discriminators_small(), periods=(3,), period_channels=(4, 8), stft_sizes=(128,)))
    wave, other = 0.1 * random(0, 2, 1200), 0.1 * random(1, 2, 1200)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), wave, other)["params"])
    judge_params = nn.unbox(jax.jit(judge.init)(jax.random.key(1), wave)["params"])

    # The waves are arguments: as constants they would make XLA fold whole discriminators at compile time.
    def codec_loss(params, wave, other):
        made, kept = model.apply({"params": params}, wave, other, mutable=["updates"])
        real, fake = (judge.apply({"params": judge_params}, x) for x in (wave, made.wave))
        return codec_losses(wave, made, real, fake, config.sampling_rate)["loss"], (made, kept)

    (loss, (made, kept)), grads = jax.jit(jax.value_and_grad(codec_loss, has_aux=True))(params, wave, other)
    assert made.wave.shape == wave.shape and np.isfinite(loss)
    assert list(kept["updates"]) == ["encoder"]
    without = {"encoder/linear/kernel", "encoder/linear/bias"}  # published, but without effect
    for path, grad in flatten(grads).items():
        assert np.all(np.isfinite(grad)), path
        assert np.any(grad) != (path in without or "running" in path), path

    def judge_loss(params, wave, decoded):
        real, fake = (judge.apply({"params": params}, x) for x in (wave, decoded))
        return discriminator_loss(real, fake)

    for path, grad in flatten(jax.jit(jax.grad(judge_loss))(judge_params, wave, made.wave)).items():
        assert np.all(np.isfinite(grad)) and np.any(grad) != path.endswith("/u"), path


def test_spectra_agree_with_numpy() -> None:
    wave = np.asarray(random(0, 1, 1000))
    got = spectrum(jnp.asarray(wave), 256, 60)
    window = np.hanning(257)[:-1]
    want = np.stack([np.fft.rfft(wave[0, i : i + 256] * window) for i in range(0, 1000 - 255, 60)])
    np.testing.assert_allclose(got[0], want, atol=1e-3)
    assert log_mel(jnp.asarray(wave[:, :960]), 256, 60, 20, 24000).shape == (1, 16, 20)
    bands = slaney_mel_bands(2048, 40, 24000)
    areas = bands.sum(axis=0) * 24000 / 2048
    np.testing.assert_allclose(areas[5:], 1.0, atol=0.15)  # equal areas
    pooled = halve_rate(jnp.asarray(wave[:, :7]))[0]
    padded = np.pad(wave[0, :7], 2)
    np.testing.assert_allclose(pooled, [padded[i : i + 4].mean() for i in range(0, 8, 2)], rtol=1e-5)


def test_consistency_is_one_minus_the_cosine() -> None:
    a = jnp.asarray([[1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(consistency_loss(a, 3 * a), 0.0, atol=1e-6)
    np.testing.assert_allclose(consistency_loss(a, a[::-1]), 1.0, atol=1e-6)
    assert np.all(np.isfinite(jax.grad(consistency_loss)(jnp.zeros((2, 3)), a[:, :1] * jnp.ones((2, 3)))))
