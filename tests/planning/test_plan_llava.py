"""LLaVA at full size: valid on its slices, parameters as published, memory by formula and by the compiler."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

from experiments.llava.curriculum import SLICES
from experiments.plans import stage_files
from tests.planning.test_plan import COMPILE, open_gpus
from vita_jax.config import load_config_file
from vita_jax.parallel.mesh import abstract_mesh
from vita_jax.planning.batches import abstract_batch
from vita_jax.planning.compiled import plan_for
from vita_jax.planning.estimate import component_parameters, used_parameters
from vita_jax.planning.report import format_result
from vita_jax.planning.search import estimate_stage
from vita_jax.training.experiment import validate

SCALES = ("7b", "13b")
ON = [name for name in SLICES if name != "one"]
# arXiv 2304.08485 and 2310.03744: rate, side of a picture, positions that it takes.
PUBLISHED = {
    "v1_stage_1": (2e-3, 224, 256),
    "v1_stage_2": (2e-5, 224, 256),
    "v1_5_stage_1": (1e-3, 336, 576),
    "v1_5_stage_2": (2e-5, 336, 576),
    "scienceqa": (2e-5, 224, 256),
}
FILES = {name: f"experiments/llava/{name}.py" for name in PUBLISHED}


@pytest.mark.parametrize(("name", "scale"), list(itertools.product(FILES, SCALES)))
def test_every_stage_is_valid_on_its_slices(name, scale):
    rate, side, tokens = PUBLISHED[name]
    for slice in ON:
        config = load_config_file(FILES[name], {"slice": slice, "scale": scale})
        validate(config, open_gpus(slice).num_devices)
        (stage,) = config.stages
        assert (stage.learning_rate, config.image.image_size) == (rate, side)
        assert config.model.tokens_per_tile == tokens and stage.row_tiles * tokens < stage.row_length
        assert not any("vision" in pattern for pattern in stage.trainable)
        assert stage.template == ("plain" if "stage_1" in name else None) and config.template == "vicuna_v1"
        assert config.data.cut_text
        assert config.image.aspect == ("pad" if name == "v1_5_stage_2" else "square")
    smoke = load_config_file(FILES[name], {"size": "smoke", "scale": scale})
    validate(smoke, 1)
    assert smoke.stages[0].steps == 3


def test_the_table_of_plans_has_all_stages():
    found = [(planned.model, planned.path.stem) for planned in stage_files()]
    assert [entry for entry in found if entry[0].startswith("LLaVA-1.5-13B")] == [
        ("LLaVA-1.5-13B", "v1_5_stage_1"),
        ("LLaVA-1.5-13B", "v1_5_stage_2"),
    ]
    assert len(found) == len(set(found)) == 12 + 8 + 3


@pytest.mark.parametrize(
    ("scale", "projector", "language"), [("7b", 20_979_712, 6_738_415_616), ("13b", 31_467_520, 13_015_864_320)]
)
def test_parameters_are_those_of_the_published_models(scale, projector, language):
    for name, trained in (("v1_5_stage_1", 0), ("v1_5_stage_2", language)):
        config = load_config_file(FILES[name], {"scale": scale, "slice": "v5p:2x2x2"})
        _, planned = plan_for(config, config.stages[0], abstract_mesh(config.mesh, 8))
        assert component_parameters(planned) == {
            "vision": (303_507_456, 0),
            "projector": (projector, projector),
            "language": (language, trained),
        }
        assert len(used_parameters(planned, config.stages[0])) == len(planned.shapes)


@pytest.mark.parametrize("name", ["v1_5_stage_1", "v1_5_stage_2"])
def test_state_and_batch_by_formula(name):
    config = load_config_file(FILES[name], {"slice": "v5e:4x8"})
    (stage,) = config.stages
    result = estimate_stage(config, stage, open_gpus("v5e:4x8"))
    least = sum(4 * (number + 2 * trained) for number, trained in result.parameters.values()) / 32
    assert least <= result.state.total <= 1.06 * least + 64 * 2**20
    assert result.fits and "language" in format_result(result)
    shapes = abstract_batch(config, stage, abstract_mesh(config.mesh, 32))
    assert shapes["tiles"].shape == (64, stage.row_tiles, 336, 336, 3)


@pytest.mark.slow
def test_instruction_tuning_of_the_larger_model_fits_the_smallest_chips():
    """By the TPU compiler, in a process of its own, which it locks."""
    command = COMPILE.replace('{"slice": sys.argv[2]}', '{"slice": sys.argv[2], "scale": sys.argv[3]}')
    assert command != COMPILE
    arguments = [sys.executable, "-c", command, FILES["v1_5_stage_2"], "v5e:4x8", "13b"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["fits"], said["refusal"]
    assert 1.0 <= said["arguments"] / said["state"] < 1.2
