"""Next-token cross entropy without the logits of a whole row: by chunks, and only of those that have a target."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from vita_jax.ops.meshes import used_axes

IGNORE_LABEL = -100
WHOLE = PartitionSpec(None, None)


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
    row_axes: PartitionSpec = WHOLE,
    kernel_axes: PartitionSpec = WHOLE,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed next-token cross entropy, the number of tokens it covers, and how many of them have the largest logit.

    Args:
      hidden, lm_head_kernel, chunk_size, row_axes, kernel_axes: see `position_scores`.
      labels: (b s) int, aligned with the tokens, -100 = ignored. The shift by one happens here.
      segment_ids: (b s) int, 0 = padding. A token never predicts one of another segment.

    Returns:
      (sum, count, correct), all () float32.
    """
    targets = shift_labels(labels, segment_ids)

    def scores(hidden: jax.Array, targets: jax.Array, kernel: jax.Array, axes: LossAxes) -> tuple[jax.Array, jax.Array]:
        # Only sums are asked for: with the positions that have a target in front, whole chunks have none and cost
        # nothing.
        order = jnp.argsort(targets == IGNORE_LABEL, axis=1, stable=True)
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        return _chunked_scores(hidden, jnp.take_along_axis(targets, order, axis=1), kernel, axes, chunk_size)

    losses, correct = _on_devices(scores, hidden, targets, lm_head_kernel, row_axes, kernel_axes)
    return jnp.sum(losses), jnp.sum(targets != IGNORE_LABEL, dtype=jnp.float32), jnp.sum(correct, dtype=jnp.float32)


def position_scores(
    hidden: jax.Array,
    lm_head_kernel: jax.Array,
    targets: jax.Array,
    *,
    chunk_size: int = 512,
    row_axes: PartitionSpec = WHOLE,
    kernel_axes: PartitionSpec = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every position, and whether its target has the largest logit.

    The row is cut into chunks of `chunk_size` positions. A scan makes the logits of one chunk at a time and the
    backward pass makes them again, so the largest temporary is (b chunk_size v) instead of (b s v). Chunks without a
    target in any row are passed over.

    Under a mesh every device does so for its own part of the rows and of the vocabulary. It gets all of `d` of its
    vocabulary once, not for every chunk, and the gradient of the kernel is added up over devices once.

    Args:
      hidden: (b s d) after the final norm, any float dtype.
      lm_head_kernel: (d v); multiplied in the dtype of `hidden`, accumulated in float32.
      targets: (b s) int, what each position predicts, -100 = nothing.
      chunk_size: positions per chunk, of a device's part of the row.
      row_axes: mesh axes of `b` and `s`, which they divide.
      kernel_axes: mesh axes of `d` and `v`.

    Returns:
      losses (b s) float32, 0 without a target; correct (b s) bool.
    """
    scores = partial(_chunked_scores, chunk_size=chunk_size)
    return _on_devices(scores, hidden, targets, lm_head_kernel, row_axes, kernel_axes)


class LossAxes(NamedTuple):
    """Mesh axes that cut the positions (rows and length), and the vocabulary."""

    positions: tuple[str, ...]
    vocab: tuple[str, ...]


def _on_devices(
    scores: Callable[[jax.Array, jax.Array, jax.Array, LossAxes], tuple[jax.Array, jax.Array]],
    hidden: jax.Array,
    targets: jax.Array,
    kernel: jax.Array,
    row_axes: PartitionSpec,
    kernel_axes: PartitionSpec,
) -> tuple[jax.Array, jax.Array]:
    """Runs `scores` on each device's positions and vocabulary: (b s d), (b s), (d v) -> two of (b s)."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, length = (used_axes(mesh, axes) for axes in row_axes)
    embed, vocab = (used_axes(mesh, axes) for axes in kernel_axes)

    def on_device(hidden: jax.Array, targets: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = kernel.astype(hidden.dtype)
        if embed:
            kernel = jax.lax.all_gather(kernel, embed, axis=0, tiled=True)
        return scores(hidden, targets, kernel, LossAxes((*rows, *length), vocab))

    if not (rows or length or embed or vocab):
        return on_device(hidden, targets, kernel)
    cut = PartitionSpec(rows or None, length or None)
    specs = (cut, cut, PartitionSpec(embed or None, vocab or None))
    # The two branches of a chunk's `cond` vary over different axes, which the check would refuse.
    return jax.shard_map(on_device, in_specs=specs, out_specs=(cut, cut), check_vma=False)(hidden, targets, kernel)


def _chunked_scores(
    hidden: jax.Array, targets: jax.Array, kernel: jax.Array, axes: LossAxes, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """`position_scores` of one device."""

    def chunk_scores(hidden: jax.Array, targets: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bsd,dv->bsv", hidden, kernel, preferred_element_type=jnp.float32)
        if axes.vocab:
            return _split_scores(logits, targets, axes.vocab)
        return token_losses(logits, targets), is_correct(logits, targets)

    def no_scores(hidden: jax.Array, targets: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)

    def scores_if_wanted(
        wanted: jax.Array, hidden: jax.Array, targets: jax.Array, kernel: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(wanted, chunk_scores, no_scores, hidden, targets, kernel.astype(hidden.dtype))

    length = hidden.shape[1]
    if length <= chunk_size:
        return chunk_scores(hidden, targets, kernel)
    padding = -length % chunk_size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE_LABEL)
    hidden = rearrange(hidden, "b (c s) d -> c b s d", s=chunk_size)
    targets = rearrange(targets, "b (c s) -> c b s", s=chunk_size)
    wanted = jnp.any(targets != IGNORE_LABEL, axis=(1, 2))
    if axes.positions:
        # All devices do the same chunks, since they meet in each.
        wanted = jax.lax.pmax(wanted.astype(jnp.int32), axes.positions) > 0
    # In float32 outside of the scan, so that the gradients of the chunks are added up in it.
    kernel = kernel.astype(jnp.float32)
    _, scores = jax.lax.scan(
        lambda _, chunk: (None, jax.checkpoint(scores_if_wanted)(*chunk, kernel)), None, (wanted, hidden, targets)
    )
    losses, correct = (rearrange(score, "c b s -> b (c s)")[:, :length] for score in scores)
    return losses, correct


def _split_scores(logits: jax.Array, targets: jax.Array, vocab: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """`token_losses` and `is_correct` of logits (... v/parts) that are cut over mesh axes."""
    size = logits.shape[-1]
    own = targets - jax.lax.axis_index(vocab) * size
    picked = jnp.sum(jnp.where(own[..., None] == jnp.arange(size), logits, 0.0), axis=-1)
    largest = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), axis=-1), vocab)
    total, picked = jax.lax.psum((jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1), picked), vocab)
    valid = targets != IGNORE_LABEL
    return jnp.where(valid, jnp.log(total) + largest - picked, 0.0), valid & (picked >= largest)
