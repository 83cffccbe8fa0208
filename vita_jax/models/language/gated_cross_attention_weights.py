"""Names and layout of gated cross-attention in open_flamingo's checkpoints."""

from __future__ import annotations

from dataclasses import replace

from vita_jax.conversion import tables
from vita_jax.errors import UnsupportedOption
from vita_jax.models.connectors.perceiver_resampler_weights import feed_forward_rules
from vita_jax.models.language.gated_cross_attention import GatedCrossAttentionConfig


def weight_table(
    config: GatedCrossAttentionConfig, torch: str = "", numbers: tuple[int, ...] | None = None
) -> tables.Table:
    """The table of one block, or of a stack of them.

    Args:
      config: of the blocks.
      torch: what stands before the names; of a stack with `{i}`.
      numbers: what `{i}` counts, one number per block; None for a single block.

    Raises:
      UnsupportedOption: blocks without gates, which no checkpoint has.
    """
    if not config.gated:
        raise UnsupportedOption(
            "cross_attention.gated=false: open_flamingo's checkpoints have gates; it cannot be exported"
        )
    c, layers = config, None if numbers is None else len(numbers)
    d, heads, wide = (c.hidden_size,), (c.num_heads, c.head_dim), c.feed_forward_multiple * c.hidden_size
    stacked = {"bias": False, "layers": layers}
    rules = (
        tables.copy(f"{torch}attn_gate", "attn_gate", (), (1,), layers=layers),
        tables.copy(f"{torch}ff_gate", "ff_gate", (), (1,), layers=layers),
        *tables.norm(f"{torch}attn.norm", "attn_norm", c.hidden_size, layers=layers),
        *tables.linear(f"{torch}attn.to_q", "q_proj", d, heads, **stacked),
        *tables.linear(f"{torch}attn.to_kv", "kv_proj", (c.media_size,), (2, *heads), **stacked),
        *tables.linear(f"{torch}attn.to_out", "o_proj", heads, d, **stacked),
        *feed_forward_rules(f"{torch}ff", "feed_forward", c.hidden_size, wide, layers),
    )
    return tables.Table(tuple(replace(rule, numbers=numbers) for rule in rules))
