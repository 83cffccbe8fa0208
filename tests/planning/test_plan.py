"""Plans: what is exact is compared with a compiled program, what is estimated with hand-computed values."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import jax
import pytest

from experiments.vita_1_0 import curriculum as vita_1_0
from experiments.vita_1_5 import curriculum as vita_1_5
from tests.training.tiny import experiment, stage
from vita_jax import plan
from vita_jax.config import load_config_file
from vita_jax.parallel.mesh import MeshConfig, abstract_mesh, make_mesh
from vita_jax.planning.batches import abstract_batch
from vita_jax.planning.compiled import _refused, compile_stage, plan_for
from vita_jax.planning.estimate import component_parameters, state_bytes, step_time
from vita_jax.planning.report import format_result, format_table, mesh_text
from vita_jax.planning.search import estimate_stage, factorisations, meshes, plan_on, search
from vita_jax.planning.topology import open_topology, parse_topology
from vita_jax.training.experiment import validate

STAGES_1_5 = ("stage_1_1", "stage_1_2", "stage_1_3", "stage_2_1a", "stage_2_1b", "stage_2_2", "stage_3_1", "stage_3_2")
STAGES_1_0 = ("stage_1", "stage_2a", "stage_2b", "stage_3")
FILES = [f"experiments/vita_1_5/{name}.py" for name in STAGES_1_5]
FILES += [f"experiments/vita_1_0/{name}.py" for name in STAGES_1_0]


def slices_of(file: str) -> dict:
    return {name: entry for name, entry in (vita_1_5 if "1_5" in file else vita_1_0).SLICES.items() if name != "one"}


@pytest.mark.parametrize("file", FILES)
def test_every_stage_is_valid_on_its_slices(file):
    for name in slices_of(file):
        config = load_config_file(file, {"slice": name})
        validate(config, open_gpus(name).num_devices)
        assert config.stages[0].row_length >= 6200 or config.stages[0].objective != "language_modeling"


def open_gpus(name: str):
    """As many GPUs as the slice has chips: a topology that needs no compiler."""
    _, extents = parse_topology(name)
    number = 1
    for extent in extents:
        number *= extent
    return open_topology(f"h200:{number}")


@pytest.mark.parametrize("file", FILES)
def test_state_by_formula_is_what_parameters_and_moments_take(file):
    """12 bytes for one that trains and 4 for any other, cut over `fsdp`, experts over `expert` as well."""
    name = next(iter(slices_of(file)))
    config = load_config_file(file, {"slice": name})
    result = estimate_stage(config, config.stages[0], open_gpus(name))
    least = 0.0
    for component, (number, trained) in result.parameters.items():
        parts = config.mesh.fsdp * (config.mesh.expert if component == "language experts" else 1)
        least += 4 * (number + 2 * trained) / parts
    assert least <= result.state.total <= 1.06 * least + 64 * 2**20  # biases and norms are whole on every device


def test_parameters_are_those_of_the_published_models():
    config = load_config_file("experiments/vita_1_5/stage_1_3.py", {})
    _, planned = plan_for(config, config.stages[0], abstract_mesh(config.mesh, 32))
    parameters = component_parameters(planned)
    assert parameters["language"] == (7_615_616_512, 7_615_616_512)
    assert parameters["vision"][1] == parameters["vision"][0]
    assert parameters["audio/encoder"][1] == 0
    config = load_config_file("experiments/vita_1_0/stage_3.py", {})
    _, planned = plan_for(config, config.stages[0], abstract_mesh(config.mesh, 128))
    assert component_parameters(planned)["language experts"][0] == 32 * 8 * 3 * 4096 * 14336


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny experiment on this machine's devices."""
    config = experiment(tmp_path_factory.mktemp("plan"))
    return dataclasses.replace(config, stages=(stage("joint", trainable=("^projector/", "^language/")),))


def test_the_compiled_step_takes_what_the_formula_says_of_its_state(tiny):
    one, mesh = tiny.stages[0], make_mesh(tiny.mesh)
    compiled = compile_stage(tiny, one, mesh)
    _, planned = plan_for(tiny, one, mesh)
    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract_batch(tiny, one, mesh).values())
    expected = state_bytes(planned).total + batch
    assert compiled.argument_bytes == pytest.approx(expected, abs=4096)  # and step number, key, metrics
    assert compiled.peak_bytes >= compiled.argument_bytes + compiled.temporary_bytes > 0
    assert not compiled.refusal


def test_the_step_is_the_largest_of_its_three_parts(tiny):
    chip = parse_topology("v5e:1x1")[0]
    _, planned = plan_for(tiny, tiny.stages[0], abstract_mesh(tiny.mesh, 1))
    time = step_time(tiny, tiny.stages[0], planned, chip, sent=chip.ici_bandwidth * 2.0)
    assert time.links == pytest.approx(2.0)
    assert time.seconds == time.links and time.limit == "links"
    assert time.arithmetic == pytest.approx(time.flops / chip.peak_flops_bf16)
    assert time.mfu == pytest.approx(time.flops / chip.peak_flops_bf16 / 2.0)


def test_compilers_that_refuse_are_quoted():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of "
        "15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal hbm usage >= 20.36G:\n    reserved        258.00M\n"
        "    program          12.00G\n    arguments         8.10G\n\n  Largest program allocations in hbm:\n\n"
        '  1. Size: 4.00G\n     Operator: op_name="jit(train_step)/scores"\n     Shape: f32[1,28,6656,6656]{3,2,1,0}\n'
    )
    refused = _refused(message, 1.0)
    assert refused.refusal == "Used 20.10G of 15.75G hbm"
    assert refused.peak_bytes == pytest.approx(20.10 * 2**30)
    assert refused.argument_bytes == pytest.approx(8.10 * 2**30)
    assert refused.largest == ("4.00G f32[1,28,6656,6656]{3,2,1,0} jit(train_step)/scores",)


