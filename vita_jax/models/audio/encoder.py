"""VITA's speech encoder, "whale": 4x subsampling by two convolutions, then a Transformer with positions on the keys.

Source: `vita/model/multimodal_encoder/whale/module` (encoder, subsampling, transformer, attention); VITA-1.0, arXiv
2408.05211, section 3.2. Its position scheme, "rel-enc", is that of Transformer-XL without the relative shift: the
sinusoid of the ABSOLUTE key position enters the scores,

    score[q, k] = ((q + u) . k + (q + v) . (W_pos PE[k])) / sqrt(h)

Axes: b utterances, f frames of 10 ms, m mel bins, s encoder frames of 40 ms, t keys, d width, n heads, h head width,
l layers, c frames per chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.audio.cmvn import RELEASED_MEAN, Cmvn
from vita_jax.models.audio.streaming import EncoderCache, advance, cached_keys_mask, empty_cache, key_positions
from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.attention import dot_product_attention
from vita_jax.ops.filter_bank import encoder_length
from vita_jax.ops.masks import chunked_attention_mask, padding_mask, random_chunk
from vita_jax.ops.patches import overlapping_patches, time_windows
from vita_jax.ops.positions import relative_weights, sinusoidal_positions

NORM_EPS = 1e-5
MIN_FRAMES = 7  # what one encoder frame is made of
# Encoder frames: of the original's position tables; "relative" needs none, an hour is what sinusoids in float32 carry.
LAST_FRAME = {"relative": 90_000, "rel-enc": 5000, "abs-enc": 1500}

Cached = tuple[jax.Array, jax.Array]  # keys and values (b t n h)


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Sizes and switches of the encoder.

    Attributes:
      input_dim: m.
      hidden_size, num_layers, num_heads, intermediate_size: d, l, n and the width of the feed-forward.
      chunk_size: encoder frames per chunk of the attention mask; below 1 means full context.
      left_chunks: chunks to the left that a query sees; negative for all. Streaming needs both to be set.
      dynamic_chunks: draw chunk and left context anew in every training call (not in evaluation, unlike the original).
      stream_positions: "exact": a stream equals the chunk-masked full pass. "lagging": positions as in Freeze-Omni's
        streaming code, which fall one chunk behind once the left context is full.
      positions: "relative": scores depend on the distance of key and query (Transformer-XL, arXiv 1901.02860, section
        3.3). "rel-enc": the released encoder, which leaves out the shift, so that scores depend on where a key stands
        but not on how far away it is; the same parameters. "abs-enc": sinusoids added to the input, plain attention.
      normalize_before: pre-norm layers and a final norm; else a norm after each residual.
      concat_after: joins attention input and output by a linear layer on both.
      feed_forward: "linear", "conv1d" (two convolutions over time) or "conv1d-linear" (causal depthwise, then linear).
      feed_forward_kernel: frames of those convolutions.
      dropout, positional_dropout: in training.
      cmvn: normalisation a fresh model starts with: "released" (80 bins), "identity"; or "none": no such parameters,
        the features come normalised, as in the serving code.
      remat: "none", or "full" to recompute each layer in the backward pass.
    """

    input_dim: int = 80
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    chunk_size: int = -1
    left_chunks: int = -1
    dynamic_chunks: bool = False
    stream_positions: str = "exact"
    positions: str = "rel-enc"
    normalize_before: bool = True
    concat_after: bool = False
    feed_forward: str = "linear"
    feed_forward_kernel: int = 1
    dropout: float = 0.1
    positional_dropout: float = 0.1
    attention_dropout: float = 0.0
    cmvn: str = "released"
    remat: str = "none"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("stream_positions", self.stream_positions, ("exact", "lagging")),
            ("positions", self.positions, tuple(LAST_FRAME)),
            ("feed_forward", self.feed_forward, ("linear", "conv1d", "conv1d-linear")),
            ("cmvn", self.cmvn, ("released", "identity", "none")),
            ("remat", self.remat, ("none", "full")),
        ):
            if value not in known:
                raise UserError(f"audio encoder: {name} {value!r} is unknown; use one of {', '.join(known)}")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise UserError(
                f"audio encoder: hidden_size {self.hidden_size} must be even and divisible by num_heads "
                f"{self.num_heads}"
            )
        if self.input_dim < MIN_FRAMES:
            raise UserError(f"audio encoder: input_dim {self.input_dim} is below the {MIN_FRAMES} bins of one output")
        if self.cmvn == "released" and self.input_dim != len(RELEASED_MEAN):
            raise UserError(
                f"audio encoder: cmvn 'released' is for {len(RELEASED_MEAN)} bins, but input_dim is "
                f"{self.input_dim}; use 'identity' or 'none'"
            )
        if self.feed_forward == "conv1d" and self.feed_forward_kernel % 2 == 0:
            raise UserError(f"audio encoder: feed_forward_kernel {self.feed_forward_kernel} of 'conv1d' must be odd")
        if self.attention_dropout:
            raise UnsupportedOption(f"audio encoder: attention_dropout {self.attention_dropout} is not offered; use 0")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def subsampled_dim(self) -> int:
        """Frequencies left after the convolutions."""
        return ((self.input_dim - 1) // 2 - 1) // 2


def whale_350m() -> AudioEncoderConfig:
    """The encoder of VITA-1.0 and VITA-1.5, 357,950,464 parameters, with full context."""
    return AudioEncoderConfig()


class Subsampling(nn.Module):
    """Two 3x3 convolutions with stride 2 over time and frequency, then a linear layer over channels and frequencies."""

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """features: (b f m) -> (b s d), and what the convolutions give (b s m' d); s = (f - 3) // 4."""
        d = self.config.hidden_size
        x = overlapping_patches(features.astype(self.dtype)[..., None], size=3, stride=2)
        x = jax.nn.relu(Dense((d,), (None, None, None, "embed"), num_input_axes=3, dtype=self.dtype, name="conv1")(x))
        x = overlapping_patches(x, size=3, stride=2)
        x = jax.nn.relu(Dense((d,), (None, None, "embed", "mlp"), num_input_axes=3, dtype=self.dtype, name="conv2")(x))
        return Dense((d,), (None, "mlp", "embed"), num_input_axes=2, dtype=self.dtype, name="out")(x), x


class Attention(nn.Module):
    """Self-attention; with "relative" the distance of every key adds to its score, with "rel-enc" its position."""

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cached: Cached | None
    ) -> tuple[jax.Array, Cached]:
        """Attends to cached keys, if any, and to the block itself.

        Args:
          x: (b s d).
          positions: (b|1 t d) sinusoids of all keys, the cached ones first.
          mask: (b 1 s|1 t) bool.
          cached: keys and values (b t-s n h), or None.

        Returns:
          (b s d), and all keys and values (b t n h).
        """
        config = self.config
        heads = (config.num_heads, config.head_dim)
        axes = ("embed", "q_heads", "head_dim")
        q, k, v = (Dense(heads, axes, dtype=self.dtype, name=f"{name}_proj")(x) for name in "qkv")
        if cached is not None:
            k, v = (
                jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in zip(cached, (k, v), strict=True)
            )
        scored_q, scored_k = q, k
        if config.positions != "abs-enc":
            project = Dense(heads, axes, use_bias=False, dtype=self.dtype, name="pos_proj")
            u, w = (self._position_bias(name).astype(self.dtype) for name in ("pos_bias_u", "pos_bias_v"))
            if config.positions == "rel-enc":
                placed_q, placed_k = q + w, project(positions)
            else:
                kernel = project(jnp.eye(config.hidden_size, dtype=self.dtype))  # (d n h)
                weights = jnp.einsum("bsnh,dnh->bsnd", q + w, kernel)
                placed_q = relative_weights(weights, positions[:, -x.shape[1] :, None])
                placed_k = positions[:, :, None]
            # Two products in one: [q + u, q + w] . [k, r].
            scored_q = jnp.concatenate([q + u, placed_q], axis=-1)
            placed_k = jnp.broadcast_to(placed_k, (*k.shape[:3], placed_q.shape[-1])).astype(k.dtype)
            scored_k = jnp.concatenate([k, placed_k], axis=-1)
        out = dot_product_attention(scored_q, scored_k, v, mask=mask, scale=config.head_dim**-0.5)
        out = Dense(
            (config.hidden_size,),
            ("q_heads", "head_dim", "embed"),
            num_input_axes=2,
            dtype=self.dtype,
            name="o_proj",
        )(out)
        return out, (k, v)

    def _position_bias(self, name: str) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("q_heads", "head_dim"))
        return self.param(name, init, (self.config.num_heads, self.config.head_dim), jnp.float32)


