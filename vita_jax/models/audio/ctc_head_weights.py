"""Name and layout of the CTC head's weights: WeNet's, as no public VITA checkpoint holds one."""

from __future__ import annotations

from vita_jax.conversion.tables import Table, linear


def weight_table(hidden_size: int, vocab_size: int) -> Table:
    """The head's names, beside the encoder's in a checkpoint of the stage."""
    return Table(linear("ctc_lo", "ctc_lo", (hidden_size,), (vocab_size,)))
