"""A checkpoint with more rows for its vocabulary, as a run of its own; one tensor is in memory at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.conversion.tables import Rule, flatten
from vita_jax.data.vocabulary import Enlargement
from vita_jax.exchange.adapters import table_of
from vita_jax.exchange.exporting import Stored
from vita_jax.exchange.importing import seal
from vita_jax.models.language import vocabulary
from vita_jax.training.checkpoint import checkpoint_folder
from vita_jax.training.experiment import ExperimentConfig, data_folder
from vita_jax.training.param_store import ParamWriter
from vita_jax.training.portable import TOKENIZER, new_folder


def enlarge_stored(
    stored: Stored, grown: Enlargement, run_dir: str | Path, *, rows: int, initialisation: str, seed: int
) -> Path:
    """Writes the run.

    Args:
      stored: the checkpoint, with adapters, if it has any, beside its weights.
      grown: its tokenizer with new entries.
      run_dir: must not exist, or be empty.
      rows: of the embedding table and the output head.
      initialisation: of the new ones, of `vocabulary.INITIALISATIONS`.
      seed: draws random rows.

    Returns:
      The folder of the new checkpoint. It has no optimiser state.

    Raises:
      UserError: see `vocabulary.enlarge_vocabulary`; or the run cannot be written.
    """
    tables = {name: stored.params["language"][name] for name in ("embed_tokens", "lm_head")}
    new = vocabulary.enlarge_vocabulary(
        jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tables),
        [piece.sources for piece in grown.pieces],
        grown.first_id,
        rows,
        initialisation,
        jax.random.key(seed),
    )
    leaves = flatten(stored.params) | flatten({"language": new})
    # The weight tables know which parameters are stacks of layers and experts, which are copied place by place.
    stacked = {rule.path: rule for rule in table_of(stored).rules if rule.stack}
    rules = tuple(stacked.get(path) or Rule(path, path, tuple(leaf.shape)) for path, leaf in leaves.items())
    config = _config(stored, grown, run_dir, rows)
    with new_folder(run_dir) as partial:
        writer = ParamWriter(checkpoint_folder(partial, stored.stage) / str(stored.step) / "params")
        for rule in rules:
            writer.write_all(rule, leaves[rule.path])
        writer.finish(rules)
        grown.tokenizer.save(partial / TOKENIZER)
        seal(partial, config, stored.stage, stored.step)
    return checkpoint_folder(run_dir, stored.stage) / str(stored.step)


def _config(stored: Stored, grown: Enlargement, run_dir: str | Path, rows: int) -> ExperimentConfig:
    """The run's configuration: its own place and sizes, the data still where it was."""
    here = dataclasses.replace(stored.config, run_dir=str(stored.run_dir))
    language = dataclasses.replace(here.model.language, vocab_size=rows)
    return dataclasses.replace(
        here,
        run_dir=str(run_dir),
        model=dataclasses.replace(here.model, language=language),
        tokenizer=dataclasses.replace(here.tokenizer, vocab_size=grown.tokenizer.vocab_size, folder=None),
        data=dataclasses.replace(here.data, folder=str(data_folder(here))),
    )
