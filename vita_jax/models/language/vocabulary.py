"""More rows for the embedding table and the output head of a language model, after its tokenizer has grown.

Axes: v old rows, w new rows, d model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError

# How the rows of new pieces start:
#   pieces   the mean of the old rows of the pieces it was spelt with before: the model already knows them
#   average  the mean of all old rows
#   random   normal, with the mean and standard deviation of each column of the old rows
INITIALISATIONS = ("pieces", "average", "random")
# New pieces whose old rows are gathered at one time.
_CHUNK = 1024


def padded_rows(number: int, multiple: int, at_least: int = 0) -> int:
    """Rows of a table for `number` entries: a multiple of `multiple`, so that it can be cut over devices.

    With 16 the 51,747 entries of VITA-1.0 take its 51,760 rows. Raises UserError if `multiple` is not positive.
    """
    if multiple < 1:
        raise UserError(f"multiple of rows {multiple} must be at least 1")
    return max(at_least, -(-number // multiple) * multiple)


def enlarge_rows(
    table: jax.Array,
    sources: Sequence[Sequence[int]],
    first: int,
    num_rows: int,
    initialisation: str = "pieces",
    key: jax.Array | None = None,
) -> jax.Array:
    """A table with new rows.

    Args:
      table: (v d); its first `first` rows are in use, any others are padding.
      sources: for every new piece the old rows that spelt it.
      first: row of the first new piece; rows before it do not change.
      num_rows: w, at least v and `first + len(sources)`.
      initialisation: a name of `INITIALISATIONS`.
      key: for "random".

    Returns:
      (w d) in the dtype of `table`. Rows behind the new pieces keep what they held; more of them hold the mean of the
      rows in use.

    Raises:
      UserError: sizes or sources that do not fit, an unknown initialisation, or "random" without a key.
    """
    (v, d), number = table.shape, len(sources)
    if initialisation not in INITIALISATIONS:
        raise UserError(f"initialisation {initialisation!r} is unknown; expected one of {', '.join(INITIALISATIONS)}")
    if not 1 <= first <= v:
        raise UserError(f"first new row {first} must be between 1 and the {v} rows of the table")
    if num_rows < max(v, first + number):
        raise UserError(f"{num_rows} rows are too few: {v} are there, and {number} new ones start at row {first}")
    used = table[:first].astype(jnp.float32)
    mean = jnp.mean(used, axis=0)
    if initialisation == "pieces":
        _check_sources(sources, first)
        rows = _means(used, sources)
    elif initialisation == "average":
        rows = jnp.broadcast_to(mean, (number, d))
    elif key is None:
        raise UserError("initialisation 'random' needs a random key")
    else:
        rows = mean + jnp.std(used, axis=0) * jax.random.normal(key, (number, d))
    spare = jnp.broadcast_to(mean, (num_rows - max(v, first + number), d))
    parts = [table[:first], rows, table[first + number :], spare]
    return jnp.concatenate([part.astype(table.dtype) for part in parts])


def _check_sources(sources: Sequence[Sequence[int]], first: int) -> None:
    for number, ids in enumerate(sources):
        if not ids or not all(0 <= id_ < first for id_ in ids):
            raise UserError(
                f"new piece {number} comes from rows {list(ids)}; it needs at least one of 0 to {first - 1}"
            )


def _means(table: jax.Array, sources: Sequence[Sequence[int]]) -> jax.Array:
    """Mean row of each group of ids: (n d)."""
    means = [jnp.zeros((0, table.shape[1]))]
    for start in range(0, len(sources), _CHUNK):
        group = sources[start : start + _CHUNK]
        lengths = np.array([len(ids) for ids in group])
        rows = table[np.concatenate([np.asarray(ids) for ids in group])]
        sums = jax.ops.segment_sum(rows, np.repeat(np.arange(len(group)), lengths), len(group))
        means.append(sums / lengths[:, None])
    return jnp.concatenate(means)


def enlarge_vocabulary(
    language: Mapping[str, Any],
    sources: Sequence[Sequence[int]],
    first: int,
    num_rows: int,
    initialisation: str = "pieces",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """A decoder's parameters with new rows in `embed_tokens/embedding` (v d) and `lm_head/kernel` (d v).

    Args and errors: as `enlarge_rows`; the tables draw different random rows. All other parameters are passed on as
    they are.

    Raises:
      UserError: also if one of the two has adapters, which are made for the old size.
    """
    for name, leaf in (("embed_tokens", "embedding"), ("lm_head", "kernel")):
        if set(language[name]) != {leaf}:
            extra = ", ".join(sorted(set(language[name]) - {leaf}))
            raise UserError(f"{name} has {extra} beside {leaf}; merge the adapters before enlarging the vocabulary")
    keys = (None, None) if key is None else jax.random.split(key)
    grown = [
        enlarge_rows(table, sources, first, num_rows, initialisation, table_key)
        for table, table_key in zip(
            (language["embed_tokens"]["embedding"], language["lm_head"]["kernel"].T), keys, strict=True
        )
    ]
    return {**language, "embed_tokens": {"embedding": grown[0]}, "lm_head": {"kernel": grown[1].T}}
