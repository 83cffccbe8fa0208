"""Next-token cross entropy without the logits of a whole row: by chunks, and only of those that have a target."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

IGNORE_LABEL = -100


def shift_labels(labels: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The label each position has to predict: that of the next position, if both are in one segment.

    Args:
      labels: (b s) int; `labels[i]` is the token AT i, -100 = ignored.
      segment_ids: (b s) int, 0 = padding; None means one segment per row.

    Returns:
      (b s) int, -100 where nothing is to be predicted (always so at the end of a segment).
    """
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_LABEL)
    if segment_ids is None:
        return following
    next_segment = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((segment_ids > 0) & (segment_ids == next_segment), following, IGNORE_LABEL)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of (... v) logits against (...) targets, 0 where the target is -100; float32 (...)."""
    valid = targets != IGNORE_LABEL
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.where(valid, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)


def is_correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Which (...) targets have the largest of their (... v) logits: bool (...), False where the target is -100."""
    logits = jax.lax.stop_gradient(logits)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    # Compared with the maximum, since an arg-max is several times slower than a plain reduction on CPU.
    return (targets != IGNORE_LABEL) & (picked >= jnp.max(logits, axis=-1))


def next_token_loss(
    hidden: jax.Array,
    lm_head_kernel: jax.Array,
    labels: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    chunk_size: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the next-token cross entropy, and how many tokens it covers: the first two results of `next_token_scores`.

    Returns:
      (sum, count), both () float32. The mean loss is `sum / max(count, 1)`.
    """
    return next_token_scores(hidden, lm_head_kernel, labels, segment_ids, chunk_size=chunk_size)[:2]


def next_token_scores(
    hidden: jax.Array,
    lm_head_kernel: jax.Array,
    labels: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    chunk_size: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed next-token cross entropy, the number of tokens it covers, and how many of them have the largest logit.

    Args:
      hidden, lm_head_kernel, chunk_size: see `position_scores`.
      labels: (b s) int, aligned with the tokens, -100 = ignored. The shift by one happens here.
      segment_ids: (b s) int, 0 = padding. A token never predicts one of another segment.

    Returns:
      (sum, count, correct), all () float32.
    """
    targets = shift_labels(labels, segment_ids)
    # Only sums are asked for: with the positions that have a target in front, whole chunks have none and cost nothing.
    order = jnp.argsort(targets == IGNORE_LABEL, axis=1, stable=True)
    hidden, targets = (
        jnp.take_along_axis(hidden, order[..., None], axis=1),
        jnp.take_along_axis(targets, order, axis=1),
    )
    losses, correct = position_scores(hidden, lm_head_kernel, targets, chunk_size=chunk_size)
    return jnp.sum(losses), jnp.sum(targets != IGNORE_LABEL, dtype=jnp.float32), jnp.sum(correct, dtype=jnp.float32)


def position_scores(
    hidden: jax.Array, lm_head_kernel: jax.Array, targets: jax.Array, *, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every position, and whether its target has the largest logit.

    The row is cut into chunks of `chunk_size` positions. A scan makes the logits of one chunk at a time and the
    backward pass makes them again, so the largest temporary is (b chunk_size v) instead of (b s v). Chunks without a
    target in any row are passed over.

    Args:
      hidden: (b s d) after the final norm, any float dtype.
      lm_head_kernel: (d v); multiplied in the dtype of `hidden`, accumulated in float32.
      targets: (b s) int, what each position predicts, -100 = nothing.
      chunk_size: positions per chunk.

    Returns:
      losses (b s) float32, 0 without a target; correct (b s) bool.
    """
    kernel = lm_head_kernel.astype(hidden.dtype)

    def chunk_scores(hidden: jax.Array, targets: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bsd,dv->bsv", hidden, kernel, preferred_element_type=jnp.float32)
        return token_losses(logits, targets), is_correct(logits, targets)

    def no_scores(hidden: jax.Array, targets: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)

    def scores_if_any(chunk: tuple[jax.Array, jax.Array], kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(jnp.any(chunk[1] != IGNORE_LABEL), chunk_scores, no_scores, *chunk, kernel)

    length = hidden.shape[1]
    if length <= chunk_size:
        return chunk_scores(hidden, targets, kernel)
    padding = -length % chunk_size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE_LABEL)
    chunks = (
        rearrange(hidden, "b (c s) d -> c b s d", s=chunk_size),
        rearrange(targets, "b (c s) -> c b s", s=chunk_size),
    )
    _, scores = jax.lax.scan(lambda _, chunk: (None, jax.checkpoint(scores_if_any)(chunk, kernel)), None, chunks)
    losses, correct = (rearrange(score, "c b s -> b (c s)")[:, :length] for score in scores)
    return losses, correct
