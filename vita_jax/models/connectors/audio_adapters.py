"""Audio adapters: speech encoder frames to language-model tokens (`vita/model/multimodal_encoder/whale/adapter.py`).

VITA-1.0 and VITA-1.5 use `subsampling` with kernel 5: one convolution with stride 2, layer norm, GELU, linear. It looks
4 encoder frames (160 ms) ahead, so in a stream its tokens come 2 tokens late; the causal one of Freeze-Omni
(`models/adapter.py`) does not.
Axes: b utterances, s encoder frames, d encoder width, k kernel, p tokens, c adapter channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.activations import activation
from vita_jax.ops.filter_bank import token_length
from vita_jax.ops.patches import time_windows

NORM_EPS = 1e-3
# Share of the batch in the running statistics: the original's `momentum` of 0.99 means this in torch.
BATCH_SHARE = 0.99
RUNNING_STATS = "running_stats"  # collection of the statistics that a training call leaves


@dataclass(frozen=True)
class AudioAdapterConfig:
    """Sizes and switches.

    Attributes:
      kind: "subsampling" (halves the frames), "cnn" (two causal convolutions, keeps them) or "linear".
      input_size: d, width of the encoder.
      output_size: width of the language model.
      kernel_size: k.
      activation: of one-convolution "subsampling": "gelu" or "relu".
      norm: of one-convolution "subsampling": "layer" or "batch".
      causal: "subsampling": pads on the left (Freeze-Omni) instead of the right (VITA).
      two_convs: "subsampling" with a causal convolution before, batch norms and ReLU. The originals choose it by width:
        VITA-1.0 and Freeze-Omni where 4 d < output_size, VITA-1.5 never.
    """

    kind: str = "subsampling"
    input_size: int = 1024
    output_size: int = 3584
    kernel_size: int = 5
    activation: str = "gelu"
    norm: str = "layer"
    causal: bool = False
    two_convs: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, ("subsampling", "cnn", "linear")),
            ("activation", self.activation, ("gelu", "relu")),
            ("norm", self.norm, ("layer", "batch")),
        ):
            if value not in known:
                raise UserError(f"audio adapter: {name} {value!r} is unknown; use one of {', '.join(known)}")
        if self.kernel_size < 1:
            raise UserError(f"audio adapter: kernel_size {self.kernel_size} must be at least 1")

    def num_tokens(self, frames: Any) -> Any:
        """Tokens of that many encoder frames; int -> int, array -> array."""
        return token_length(frames) if self.kind == "subsampling" else frames

    @property
    def conv_widths(self) -> tuple[int, ...]:
        """Output channels of the convolutions, in order."""
        if self.kind == "linear":
            return ()
        if self.kind == "cnn" or self.two_convs:
            return (2 * self.input_size, 4 * self.input_size)
        return (2 * self.input_size,)

    @property
    def looks_ahead(self) -> bool:
        """Whether its convolution pads on the right."""
        return self.kind == "subsampling" and not self.causal

    @property
    def stream_delay(self) -> int:
        """Tokens by which a stream is late: so many at its start stand for nothing."""
        return (self.kernel_size - 1) // 2 if self.looks_ahead else 0


@struct.dataclass
class AdapterCache:
    """What the next chunk of a stream needs: the last k-1 inputs of every convolution, the first one's first.

    Attributes:
      inputs: one (b k-1 c) per convolution; zeros before the first chunk.
    """

    inputs: tuple[jax.Array, ...]


def make_cache(config: AudioAdapterConfig, batch: int, dtype: jnp.dtype = jnp.float32) -> AdapterCache:
    """The cache before the first chunk.

    Raises:
      UserError: an adapter that looks ahead by half tokens, or with two convolutions.
    """
    if config.looks_ahead and (config.two_convs or config.kernel_size % 2 == 0):
        raise UserError(
            f"audio adapter: 'subsampling' that pads on the right, kernel_size {config.kernel_size} and two_convs "
            f"{config.two_convs}, cannot be streamed; use an odd kernel and one convolution, or causal=True"
        )
    widths = (config.input_size, *config.conv_widths)[: len(config.conv_widths)]
    return AdapterCache(tuple(jnp.zeros((batch, config.kernel_size - 1, width), dtype) for width in widths))


class BatchNorm(nn.Module):
    """Batch norm over the last axis, parameters `scale`, `bias`, `running_mean`, `running_var`.

    The running statistics are parameters without gradient, so that a model is one tree. A training call uses those of
    the batch (padding included, as in the original) and leaves updated ones in the collection `RUNNING_STATS`, from
    where `with_running_stats` puts them into the tree.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x: (... c) -> (... c)."""
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        first = {"scale": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
        scale, bias, *running = (
            self.param(name, nn.with_logical_partitioning(init, ("mlp",)), x.shape[-1:], jnp.float32)
            for name, init in first.items()
        )
        x32 = x.astype(jnp.float32)
        mean, var = (jax.lax.stop_gradient(values) for values in running)
        if train:
            axes = tuple(range(x.ndim - 1))
            count = x.size // x.shape[-1]
            batch_mean, batch_var = jnp.mean(x32, axes), jnp.var(x32, axes)
            unbiased = batch_var * (count / max(count - 1, 1))
            for name, old, new in (("running_mean", mean, batch_mean), ("running_var", var, unbiased)):
                self.sow(RUNNING_STATS, name, (1 - BATCH_SHARE) * old + BATCH_SHARE * new, reduce_fn=lambda _, x: x)
            mean, var = batch_mean, batch_var
        return ((x32 - mean) * jax.lax.rsqrt(var + NORM_EPS) * scale + bias).astype(self.dtype)


def with_running_stats(params: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the statistics that a training call left; `stats` has the tree of `params`, mostly empty."""
    merged = dict(params)
    for name, value in stats.items():
        merged[name] = with_running_stats(params[name], value) if isinstance(value, dict) else value
    return merged


