"""The one decoder: a pre-norm transformer with grouped-query attention, rotary positions and SwiGLU feed-forwards.

Qwen2 (arXiv 2407.10671, section 2) as published: biases on q, k and v only, RMS norms, an untied output head. Mixtral
(arXiv 2401.04088) as published: no biases, and a feed-forward per expert. LLaMA: no biases (`llama.py`). A layer:

    x = x + attention(norm(x));  x = x + feed_forward(norm(x))

The layers are one scanned block, so every parameter of `layers` has a leading `layers` axis. Training, prefill and
single steps run the same block; what differs is only whether a cache is passed.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vita_jax.errors import UserError
from vita_jax.models.language.cache import (
    KVCache,
    Stack,
    advance,
    empty_cache,
    mark_written,
    read_layer,
    write_layer,
)
from vita_jax.models.language.experts import ROUTER, SparseMoE
from vita_jax.nn.layers import Dense, Embed, Initializer, RMSNorm, normal_init
from vita_jax.ops.attention import check_implementation as check_attention
from vita_jax.ops.attention import dot_product_attention, segment_attention
from vita_jax.ops.attention_kernels import ATTENTION_OUTPUT
from vita_jax.ops.experts import check_implementation
from vita_jax.ops.masks import make_attention_mask
from vita_jax.ops.rope import apply_rotary, rotary_tables

# Name of a layer's input for the policies below.
LAYER_INPUT = "layer_input"

# What the backward pass may keep of each layer; everything else is computed again. Per layer and position, in values:
# `full` keeps d, `attention` d + n h (and does not run the attention kernel twice), `dots` about 2 d + (2 n + 2 k) h +
# 2 f, `offload` none on the accelerator and d + n h in the memory of its host.
REMAT_POLICIES = {
    "none": None,  # no rematerialisation: keep all
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the layer's input only
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),  # and what attention made
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, not scores
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, ATTENTION_OUTPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Attributes:
      vocab_size: v, rows of the embedding table and of the output head.
      hidden_size: d.
      num_layers: l.
      num_heads: n query heads.
      num_kv_heads: k key/value heads, each shared by n / k query heads.
      head_dim: h, even.
      intermediate_size: f, width of the feed-forward, or of each expert.
      rope_theta: base of the rotary wavelengths.
      rms_norm_eps: added to the mean square.
      qkv_bias: biases on the query, key and value projections.
      max_positions: longest sequence the weights were trained for; information for callers, not a limit of the maths.
      remat: a name of `REMAT_POLICIES`: what the backward pass may keep.
      attention: how attention without a cache is computed, see `vita_jax.ops.attention.segment_attention`.
      initializer_range: standard deviation of every matrix of a fresh model. Small models learn faster from about
        `hidden_size ** -0.5`. None draws matrices as `torch.nn.Linear` does.
      num_experts: e; 0 = one dense feed-forward.
      experts_per_token: how many experts each token goes to.
      router_aux_loss_coef: weight of the load-balancing loss in training; 0 leaves it out, as the released models did.
      expert_implementation: see `vita_jax.ops.experts.apply_experts`, and for experts that are divided among devices
        `vita_jax.ops.expert_parallel.apply_sharded_experts`.
      expert_buffer_factor: at least 1; bounds what a device can receive from others to this many times its even share,
        and drops what does not fit. None drops nothing and reserves memory for the worst case.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = True
    max_positions: int = 32768
    remat: str = "none"
    attention: str = "auto"
    initializer_range: float | None = INITIALIZER_RANGE
    num_experts: int = 0
    experts_per_token: int = 2
    router_aux_loss_coef: float = 0.0
    expert_implementation: str = "ragged"
    expert_buffer_factor: float | None = None

    @property
    def kernel_init(self) -> Initializer | None:
        """How new matrices are drawn; None is `Dense`'s own way."""
        return None if self.initializer_range is None else normal_init(self.initializer_range)

    @property
    def embedding_stddev(self) -> float:
        """Standard deviation of a new embedding table."""
        return INITIALIZER_RANGE if self.initializer_range is None else self.initializer_range

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even for rotary positions")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat {self.remat!r} must be one of {', '.join(REMAT_POLICIES)}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"experts_per_token {self.experts_per_token} must be between 1 and num_experts {self.num_experts}"
            )
        if self.router_aux_loss_coef and not self.num_experts:
            raise UserError(
                f"router_aux_loss_coef {self.router_aux_loss_coef} needs experts; set num_experts, or the weight to 0"
            )
        check_attention(self.attention)
        check_implementation(self.expert_implementation)
        if self.expert_buffer_factor is not None and self.expert_buffer_factor < 1:
            raise UserError(
                f"expert_buffer_factor {self.expert_buffer_factor} must be at least 1, which is room for experts that "
                "are used evenly; None drops nothing"
            )


