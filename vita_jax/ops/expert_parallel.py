"""Mixture of experts on many devices: every device routes its own tokens, holds its own experts, and exchanges rows.

Tokens are cut over the axes of the batch and of the length, experts over some axes of the batch. The p devices that
share out the experts among them are a group; each has e / p experts and, like every other, tokens of its own. A layer:

    sort the own assignments by expert  ->  tell the group how many there are of each expert
    rows to the devices of their experts  ->  sort by expert, multiply group by group  ->  rows back  ->  weighted sum

No token is dropped unless the receive buffer is bounded, whatever the router does.

Axes: n tokens and m = n k assignments of one device, k experts per token, d model width, f hidden width, e experts,
p devices of a group, t parts that f is cut in, c rows of a receive buffer. With j = min(k, e / p), the most rows that
one token sends to one device, and z bytes per number of the compute dtype:

Held by a device during a layer
  kernels of its experts, whole along d: 3 (e / p) d (f / t) z, gathered in the compute dtype just before use
  own rows, sorted: m d z
  received rows: c d z, twice (as received, and sorted), and c (f / t) z for each of gate, up and their product. c is
  n j p, as if the whole group sent all it can to this device, or what `buffer_factor` allows
  padded exchange: 2 n j p d z more

Sent by a device in a layer, forward; the gradient sends the same once more
  counts: 4 e bytes to each other device of the group
  rows: m d z (p - 1) / p there and as much back if experts are used evenly; padded always (p - 1) n j d z each way.
  Where f is cut, each of the t devices sends the same rows
  kernels: its part of 3 (e / p) d (f / t) z to the devices that d is cut over; the gradient is summed and scattered
  partial sums: if f is cut, n d z are summed over its t devices, once forward and once backward
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from vita_jax.errors import UserError
from vita_jax.ops.experts import (
    ExpertLinear,
    Experts,
    Routing,
    apply_experts,
    check_implementation,
    grouped_feed_forward,
    route,
    sort_assignments,
    take_rows,
    weighted_sum,
)
from vita_jax.ops.meshes import num_parts, platform_of


@dataclass(frozen=True)
class ExpertAxes:
    """Mesh axes by what is cut over them, largest stride first; () where a dimension is whole.

    Attributes:
      batch, length: rows and positions of the tokens.
      experts: experts; some of `batch`.
      embed: d of the kernels at rest; some of `batch` and `length`.
      mlp: f; none of the others.
    """

    batch: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """Axes along which tokens differ."""
        return self.batch + self.length


def apply_sharded_experts(
    x: jax.Array,
    logits: jax.Array,
    experts: Experts,
    mesh: AbstractMesh,
    axes: ExpertAxes,
    *,
    experts_per_token: int,
    implementation: str = "ragged",
    buffer_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Routes tokens and sums what their experts make of them, on all devices of a mesh.

    Args:
      x: (b s d).
      logits: (b s e) of the router.
      experts: parameters in the dtype of `x`.
      mesh: the current mesh.
      axes: of the mesh.
      experts_per_token: k.
      implementation: "ragged" exchanges rows with `jax.lax.ragged_all_to_all` where the devices of the mesh are TPUs or
        GPUs, and padded where they are CPUs, which lack it; "ragged_all_to_all" and "padded_all_to_all" insist on one.
        A program for devices of another host therefore has to be traced inside their mesh.
      buffer_factor: rows that a device can receive, in parts of the m it would receive if experts were used evenly.
        What does not fit is dropped: a buffer fills in the order of the devices that send, then of experts, then of
        tokens. None has room for all.

    Returns:
      (b s d) in the dtype of `x`; and (b s) int32, how many of its k experts each token did not reach.

    Raises:
      UserError: "dense" or an unknown `implementation`, axes that do not fit together, sizes that the mesh does not
        divide, or kernels in int8.
    """
    check_implementation(implementation)
    if experts.gate.scale is not None:
        raise UserError(
            "experts in int8 run on one device, and this mesh divides them among several; leave int8 weights out, or "
            "run without a mesh"
        )
    if implementation == "dense":
        raise UserError("expert implementation 'dense' is partitioned automatically; call apply_experts")
    if implementation == "ragged":
        implementation = "padded_all_to_all" if platform_of(mesh) == "cpu" else "ragged_all_to_all"
    _check_axes(x, experts, mesh, axes)
    tokens = _spec(axes.batch, axes.length)
    specs = expert_specs(experts, axes)

    def on_device(x: jax.Array, logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
        # Along axes that cut f everything behind the gate is a part of a sum. Saying so before anything is sent makes
        # the gradient of x one sum of n rows at the end, as the last line does for the result.
        rows = jax.lax.pcast(x, axes.mlp, to="varying").reshape(-1, x.shape[-1])
        experts = jax.tree.map(partial(_gather, axes=axes), experts, specs)
        routing = route(logits.reshape(-1, logits.shape[-1]), experts_per_token)
        if axes.experts:
            out, dropped = exchange_and_apply(rows, routing, experts, axes.experts, implementation, buffer_factor)
        else:
            out, dropped = apply_experts(rows, routing, experts), jnp.zeros_like(routing.experts[:, 0])
        out = jax.lax.psum(out, axes.mlp) if axes.mlp else out
        return out.reshape(x.shape), dropped.reshape(x.shape[:-1])

    return jax.shard_map(on_device, mesh=mesh, in_specs=(tokens, tokens, specs), out_specs=(tokens, tokens))(
        x, logits, experts
    )


def _check_axes(x: jax.Array, experts: Experts, mesh: AbstractMesh, axes: ExpertAxes) -> None:
    if not set(axes.experts) <= set(axes.batch):
        raise UserError(f"experts are cut over {axes.experts}, which must be among the axes of the batch, {axes.batch}")
    if not set(axes.embed) <= set(axes.tokens) - set(axes.experts):
        raise UserError(f"kernels are cut over {axes.embed} along d, which must be axes of tokens and not of experts")
    if set(axes.mlp) & set(axes.tokens):
        raise UserError(f"the experts' width is cut over {axes.mlp}, so tokens cannot be cut over {axes.tokens}")
    num_experts, width, hidden = experts.gate.kernel.shape
    sizes = {
        "rows of the batch": (x.shape[0], axes.batch),
        "positions": (x.shape[1], axes.length),
        "experts": (num_experts, axes.experts),
        "numbers of the model width": (width, axes.embed),
        "numbers of the experts' width": (hidden, axes.mlp),
    }
    for what, (size, names) in sizes.items():
        parts = num_parts(mesh, names)
        if size % parts:
            raise UserError(
                f"experts: {size} {what} cannot be cut in {parts} parts (mesh axis {', '.join(names)}); choose "
                "sizes of --config.mesh that divide it"
            )


def expert_specs(experts: Experts, axes: ExpertAxes) -> Experts:
    """Layout of every array of `experts`; the rank of low-rank updates is never cut."""

    def linear(layer: ExpertLinear, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> ExpertLinear:
        kernel = _spec(axes.experts, inputs, outputs)
        if layer.down is None:
            return ExpertLinear(kernel)
        return ExpertLinear(kernel, _spec(axes.experts, inputs, ()), _spec(axes.experts, (), outputs))

    return Experts(
        gate=linear(experts.gate, axes.embed, axes.mlp),
        up=linear(experts.up, axes.embed, axes.mlp),
        down=linear(experts.down, axes.mlp, axes.embed),
    )


def _spec(*dimensions: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in dimensions))


def _gather(leaf: jax.Array, spec: PartitionSpec, axes: ExpertAxes) -> jax.Array:
    """A parameter made whole along d.

    It is gathered here, not by the partitioner, because then it is the copy in the compute dtype that travels, and its
    gradient is scattered while it is summed over the same devices. Only that part is summed over the other devices.
    """
    dimensions = [(names,) if isinstance(names, str) else names or () for names in spec]
    whole = tuple(name for name in axes.tokens if not any(name in names for names in dimensions))
    leaf = jax.lax.pcast(leaf, whole, to="varying")
    if axes.embed and axes.embed in dimensions:
        leaf = jax.lax.all_gather(leaf, axes.embed, axis=dimensions.index(axes.embed), tiled=True)
    return leaf


def exchange_and_apply(
    x: jax.Array,
    routing: Routing,
    experts: Experts,
    group: tuple[str, ...],
    implementation: str,
    buffer_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The part of one device, inside `shard_map`: own tokens, own experts, rows exchanged with its group.

    Args:
      x: (n d), this device's tokens.
      routing: of these, among all e experts.
      experts: this device's e / p experts. Device i of the group has those from i e / p on.
      group: mesh axes that the experts are cut over.
      implementation: "ragged_all_to_all" or "padded_all_to_all".
      buffer_factor: see `apply_sharded_experts`.

    Returns:
      (n d), and how many assignments of each token were dropped (n) int32.
    """
    (n, k), num_local = routing.experts.shape, experts.gate.kernel.shape[0]
    devices = jax.lax.axis_size(group)
    # The experts of a token are different ones, so it sends at most this many rows to one device.
    slots = n * min(k, num_local)
    num_rows = slots * devices if buffer_factor is None else min(slots * devices, math.ceil(buffer_factor * n * k))
    there = Channel(group, implementation, slots=min(slots, num_rows), rows_in=n * k, rows_out=num_rows)

    assignments = sort_assignments(routing.experts, num_local * devices)
    counts = jax.lax.all_gather(assignments.sizes, group)
    transfer, received = plan_exchange(counts, jax.lax.axis_index(group), num_rows)
    rows = exchange(take_rows(x, assignments.order, assignments.place, k), transfer, there)
    by_expert, by_device = transposed_order(received, num_rows), transposed_order(received.T, num_rows)
    out = grouped_feed_forward(take_rows(rows, by_expert, by_device), jnp.sum(received, axis=0), experts)
    out = exchange(take_rows(out, by_device, by_expert), transfer.reversed(), there.reversed())

    device = routing.experts // num_local
    number = assignments.place.reshape(n, k) - transfer.send_starts[device]  # place within the block for that device
    dropped = jnp.sum(number >= transfer.send_sizes[device], axis=-1, dtype=jnp.int32)
    return weighted_sum(out, assignments, routing.weights), dropped


# ---------------------------------------------------------------------------------------------------------------------
# Who sends how many rows, and where they go
# ---------------------------------------------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """An exchange of blocks of rows as one device sees it. All (p) int32, a number for each device of the group.

    Attributes:
      send_starts, send_sizes: the block for that device in the rows of this one.
      write_starts: where that device puts it in its buffer.
      receive_starts, receive_sizes: the block from that device in the buffer of this one.
      origin_starts: where it was in the rows of that device.
    """

    send_starts: jax.Array
    send_sizes: jax.Array
    write_starts: jax.Array
    receive_starts: jax.Array
    receive_sizes: jax.Array
    origin_starts: jax.Array

    def reversed(self) -> Transfer:
        """The exchange that puts every row back; also the transpose, which gradients need."""
        return Transfer(
            send_starts=self.receive_starts,
            send_sizes=self.receive_sizes,
            write_starts=self.origin_starts,
            receive_starts=self.send_starts,
            receive_sizes=self.send_sizes,
            origin_starts=self.write_starts,
        )


def plan_exchange(counts: jax.Array, device: jax.Array, num_rows: int) -> tuple[Transfer, jax.Array]:
    """Sizes and places of all blocks that one device sends and receives.

    Every device has its rows sorted by expert, so the block for another device is contiguous. Received blocks lie one
    behind the other in the order of the devices they come from. All devices compute the same from the same counts.

    Args:
      counts: (p e) int32, how many rows each device of the group has for each expert.
      device: () int32, which of the p devices this is.
      num_rows: c. What a buffer cannot hold is cut off at its end.

    Returns:
      The transfer, and (p e/p) int32: how many rows come from each device for each of this one's experts.
    """
    devices = counts.shape[0]
    counts = counts.reshape(devices, devices, -1)  # from, to, expert
    blocks = jnp.sum(counts, axis=-1)
    starts = _starts(blocks, axis=1)
    kept = jnp.clip(num_rows - _starts(blocks, axis=0), 0, blocks)
    places = _starts(kept, axis=0)
    transfer = Transfer(
        send_starts=starts[device],
        send_sizes=kept[device],
        write_starts=places[device],
        receive_starts=places[:, device],
        receive_sizes=kept[:, device],
        origin_starts=starts[:, device],
    )
    own = counts[:, device]
    return transfer, jnp.clip(transfer.receive_sizes[:, None] - _starts(own, axis=1), 0, own)


def _starts(sizes: jax.Array, axis: int) -> jax.Array:
    """Where each of the blocks that lie one behind the other along an axis begins."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def transposed_order(sizes: jax.Array, num_rows: int) -> jax.Array:
    """The permutation that sorts blocks of rows by their second index instead of their first.

    Rows stored as blocks (0 0), (0 1), ..., (1 0), ... are read as blocks (0 0), (1 0), ..., (0 1), ...; the order
    within a block stays. `transposed_order(sizes.T, num_rows)` is the inverse.

    Args:
      sizes: (a b) int32, rows of each block.
      num_rows: length of the result; rows behind the last block stay where they are.

    Returns:
      (num_rows) int32: which stored row is read at each place.
    """
    stored = _starts(sizes.reshape(-1), axis=0).reshape(sizes.shape).T.reshape(-1)
    ends = jnp.cumsum(sizes.T.reshape(-1))
    shifts = stored - (ends - sizes.T.reshape(-1))
    place = jnp.arange(num_rows, dtype=jnp.int32)
    block = jnp.sum(place[:, None] >= ends, axis=1)  # those that end before or at this place
    return place + jnp.append(shifts, 0)[block]


# ---------------------------------------------------------------------------------------------------------------------
# The exchange
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channel:
    """What an exchange knows when it is compiled.

    Attributes:
      group: mesh axes of the devices that exchange rows.
      implementation: "ragged_all_to_all" or "padded_all_to_all".
      slots: no block has more rows.
      rows_in, rows_out: length of what is sent from, and of the buffer.
    """

    group: tuple[str, ...]
    implementation: str
    slots: int
    rows_in: int
    rows_out: int

    def reversed(self) -> Channel:
        """Of the way back."""
        return replace(self, rows_in=self.rows_out, rows_out=self.rows_in)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(rows: jax.Array, transfer: Transfer, channel: Channel) -> jax.Array:
    """Sends blocks of rows to the devices of the group and receives theirs. Its gradient is the exchange reversed.

    Args:
      rows: (channel.rows_in d). Rows outside the blocks are not read.
      transfer: the blocks.
      channel: see there.

    Returns:
      (channel.rows_out d), zero where no block was received.
    """
    move = _ragged_all_to_all if channel.implementation == "ragged_all_to_all" else _padded_all_to_all
    return move(rows, transfer, channel)


def _exchange_forward(rows: jax.Array, transfer: Transfer, channel: Channel) -> tuple[jax.Array, Transfer]:
    return exchange(rows, transfer, channel), transfer


def _exchange_backward(channel: Channel, transfer: Transfer, gradient: jax.Array) -> tuple[jax.Array, Any]:
    return exchange(gradient, transfer.reversed(), channel.reversed()), None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _ragged_all_to_all(rows: jax.Array, transfer: Transfer, channel: Channel) -> jax.Array:
    """Only the rows of the blocks travel."""
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows, shape=(channel.rows_out, *rows.shape[1:])),
        transfer.send_starts,
        transfer.send_sizes,
        transfer.write_starts,
        transfer.receive_sizes,
        axis_name=channel.group,
    )


def _padded_all_to_all(rows: jax.Array, transfer: Transfer, channel: Channel) -> jax.Array:
    """Every device sends `slots` rows to every other; what is in those behind a block is ignored."""
    slot = jnp.arange(channel.slots, dtype=jnp.int32)
    sent = rows[jnp.minimum(transfer.send_starts[:, None] + slot, channel.rows_in - 1)]
    received = jax.lax.all_to_all(sent, channel.group, split_axis=0, concat_axis=0, tiled=True)
    place = jnp.arange(channel.rows_out, dtype=jnp.int32)
    # Blocks lie in the order of their devices, so a row can only be in the last one that starts before or at it.
    block = jnp.sum(place[:, None] >= transfer.receive_starts, axis=1) - 1
    number = place - transfer.receive_starts[block]
    found = received[block, jnp.minimum(number, channel.slots - 1)]
    return jnp.where((number < transfer.receive_sizes[block])[:, None], found, 0)
