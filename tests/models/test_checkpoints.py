"""Names and shapes of the released checkpoints against tables and models at full size; nothing is allocated.

`checkpoint_<model>.json` lists them with `{24}` for the numbers 0 to 23.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vita_jax.conversion.tables import flatten
from vita_jax.models.vita import Vita, text_inputs, vita_1_0, vita_1_5
from vita_jax.models.vita_weights import weight_table


def expand(pattern: str) -> Iterator[str]:
    counts = [range(int(number)) for number in re.findall(r"\{(\d+)\}", pattern)]
    parts = re.split(r"\{\d+\}", pattern)
    for numbers in itertools.product(*counts):
        yield "".join(part + str(number) for part, number in zip(parts, [*numbers, ""], strict=True))


def released(model: str) -> dict[str, tuple[int, ...]]:
    text = (Path(__file__).parent / f"checkpoint_{model}.json").read_text(encoding="utf-8")
    return {name: tuple(shape) for pattern, shape in json.loads(text).items() for name in expand(pattern)}


@pytest.mark.parametrize(
    ("preset", "model", "num_tensors", "num_elements"),
    [(vita_1_0, "vita_1_0", 1815, 47_579_076_768), (vita_1_5, "vita_1_5", 1159, 8_322_947_232)],
)
def test_every_name_maps_exactly_once(preset, model, num_tensors, num_elements):
    config, shapes = preset(), released(model)
    assert len(shapes) == num_tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == num_elements
    table = weight_table(config)
    assert len(table.torch_names) == len(set(table.torch_names)) == num_tensors
    assert {name: rule.torch_shape for rule in table.rules for name in rule.names} == shapes
    inputs = text_inputs(jnp.zeros((1, 2), jnp.int32))
    variables = jax.eval_shape(Vita(config).init, jax.random.key(0), inputs)
    params = {path: leaf.shape for path, leaf in flatten(nn.unbox(variables)["params"]).items()}
    assert params == {rule.path: (*rule.stack, *rule.param_shape) for rule in table.rules}
