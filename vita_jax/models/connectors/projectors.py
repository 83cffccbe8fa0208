"""Vision projectors: tower features to language-model width (`vita/model/multimodal_projector/builder.py`).

VITA-1.0 and VITA-1.5 use `mlp2x_gelu`; the others are options of the same switch, `mm_projector_type`.
Axes: b tiles, p tokens, c tower width, d language width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense, LayerNorm
from vita_jax.ops.activations import gelu_exact, hard_sigmoid, hard_swish

DEFAULT_PROJECTOR = "mlp2x_gelu"
LDP_NORM_EPS = 1e-5
TOKEN_GROUP = 4  # tokens joined by `vanilla` and `minigpt`


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector.

    Attributes:
      projector_type: the public `mm_projector_type`.
      input_size, output_size: widths of tower and language model.
      hidden_size: width between the layers of an mlp; None = `output_size`, as in all public checkpoints. A linear
        projector that has one is the product of two matrices through it: linear all the same, with other parameters.
    """

    projector_type: str = DEFAULT_PROJECTOR
    input_size: int = 4096
    output_size: int = 3584
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        kind = projector_kind(self.projector_type)
        if self.hidden_size is None:
            return
        if kind not in ("linear", "mlp"):
            raise UserError(
                f"projector.hidden_size is {self.hidden_size}, but projector type {self.projector_type!r} has no such "
                "width; leave it out"
            )
        if self.hidden_size < 1:
            raise UserError(f"projector.hidden_size {self.hidden_size} must be at least 1")

    @property
    def kind(self) -> str:
        """linear, mlp, spp, vanilla, minigpt, ldp or identity."""
        return projector_kind(self.projector_type)

    @property
    def mlp_depth(self) -> int:
        """Number of linear layers of an mlp projector."""
        match = re.fullmatch(r"mlp(\d+)x_gelu", self.projector_type)
        return max(int(match.group(1)), 1) if match else 0

    @property
    def squeeze_size(self) -> int:
        """Width inside the squeeze-and-excitation of `ldp`: a quarter, rounded to a multiple of eight."""
        quarter = self.output_size // 4
        rounded = max(8, (quarter + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * quarter else rounded

    @property
    def spp_version(self) -> str | None:
        """v1, v2 or v3; None passes the input through."""
        return next((version for version in ("v1", "v2", "v3") if version in self.projector_type), None)


def projector_kind(projector_type: str) -> str:
    """The family of a public `mm_projector_type`.

    Raises:
      UserError: an unknown type.
    """
    if projector_type in ("linear", "vanilla", "minigpt", "ldp", "identity"):
        return projector_type
    if projector_type.startswith("spp"):
        return "spp"
    if re.fullmatch(r"mlp\d+x_gelu", projector_type):
        return "mlp"
    raise UserError(
        f"projector type {projector_type!r} is unknown; use linear, mlp<n>x_gelu, spp_v1, spp_v2, spp_v3, vanilla, "
        "minigpt, ldp or identity"
    )


def _square_side(x: jax.Array) -> int:
    side = int(x.shape[1] ** 0.5 + 0.5)
    if side * side != x.shape[1]:
        raise UserError(f"{x.shape[1]} tokens are not a square grid, which this projector needs")
    return side


def mean_pool_grid(x: jax.Array) -> jax.Array:
    """Means of 2x2 neighbours; a last odd row or column is left out. x: (b p c), p a square -> (b p' c)."""
    side = _square_side(x)
    half = side // 2
    grid = rearrange(x, "b (r q) c -> b r q c", r=side)[:, : 2 * half, : 2 * half]
    return reduce(grid, "b (r dr) (q dq) c -> b (r q) c", "mean", dr=2, dq=2)


def depthwise_3x3(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise 3x3 convolution with padding 1, as nine shifted products (fast to differentiate on every backend).

    x: (b rows cols c), kernel: (3 3 1 c) -> (b ceil(rows/stride) ceil(cols/stride) c).
    """
    rows, cols = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (
        padded[:, dy : dy + rows : stride, dx : dx + cols : stride] * kernel[dy, dx, 0]
        for dy in range(3)
        for dx in range(3)
    )
    return sum(shifted)


class InvertedResidual(nn.Module):
    """Depthwise 3x3, norm, hard-swish, squeeze-and-excitation, 1x1, norm (MobileNetV3); adds its input at stride 1."""

    features: int
    squeeze: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b rows cols d) -> (b ceil(rows/stride) ceil(cols/stride) d)."""
        kernel = self.param(
            "depthwise_kernel",
            # torch's default for a convolution whose fan-in is the nine taps
            nn.with_logical_partitioning(_uniform(1 / 3), (None, None, None, "embed")),
            (3, 3, 1, self.features),
            jnp.float32,
        )
        y = depthwise_3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
        y = hard_swish(LayerNorm(LDP_NORM_EPS, self.dtype, name="norm1")(y))
        gate = jnp.mean(y, axis=(1, 2), keepdims=True)
        gate = jax.nn.relu(Dense((self.squeeze,), axes=("embed", "mlp"), dtype=self.dtype, name="squeeze")(gate))
        gate = Dense((self.features,), axes=("mlp", "embed"), dtype=self.dtype, name="excite")(gate)
        y = y * hard_sigmoid(gate)
        y = Dense((self.features,), axes=(None, "embed"), use_bias=False, dtype=self.dtype, name="pointwise")(y)
        y = LayerNorm(LDP_NORM_EPS, self.dtype, name="norm2")(y)
        return x + y if self.stride == 1 else y


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Projector(nn.Module):
    """The projector named by `config.projector_type`; sub-module names follow the checkpoint's indices."""

    config: ProjectorConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects tower tokens.

        Args:
          x: (b p c).

        Returns:
          (b p' d): p' is p for linear, mlp and identity, p/4 for vanilla and minigpt, floor(sqrt(p)/2)**2 for spp and
          ceil(sqrt(p)/2)**2 for ldp.

        Raises:
          UserError: p is not what the type needs (a square, or a multiple of four).
        """
        x = x.astype(self.dtype)
        match self.config.kind:
            case "identity":
                return x
            case "linear" if self.config.hidden_size is not None:
                x = self._dense("linear_in", self.config.hidden_size, ("embed", "mlp"))(x)
                return self._dense("linear_out", axes=("mlp", "embed"))(x)
            case "linear":
                return self._dense("linear")(x)
            case "mlp":
                return self._mlp(x)
            case "spp":
                return self._spp(x)
            case "ldp":
                return self._ldp(x)
            case _:
                return self._grouped(x)

    def _dense(self, name: str, size: int | None = None, axes: tuple[str | None, ...] = (None, "embed")) -> Dense:
        return Dense((size or self.config.output_size,), axes=axes, dtype=self.dtype, name=name)

    def _mlp(self, x: jax.Array) -> jax.Array:
        last = self.config.mlp_depth - 1
        for i in range(self.config.mlp_depth):
            axes = ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed")
            size = None if i == last else self.config.hidden_size
            x = self._dense(f"layers_{2 * i}", size, axes)(x if i == 0 else gelu_exact(x))
        return x

    def _spp(self, x: jax.Array) -> jax.Array:
        """All three linear layers exist in every version, used or not, as in the checkpoints."""
        linear_0 = self._dense("linear_0", self.config.input_size)
        linear_1, linear_2 = self._dense("linear_1"), self._dense("linear_2")
        if self.is_initializing():
            linear_2(linear_1(linear_0(x)))
        match self.config.spp_version:
            case "v1":
                return linear_2(mean_pool_grid(linear_1(x)))
            case "v2":
                return mean_pool_grid(linear_2(linear_1(x)))
            case "v3":
                return linear_2(linear_1(mean_pool_grid(linear_0(x))))
            case _:
                return x

    def _grouped(self, x: jax.Array) -> jax.Array:
        """Joins four consecutive tokens; `vanilla` interleaves their channels, `minigpt` concatenates them."""
        if x.shape[1] % TOKEN_GROUP:
            raise UserError(f"{self.config.projector_type} joins {TOKEN_GROUP} tokens, but there are {x.shape[1]}")
        order = "(c k)" if self.config.kind == "vanilla" else "(k c)"
        return self._dense("linear")(rearrange(x, f"b (p k) c -> b p {order}", k=TOKEN_GROUP))

    def _ldp(self, x: jax.Array) -> jax.Array:
        """MobileVLM's lightweight downsampling projector (Chu et al. 2023)."""
        config = self.config
        side = _square_side(x)
        x = self._dense("mlp_1", axes=("embed", "mlp"))(x)
        x = self._dense("mlp_3", axes=("mlp", "embed"))(gelu_exact(x))
        x = rearrange(x, "b (r q) d -> b r q d", r=side)
        for i in (1, 2):
            x = InvertedResidual(config.output_size, config.squeeze_size, i, self.dtype, name=f"block_{i}")(x)
        return rearrange(x, "b r q d -> b (r q) d")
