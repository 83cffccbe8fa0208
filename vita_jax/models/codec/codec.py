"""The whole codec: wave to codes and back (`ticodec/vqvae.py`), and its forward pass in training."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from vita_jax.errors import UserError
from vita_jax.models.codec.config import CodecConfig
from vita_jax.models.codec.encoder import Encoder
from vita_jax.models.codec.generator import Generator
from vita_jax.models.codec.quantizer import Quantizer


@struct.dataclass
class Reconstruction:
    """What training needs of a batch of crops.

    Attributes:
      wave: (b n'), decoded from the frames and vectors, quantised by the share asked for.
      quantizer_loss, consistency_loss: () float32; the former times that share.
      codes: (b t q) int32.
    """

    wave: jax.Array
    quantizer_loss: jax.Array
    consistency_loss: jax.Array
    codes: jax.Array


class Codec(nn.Module):
    """Parameters: `encoder/...`, `quantizer/...`, `generator/...`."""

    config: CodecConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, dtype=self.dtype)
        self.quantizer = Quantizer(self.config)
        self.generator = Generator(self.config, dtype=self.dtype)

    def __call__(
        self, wave: jax.Array, other_wave: jax.Array, train: bool = True, share: float | jax.Array = 1.0
    ) -> Reconstruction:
        """Encodes, quantises and decodes a crop; the vector of another crop of the utterance should be the same.

        Args:
          wave: (b n) samples in -1 .. 1.
          other_wave: (b n) a second crop of the same utterances.
          train: batch statistics in the utterance branch; the collection "updates" then holds the new running ones.
          share: () how far what is decoded has moved from what was encoded (0) to the entries chosen for it (1). The
            quantiser's loss counts by this share, too.
        """
        latent, global_vector = self.encoder(wave, train)
        quantized = self.quantizer(latent, global_vector)
        other_vector = jax.lax.stop_gradient(self.encoder.global_vector(other_wave, train))
        return Reconstruction(
            wave=self.generator(
                latent + share * (quantized.latent - latent),
                global_vector + share * (quantized.global_vector - global_vector),
            ),
            quantizer_loss=share * quantized.loss,
            consistency_loss=consistency_loss(global_vector, other_vector),
            codes=quantized.codes,
        )

    def encode(self, wave: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Whole utterances: (b n) samples -> codes (b t q), codes of the utterance (b g); int32.

        Args:
          wave: utterances of one length, or padded to one that is a multiple of the hop.
          lengths: (b,) int32 real frames; a padded row then has the codes that it has alone, and arbitrary ones behind.
        """
        latent, global_vector = self.encoder(wave, lengths=lengths)
        quantized = self.quantizer(latent, global_vector)
        return quantized.codes, quantized.global_codes

    def decode(self, codes: jax.Array, global_codes: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Codes (b t q) and codes of the utterance (b g), int32 -> (b t*hop) samples; `lengths` as in `Generator`.

        Raises:
          UserError: another number of codes per frame or per utterance than the codec has.
        """
        for name, got, want in (
            ("codes per frame", codes.shape[-1], self.config.num_quantizers),
            ("codes of the utterance", global_codes.shape[-1], self.config.num_global_codes),
        ):
            if got != want:
                raise UserError(f"{got} {name}, but this codec has {want}")
        return self.generator(self.quantizer.embed(codes), self.quantizer.embed_global(global_codes), lengths)


def consistency_loss(a: jax.Array, b: jax.Array) -> jax.Array:
    """One minus the mean cosine of the rows of (b g) and (b g); the cosine with a zero row is 0."""

    def unit(x: jax.Array) -> jax.Array:
        # The floor is under the root: fresh models give rows of zeros, where the root itself has no gradient.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-16))

    return 1 - jnp.mean(jnp.sum(unit(a) * unit(b), axis=-1))