def qwen2_7b() -> DecoderConfig:
    """Qwen2-7B and Qwen2.5-7B, the language model of VITA-1.5."""
    return DecoderConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        remat="full",
    )


def mixtral_8x7b(vocab_size: int = 32000) -> DecoderConfig:
    """Mixtral-8x7B; with 51,760 rows of vocabulary it is the language model of VITA-1.0."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        num_experts=8,
        experts_per_token=2,
        remat="full",
    )


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config

        def project(heads: int, name: str) -> Dense:
            return Dense(
                (heads, c.head_dim),
                ("embed", name, "head_dim"),
                use_bias=c.qkv_bias,
                kernel_init=c.kernel_init,
                dtype=self.dtype,
            )

        self.q_proj = project(c.num_heads, "q_heads")
        self.k_proj = project(c.num_kv_heads, "kv_heads")
        self.v_proj = project(c.num_kv_heads, "kv_heads")
        self.o_proj = Dense(
            (c.hidden_size,),
            ("q_heads", "head_dim", "embed"),
            num_input_axes=2,
            use_bias=False,
            kernel_init=c.kernel_init,
            dtype=self.dtype,
        )

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        stacks: tuple[Stack, Stack] | None,
        layer: jax.Array,
        start: jax.Array | None,
    ) -> tuple[jax.Array, tuple[Stack, Stack] | None]:
        """Attends.

        Args:
          x: (b s d).
          rotary: cosine and sine, (b s h/2) each.
          mask: (b 1 s t) bool, True = may attend; or (b s) int32 segment ids: `x` attends to itself, causally within
            its segments.
          stacks: cached keys and values of all layers, (l b t k h) each; None attends to `x` itself.
          layer, start: () int32, this layer and the first slot to write.

        Returns:
          (b s d), and the stacks with this block written.
        """
        q = apply_rotary(self.q_proj(x), *rotary)
        k = apply_rotary(self.k_proj(x), *rotary)
        v = self.v_proj(x)
        if stacks is not None:
            stacks = tuple(write_layer(stack, new, layer, start) for stack, new in zip(stacks, (k, v), strict=True))
            k, v = (read_layer(stack, layer, q.dtype) for stack in stacks)
        return self.o_proj(self._attend(q, k, v, mask)), stacks

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        if mask.ndim > 2:
            return dot_product_attention(q, k, v, mask=mask)
        if self.is_initializing():
            # The row that `init` is given only makes parameters; the mesh it is for need not divide it.
            return segment_attention(q, k, v, mask, implementation="xla")
        axes = nn.logical_to_mesh_axes(("batch", "length", "kv_heads"))
        return segment_attention(q, k, v, mask, implementation=self.config.attention, axes=axes)


class SwiGLU(nn.Module):
    """Dense feed-forward: `down(silu(gate(x)) * up(x))`."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (b s d) -> (b s d)."""

        def linear(features: int, axes: tuple[str, str], name: str) -> Dense:
            init = self.config.kernel_init
            return Dense((features,), axes, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        gate = linear(self.config.intermediate_size, ("embed", "mlp"), "gate_proj")(x)
        up = linear(self.config.intermediate_size, ("embed", "mlp"), "up_proj")(x)
        return linear(self.config.hidden_size, ("mlp", "embed"), "down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One layer. Its first argument and result are the carry of the scan over layers."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.input_norm = RMSNorm(c.rms_norm_eps, dtype=self.dtype)
        self.attention = Attention(c, dtype=self.dtype)
        self.post_attention_norm = RMSNorm(c.rms_norm_eps, dtype=self.dtype)
        if c.num_experts:
            self.moe = SparseMoE(
                num_experts=c.num_experts,
                experts_per_token=c.experts_per_token,
                intermediate_size=c.intermediate_size,
                implementation=c.expert_implementation,
                buffer_factor=c.expert_buffer_factor,
                kernel_init=c.kernel_init,
                dtype=self.dtype,
            )
        else:
            self.mlp = SwiGLU(c, dtype=self.dtype)

    def __call__(
        self,
        carry: tuple[jax.Array, tuple[Stack, Stack] | None],
        layer: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        start: jax.Array | None,
    ) -> tuple[tuple[jax.Array, tuple[Stack, Stack] | None], None]:
        """carry: hidden (b s d), and cached keys and values (l b t k h) or None; layer: () int32 -> the same carry."""
        x, stacks = carry
        x = checkpoint_name(nn.with_logical_constraint(x, ("batch", "length", None)), LAYER_INPUT)
        # Kept only when the caller makes `intermediates` mutable; then (l b s d), the input of every layer.
        self.sow("intermediates", "layer_input", x)
        attended, stacks = self.attention(self.input_norm(x), rotary, mask, stacks, layer, start)
        x = x + attended
        feed_forward = self.moe if self.config.num_experts else self.mlp
        x = x + feed_forward(self.post_attention_norm(x))
        return (x, stacks), None


def block_stack(config: DecoderConfig, dtype: jnp.dtype) -> nn.Module:
    """All layers of a decoder as one scanned `Block`: called as a block is, with the numbers of the layers (l,)."""
    block = Block
    if config.remat != "none":
        # Inside a scan XLA cannot merge the second computation with the first, so the barrier is not needed.
        block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0, ROUTER: 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, dtype=dtype)


class Decoder(nn.Module):
    """Embedding table, scanned blocks, final norm and output head.

    Parameters: `embed_tokens/embedding` (v d), `layers/...` (l ...), `norm/scale` (d), `lm_head/kernel` (d v).
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, init_stddev=c.embedding_stddev, dtype=self.dtype)
        self.layers = block_stack(c, self.dtype)
        self.norm = RMSNorm(c.rms_norm_eps, dtype=self.dtype)
        self.lm_head = Dense(
            (c.vocab_size,),
            ("embed", "vocab"),
            use_bias=False,
            kernel_init=c.kernel_init,
            dtype=self.dtype,
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: (b s) int32 -> (b s d)."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (b s d) after the final norm -> (b s v) in the compute dtype."""
        return self.lm_head(hidden)

    def __call__(
        self,
        inputs_embeds: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the stack; with a cache, the block given is appended to it.

        Args:
          inputs_embeds: (b s d).
          positions: (b s) int32 rotary positions; they may repeat.
          segment_ids: (b s) int32; a token attends causally within its segment; 0 = padding.
          cache: None, or what earlier blocks left; `cache.end + s` must not exceed its slots.

        Returns:
          hidden after the final norm (b s d), zeros or arbitrary but finite at padding, and the new cache.
        """
        c = self.config
        start, stacks = (None, None) if cache is None else (cache.end, (cache.k, cache.v))
        if cache is None:
            mask = segment_ids
        else:
            block = segment_ids.shape[1]
            if block > cache.num_slots:
                raise UserError(f"a block of {block} positions needs a cache with as many slots, not {cache.num_slots}")
            mask = make_attention_mask(segment_ids, mark_written(cache, segment_ids), first_query_slot=cache.end)
        rotary = rotary_tables(positions, c.head_dim, c.rope_theta)
        layers = jnp.arange(c.num_layers, dtype=jnp.int32)
        (x, stacks), _ = self.layers((inputs_embeds.astype(self.dtype), stacks), layers, rotary, mask, start)
        hidden = self.norm(x)
        if self.is_initializing():
            # Both ends of the model have parameters of their own, and `init` only makes those that are used.
            self.embed(jnp.zeros((1, 1), jnp.int32))
            self.logits(hidden[:, :1])
        return hidden, None if cache is None else advance(cache, *stacks, segment_ids, positions)


def make_cache(config: DecoderConfig, batch: int, num_slots: int, dtype: jnp.dtype = jnp.float32) -> KVCache:
    """An empty cache for `batch` rows of at most `num_slots` positions; `dtype` as in `cache.empty_cache`."""
    return empty_cache(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        batch=batch,
        num_slots=num_slots,
        dtype=dtype,
    )
