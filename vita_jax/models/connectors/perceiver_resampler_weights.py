"""Names and layout of the resampler's weights in open_flamingo's checkpoints."""

from __future__ import annotations

from vita_jax.conversion import tables
from vita_jax.errors import UnsupportedOption
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig

# Where a whole checkpoint keeps it.
FLAMINGO_PREFIX = "perceiver."


def feed_forward_rules(
    torch: str, path: str, size: int, hidden_size: int, layers: int | None
) -> tuple[tables.Rule, ...]:
    """Rules of a `NormedFeedForward`, which is a sequence of modules there: norm, linear, activation, linear."""
    return (
        *tables.norm(f"{torch}.0", f"{path}/norm", size, layers=layers),
        *tables.linear(f"{torch}.1", f"{path}/up", (size,), (hidden_size,), bias=False, layers=layers),
        *tables.linear(f"{torch}.3", f"{path}/down", (hidden_size,), (size,), bias=False, layers=layers),
    )


def weight_table(config: ResamplerConfig) -> tables.Table:
    """Names relative to `FLAMINGO_PREFIX`. Raises UnsupportedOption for a resampler that has none there."""
    if config.kind != "perceiver":
        raise UnsupportedOption(
            f"resampler.kind {config.kind!r}: open_flamingo's checkpoints hold Perceivers alone; it cannot be exported"
        )
    d, layers, heads = config.hidden_size, config.num_layers, (config.num_heads, config.head_dim)
    attention, path = "layers.{i}.0", "layers/attention"
    stacked = {"bias": False, "layers": layers}
    rules = [
        tables.copy("latents", "latents", (config.num_latents, d)),
        *tables.norm(f"{attention}.norm_media", f"{path}/norm_media", d, layers=layers),
        *tables.norm(f"{attention}.norm_latents", f"{path}/norm_latents", d, layers=layers),
        *tables.linear(f"{attention}.to_q", f"{path}/q_proj", (d,), heads, **stacked),
        *tables.linear(f"{attention}.to_kv", f"{path}/kv_proj", (d,), (2, *heads), **stacked),
        *tables.linear(f"{attention}.to_out", f"{path}/o_proj", heads, (d,), **stacked),
        *feed_forward_rules("layers.{i}.1", "layers/feed_forward", d, config.feed_forward_multiple * d, layers),
        *tables.norm("norm", "norm", d),
    ]
    if config.max_frames:
        rules.append(tables.copy("frame_embs", "frame_embedding", (config.max_frames, d)))
    if config.max_media:
        shape = (config.max_media, d)
        rules.append(tables.copy("media_time_embs", "media_embedding", shape, (config.max_media, 1, d)))
    return tables.Table(tuple(rules))
