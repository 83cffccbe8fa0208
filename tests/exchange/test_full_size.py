"""Full size, with shapes alone: elements by part, and what config.json and shapes tell of a model.

Every name and shape is compared with the released ones in `tests/models/test_checkpoints.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from vita_jax.conversion.tables import compare
from vita_jax.models.vita import vita_1_0, vita_1_5
from vita_jax.models.vita_hf import config_from_hf, config_to_hf
from vita_jax.models.vita_weights import weight_table

PARTS = {
    "vita_1_5": {
        "language": 7_615_616_512,
        "vision": 304_012_288,
        "projector": 27_532_288,
        "audio/encoder": 357_950_624,
        "audio/adapter": 17_835_520,
    },
    "vita_1_0": {
        "language": 46_864_666_624,
        "vision": 304_012_288,
        "projector": 33_562_624,
        "audio/encoder": 357_950_624,
        "audio/adapter": 18_884_608,
    },
}
TENSORS = {"vita_1_5": 1159, "vita_1_0": 1815}
CONFIGS = {"vita_1_5": vita_1_5, "vita_1_0": vita_1_0}


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    return {name: rule.torch_shape for rule in weight_table(config).rules for name in rule.names}


@pytest.mark.parametrize("model", list(CONFIGS))
def test_counts(model):
    table = weight_table(CONFIGS[model]())
    assert len(table.torch_names) == len(set(table.torch_names)) == TENSORS[model]
    counts = Counter()
    for rule in table.rules:
        parts = rule.path.split("/")
        counts["/".join(parts[: 2 if parts[0] == "audio" else 1])] += len(rule.names) * math.prod(rule.torch_shape)
    assert counts == PARTS[model]


@pytest.mark.parametrize("model", list(CONFIGS))
def test_the_configuration_is_told_by_config_and_shapes(model):
    config = CONFIGS[model]()
    fields = config_to_hf(config)
    del fields["vision_config"]  # the released config has none
    found = config_from_hf(fields, shapes_of(config))
    # How a model is trained is not in the files.
    assert replace(found.vision, drop_path_rate=0.1, remat=config.vision.remat) == config.vision
    assert replace(found.language, remat=config.language.remat) == config.language
    assert (found.projector, found.audio) == (config.projector, config.audio)


@pytest.mark.parametrize("rows", [151_665, 152_064])
def test_both_numbers_of_vocabulary_rows(rows):
    config = vita_1_5()
    shapes = shapes_of(config) | {name: (rows, 3584) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    found = config_from_hf(config_to_hf(config), shapes)
    assert found.language.vocab_size == rows
    compare(weight_table(found), shapes).raise_any()


def test_the_variant_with_a_state_head_and_prompts():
    config = vita_1_5()
    shapes = shapes_of(config) | {"predictor_head.weight": (3, 3584), "predictor_head.bias": (3,)}
    shapes["model.audio_encoder.prompt_embeddings.weight"] = (25, 3584)
    found = config_from_hf(config_to_hf(config), shapes)
    assert found.audio.num_prompt_tokens == 25 and found.state_head.num_classes == 3
    compare(weight_table(found), shapes).raise_any()
