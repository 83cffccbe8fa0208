"""Text generation of Flamingo: the loop of `generate.py` around its own steps.

Pictures are encoded once; every new token sees the picture that the end of its prompt sees. A picture's tag cannot be
answered with: it has no picture behind it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from vita_jax.inference.generate import Generated, Params, checked_key, continue_rows
from vita_jax.inference.sampling import GREEDY, Sampler
from vita_jax.models.flamingo import Flamingo, FlamingoInputs
from vita_jax.models.language.gated_decoder import GatedCache


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_tokens", "sampler", "pad_token"))
def generate_flamingo(
    model: Flamingo,
    params: Params,
    inputs: FlamingoInputs,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    sampler: Sampler = GREEDY,
    key: jax.Array | None = None,
    pad_token: int = 0,
) -> Generated:
    """Continues a batch of prompts in one compiled call; arguments as in `generate_from_embeds`.

    Args:
      model: the whole model.
      params: its parameters.
      inputs: b prompts, one segment per row, padded on either side.
    """
    key = checked_key(max_new_tokens, sampler, key)
    variables = {"params": params}

    def step(tokens: jax.Array, cache: GatedCache) -> tuple[jax.Array, GatedCache]:
        return model.apply(variables, tokens, cache, method="decode_step")

    num_slots = inputs.tokens.shape[1] + max_new_tokens
    logits, cache = model.apply(variables, inputs, num_slots, method="prefill")
    return continue_rows(
        step,
        logits,
        cache,
        empty=~jnp.any(inputs.segment_ids > 0, axis=1),
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampler=sampler,
        key=key,
        pad_token=pad_token,
    )
