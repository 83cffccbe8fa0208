"""What a mixture of experts costs beside a dense feed-forward of the same active FLOPs.

    python -m experiments.benchmarks.moe_ratio
    python -m experiments.benchmarks.moe_ratio --sizes mixtral --dtype bfloat16        # on an accelerator

A layer of e experts of width f, k of them for each token, takes turns with a dense SwiGLU layer of width k f: both
multiply every token by as many weights. A ratio is the mixture's time by the dense layer's, the median of all turns
with quartiles: at 1 the mixture's routing, sorting and adding up would cost nothing. Timed are "forward"; "backward",
the gradients of everything with the forward pass; and "step", with AdamW besides, which has e / k times as many weights
to change.

`dense` multiplies every token by all experts, e / k times the work; the others only by those it goes to. On a CPU these
walk tiles of rows (`vita_jax/ops/grouped_matmul.py`), each of which reads an expert's matrix whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.turns import (
    Call,
    describe_machine,
    format_machine,
    format_table,
    take_turns,
    use_cores,
    write_page,
)
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError
from vita_jax.models.language.decoder import SwiGLU
from vita_jax.models.language.experts import SparseMoE
from vita_jax.models.vita import vita_small
from vita_jax.ops.experts import IMPLEMENTATIONS
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.parallel.process import prepare_process

EXAMPLES = """\
examples:
  python -m experiments.benchmarks.moe_ratio --sizes small --turns 31
  python -m experiments.benchmarks.moe_ratio --implementations ragged --output /tmp/moe
"""
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax")
NOTES = "## Why"  # from here on the written file is kept: a person's words
RATE = 1e-5


@dataclass(frozen=True)
class Size:
    """A layer: n tokens, d, f of an expert, e and k."""

    tokens: int
    width: int
    intermediate: int
    experts: int = 8
    active: int = 2


SIZES = {
    "tiny": Size(16, 16, 24, 4),
    "small": Size(1248, 192, 528),  # the quickstart's width and a batch of it
    "middle": Size(1024, 512, 1408),
    "mixtral": Size(8192, 4096, 14336),  # Mixtral-8x7B's; 23 GB of weights, gradients and optimiser
}
DEFAULT_SIZES = ("small", "middle")
TIMED = ("forward", "backward", "step")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      size, implementation, timed: what.
      ratio, lower, upper: the mixture's time by the dense layer's, median and quartiles.
      moe_ms, dense_ms: medians of a call.
    """

    size: str
    implementation: str
    timed: str
    ratio: float
    lower: float
    upper: float
    moe_ms: float
    dense_ms: float


def dense_layer(size: Size, dtype: jnp.dtype) -> nn.Module:
    """A feed-forward of the same active FLOPs."""
    width = size.active * size.intermediate
    config = replace(vita_small(size.width, 1).language, hidden_size=size.width, intermediate_size=width)
    return SwiGLU(config, dtype=dtype)


def moe_layer(size: Size, implementation: str, dtype: jnp.dtype) -> nn.Module:
    """The mixture."""
    return SparseMoE(size.experts, size.active, size.intermediate, implementation, dtype=dtype)


def program(layer: nn.Module, timed: str, x: jax.Array) -> Call:
    """A compiled call of the layer.

    Args:
      layer: (b s d) -> (b s d).
      timed: a name of `TIMED`.
      x: (b s d); the loss is the mean square of the result.
    """
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x[:, :1]))["params"]
    optimizer = optax.adamw(RATE)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(layer.apply({"params": params}, x).astype(jnp.float32)))

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    if timed == "step":
        state = jax.jit(optimizer.init)(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
        held = (params, state)

        def call() -> None:
            nonlocal held
            held = jax.block_until_ready(compiled(*held, x))

        return call
    functions: dict[str, Callable] = {
        "forward": lambda params, x: layer.apply({"params": params}, x),
        "backward": jax.value_and_grad(loss, argnums=(0, 1)),
    }
    compiled = jax.jit(functions[timed]).lower(params, x).compile()
    return lambda: jax.block_until_ready(compiled(params, x))


def measure(
    sizes: Sequence[str], implementations: Sequence[str], dtype: jnp.dtype, *, turns: int, sample_seconds: float
) -> Iterator[Row]:
    """Rows, one after the other.

    Raises:
      UserError: an unknown size or implementation.
    """
    for what, names, known in (
        ("sizes", sizes, SIZES),
        ("implementations", implementations, IMPLEMENTATIONS),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"--{what}: {name!r} is unknown; use some of {', '.join(known)}")
    for name in sizes:
        size = SIZES[name]
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, size.tokens, size.width)), dtype)
        for timed in TIMED:
            dense = program(dense_layer(size, dtype), timed, x)
            for implementation in implementations:
                moe = program(moe_layer(size, implementation, dtype), timed, x)
                ratio = take_turns(dense, moe, turns=turns, sample_seconds=sample_seconds)
                times = (1e3 * ratio.other_seconds, 1e3 * ratio.first_seconds)
                yield Row(name, implementation, timed, ratio.median, ratio.lower, ratio.upper, *times)


