"""What a language model and its tokenizer make of each of two languages, in figures that do not depend on how a text is
cut into tokens.

Axes: b rows, s positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.studies.arms import SEED
from experiments.studies.bilingual_vocabulary.texts import HELD_OUT, LANGUAGES, characters_of, held_out_turns
from vita_jax.data.loader import SourceConfig, make_loader
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.vocabulary import count_tokens
from vita_jax.errors import UserError
from vita_jax.evaluation.bootstrap import interval
from vita_jax.evaluation.items import ITEMS, Item, read_items
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.ops.losses import position_scores, shift_labels
from vita_jax.training.experiment import ExperimentConfig, build_model, data_folder, example_context
from vita_jax.training.families import Model
from vita_jax.training.objectives import model_inputs

GROUP = "text"


def in_language(group: Mapping[str, Any], items: Sequence[Item], language: str) -> dict[str, Any]:
    """The questions of one language of a group.

    Args:
      group: figures of a group, see `evaluation.figures`.
      items: the benchmark.
      language: of its items.

    Returns:
      {"title", "accuracy" (mean over kinds), "low", "high" (95 %, by bootstrap), "n", "outcomes"}.

    Raises:
      UserError: a kind has no question in that language.
    """
    asked = {item.id for item in items if item.language == language}
    outcomes = {
        kind: {name: right for name, right in found.items() if name in asked}
        for kind, found in group["outcomes"].items()
    }
    parts = [np.array(list(found.values()), float) for found in outcomes.values()]
    low, high = interval(parts, SEED)
    return {
        "title": group["title"],
        "accuracy": float(np.mean([part.mean() for part in parts])),
        "low": low,
        "high": high,
        "n": sum(map(len, parts)),
        "outcomes": outcomes,
    }


@functools.partial(jax.jit, static_argnames="model")
def text_nats(model: Model, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    """Loss of all text of a batch of rows (b s), what the template writes included: () float32, in nats."""
    hidden = model.apply({"params": params}, model_inputs(batch))
    targets = shift_labels(batch["tokens"], batch["segment_ids"])
    losses, _ = position_scores(hidden, params["language"]["lm_head"]["kernel"], targets)
    return losses.sum()


def bits_per_character(config: ExperimentConfig, params: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> float:
    """Loss of the held-out records of a language in bits, divided by the characters of their turns.

    What the template writes between turns counts as loss and not as characters; it is the same for all tokenizers.

    Raises:
      UserError: a record does not fit into a row of the stage.
    """
    (stage,), folder, model = config.stages, data_folder(config), build_model(config)
    batches = make_loader(
        [SourceConfig(str(folder / f"{HELD_OUT}{name}"))],
        example_context(config, tokenizer),
        batch_size=stage.batch_size,
        row_length=stage.row_length,
        row_tiles=0,
        seed=0,
        reading=config.data.reading,
        num_epochs=1,
        shuffle=False,
        max_bad_fraction=0,
        drop_remainder=False,
    )
    nats = sum(float(text_nats(model, params, batch)) for batch in batches)
    whole = characters_of(folder, f"{HELD_OUT}{name}")
    if batches.counts.seen != whole["records"]:
        raise UserError(f"{batches.counts.seen} of {whole['records']} held-out records were read; build the data again")
    return nats / math.log(2) / whole["characters"]


def measure(config: ExperimentConfig, params: Mapping[str, Any], tokenizer: Tokenizer, per_kind: int) -> dict[str, Any]:
    """Figures of both languages.

    Args:
      per_kind: questions of each kind, half of them in each language; a multiple of 8.

    Returns:
      language -> {"answers": see `in_language`, "bits": per character of held-out text, "tokens": per character of the
      same}.
    """
    answered = evaluate_params(config, params, tokenizer, groups=(GROUP,), limit=per_kind)["groups"][GROUP]
    items = read_items(benchmark_folder(config) / ITEMS)
    return {
        name: {
            "answers": in_language(answered, items, language),
            "bits": bits_per_character(config, params, tokenizer, name),
            "tokens": count_tokens(tokenizer, held_out_turns(data_folder(config), name)).per_character,
        }
        for name, language in LANGUAGES.items()
    }
