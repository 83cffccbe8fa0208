"""Names and layout of published projector weights."""

from __future__ import annotations

from dataclasses import replace

from vita_jax.conversion import tables
from vita_jax.errors import UnsupportedOption
from vita_jax.models.connectors.projectors import TOKEN_GROUP, ProjectorConfig

# Where a VITA checkpoint keeps the projector.
VITA_PREFIX = "model.mm_projector."


def weight_table(config: ProjectorConfig) -> tables.Table:
    """Names relative to `VITA_PREFIX`, which is also in front of them in a separate `mm_projector` file.

    Raises:
      UnsupportedOption: a width between the layers that no public checkpoint has.
    """
    if config.hidden_size is not None:
        raise UnsupportedOption(
            f"projector.hidden_size {config.hidden_size}: public checkpoints have no projectors with a width of their "
            "own between the layers; only runs of this program hold it, without adapters, int8 weights and exports"
        )
    c, d = (config.input_size,), (config.output_size,)
    match config.kind:
        case "identity":
            rules: tuple[tables.Rule, ...] = ()
        case "linear":
            rules = tuple(
                replace(rule, torch=rule.torch.removeprefix(".")) for rule in tables.linear("", "linear", c, d)
            )
        case "mlp":
            rules = tuple(
                rule
                for i in range(config.mlp_depth)
                for rule in tables.linear(f"{2 * i}", f"layers_{2 * i}", c if i == 0 else d, d)
            )
        case "spp":
            rules = (
                *tables.linear("linear_0", "linear_0", c, c),
                *tables.linear("linear_1", "linear_1", c, d),
                *tables.linear("linear_2", "linear_2", d, d),
            )
        case "ldp":
            rules = _ldp_rules(config)
        case _:
            rules = tables.linear("linear", "linear", (TOKEN_GROUP * config.input_size,), d)
    return tables.Table(rules)


def _ldp_rules(config: ProjectorConfig) -> tuple[tables.Rule, ...]:
    c, d, squeeze = config.input_size, config.output_size, config.squeeze_size
    rules = [*tables.linear("model.mlp.1", "mlp_1", (c,), (d,)), *tables.linear("model.mlp.3", "mlp_3", (d,), (d,))]
    for i in (1, 2):
        block, path = f"model.mb_block.{i}.block", f"block_{i}"
        rules += [
            tables.Rule(f"{block}.0.0.weight", f"{path}/depthwise_kernel", (d, 1, 3, 3), permute=(2, 3, 1, 0)),
            *tables.norm(f"{block}.0.1", f"{path}/norm1", d),
            *tables.linear_1x1(f"{block}.1.fc1", f"{path}/squeeze", d, squeeze),
            *tables.linear_1x1(f"{block}.1.fc2", f"{path}/excite", squeeze, d),
            *tables.linear_1x1(f"{block}.2.0", f"{path}/pointwise", d, d, bias=False),
            *tables.norm(f"{block}.2.1", f"{path}/norm2", d),
        ]
    return tuple(rules)