def test_compilers_that_refuse_without_a_list_are_quoted_as_well():
    refused = _refused(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (232.64G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
        1.0,
    )
    assert refused.refusal == "HLO temporaries (232.64G) exceeds available HBM (15.75G)"
    assert refused.peak_bytes == pytest.approx(232.64 * 2**30) and refused.largest == ()


def test_gpus_are_planned_by_formula_and_advice_says_what_helps():
    config = load_config_file("experiments/vita_1_5/stage_1_3.py", {"slice": "v5p:4x4x2"})
    fits = plan_on(config, config.stages[0], open_topology("h100:32"))
    assert fits.fits and fits.step is None
    text = format_result(fits)
    assert "peak, by formula" in text and "together" in text
    small = dataclasses.replace(config, mesh=MeshConfig(fsdp=1))
    does_not = plan_on(small, small.stages[0], open_topology("h100:1"))
    assert not does_not.fits
    assert "It does not fit" in format_result(does_not)
    assert "does not fit" in format_table([fits, does_not]).splitlines()[-1]


def test_a_search_ranks_what_fits_fastest_first():
    config = load_config_file("experiments/vita_1_5/stage_1_1.py", {})
    found = search(config, config.stages[0], open_topology("h100:8"), tries=4)
    assert found and all(result.fits for result in found)
    assert [result.time.seconds for result in found] == sorted(result.time.seconds for result in found)


def test_factorisations_are_all_there():
    assert sorted(factorisations(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert all(a * b * c == 12 for a, b, c in factorisations(12, 3))


def test_experts_are_only_cut_where_there_are_some():
    dense = load_config_file("experiments/vita_1_5/stage_1_3.py", {})
    assert all(mesh.expert == 1 for mesh in meshes(dense, open_topology("h100:8")))
    sparse = load_config_file("experiments/vita_1_0/stage_3.py", {})
    assert {mesh.expert for mesh in meshes(sparse, open_topology("h100:8"))} == {1, 2, 4, 8}
    assert mesh_text(dense, 32) == "fsdp 32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=experiments/vita_1_5/stage_1_1.py"], "--topology=CHIP:SHAPE is missing"),
        (["--config=experiments/vita_1_5/stage_1_1.py", "--topology=v5p"], "write CHIP:SHAPE"),
        (["--config=experiments/vita_1_5/stage_1_1.py", "--topology=v9:4x4"], "chip 'v9' is unknown"),
        (["--config=experiments/vita_1_5/stage_1_1.py", "--topology=h100:32", "--tries=0"], "--tries=0"),
        (["--config=experiments/vita_1_5/stage_1_1.py", "--topology=h100:7"], "mesh"),
        (["--config=experiments/vita_1_5/stage_1_1.py", "--topology=h100:32", "--fast"], "--fast"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert plan.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_plan_and_keeps_a_table(tmp_path, capsys):
    table = tmp_path / "plans.md"
    arguments = ["--config=experiments/vita_1_5/stage_1_1.py", "--topology=h100:32", f"--table={table}"]
    assert plan.main(arguments) == 0
    assert plan.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1.1 vision alignment on h100:32: 32 chips, mesh fsdp 32" in printed
    assert len(table.read_text(encoding="utf-8").splitlines()) == 2 + 2
    assert plan.main(["--help"]) == 0


MESHES = """
import jax
jax.config.update("jax_platforms", "cpu")
from experiments import plans
from vita_jax.parallel.mesh import make_mesh
from vita_jax.planning.topology import open_topology

for slices in (plans.SLICES_1_5, plans.SLICES_1_0, plans.SLICES_LLAVA, plans.SLICES_FLAMINGO):
    for name, layout in slices.items():
        if name != plans.DEVICE:
            mesh = make_mesh(getattr(layout, "mesh", layout), open_topology(name).devices)
            print(name, len(set(mesh.devices.flat)), max(mesh.devices.shape))
"""


@pytest.mark.slow
def test_every_recommended_slice_has_room_for_its_mesh():
    """Axes of a mesh need not be axes of the machine: eight experts lie on a torus of 16 x 16."""
    done = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["v6e:16x16", "256", "32"] in lines and ["v5p:4x4x8", "128", "16"] in lines and len(lines) >= 11
    for name, devices, _ in lines:
        assert int(devices) == math.prod(int(side) for side in name.partition(":")[2].split("x"))


COMPILE = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from vita_jax.config import load_config_file
from vita_jax.planning.search import plan_on
from vita_jax.planning.topology import open_topology

config = load_config_file(sys.argv[1], {"slice": sys.argv[2]})
result = plan_on(config, config.stages[0], open_topology(sys.argv[2]))
step = result.step
print(json.dumps({
    "fits": result.fits, "refusal": step.refusal, "state": result.state.total, "arguments": step.argument_bytes,
    "peak": result.peak_bytes, "kinds": sorted({one.kind for one in step.collectives}),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("experiments/vita_1_5/stage_1_3.py", "v5e:8x8"),
        ("experiments/vita_1_0/stage_3.py", "v6e:16x16"),
        ("experiments/flamingo/pretrain.py", "v5e:4x8"),
    ],
)
def test_full_size_stages_fit_their_slices(file, name):
    """By the TPU compiler, in a process of its own, which it locks."""
    done = subprocess.run([sys.executable, "-c", COMPILE, file, name], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["fits"], said["refusal"]
    # What the compiler is handed are the state by formula, the batch and little else.
    assert 1.0 <= said["arguments"] / said["state"] < 1.2
    assert "all-gather" in said["kinds"]
    assert jax.default_backend() == "cpu"
