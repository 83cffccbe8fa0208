"""Separable resizing by explicit interpolation matrices, matching `torch.nn.functional.interpolate` without
antialiasing.

`jax.image.resize` is no substitute: its cubic kernel has a = -0.5 (torch: -0.75) and it antialiases when it shrinks.
All matrices are (n_out n_in), float32, with half-pixel centres (`align_corners=False`) and replicated edges.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

BICUBIC_A = -0.75


def _source_positions(n_in: int, n_out: int) -> np.ndarray:
    return (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5


def _scatter_taps(n_in: int, taps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Sums (index, weight) taps into a matrix, with indices outside the input moved to its edge."""
    n_out = taps[0][0].shape[0]
    matrix = np.zeros((n_out, n_in))
    for index, weight in taps:
        np.add.at(matrix, (np.arange(n_out), np.clip(index, 0, n_in - 1)), weight)
    return matrix.astype(np.float32)


def bicubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out n_in): cubic convolution with a = -0.75 (Keys 1981), four taps."""
    a = BICUBIC_A
    positions = _source_positions(n_in, n_out)
    floor = np.floor(positions).astype(int)
    t = positions - floor

    def near(x: np.ndarray) -> np.ndarray:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: np.ndarray) -> np.ndarray:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return _scatter_taps(
        n_in, [(floor - 1, far(1 + t)), (floor, near(t)), (floor + 1, near(1 - t)), (floor + 2, far(2 - t))]
    )


def bilinear_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out n_in): linear interpolation, two taps."""
    positions = _source_positions(n_in, n_out)
    floor = np.floor(positions).astype(int)
    t = positions - floor
    return _scatter_taps(n_in, [(floor, 1 - t), (floor + 1, t)])


def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out n_in): mean over the inputs that output cell o touches, floor(o n_in/n_out) to ceil((o+1) n_in/n_out)."""
    matrix = np.zeros((n_out, n_in), np.float32)
    for o in range(n_out):
        start, stop = o * n_in // n_out, -(-(o + 1) * n_in // n_out)
        matrix[o, start:stop] = 1 / (stop - start)
    return matrix


def resize_grid(
    x: jax.Array, size: tuple[int, int], matrix: Callable[[int, int], np.ndarray] = bicubic_matrix
) -> jax.Array:
    """Resizes the rows and columns of a grid.

    Args:
      x: (... rows cols c).
      size: new rows and columns.
      matrix: `bicubic_matrix`, `bilinear_matrix` or `area_matrix`.

    Returns:
      (... *size c) in the dtype of `x`, computed in float32; `x` itself if it has that size already.
    """
    rows, cols = x.shape[-3], x.shape[-2]
    if (rows, cols) == tuple(size):
        return x
    row_weights, col_weights = jnp.asarray(matrix(rows, size[0])), jnp.asarray(matrix(cols, size[1]))
    return jnp.einsum("yr,xq,...rqc->...yxc", row_weights, col_weights, x.astype(jnp.float32)).astype(x.dtype)
