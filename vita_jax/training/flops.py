"""Model FLOPs of a stage: what one optimiser step has to compute, by formula, for model FLOPs utilisation (MFU).

Counted, with 2 FLOPs for a multiplication and its addition:
* every product with a kernel (linear layers, convolutions, experts): `2 * size * positions` forward; the same again for
  the kernel's gradient where it trains, and again for the gradient at its input where anything before it trains. A
  model that trains as a whole so comes to the usual 6 per parameter and token, a frozen part with nothing to train
  before it to 2. A stack of layers is one: if any of it trains, gradients pass through all of it;
* attention: scores and sums of values, `4 * heads * head_dim * length**2` forward and twice that backward where
  gradients pass; half of it where attention is causal, so `12 * layers * heads * head_dim * length * tokens / 2` for a
  language model that trains. Rows count with their full `row_length`, which is an upper bound where they are packed
  with several conversations; encoders that draw chunks count with the full context;
* of a mixture of experts, the `experts_per_token` that a token goes to;
* adapters (LoRA) as the kernels they are, beside the frozen one that they adapt;
* the output head at every position of a row, and every tile and clip that the stage's shapes have room for, padding
  included: all of it is computed. (Chunks of a row without any label are passed over, which is not counted.)

Not counted: what rematerialisation computes again (those are no model FLOPs), norms, activations, softmax, embedding
look-ups, Fourier transforms, losses, the optimiser, and the codec's tokens where a stage makes them from waves.

Axes: b rows, s positions, n heads, h head width, d width, l layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from vita_jax.data.mixture import DataSet
from vita_jax.models.audio.tower import AudioTowerConfig
from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.discriminators import SCALE_CONVS, STFT_DILATIONS, DiscriminatorConfig
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.lora import LoraConfig
from vita_jax.models.vita import VitaConfig
from vita_jax.nn.layers import LORA_UP
from vita_jax.ops.filter_bank import encoder_length
from vita_jax.parallel.rules import unbox
from vita_jax.training.adapters import with_adapters
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.families import ModelConfig, family_of, make_model
from vita_jax.training.objectives import OBJECTIVES, init_params, objective_of
from vita_jax.training.stages import Stage, flatten, trainable_paths

KERNEL = re.compile(r"((^|/|_)kernel(_v)?|/lora_[ab])$")


@dataclasses.dataclass(frozen=True)
class StageFlops:
    """FLOPs of one optimiser step, over all devices and micro-batches, by part of the model."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.parts.values())


class Use(NamedTuple):
    """How often the kernels below a path are applied in a step.

    Attributes:
      path: start of parameter paths; the longest that fits a kernel counts.
      part: what it is reported as.
      positions: applications that gradients pass through.
      upstream: starts of paths; if anything below them trains, gradients are needed at the kernels' inputs.
      others: further passes that cost as much as one application each, whatever trains: without gradients, or, two for
        each, where only the gradient at the input is wanted.
    """

    path: str
    part: str
    positions: float
    upstream: tuple[str, ...] = ()
    others: float = 0.0


class Product(NamedTuple):
    """A product without a kernel of its own.

    Attributes:
      part: what it is reported as.
      forward: FLOPs of the forward pass.
      upstream: as in `Use`.
      operands: how many of the two factors get a gradient.
    """

    part: str
    forward: float
    upstream: tuple[str, ...] = ()
    operands: int = 2


Work = Iterator[Use | Product]


def stage_flops(config: ExperimentConfig, stage: Stage) -> StageFlops:
    """Model FLOPs of one optimiser step of a stage; what counts is said at the top of this file.

    Raises:
      UserError: a pattern of the stage's `trainable` matches nothing.
    """
    objective = objective_of(stage)
    sizes = _parameter_sizes(config.model, stage.objective, stage.lora)
    trains = set(trainable_paths(stage, list(sizes)))
    trains.update(path for path in sizes if path.split("/")[0] in objective.extra_names)

    def reached(upstream: tuple[str, ...]) -> bool:
        return any(path.startswith(upstream) for path in trains) if upstream else False

    work = list(WORK[stage.objective](config.model, stage))
    uses = [entry for entry in work if isinstance(entry, Use)]
    parts = dict.fromkeys((entry.part for entry in work), 0.0)
    for entry in work:
        if isinstance(entry, Product):
            parts[entry.part] += entry.forward * (1 + entry.operands * reached(entry.upstream))
    for path, size in sizes.items():
        fitting = [use for use in uses if path.startswith(use.path)] if KERNEL.search(path) else []
        if fitting:
            use = max(fitting, key=lambda use: len(use.path))
            # In front of `lora_b` is `lora_a`, which trains.
            passed_on = path.endswith(f"/{LORA_UP}") or reached(use.upstream)
            passes = use.positions * (1 + (path in trains) + passed_on) + use.others
            parts[use.part] += 2.0 * size * passes
    return StageFlops(parts)


