"""The one attention function.

Axes: b batch, s queries, t keys, n query heads, k kv heads, g queries per kv head, h head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from vita_jax.errors import UnsupportedOption

# Added to a masked score. Finite, so that a row with no key at all stays free of NaN in forward and backward passes.
MASKED_SCORE = -1e30


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention with grouped key/value heads; query head `j` reads kv head `j // (n / k)`.

    Args:
      q: (b s n h).
      k, v: (b t k h), `n` divisible by `k`.
      mask: bool, broadcastable to (b 1 s t); True means the query may attend to the key. None means it may attend to
        all.
      scale: multiplies the scores; default `h ** -0.5`.
      implementation: "xla" runs on any backend.

    Returns:
      (b s n h) in the dtype of `q`. The softmax is computed in float32. A query whose mask is all False gets zeros.

    Raises:
      UnsupportedOption: unknown `implementation`.
      ValueError: `n` not divisible by `k`.
    """
    if implementation != "xla":
        raise UnsupportedOption(f"attention implementation {implementation!r} is not available; use 'xla'")
    length, num_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot be shared evenly by {num_kv_heads} kv heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # One plain matrix product per row and kv head, which every backend has a fast kernel for; the sums of the softmax
    # divide the output, which is smaller than the weights.
    q = rearrange(q * scale, "b s (k g) h -> b k (g s) h", k=num_kv_heads)
    k, v = rearrange(k, "b t k h -> b k h t"), rearrange(v, "b t k h -> b k t h")
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, mask.shape[3]))
        mask = jnp.tile(mask, (1, 1, num_heads // num_kv_heads, 1))  # (b 1 g*s t)
        scores = jnp.where(mask, scores, MASKED_SCORE)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    if mask is not None:
        out = jnp.where(jnp.any(mask, axis=-1, keepdims=True), out, 0.0)
    return rearrange(out, "b k (g s) h -> b s (k g) h", g=num_heads // num_kv_heads).astype(q.dtype)