class AudioAdapter(nn.Module):
    """The adapter of `config`; parameters as in the checkpoints: `conv1d1`, `bn1`, `conv1d2`, `bn2`, `project`."""

    config: AudioAdapterConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        config = self.config
        conv_axes = (None, "embed", "mlp")
        if self._two_convs:
            first, second = config.conv_widths
            # Not (embed, mlp) twice: the second one's input is as wide as the first one's output.
            self.conv1d1 = Dense((first,), conv_axes, num_input_axes=2, dtype=self.dtype)
            self.bn1 = BatchNorm(self.dtype)
            self.conv1d2 = Dense((second,), (None, None, "mlp"), num_input_axes=2, dtype=self.dtype)
            self.bn2 = BatchNorm(self.dtype)
        elif config.kind == "subsampling":
            self.conv1d2 = Dense(config.conv_widths, conv_axes, num_input_axes=2, dtype=self.dtype)
            self.bn2 = LayerNorm(NORM_EPS, self.dtype) if config.norm == "layer" else BatchNorm(self.dtype)
        axes = (None, "embed") if config.kind == "linear" else ("mlp", "embed")
        self.project = Dense((config.output_size,), axes, dtype=self.dtype)

    @property
    def _two_convs(self) -> bool:
        return len(self.config.conv_widths) == 2

    def __call__(self, x: jax.Array, valid: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Adapts whole utterances.

        Args:
          x: (b s d).
          valid: (b s) bool; the convolutions see zeros elsewhere.
          train: batch norms use the batch, see `BatchNorm`.

        Returns:
          (b p output_size), arbitrary but finite where not valid, and (b p) bool; p is ceil(s / 2) for "subsampling",
          else s.
        """
        config = self.config
        if config.kind == "linear":
            return self.project(x), valid
        x = jnp.where(valid[..., None], x, 0)
        past = config.kernel_size - 1
        ahead = config.kind == "subsampling" and not config.causal
        if self._two_convs:
            x = self._first(time_windows(x, config.kernel_size, left=past), train)
        stride = 2 if config.kind == "subsampling" else 1
        side = {"right": past} if ahead else {"left": past}
        y = self._second(time_windows(x, config.kernel_size, stride=stride, **side), train)
        return y, valid[:, ::stride]

    def stream_step(self, x: jax.Array, cache: AdapterCache) -> tuple[jax.Array, AdapterCache]:
        """Adapts one more chunk of a stream; all chunks together give what the whole utterance gives.

        An adapter that looks ahead sees the same windows as a causal one, `config.stream_delay` tokens later: the first
        tokens are to be dropped, and the last ones come with as many pairs of zeros.

        Args:
          x: (b s d), s even for "subsampling".
          cache: from `make_cache` or the previous call.

        Returns:
          (b p output_size) and the next cache.

        Raises:
          UserError: an odd chunk.
        """
        config = self.config
        if config.kind == "linear":
            return self.project(x), cache
        stride = 2 if config.kind == "subsampling" else 1
        if x.shape[1] % stride:
            raise UserError(f"audio adapter: a chunk of {x.shape[1]} frames cannot be halved; use an even number")
        kept = []
        for i, past in enumerate(cache.inputs):
            last = i == len(cache.inputs) - 1
            joined = jnp.concatenate([past.astype(x.dtype), x], axis=1)
            kept.append(joined[:, joined.shape[1] - past.shape[1] :].astype(past.dtype))
            windows = time_windows(joined, config.kernel_size, stride=stride if last else 1)
            x = self._second(windows, False) if last else self._first(windows, False)
        return x, AdapterCache(tuple(kept))

    def _first(self, windows: jax.Array, train: bool) -> jax.Array:
        """(b s k d) -> (b s 2d), of the two-convolution kinds."""
        return jax.nn.relu(self.bn1(self.conv1d1(windows), train))

    def _second(self, windows: jax.Array, train: bool) -> jax.Array:
        """(b p k c) -> (b p output_size)."""
        y = self.conv1d2(windows)
        y = self.bn2(y, train) if isinstance(self.bn2, BatchNorm) else self.bn2(y)
        return self.project(activation("relu" if self._two_convs else self.config.activation)(y))
