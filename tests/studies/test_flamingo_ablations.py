"""The study of Flamingo's ablations: one thing changes in each, and a run of a few steps with its tables."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest

from experiments.flamingo import quickstart as flamingo
from experiments.studies import arms as studies
from experiments.studies.flamingo_ablations import __main__ as ablations
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import validate
from vita_jax.training.stages import flatten


def test_arms_are_the_ablations_of_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(flamingo, "with_new_tokens", with_two_tokens)
    arms = {arm.name: arm for arm in ablations.make_arms("small", str(tmp_path), str(tmp_path), steps=70)}
    # `every_1` is what the experiment is without any ablation.
    assert set(arms) == set(get_args(flamingo.Ablation)) - {"every_1"}
    for name, arm in arms.items():
        validate(arm.config, num_devices=1)
        ablation = flamingo.get_config("small", name)
        (stage,), seeing = arm.config.stages, ablation.stages[-1]
        assert arm.config.model == ablation.model and stage.steps == 70
        assert stage.start_from == str(tmp_path)
        for field in ("learning_rate", "sets", "trainable", "optimizer", "objective"):
            assert getattr(stage, field) == getattr(seeing, field), field
    counts = {name: ablations.trained_parameters(arm.config) for name, arm in arms.items()}
    # By hand. A block: two norms, q 192 x 192, k and v 96 x 384, o 192 x 192, feed-forward 192 x 768 twice, two gates;
    # the Perceiver: 2 layers of three norms, 4 x 96 x 96, feed-forward 96 x 384 twice, 8 latents and times, a norm.
    block = 2 * 384 + 192 * 192 + 96 * 384 + 192 * 192 + 2 * 192 * 768 + 2
    perceiver = 2 * (3 * 192 + 4 * 96 * 96 + 2 * 96 * 384) + (8 + 8) * 96 + 192
    assert counts["none"] == 4 * block + perceiver + 2 * 192
    assert counts["every_2"] == counts["none"] - 2 * block and counts["every_4"] == counts["none"] - 3 * block
    assert counts["no_gate"] == counts["none"] - 4 * 2
    language = studies.component_sizes(arms["none"].config.model)["language"]
    assert counts["unfrozen"] == counts["none"] - 2 * 192 + language


def with_two_tokens(config):
    """As `with_new_tokens`, without a tokenizer."""
    stages = (
        dataclasses.replace(stage, trained_tokens=(5, 6)) if flamingo.EMBEDDINGS in stage.trainable else stage
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=tuple(stages))


@pytest.mark.slow
def test_a_run_leaves_tables_and_a_plot(tmp_path, monkeypatch, capsys):
    # Fewer shots, fewer programs to compile.
    options = dataclasses.replace(flamingo.get_config("smoke").few_shot, shots=(0, 4))
    monkeypatch.setattr(flamingo, "FewShotOptions", lambda **fields: options)
    arguments = ["--run_dir", str(tmp_path), "--size", "smoke", "--per_kind", "1", "--steps", "3"]
    assert ablations.main([*arguments, "--only", "every_4"]) == 0
    start, after = (
        flatten(load_params(folder).params) for folder in (tmp_path / "shared" / "start", tmp_path / "every_4")
    )
    assert {path.split("/")[0] for path in set(after) - set(start)} == {"resampler", "cross_attention"}
    for path in set(start) - {"language/embed_tokens/embedding"}:
        np.testing.assert_array_equal(start[path], after[path], err_msg=path)
    file = tmp_path / "every_4" / studies.RESULT
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found["tasks"]) == {"typed", "video_order", "labelling", "labelling_ranked"}
    assert set(found["tasks"]["labelling_ranked"]["shots"]) == {"0", "4"}
    # The arm it is compared with, as if it had been trained; nothing is trained again.
    monkeypatch.setattr(ablations, "run_arms", lambda *args: {"none": {**found, "title": "Flamingo"}, "every_4": found})
    capsys.readouterr()
    assert ablations.main(arguments) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 4 + 3 and printed[0].count("|") == 1 + 2 + 7 + 2 and printed[4].count("|") == 1 + 1 + 7
    assert printed[6].count("+0.0 (") == 7  # compared with itself
    page = (tmp_path / "flamingo.md").read_text(encoding="utf-8")
    assert all(line in page for line in printed) and "flamingo.png" in page
    content = json.loads((tmp_path / "flamingo.json").read_text(encoding="utf-8"))
    assert set(content["arms"]) == {"none", "every_4"} and "outcomes" not in str(content)
    assert (tmp_path / "flamingo.png").read_bytes().startswith(b"\x89PNG")