class FeedForward(nn.Module):
    """Two layers with a ReLU; the convolutional kinds also mix neighbouring frames."""

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b s d) -> (b s d)."""
        config, size = self.config, self.config.feed_forward_kernel
        wide, narrow = (config.intermediate_size,), (config.hidden_size,)
        if config.feed_forward == "conv1d":
            side = (size - 1) // 2
            x = time_windows(x, size, left=side, right=side)
            x = self._drop(jax.nn.relu(self._dense("fc1", wide, (None, "embed", "mlp"))(x)))
            return self._dense("fc2", narrow, (None, "mlp", "embed"))(time_windows(x, size, left=side, right=side))
        if config.feed_forward == "conv1d-linear":
            x = self._depthwise(time_windows(x, size, left=size - 1))
        x = self._drop(jax.nn.relu(self._dense("fc1", wide, ("embed", "mlp"))(x)))
        return self._dense("fc2", narrow, ("mlp", "embed"))(x)

    def _dense(self, name: str, features: tuple[int, ...], axes: tuple[str | None, ...]) -> Dense:
        return Dense(features, axes, num_input_axes=len(axes) - 1, dtype=self.dtype, name=name)

    def _drop(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x)

    def _depthwise(self, windows: jax.Array) -> jax.Array:
        """(b s k d) -> (b s d), one filter per channel."""
        bound = windows.shape[2] ** -0.5  # torch's default, whose fan-in is the filter's length

        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        shapes = {"kernel": ((None, "embed"), windows.shape[2:]), "bias": (("embed",), windows.shape[3:])}
        kernel, bias = (
            self.param(f"depthwise_{name}", nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            for name, (axes, shape) in shapes.items()
        )
        return jnp.einsum("bskd,kd->bsd", windows, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class Block(nn.Module):
    """One layer: x + attention(norm1(x)), then x + feed_forward(norm2(x)); variants as in the config."""

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32
    deterministic: bool = True
    capture: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, cached: Cached | None, positions: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, tuple[Cached | None, dict[str, jax.Array]]]:
        """x: (b s d), others as in `Attention` -> (b s d); keys and values if there is a cache; intermediates."""
        config = self.config
        # Clips stay with the devices that hold their rows; weights come to them.
        x = nn.with_logical_constraint(x, ("batch", None, None))
        norm1, norm2 = (LayerNorm(NORM_EPS, self.dtype, name=name) for name in ("norm1", "norm2"))
        drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        before = norm1(x) if config.normalize_before else x
        attn, keys = Attention(config, self.dtype, name="attention")(before, positions, mask, cached)
        if config.concat_after:
            both = jnp.concatenate([before, attn], axis=-1)
            x = x + Dense((config.hidden_size,), (None, "embed"), dtype=self.dtype, name="concat")(both)
        else:
            x = x + drop(attn)
        x = x if config.normalize_before else norm1(x)
        before = norm2(x) if config.normalize_before else x
        mlp = FeedForward(config, self.dtype, self.deterministic, name="mlp")(before)
        x = x + drop(mlp)
        x = x if config.normalize_before else norm2(x)
        captured = {"attn": attn, "mlp": mlp, "output": x} if self.capture else {}
        return x, (None if cached is None else keys, captured)


class Transformer(nn.Module):
    """Embedding, scanned layers, final norm. Parameters `embed/...`, `layers/...` (l ...), `norm/...`."""

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cached: Cached | None = None,
        deterministic: bool = True,
        capture: bool = False,
    ) -> tuple[jax.Array, Cached | None, dict[str, jax.Array]]:
        """Runs the stack.

        Args:
          x: (b s d) subsampled features.
          positions: (b|1 t) int of all keys, the cached ones first.
          mask: (b 1 s|1 t) bool.
          cached: keys and values (l b t-s n h), or None.
          deterministic: False applies dropout and needs an rng named "dropout".
          capture: also return intermediates.

        Returns:
          (b s d); keys and values (l b t n h) if there is a cache; with `capture` `embed`, `scaled` (b s d), `pos_emb`
          (b|1 t d), and per layer `attn`, `mlp`, `output` (l b s d).
        """
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=deterministic)
        embed = Dense((config.hidden_size,), (None, "embed"), dtype=self.dtype, name="embed_linear")(x)
        embed = jax.nn.relu(drop(LayerNorm(NORM_EPS, self.dtype, name="embed_norm")(embed)))
        sinusoids = sinusoidal_positions(positions, config.hidden_size).astype(self.dtype)
        scaled = embed * math.sqrt(config.hidden_size)
        if config.positions == "abs-enc":
            scaled = scaled + sinusoids[:, -x.shape[1] :]
        drop_positions = nn.Dropout(config.positional_dropout, deterministic=deterministic)
        block = nn.remat(Block, prevent_cse=False) if config.remat == "full" else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.dtype, deterministic, capture, name="layers")
        x, (keys, captured) = layers(drop_positions(scaled), cached, drop_positions(sinusoids), mask)
        if config.normalize_before:
            x = LayerNorm(NORM_EPS, self.dtype, name="norm")(x)
        if capture:
            captured = {**captured, "embed": embed, "scaled": scaled, "pos_emb": sinusoids}
        return x, keys, captured


class AudioEncoder(nn.Module):
    """The whole encoder. Parameters `cmvn/...` (unless the features come normalised), `subsampling/...`,
    `transformer/...`.
    """

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        if self.config.cmvn != "none":
            self.cmvn = Cmvn(self.config.cmvn)
        self.subsampling = Subsampling(self.config, self.dtype)
        self.transformer = Transformer(self.config, self.dtype)

    def normalise(self, features: jax.Array) -> jax.Array:
        """(b f m) -> (b f m) float32; in float32 because rounding raw features to bfloat16 costs up to 0.06."""
        return features if self.config.cmvn == "none" else self.cmvn(features)

    def __call__(
        self, features: jax.Array, lengths: jax.Array, deterministic: bool = True, capture: bool = False
    ) -> tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Encodes whole utterances.

        Args:
          features: (b f m) log-mel features, not normalised (unless cmvn is "none"), padded on the right with anything.
          lengths: (b,) int, real frames of each.
          deterministic: False applies dropout, draws chunks if `dynamic_chunks`, and needs an rng named "dropout".
          capture: also return intermediates.

        Returns:
          hidden (b s d), s = (f - 3) // 4: arbitrary but finite behind the end of an utterance.
          valid (b s) bool: frames whose whole receptive field is real.
          With `capture` a dict: `cmvn` (b f m), `conv` (b s m' d), `subsample`, `mask` (b 1 s|1 s) bool, and those of
          `Transformer`.

        Raises:
          UserError: too few or too many frames.
        """
        config = self.config
        size = encoder_length(features.shape[1])
        if not 1 <= size <= LAST_FRAME[config.positions]:
            most = LAST_FRAME[config.positions] * 4 + 6
            raise UserError(
                f"audio encoder: {features.shape[1]} frames, but at least {MIN_FRAMES} and at most {most} can be "
                "encoded at once; pad or cut the clip"
            )
        normed = self.normalise(features)
        subsampled, conv = self.subsampling(normed)
        valid = padding_mask(encoder_length(lengths), size)
        chunk_size, left_chunks = config.chunk_size, config.left_chunks
        if config.dynamic_chunks and not deterministic:
            chunk_size, left_chunks = random_chunk(self.make_rng("dropout"), size)
        mask = chunked_attention_mask(valid, chunk_size, left_chunks)
        hidden, _, captured = self.transformer(subsampled, jnp.arange(size)[None], mask, None, deterministic, capture)
        if not capture:
            return hidden, valid
        return hidden, valid, captured | {"cmvn": normed, "conv": conv, "subsample": subsampled, "mask": mask}

    def stream_step(
        self, window: jax.Array, cache: EncoderCache, real: jax.Array | None = None
    ) -> tuple[jax.Array, EncoderCache]:
        """Encodes one more chunk of a stream (Freeze-Omni's `infer`; see `streaming.py`).

        Args:
          window: (b 4c+3 m): the last 3 frames of the previous window and 4c new ones. Freeze-Omni has zeros before the
            first 4c; 4c+3 real ones in the first window give the chunks of the full pass.
          cache: from `make_cache`, or the previous call.
          real: (b,) int32, encoder frames of the chunk that are made of real frames only: all but in the last chunk of
            an utterance. None = all.

        Returns:
          hidden (b c d), arbitrary but finite behind the real ones, and the next cache.

        Raises:
          UserError: the config is no streaming one, or the window has another size.
        """
        config = self.config
        chunk = config.chunk_size
        if window.shape[1] != 4 * chunk + 3:
            raise UserError(f"audio stream: a chunk of {chunk} needs {4 * chunk + 3} frames, not {window.shape[1]}")
        subsampled, _ = self.subsampling(self.normalise(window))
        mask = cached_keys_mask(cache, chunk)
        if real is not None:
            slots = cache.k.shape[2]
            mask = mask & padding_mask(slots + real, slots + chunk)[:, None, None]
        positions = key_positions(cache, chunk, config.left_chunks, config.stream_positions, LAST_FRAME["rel-enc"])
        hidden, keys, _ = self.transformer(subsampled, positions, mask, (cache.k, cache.v))
        return hidden, advance(cache, *keys)


def make_cache(config: AudioEncoderConfig, batch: int, dtype: jnp.dtype = jnp.float32) -> EncoderCache:
    """The cache of `batch` streams before their first chunk.

    Raises:
      UserError: the encoder has no chunks, no bounded left context, or layers that look beyond the chunk.
    """
    lagging = config.stream_positions == "lagging"
    if config.chunk_size < 1 or (config.left_chunks < 0 and not lagging):
        raise UserError(
            f"audio stream: chunk_size {config.chunk_size} and left_chunks {config.left_chunks}; a stream needs at "
            "least 1 and 0 (4 and 16, for example)"
        )
    if config.positions == "abs-enc" or config.feed_forward != "linear":
        raise UserError(
            f"audio stream: positions {config.positions!r} and feed_forward {config.feed_forward!r} cannot be "
            "streamed; use 'relative' or 'rel-enc', and 'linear'"
        )
    slots = config.chunk_size * config.left_chunks
    if lagging:
        slots = max(slots, 1)  # the original keeps one frame where there is no bounded left context to keep
    return empty_cache(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        batch=batch,
        slots=slots,
        dtype=dtype,
    )