# ---- what is printed ------------------------------------------------------------------------------------------------


def format_rows(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """The table."""
    head = ("layer", "experts by", "timed", "ratio", "quartiles", "mixture ms", "dense ms")
    cells = [
        (
            row.size,
            row.implementation,
            row.timed,
            f"{row.ratio:.2f}",
            f"{row.lower:.2f} to {row.upper:.2f}",
            f"{row.moe_ms:.2f}",
            f"{row.dense_ms:.2f}",
        )
        for row in rows
    ]
    return format_table(head, cells, markdown=markdown)


def write_results(output: Path, rows: Sequence[Row], machine: dict[str, str], turns: int) -> None:
    """Writes the table and the sizes, see `turns.write_page`."""
    sizes = [(name, *map(str, (s.tokens, s.width, s.intermediate, s.experts, s.active))) for name, s in SIZES.items()]
    used = [cells for cells in sizes if cells[0] in {row.size for row in rows}]
    text = f"""\
# A mixture of experts beside a dense layer

Written by `python -m experiments.benchmarks.moe_ratio`; what is compared, and how, is said at its top. Ratios are the
mixture's time by that of a dense layer of the same active FLOPs, medians of {turns} turns with quartiles. The machine
has other jobs beside this one; the sides take turns within the run, so ratios hold where milliseconds may not.

{format_machine(machine)}

{format_rows(rows, markdown=True)}

{format_table(("layer", "tokens", "width", "of an expert", "experts", "active"), used, markdown=True)}
"""
    write_page(output, text, NOTES, {"machine": machine, "turns": turns, "rows": [asdict(row) for row in rows]})


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m experiments.benchmarks.moe_ratio", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--sizes", default=",".join(DEFAULT_SIZES), metavar="A,B", help=", ".join(SIZES))
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), metavar="A,B", help="of the experts")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (default float32)"
    )
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="samples of each side (default 15)")
    parser.add_argument("--threads", type=int, metavar="N", help="cores, on a CPU (default all of this process)")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, two turns, nothing written by default")
    parser.add_argument("--output", type=Path, metavar="PATH", help="of .md and .json (default results/moe_ratio)")
    return parser


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes. Raises UserError for fewer than one turn."""
    if arguments.turns < 1:
        raise UserError(f"--turns {arguments.turns} must be at least 1")
    threads = use_cores(arguments.threads)
    prepare_process()
    device = jax.devices()[0]
    machine = describe_machine(PACKAGES) | {"device": device.device_kind, "dtype": arguments.dtype}
    if device.platform == "cpu":
        machine["threads"] = str(threads)
    quick = arguments.quick
    sizes = ("tiny",) if quick else arguments.sizes.split(",")
    turns, sample_seconds = (2, 0.0) if quick else (arguments.turns, 0.05)
    implementations = arguments.implementations.split(",")
    dtype = jnp.dtype(arguments.dtype)
    rows = list(measure(sizes, implementations, dtype, turns=turns, sample_seconds=sample_seconds))
    print(format_machine(machine), format_rows(rows), sep="\n")
    output = arguments.output or (None if quick else RESULTS / "moe_ratio")
    if output is not None:
        write_results(output, rows, machine, turns)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(benchmark, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
