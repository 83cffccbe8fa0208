"""The VITA-1.0 experiment: its stages as data, what is left out without records, and a run of a few steps."""

from __future__ import annotations

import dataclasses
import io
import json
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.own_data_vita_1_0 import SYMBOLS, get_config, kind_of, prepare, without_sources
from vita_jax.data.prompts import state_symbol_ids
from vita_jax.data.templates import get_template
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.training import loop
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import build_model, example_context, tokenizer_folder, validate
from vita_jax.training.objectives import OBJECTIVES


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_records(root: Path, kinds: str) -> Path:
    """Six records of each kind: t for text in two languages, v for pictures, s for sounds and noises."""
    records: list[dict] = []
    for number in range(6):
        if "t" in kinds:
            records.append({"id": f"t{number}", "conversations": turns(f"{number} 加一?", f"是 {number + 1}.")})
        if "v" in kinds:
            Image.new("RGB", (40, 30), (number * 40, 0, 0)).save(root / f"{number}.png")
            record = {"id": f"v{number}", "image": f"{number}.png"}
            records.append({**record, "conversations": turns("<image>\nHow red?", f"Level {number}.")})
        if "s" in kinds:
            with wave.open(str(root / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                samples = np.random.default_rng(number).integers(-3000, 3000, 12000)
                file.writeframes(samples.astype("<i2").tobytes())
            record = {"id": f"s{number}", "audio": f"{number}.wav", "conversations": turns("<audio>", "Noise.")}
            records.append(record | ({"inserted_id": 1} if number % 2 else {}))
    path = root / "records.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def config_with(root: Path, kinds: str):
    config = get_config("smoke")
    data = dataclasses.replace(config.data, json=str(write_records(root, kinds)), root=str(root))
    return dataclasses.replace(config, data=data, run_dir=str(root / "run"))


@pytest.mark.parametrize("size", ["smoke", "small", "full"])
def test_stages_are_valid_at_every_size(size):
    config = get_config(size)
    validate(config, num_devices=1)
    first = config.stages[0]
    assert (first.name, first.trainable, first.row_tiles) == ("bilingual_text", ("^language/",), 0)
    assert config.template == "mixtral_two" and config.model.language.num_experts in (4, 8)
    assert config.model.language.router_aux_loss_coef == (0 if size == "full" else 0.01)


def test_stages_without_records_are_left_out():
    stages = get_config("smoke").stages
    assert without_sources(stages, {"text", "vision", "sound"}) == stages
    (only,) = without_sources(stages[:1], {"text"})
    assert only.start_from is None
    first, last = without_sources(stages, {"text"})
    assert (first.name, last.name) == ("bilingual_text", "instruction_tuning")
    assert last.start_from == "bilingual_text" and last.row_clips == 0
    align, last = without_sources(stages, {"vision"})
    assert align.start_from is None and last.start_from == "vision_alignment"
    three = without_sources(stages, {"text", "sound"})
    assert [stage.start_from for stage in three] == [None, "bilingual_text", "sound_alignment"]
    given = (dataclasses.replace(stages[0], start_from="runs/enlarged"), *stages[1:])
    assert without_sources(given, {"vision"})[0].start_from == "runs/enlarged"
    with pytest.raises(UserError, match="no stage has records"):
        without_sources(stages, set())


def test_kinds_of_records():
    assert kind_of({"image": "a.png"}) == kind_of({"video": "a.mp4"}) == "vision"
    assert kind_of({"audio": "a.wav", "image": "a.png"}) == "sound"
    assert kind_of({"id": 1}) == kind_of("no record") == "text"


def test_records_are_needed():
    with pytest.raises(UserError, match="vita_1_0 needs your records"):
        prepare(get_config("smoke"))


def test_prepared_tokenizer_and_examples(tmp_path):
    """State tokens and the end marker are single tokens; every stage's batch has what its objective reads."""
    config = prepare(config_with(tmp_path, "tvs"))
    assert len(config.stages) == 4
    tokenizer, template = load_tokenizer(tokenizer_folder(config)), get_template(config.template)
    assert {tokenizer.encode(symbol, allow_special=True)[0] for symbol in SYMBOLS} <= set(
        tokenizer.special_tokens.values()
    )
    states = state_symbol_ids(tokenizer, template)
    assert set(states.values()) == {"audio", "noise", "text"}
    assert tokenizer.vocab_size <= config.model.language.vocab_size
    context = example_context(config, tokenizer)
    assert context.audio is not None and build_model(config).config.language.num_experts == 4
    expected = {"bilingual_text": {"text"}, "sound_alignment": {"audio", "noise"}, "vision_alignment": {"text"}}
    for stage in config.stages[:3]:
        batches = loop.record_batches(config, stage, tokenizer=tokenizer)
        seen = set()
        for _ in range(3):
            batch = next(batches)
            seen |= {states[id_] for id_ in np.unique(batch["labels"]).tolist() if id_ in states}
        batches.close()
        assert seen == expected[stage.name] and set(OBJECTIVES[stage.objective].batch_keys) <= set(batch)
        assert batches.counts.bad == 0


@pytest.mark.slow
def test_a_run_of_a_few_steps(tmp_path):
    config = prepare(config_with(tmp_path, "t"))
    loop.run(config, stream=io.StringIO())
    loaded = load_params(config.run_dir)
    assert loaded.stage == "instruction_tuning" and "moe" in loaded.params["language"]["layers"]
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").open(encoding="utf-8")]
    last = next(line for line in reversed(lines) if "router_balance" in line)
    assert sum(last[f"expert_load_{i}"] for i in range(4)) == pytest.approx(1.0, rel=1e-4)
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
