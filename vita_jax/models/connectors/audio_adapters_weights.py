"""Names and layout of published audio adapter weights."""

from __future__ import annotations

from vita_jax.conversion import tables
from vita_jax.models.connectors.audio_adapters import AudioAdapterConfig

# How often a batch norm has been called; nothing is computed from it.
COUNTER = r"bn\d\.num_batches_tracked"


def weight_table(config: AudioAdapterConfig) -> tables.Table:
    """Names of the module itself; in a VITA checkpoint they follow `model.audio_encoder.adpter.` (spelled so)."""
    output = (config.output_size,)
    if config.kind == "linear":
        return tables.Table(tables.linear("adpter", "project", (config.input_size,), output))
    widths = (config.input_size, *config.conv_widths)
    rules: list[tables.Rule] = []
    batch_norms = len(config.conv_widths) == 2 or config.norm == "batch"
    # A single convolution is number 2 in the checkpoints.
    first = 3 - len(config.conv_widths)
    for number, inputs, outputs in zip(range(first, 3), widths, widths[1:], strict=False):
        conv, norm = f"conv1d{number}", f"bn{number}"
        rules += tables.conv1d(conv, conv, (outputs, inputs, config.kernel_size))
        rules += tables.norm(norm, norm, outputs)
        if batch_norms:
            rules += [tables.copy(f"{norm}.{x}", f"{norm}/{x}", (outputs,)) for x in ("running_mean", "running_var")]
    rules += tables.linear("project", "project", widths[-1:], output)
    return tables.Table(tuple(rules), ignore=(COUNTER,) if batch_norms else ())