@functools.lru_cache
def _parameter_sizes(config: ModelConfig, objective: str, lora: LoraConfig | None) -> Mapping[str, int]:
    """Elements of every parameter by path, from shapes alone."""
    model, chosen = make_model(config), OBJECTIVES[objective]
    shapes = jax.eval_shape(lambda key: init_params(model, chosen, key), jax.random.key(0))
    shapes = with_adapters(shapes, config, lora)
    return {path: math.prod(leaf.shape) for path, leaf in flatten(unbox(shapes)).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Seeing
# ---------------------------------------------------------------------------------------------------------------------


def _vision(config: ModelConfig, tiles: int) -> Work:
    vision = config.vision
    patches = (vision.image_size // vision.patch_size) ** 2
    yield Use("vision/embeddings/", "vision", tiles * patches)
    # Where InternViT and CLIP keep their layers. All of them run, also the one behind LLaVA's features.
    for layers in ("vision/layers/", "vision/encoder/layers/"):
        yield Use(layers, "vision", tiles * (patches + 1), ("vision/",))
    attention = 4 * vision.num_layers * vision.hidden_size * (patches + 1) ** 2
    yield Product("vision attention", float(tiles * attention), ("vision/",))


def _projector(config: ModelConfig, tiles: int) -> Work:
    upstream: tuple[str, ...] = ("vision/", "resampler/")
    tokens = family_of(config).layout(config).tokens_per_tile
    for name, positions in _projector_positions(config.projector, tokens).items():
        yield Use(f"projector/{name}/", "projector", tiles * positions, upstream)
        upstream += (f"projector/{name}/",)


def _projector_positions(config: ProjectorConfig, tokens: int) -> dict[str, float]:
    """How often each layer is applied to the `tokens` of a tile, the first one first."""
    side = math.isqrt(tokens)
    match config.kind:
        case "linear" if config.hidden_size is not None:
            return {"linear_in": tokens, "linear_out": tokens}
        case "linear":
            return {"linear": tokens}
        case "vanilla" | "minigpt":
            return {"linear": tokens / 4}
        case "mlp":
            return {f"layers_{2 * i}": tokens for i in range(config.mlp_depth)}
        case "spp":
            pooled = (side // 2) ** 2
            return {
                "v1": {"linear_1": tokens, "linear_2": pooled},
                "v2": {"linear_1": tokens, "linear_2": tokens},
                "v3": {"linear_0": tokens, "linear_1": pooled, "linear_2": pooled},
                None: {},
            }[config.spp_version]
        case "ldp":
            small = ((side + 1) // 2) ** 2
            once = {f"block_{i}/{name}": 1 for i in (1, 2) for name in ("squeeze", "excite")}
            return {"mlp_1": tokens, "mlp_3": tokens, "block_1": tokens, "block_2": small, **once}
        case _:
            return {}


def _resampler(config: ResamplerConfig, pictures: int, frames: int, frame_tokens: int) -> Work:
    """frame_tokens: what the tower gives of a frame."""
    upstream, tokens, m = ("vision/", "resampler/"), frames * frame_tokens, config.num_latents
    inside = {"perceiver": m, "transformer": m + tokens, "mlp": tokens}[config.kind]
    yield Use("resampler/layers/", "resampler", pictures * inside, upstream)
    if config.kind == "mlp":
        yield Use("resampler/mix/", "resampler", pictures * frames * config.hidden_size, upstream)
        return
    yield Use("resampler/layers/attention/kv_proj/", "resampler", pictures * (tokens + m), upstream)
    width = config.num_heads * config.head_dim
    yield Product("resampler attention", 4.0 * config.num_layers * width * pictures * inside * (tokens + m), upstream)


# ---------------------------------------------------------------------------------------------------------------------
# Hearing
# ---------------------------------------------------------------------------------------------------------------------

ENCODER = "audio/encoder/"


def _audio_encoder(config: AudioTowerConfig, clips: int, frames: int) -> Work:
    encoder = config.encoder
    d, n, h = encoder.hidden_size, encoder.num_heads, encoder.head_dim
    s = encoder_length(frames)
    first = ((frames - 1) // 2) * ((encoder.input_dim - 1) // 2)  # outputs of the first convolution
    yield Use(f"{ENCODER}subsampling/conv1/", "audio encoder", clips * first)
    yield Use(f"{ENCODER}subsampling/conv2/", "audio encoder", clips * s * encoder.subsampled_dim, (ENCODER,))
    yield Use(f"{ENCODER}subsampling/out/", "audio encoder", clips * s, (ENCODER,))
    yield Use(f"{ENCODER}transformer/", "audio encoder", clips * s, (ENCODER,))
    # "relative" projects every query onto the sinusoids, "rel-enc" every key's position, once for all clips.
    placed, upstream = (clips * s, (ENCODER,)) if encoder.positions == "relative" else (s, ())
    yield Use(f"{ENCODER}transformer/layers/attention/pos_proj/", "audio encoder", placed, upstream)
    score_width = h + {"abs-enc": 0, "rel-enc": h, "relative": d}[encoder.positions]
    attention = 2 * encoder.num_layers * n * (score_width + h) * s**2
    yield Product("audio attention", float(clips * attention), (ENCODER,))


def _audio_adapter(config: AudioTowerConfig, clips: int, frames: int) -> Work:
    s = encoder_length(frames)
    tokens = config.adapter.num_tokens(s)
    upstream: tuple[str, ...] = (ENCODER,)
    convolutions = ("conv1d1", "conv1d2")[2 - len(config.adapter.conv_widths) :]
    for name in (*convolutions, "project"):
        positions = s if name == "conv1d1" else tokens
        yield Use(f"audio/adapter/{name}/", "audio adapter", clips * positions, upstream)
        upstream += (f"audio/adapter/{name}/", "audio/adapter/bn")


def _recognition(config: VitaConfig, stage: Stage) -> Work:
    """Objective `ctc`: a clip in every row."""
    rows, s = stage.batch_size, encoder_length(stage.clip_frames)
    yield from _audio_encoder(config.audio, rows, stage.clip_frames)
    yield Use("ctc_head/", "ctc head", rows * s, (ENCODER,))
    if config.ctc_training.token_weight:
        yield from _audio_adapter(config.audio, rows, stage.clip_frames)
        # The embedding table is what the adapter's tokens are compared with; it stays as it is.
        language, tokens = config.language, config.audio.adapter.num_tokens(s)
        scores = 2.0 * language.hidden_size * (language.vocab_size + 1) * rows * tokens
        yield Product("embedding table", scores, ("audio/",), operands=1)


# ---------------------------------------------------------------------------------------------------------------------
# The language model
# ---------------------------------------------------------------------------------------------------------------------


def _language(config: ModelConfig, stage: Stage) -> Work:
    """Objectives `language_modeling` and `text_pretraining`: everything that is read, then the decoder."""
    rows, s, language = stage.batch_size, stage.row_length, config.language
    tokens = rows * s
    upstream: tuple[str, ...] = ("language/embed_tokens/", "language/layers/")
    if stage.row_tiles:
        upstream += ("vision/", "resampler/", "projector/")
        yield from _vision(config, rows * stage.row_tiles)
        if config.resampler is not None:
            yield from _resampler(config.resampler, rows * stage.row_tiles, 1, config.tower_tokens)
        yield from _projector(config, rows * stage.row_tiles)
    if stage.row_clips:
        upstream += ("audio/",)
        yield from _audio_encoder(config.audio, rows * stage.row_clips, stage.clip_frames)
        yield from _audio_adapter(config.audio, rows * stage.row_clips, stage.clip_frames)
    yield Use("language/layers/", "language", tokens, upstream)
    if language.num_experts:
        active = language.experts_per_token / language.num_experts
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield Use(f"language/layers/moe/{name}/", "language experts", tokens * active, upstream)
    heads = language.num_heads * language.head_dim
    yield Product("language attention", 4.0 * language.num_layers * heads * s * tokens / 2, upstream)
    upstream += ("language/norm/",)
    yield Use("language/lm_head/", "lm_head", tokens, upstream)
    if stage.state_labels:
        yield Use("state_head/", "state head", tokens, upstream)


def _cell_naming(config: ModelConfig, stage: Stage) -> Work:
    tiles = stage.batch_size * stage.row_tiles
    yield from _vision(config, tiles)
    tokens = family_of(config).layout(config).tokens_per_tile
    yield Use("naming_head/", "naming head", tiles * tokens, ("vision/",))


# ---------------------------------------------------------------------------------------------------------------------
# Speaking
# ---------------------------------------------------------------------------------------------------------------------


def _codec(config: VitaConfig, stage: Stage) -> Work:
    """Objective `codec`: a crop in every row. Discriminators count with the share of the steps in which they run."""
    codec, training, rows = config.codec, config.codec_training, stage.batch_size
    samples = stage.codec_frames * codec.hop
    yield from _codec_encoder(codec, rows, samples)
    frames = rows * stage.codec_frames
    codes = 2.0 * codec.num_codes * (codec.latent_dim * codec.num_residual_layers * frames + codec.global_dim * rows)
    yield Product("codebooks", codes, operands=0)  # distances only choose the nearest entry
    yield from _codec_generator(codec, rows, stage.codec_frames)
    if training.discriminators is not None:
        share = max(0, stage.steps - training.adversarial_start) / stage.steps
        for path, positions in _discriminator_positions(training.discriminators, samples).items():
            # They learn from recorded and decoded crops, and pass the decoded ones' gradient on to the codec.
            learnt, passed = 2 * rows * positions * share, 2 * rows * positions * share
            yield Use(f"discriminators/{path}/", "discriminators", learnt, ("discriminators/",), passed)


def _codec_encoder(codec: CodecConfig, rows: int, samples: int) -> Work:
    """The second crop of an utterance goes, without gradients, as far as the utterance's vector is made."""

    def use(name: str, positions: int, other: bool, upstream: tuple[str, ...] = ("codec/encoder/",)) -> Use:
        return Use(f"codec/encoder/{name}/", "codec", rows * positions, upstream, rows * positions * other)

    yield use("conv_pre", samples, True, ())
    length, blocks = samples, len(codec.resblock_kernel_sizes)
    for i, stride in enumerate(reversed(codec.upsample_rates)):
        length //= stride
        yield use(f"ups_{i}", length, i <= codec.global_stage)
        for j in range(blocks):
            yield use(f"resblocks_{i * blocks + j}", length, i <= codec.global_stage)
        if i == codec.global_stage:
            inner = length
            for index in (0, 2, 4):
                inner //= codec.global_feature_conv[4]
                yield use(f"global_encoder/conv_{index}", inner, True)
            yield use("global_encoder/fn_0", 1, True)
    yield use("conv_post", length, False)


def _codec_generator(codec: CodecConfig, rows: int, frames: int) -> Work:
    upstream = ("codec/",)

    def use(name: str, positions: int) -> Use:
        return Use(f"codec/generator/{name}/", "codec", rows * positions, upstream)

    length, blocks = frames, len(codec.resblock_kernel_sizes)
    yield use("conv_pre", length)
    for i, stride in enumerate(codec.upsample_rates):
        yield use(f"ups_{i}", length)  # transposed: every input gives all taps
        length *= stride
        for j in range(blocks):
            yield use(f"resblocks_{i * blocks + j}", length)
    yield use("conv_post", length)


def _discriminator_positions(config: DiscriminatorConfig, samples: int) -> dict[str, int]:
    """Outputs of every convolution for one crop."""
    positions: dict[str, int] = {}
    for period in config.periods:
        length = -(-samples // period)
        for i in range(len(config.period_channels)):
            length = -(-length // 3) if i + 1 < len(config.period_channels) else length
            positions[f"period_{period}/convs_{i}"] = period * length
        positions[f"period_{period}/conv_post"] = period * length
    length = samples
    for scale in range(config.num_scales):
        length = length // 2 + 1 if scale else length
        inner = length
        for i, (_, _, stride, _) in enumerate(SCALE_CONVS):
            inner = (inner - 1) // stride + 1
            positions[f"scale_{scale}/convs_{i}"] = inner
        positions[f"scale_{scale}/conv_post"] = inner
    for size in config.stft_sizes:
        frames, bins = max(0, (samples - size) // (size // 4) + 1), size // 2 + 1
        last = len(STFT_DILATIONS) + 1
        for i in range(last + 1):
            bins = (bins - 1) // 2 + 1 if 0 < i < last else bins
            positions[f"stft_{size}/convs_{i}"] = frames * bins
        positions[f"stft_{size}/conv_post"] = frames * bins
    return positions


def _speech_decoder(config: VitaConfig, stage: Stage) -> Work:
    """Objective `speech_decoder`: `row_length` tokens of text and `codec_frames` speech tokens in every row."""
    speech, rows = config.speech, stage.batch_size
    text = stage.row_length * (config.language.hidden_size // speech.hidden_size)
    prompt, spoken = text + 1, stage.codec_frames + 1  # with BOS and SOS
    nar, both = ("speech/nar/",), ("speech/nar/", "speech/ar/")
    per_pair = 4.0 * speech.hidden_size
    if speech.num_nar_layers:
        yield Use("speech/nar/layers/", "speech nar", rows * text, nar)
        yield Product("speech attention", rows * per_pair * speech.num_nar_layers * text**2, nar)
    if speech.initial_head:
        yield Use("speech/nar/initial_head/", "speech nar", rows * text, nar)
    yield Use("speech/ar/layers/", "speech ar", rows * (prompt + spoken), both)
    # Text sees text in both directions; speech sees the text, and speech up to itself.
    pairs = prompt**2 + spoken * prompt + spoken**2 / 2
    yield Product("speech attention", rows * per_pair * speech.num_layers * pairs, both)
    yield Use("speech/ar/head/", "speech ar", rows * spoken, both)


# ---------------------------------------------------------------------------------------------------------------------
# Flamingo
# ---------------------------------------------------------------------------------------------------------------------

LOOKING = ("vision/", "resampler/", "cross_attention/")


def _flamingo(config: FlamingoConfig, stage: Stage) -> Work:
    """Objective `flamingo`: a batch of every data set, whose kernels are the same."""
    uses: dict[str, Use] = {}
    for data in stage.sets:
        pictures = data.batch_size * data.row_images
        resampled = _resampler(config.resampler, pictures, data.frames, config.vision.num_patches)
        seen = (_vision(config, pictures * data.frames), resampled)
        for entry in (*seen[0], *seen[1], *_gated_language(config, data)):
            if isinstance(entry, Product):
                yield entry
            else:
                before = uses[entry.path].positions if entry.path in uses else 0.0
                uses[entry.path] = entry._replace(positions=before + entry.positions)
    yield from uses.values()


def _gated_language(config: FlamingoConfig, data: DataSet) -> Work:
    """The layers, the blocks between them and the head. Text is counted as if it saw all pictures of its row: masked
    scores are computed, too.
    """
    c, language, s = config.cross_attention, config.language, data.row_length
    positions, media = data.batch_size * s, data.row_images * config.resampler.num_latents
    upstream = ("language/embed_tokens/", "language/layers/", *LOOKING)
    yield Use("cross_attention/", "cross attention", positions, upstream)
    yield Use("cross_attention/kv_proj/", "cross attention", data.batch_size * media, ("vision/", "resampler/"))
    scores = 4.0 * config.num_blocks * c.num_heads * c.head_dim * positions * media
    yield Product("cross attention", scores, upstream)
    yield Use("language/layers/", "language", positions, upstream)
    heads = language.num_heads * language.head_dim
    yield Product("language attention", 4.0 * language.num_layers * heads * s * positions / 2, upstream)
    yield Use("language/lm_head/", "lm_head", positions, (*upstream, "language/norm/"))


WORK = {
    "language_modeling": _language,
    "text_pretraining": _language,
    "cell_naming": _cell_naming,
    "ctc": _recognition,
    "codec": _codec,
    "speech_decoder": _speech_decoder,
    "flamingo": _flamingo,
}
