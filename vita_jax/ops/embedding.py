"""Rows of a table by number, where the table is cut over devices.

Axes: v rows of the table, d width, b rows of tokens, s positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vita_jax.ops.meshes import num_parts, used_axes

WHOLE = PartitionSpec(None, None)


def lookup(
    table: jax.Array,
    tokens: jax.Array,
    dtype: jnp.dtype,
    *,
    table_axes: PartitionSpec = WHOLE,
    token_axes: PartitionSpec = WHOLE,
) -> jax.Array:
    """`table[tokens]` without moving the table, where a mesh cuts it.

    Each device looks up, in its part of the table, the tokens of all devices that hold other columns of it. A sum over
    the devices with other rows (zeros stand for what they have) and an exchange with those that have other columns give
    every device all of its own tokens. So what travels is about what comes out, in `dtype`, however large the table is.
    The gradient of the table is summed in the table's own dtype.

    Args:
      table: (v d).
      tokens: (b s) int32 in [0, v).
      dtype: of the result.
      table_axes: mesh axes of `v` and `d`. Where those of `d` do not cut `b` as well, or `b` or `s` is no multiple of
        its number of parts, the compiler is left to do it its own way.
      token_axes: mesh axes of `b` and `s`.

    Returns:
      (b s d) in `dtype`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    vocab, embed = (used_axes(mesh, axes) for axes in table_axes)
    rows, length = (used_axes(mesh, axes) for axes in token_axes)
    cut = bool(vocab or embed) and set(embed) <= set(rows)
    if not cut or tokens.shape[0] % num_parts(mesh, rows) or tokens.shape[1] % num_parts(mesh, length):
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def on_device(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if embed:
            tokens = jax.lax.all_gather(tokens, embed, axis=0, tiled=True)
        if not vocab:
            found = jnp.take(table, tokens, axis=0).astype(dtype)
        else:
            tokens = tokens - jax.lax.axis_index(vocab) * table.shape[0]
            here = (tokens >= 0) & (tokens < table.shape[0])
            found = jnp.take(table, jnp.where(here, tokens, 0), axis=0).astype(dtype)
            found = jax.lax.psum(jnp.where(here[..., None], found, 0), vocab)
        return jax.lax.all_to_all(found, embed, split_axis=0, concat_axis=2, tiled=True) if embed else found

    token_spec = PartitionSpec(rows or None, length or None)
    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(vocab or None, embed or None), token_spec),
        out_specs=PartitionSpec(*token_spec, None),
    )(table, tokens)
