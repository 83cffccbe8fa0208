"""The CTC head of stage 2.1: one linear layer on the encoder's frames (25 a second), before the adapter.

The public code of VITA has no CTC training; names and conventions are those of WeNet, which it descends from.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from vita_jax.errors import UserError
from vita_jax.nn.layers import Dense


@dataclass(frozen=True)
class CtcTraining:
    """How the head and its encoder are trained.

    Attributes:
      flat_start_steps: steps that begin with the characters of a clip spread evenly over its frames; 0 for none.
      spec_augment: blanks out stripes of the features, which a long training needs.
      feature_noise: how far patches of the features are moved up and down, as a standard deviation of the logarithm of
        energy in the worst case; each row draws its own strength. Recordings that passed through something, a telephone
        or a codec, differ from clean ones in such patches.
      token_weight: of a second CTC loss, behind the adapter: its tokens are to say the transcript in tokens of the
        language model, of which the rows of that model's embedding table are the scores. Spoken words then come in near
        where they lie when they are written. 0 = none.
    """

    flat_start_steps: int = 0
    spec_augment: bool = True
    feature_noise: float = 0.0
    token_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("feature_noise", "token_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} must be at least 0")


class CtcHead(nn.Module):
    """Logits over a vocabulary with a blank. Parameters `ctc_lo/{kernel (d v), bias (v)}`."""

    vocab_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden: (b s d) -> (b s v) float32, for `vita_jax.ops.ctc`."""
        logits = Dense((self.vocab_size,), ("embed", "vocab"), dtype=self.dtype, name="ctc_lo")(hidden)
        return logits.astype(jnp.float32)
