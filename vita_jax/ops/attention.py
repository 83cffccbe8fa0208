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
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot be shared evenly by {num_kv_heads} kv heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = rearrange(q * scale, "b s (k g) h -> b s k g h", k=num_kv_heads)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, :, None]  # (b 1 s t) -> (b 1 1 s t): every head and group sees the same mask
        scores = jnp.where(mask, scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, 0.0)
    out = jnp.einsum("bkgst,btkh->bskgh", weights.astype(v.dtype), v)
    return rearrange(out, "b s k g h -> b s (k g) h")
