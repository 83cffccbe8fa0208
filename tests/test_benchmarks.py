"""The benchmarks run: what they measure is not asserted, what they compute is."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import conversion, input_stalls, loader, moe_ratio, turns
from vita_jax.data.lanes import Reading
from vita_jax.errors import UserError

pytestmark = pytest.mark.slow


def test_conversion_gives_every_tensor_its_bits_and_leaves_nothing(tmp_path):
    steps, different = conversion.measure("small", tmp_path)
    assert [step.name for step in steps] == ["plain copy of one file", "import", "export"] and different == 0
    assert all(step.peak_gigabytes > 0 for step in steps[1:])
    assert not list(tmp_path.iterdir())
    (tmp_path / "small.run").mkdir()
    with pytest.raises(UserError, match=r"small\.run is in the way"):
        conversion.measure("small", tmp_path)
    table = conversion.format_steps("small", steps, different)
    assert "every tensor has its bits" in table and table.count("\n") == 4
    assert conversion.main(["--model", "small", "--folder", str(tmp_path / "by command")]) == 0


def test_changed_bits_are_found(tmp_path):
    config = conversion.vita_small(32, 1, 32, 64)
    conversion.write_public(tmp_path, config)
    assert conversion.count_different(tmp_path, config) == 0
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert conversion.count_different(tmp_path, config) == 1


def test_every_modality_is_read_by_both_loaders():
    rates = list(loader.run(2, loader.MODALITIES))
    assert [rate.modality for rate in rates] == list(loader.MODALITIES)
    for rate in rates:
        assert rate.records > 0 and rate.torch_records > 0 and 0 < rate.fill <= 1
        assert (rate.media > 0) == (rate.modality != "text")
    table = loader.format_rates(rates, 4.59e14)
    assert table.count("\n") == 5 and "one chip trains 4,026 tokens/s" in table
    with pytest.raises(UserError, match="'smell' is unknown"):
        next(loader.run(2, ["smell"]))
    assert loader.main(["--records", "1", "--modalities", "text"]) == 0


def test_ratios_are_taken_within_turns(monkeypatch):
    """The second side takes three times as long, whatever the machine does to both."""
    now, begun, slow = [0.0], [], [1.0]

    def call(name: str, seconds: float) -> None:
        begun.append(name)
        now[0] += seconds * slow[0]
        slow[0] *= 1.001  # other jobs come in as time goes by

    monkeypatch.setitem(turns.CLOCKS, "wall", lambda: now[0])
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0.0)
    ratio = turns.take_turns(lambda: call("a", 0.5), lambda: call("b", 1.5), turns=9, sample_seconds=0.0)
    assert abs(ratio.median - 3) < 0.01 and 2.98 < ratio.lower <= ratio.median <= ratio.upper < 3.02
    assert begun[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_the_results_of_a_benchmark_keep_what_a_person_wrote(tmp_path):
    output = tmp_path / "folder" / "page"
    turns.write_page(output, "# Old\n", "## Why", {"rows": []})
    page = output.with_suffix(".md")
    page.write_text(page.read_text() + "\n## Why\n\nBecause.\n")
    turns.write_page(output, "# New\n", "## Why", {"rows": [1]})
    assert page.read_text() == "# New\n\n## Why\n\nBecause.\n"
    assert json.loads(output.with_suffix(".json").read_text()) == {"rows": [1]}


def test_every_operation_gives_what_transformers_gives(tmp_path):
    from experiments.benchmarks import torch_ratio  # it imports transformers, which takes seconds

    assert torch_ratio.main(["--quick", "--output", str(tmp_path / "ratio")]) == 0
    rows = json.loads((tmp_path / "ratio.json").read_text())["rows"]
    language = ["train", "forward", "prefill", "decode 1", "decode 8", "stepwise"]
    wanted = [(case, name) for case in ("qwen2", "mixtral") for name in language] + [("tower", "train")]
    assert [(row["case"], row["operation"]) for row in rows] == [*wanted, ("tower", "forward")]
    assert all(row["difference"] <= 1e-4 and row["ratio"] > 0 for row in rows)
    assert (tmp_path / "ratio.md").read_text().count("\n| qwen2 ") == len(language) + 1
    assert torch_ratio.main(["--quick", "--cases", "gpt"]) == 2


def test_two_models_that_differ_are_not_timed():
    from experiments.benchmarks import torch_ratio, torch_sides

    case = torch_ratio.quick_cases()["qwen2"]
    operation = torch_sides.language_operations(case.config, case.shape)["forward"]()
    assert torch_sides.fastest(operation, "equal").difference <= 1e-4
    operation.model.model.layers[1].self_attn.k_proj.bias.data[0] += 1.0
    with pytest.raises(UserError, match=r"changed: PyTorch \(sdpa\) differs from ours by"):
        torch_sides.fastest(operation, "changed")


def test_a_mixture_is_held_against_a_dense_layer(tmp_path):
    assert moe_ratio.main(["--quick", "--output", str(tmp_path / "moe")]) == 0
    rows = json.loads((tmp_path / "moe.json").read_text())["rows"]
    assert [row["timed"] for row in rows] == [name for name in moe_ratio.TIMED for _ in moe_ratio.IMPLEMENTATIONS]
    assert all(0 < row["lower"] <= row["ratio"] <= row["upper"] for row in rows)


def test_a_mixture_and_its_dense_layer_multiply_a_token_by_as_many_weights():
    size, x = moe_ratio.SIZES["tiny"], jnp.zeros((1, 1, moe_ratio.SIZES["tiny"].width))

    def weights(layer) -> int:
        params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        return sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "router" not in str(path))

    mixture = weights(moe_ratio.moe_layer(size, "ragged", jnp.float32))
    dense = weights(moe_ratio.dense_layer(size, jnp.float32))
    assert dense > 0 and mixture * size.active == dense * size.experts


def test_waiting_for_data_is_told_for_the_planned_step():
    step = input_stalls.planned_step("image", "v5p")
    matrices = 6 * 7.0e9 * step.rows * step.length / (0.4 * 459e12)  # the language model's layers alone
    assert (step.rows, step.length, step.clips) == (4, 6656, 0) and matrices < step.seconds < 2 * matrices
    assert input_stalls.planned_step("audio", "v5p").clips == 8
    (stall,) = input_stalls.run(["text"], Reading(1), records=4, steps=2, step_seconds=0.01)
    assert stall.rows == 4 and stall.step_seconds == 0.01 and 0 <= stall.share < 1
    assert "| text " in input_stalls.format_stalls([stall], markdown=True)
    with pytest.raises(UserError, match="'smell' is unknown"):
        next(input_stalls.run(["smell"], Reading(1), records=4, steps=2))


def test_int8_is_held_against_floats(tmp_path, monkeypatch):
    """Few questions: their answers are those of the model in floats, and what is compared is counted."""
    from experiments.benchmarks import int8  # it needs qwix

    int8.write_questions(tmp_path, 2)
    figures = int8.measure(tmp_path, turns=1, larger=None)
    floats, both = figures["floats"], figures["both"]
    assert (floats.same, floats.divergence) == (floats.asked, 0.0) and list(figures) == list(int8.CHOICES)
    assert floats.positions == both.positions > floats.asked > 60
    for found in list(figures.values())[1:]:
        assert found.same >= 0.97 * found.asked and 0 < found.divergence < 1e-2
        assert found.speeds["the kept weights"][0] > 0
    assert both.weights < floats.weights - 2**21 and both.cache == floats.cache * (32 + 4) / (4 * 32)
    table = int8.format_figures(figures, markdown=True)
    assert table.count("\n") == 1 + len(floats.accuracy) + 5 and "int8 weights |" in table.splitlines()[0]
    monkeypatch.setattr(int8, "measure", lambda folder, turns: figures)
    assert int8.main(["--per-kind", "1", "--turns", "1"]) == 0
