"""The codec's vector quantiser: groups, residual layers, and the codes of the utterance (`ticodec/models.py`).

Codebooks are ordinary parameters, moved by the loss as in the original. What each of them was asked for is left in the
collection "codebook_inputs", from which `codebook_training` can move them by averages instead.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.models.codec.config import CodecConfig

INPUTS = "codebook_inputs"  # collection: codebook -> (vectors (... d), codes (...)) of the last call


def nearest_codes(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the nearest entry, the lowest among equals: (... d), (n d) -> (...) int32.

    The distance is taken as |x|^2 + |e|^2 - 2 x e, whose rounding the published codes were made with.
    """
    distance = (
        jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        + jnp.sum(jnp.square(codebook), axis=-1)
        - 2 * jnp.einsum("...d,nd->...n", x, codebook)
    )
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


@struct.dataclass
class Quantized:
    """What the quantiser makes of a batch.

    Attributes:
      latent: (b t c), the chosen entries, with the gradient of what went in.
      global_vector: (b g), the same of the utterance's vectors.
      codes: (b t q) int32, layer by layer, group by group.
      global_codes: (b n) int32.
      loss: () float32.
    """

    latent: jax.Array
    global_vector: jax.Array
    codes: jax.Array
    global_codes: jax.Array
    loss: jax.Array


class Quantizer(nn.Module):
    """Parameters: `codebook_{layer}_{group}` (codes c/groups), `global_codebook_{j}` (codes g/n)."""

    config: CodecConfig

    def setup(self) -> None:
        c = self.config

        def table(name: str, width: int) -> jax.Array:
            def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
                return jax.random.uniform(key, shape, dtype, -1 / c.num_codes, 1 / c.num_codes)

            axes = nn.with_logical_partitioning(init, ("codebook", None))
            return self.param(name, axes, (c.num_codes, width), jnp.float32)

        width, global_width = c.latent_dim // c.num_code_groups, c.global_dim // c.num_global_codes
        self.codebooks = [
            [table(f"codebook_{layer}_{group}", width) for group in range(c.num_code_groups)]
            for layer in range(c.num_residual_layers)
        ]
        self.global_codebooks = [table(f"global_codebook_{j}", global_width) for j in range(c.num_global_codes)]

    def __call__(self, latent: jax.Array, global_vector: jax.Array) -> Quantized:
        """latent: (b t c), global_vector: (b g) -> `Quantized`; computed in float32."""
        residual = latent.astype(jnp.float32)
        total, losses, codes = jnp.zeros_like(residual), [], []
        for layer, tables in enumerate(self.codebooks):
            chosen, layer_codes, loss = self._nearest(residual, tables, f"codebook_{layer}_")
            total, residual = total + chosen, residual - chosen
            codes.append(layer_codes)
            losses.append(loss)
        global_chosen, global_codes, global_loss = self._nearest(
            global_vector.astype(jnp.float32), self.global_codebooks, "global_codebook_"
        )
        return Quantized(
            latent=total,
            global_vector=global_chosen,
            codes=jnp.concatenate(codes, axis=-1),
            global_codes=global_codes,
            loss=sum(losses) / len(losses) + global_loss,
        )

    def _nearest(self, x: jax.Array, tables: list[jax.Array], name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x: (... d) in one slice per table -> chosen entries (... d), codes (... tables), loss ()."""
        c = self.config
        slices = jnp.split(x, len(tables), axis=-1)
        codes = [nearest_codes(part, table) for part, table in zip(slices, tables, strict=True)]
        for j, asked in enumerate(zip(slices, codes, strict=True)):
            self.sow(INPUTS, f"{name}{j}", asked, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        chosen = jnp.concatenate([table[index] for table, index in zip(tables, codes, strict=True)], axis=-1)
        stop = jax.lax.stop_gradient
        loss = c.codebook_weight * jnp.mean(jnp.square(chosen - stop(x)))
        loss = loss + c.commitment_weight * jnp.mean(jnp.square(stop(chosen) - x))
        return x + stop(chosen - x), jnp.stack(codes, axis=-1), loss

    def embed(self, codes: jax.Array) -> jax.Array:
        """Frames of codes: (b t q) int32 -> (b t c)."""
        groups = self.config.num_code_groups
        layers = [
            jnp.concatenate([table[codes[..., r * groups + g]] for g, table in enumerate(tables)], axis=-1)
            for r, tables in enumerate(self.codebooks)
        ]
        return sum(layers[1:], start=layers[0])

    def embed_global(self, codes: jax.Array) -> jax.Array:
        """The utterance's vector of its codes: (b n) int32 -> (b g)."""
        return jnp.concatenate([table[codes[:, j]] for j, table in enumerate(self.global_codebooks)], axis=-1)
