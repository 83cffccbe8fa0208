"""Activation functions by the names that published configurations use."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vita_jax.errors import UserError


def gelu_exact(x: jax.Array) -> jax.Array:
    """x Phi(x), by the error function."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def squared_relu(x: jax.Array) -> jax.Array:
    """relu(x)^2 (So et al. 2021)."""
    return jnp.square(jax.nn.relu(x))


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """relu6(x + 3) / 6."""
    return jnp.clip(x + 3.0, 0.0, 6.0) / 6.0


def hard_swish(x: jax.Array) -> jax.Array:
    """x relu6(x + 3) / 6."""
    return x * hard_sigmoid(x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu_exact,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "squared_relu": squared_relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of that name.

    Raises:
      UserError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
