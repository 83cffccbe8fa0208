"""The small VITA-1.0 of the quickstart: stages, tokenizer and state tokens, and a run of a few steps by the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import quickstart
from experiments.own_data_vita_1_0 import SYMBOLS
from experiments.quickstart_vita_1_0 import EVALUATED, FIRST_VOCABULARY, TITLES, get_config, make_tokenizer
from tests.test_smoke import command
from vita_jax.data.prompts import state_symbol_ids, stop_ids
from vita_jax.data.templates import get_template
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.inference.engine import Seat
from vita_jax.inference.session import Session
from vita_jax.parallel.mesh import MeshConfig
from vita_jax.training import loop
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder, validate

FILE = "experiments/quickstart_vita_1_0.py"
ENGLISH, CHINESE = "What is the largest digit?", "最大的数字是什么？"


@pytest.mark.parametrize("size", ["smoke", "small"])
def test_stages_are_the_quickstarts_without_voice_and_input_head(size):
    config, base = get_config(size), quickstart.get_config(size)
    validate(config, num_devices=1)
    assert [stage.name for stage in config.stages] == [stage.name for stage in base.stages[:8]] == list(TITLES)
    assert not any("state_head" in pattern for stage in config.stages for pattern in stage.trainable)
    assert not any(stage.state_labels for stage in config.stages) and EVALUATED.keys() < TITLES.keys()
    model, dense = config.model, base.model.language
    assert (model.state_head, model.codec, model.speech) == (None, None, None)
    active = model.language.experts_per_token * model.language.intermediate_size
    assert active == dense.intermediate_size and model.language.num_experts == 4
    assert config.data.amounts == base.data.amounts  # so that a run of the quickstart can lend its data


def with_rows(config: ExperimentConfig, rows: int, *names: str) -> ExperimentConfig:
    stages = [dataclasses.replace(s, batch_size=rows) if s.name in names else s for s in config.stages]
    return dataclasses.replace(config, stages=tuple(stages))


def test_experts_fit_on_four_devices():
    on_four = {size: dataclasses.replace(get_config(size), mesh=MeshConfig(expert=4)) for size in ("smoke", "small")}
    validate(on_four["smoke"], num_devices=4)
    validate(with_rows(on_four["small"], 4, "speech_encoder", "speech_alignment", "audio_sft"), num_devices=4)
    with pytest.raises(UserError, match="stages.speech_encoder.batch_size=2 must be a multiple of"):
        validate(on_four["small"], num_devices=4)


def test_the_tokenizer_is_enlarged_for_chinese(tmp_path):
    """English is spelt as before, Chinese in fewer tokens, state and end are single tokens that no text can write."""
    texts = [ENGLISH, CHINESE, "blue/white: 7", "蓝色/白色: 7", "我们看见两只猫", "we saw two cats near the garden"]
    lines = "\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
    (tmp_path / "tokenizer_text.txt").write_text(lines, encoding="utf-8")
    config = get_config("smoke")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=str(tmp_path)))
    grown = make_tokenizer(config)
    tokenizer, template = grown.tokenizer, get_template(config.template)
    assert grown.first_id <= FIRST_VOCABULARY and tokenizer.vocab_size <= config.tokenizer.vocab_size
    assert all(id_ < grown.first_id for id_ in tokenizer.encode(ENGLISH))
    assert len(tokenizer.encode(CHINESE)) < len(CHINESE) < len(CHINESE.encode())
    assert {piece.text for piece in grown.pieces} >= {"数字", *SYMBOLS}
    assert set(state_symbol_ids(tokenizer, template).values()) == {"audio", "noise", "text"}
    assert tokenizer.special_tokens["</s>"] in stop_ids(tokenizer, template)
    assert len(tokenizer.encode("<2>", allow_special=False)) > 1
    assert len(tokenizer.encode("bot:")) == len(tokenizer.encode("user:")) == 2  # the name and the colon
    assert tokenizer.decode(tokenizer.encode(CHINESE)) == CHINESE


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    command("vita_jax.train", f"--config={FILE}", "--config.size=smoke", f"--config.run_dir={folder}")
    return folder


@pytest.mark.slow
def test_smoke_run_leaves_everything(run_dir):
    assert all(any((run_dir / "stages" / stage / "checkpoints").iterdir()) for stage in TITLES)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    assert {line["stage"] for line in lines} == set(TITLES)
    steps = [line for line in lines if line["event"] == "step"]
    with_experts = {line["stage"] for line in steps if "router_balance" in line}
    assert with_experts == set(TITLES) - {"tower", "speech_encoder"}
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert "<img" in (run_dir / "report.html").read_text(encoding="utf-8")
    final = json.loads((run_dir / "evaluation" / "final.json").read_text(encoding="utf-8"))
    assert set(final["groups"]) == {"typed", "typed_unseen_writers", "video_order", "text"}
    assert set(final["changes"]) == {"typed", "text"}
    speech = json.loads((run_dir / "evaluation" / "final.speech.json").read_text(encoding="utf-8"))
    heard = {"spoken", "noise", "transcribe", "accepted", "recognition_full", "recognition_chunked"}
    # What reads recordings back is the recogniser, which needs no voice.
    assert set(speech["groups"]) == heard | {"voice_synthesizer"}
    assert speech["left_out"]["input_head"] == "the model has no state head"


@pytest.mark.slow
def test_later_stages_leave_the_recogniser_alone(run_dir):
    recogniser = load_params(run_dir / "stages" / "speech_encoder" / "checkpoints").params
    final = load_params(run_dir).params
    jax.tree.map(np.testing.assert_array_equal, recogniser["audio"]["encoder"], final["audio"]["encoder"])
    assert not {"state_head", "codec", "speech"} & final.keys() and "moe" in final["language"]["layers"]


@pytest.mark.slow
def test_every_answer_begins_with_a_state_token(run_dir):
    """The last stage's batches teach all three, as many of them as there are answers."""
    config = get_config("smoke")
    config = dataclasses.replace(config, run_dir=str(run_dir))
    tokenizer, template = load_tokenizer(tokenizer_folder(config)), get_template(config.template)
    states = state_symbol_ids(tokenizer, template)
    batches = loop.record_batches(config, config.stage("audio_sft"), tokenizer=tokenizer)
    labels = np.concatenate([np.ravel(next(batches)["labels"]) for _ in range(6)])
    batches.close()
    seen = [states[token] for token in labels.tolist() if token in states]
    assert set(seen) == {"audio", "noise", "text"}
    assert len(seen) == np.count_nonzero(labels == tokenizer.special_tokens[template.end_marker])


@pytest.mark.slow
def test_chat_answers_by_the_state_token(run_dir, monkeypatch):
    session = Session.load(run_dir)
    sound = next((run_dir / "data/benchmarks/speech/media").glob("*.wav"))
    said = {"says": "<2>Not for me."}
    monkeypatch.setattr(Seat, "answer", lambda *_: iter(session.tokenizer.encode(said["says"])))
    assert list(session.ask("", audio=[sound])) == [] and session.last_state == "noise" and not session.turns
    said["says"] = "<1>red"
    assert "".join(session.ask("", audio=[sound])) == "red" and session.last_state == "audio"
    said["says"] = "<3>7"
    assert "".join(session.ask("And now?")) == "7" and session.last_state == "text"
    assert [turn["value"] for turn in session.turns[1::2]] == ["<1>red", "<3>7"]
