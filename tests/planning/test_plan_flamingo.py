"""Flamingo at full size: parameters as published, memory and work by formula."""

from __future__ import annotations

import pytest

from experiments.plans import stage_files
from tests.planning.test_plan import open_gpus
from vita_jax.config import load_config_file
from vita_jax.parallel.mesh import abstract_mesh
from vita_jax.planning.batches import abstract_batch
from vita_jax.planning.compiled import plan_for
from vita_jax.planning.estimate import component_parameters, used_parameters
from vita_jax.planning.report import format_result
from vita_jax.planning.search import estimate_stage
from vita_jax.training.flops import stage_flops

FILE = "experiments/flamingo/pretrain.py"
# Gated blocks, and the language model with its three new tokens.
PUBLISHED = {
    "3b": (881_000_496, 1_345_435_648),
    "4b": (897_744_928, 2_701_575_680),
    "9b": (1_115_815_952, 6_738_440_192),
}


@pytest.mark.parametrize("scale", PUBLISHED)
def test_what_trains(scale):
    """Resampler, blocks and the embedding table, of which the loss lets two rows learn."""
    gated, language = PUBLISHED[scale]
    config = load_config_file(FILE, {"scale": scale})
    _, planned = plan_for(config, config.stages[0], abstract_mesh(config.mesh, 8))
    table = 32_003 * config.model.language.hidden_size
    assert component_parameters(planned) == {
        "vision": (303_179_776, 0),
        "resampler": (63_019_008, 63_019_008),
        "language": (language, table),
        "cross_attention": (gated, gated),
    }
    assert len(used_parameters(planned, config.stages[0])) == len(planned.shapes)


def test_state_batch_and_work_by_formula():
    config = load_config_file(FILE, {"slice": "v5e:4x8", "video": "true"})
    (stage,) = config.stages
    result = estimate_stage(config, stage, open_gpus("v5e:4x8"))
    least = sum(4 * (number + 2 * trained) for number, trained in result.parameters.values()) / 32
    assert least <= result.state.total <= 1.06 * least + 64 * 2**20
    assert "language" in format_result(result)
    shapes = abstract_batch(config, stage, abstract_mesh(config.mesh, 32))
    assert shapes["pages/images"].shape == (2048, 6, 1, 224, 224, 3)
    assert shapes["clips/images"].shape == (256, 8, 8, 224, 224, 3)
    parts = stage_flops(config, stage).parts
    tokens = sum(data.batch_size * data.row_length for data in stage.sets)
    # Frozen layers pass gradients on to the blocks: 4 FLOPs a parameter and token. Norms have no products.
    layers = 6_738_440_192 - 2 * 32_003 * 4096
    assert parts["language"] == pytest.approx(4 * layers * tokens, rel=1e-3)
    # A frozen tower has a forward pass alone, and none in front of it.
    pictures = sum(data.batch_size * data.row_images * data.frames for data in stage.sets)
    assert parts["vision"] == pytest.approx(2 * 302_000_000 * 257 * pictures, rel=0.01)


def test_all_scales_are_planned():
    planned = [one for one in stage_files() if one.model.startswith("Flamingo")]
    assert [one.model for one in planned] == ["Flamingo-3B", "Flamingo-4B", "Flamingo-9B"]
    assert all(one.path.is_file() and len(one.slices) == 3 for one in planned)
