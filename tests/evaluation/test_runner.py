"""Batched answers against one question at a time, and results as files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import answer_items
from vita_jax.evaluation.items import read_items
from vita_jax.evaluation.results import format_result, format_stages, read_evaluation, save_stage_evaluation
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.evaluation.subject import benchmark_folder
from vita_jax.inference.session import Session
from vita_jax.training.experiment import tokenizer_folder


@pytest.fixture(scope="module")
def session(run_config):
    return Session.load(run_config.run_dir)


@pytest.mark.slow
def test_batched_answers_are_those_of_chat(run_config, session):
    root = benchmark_folder(run_config)
    items = read_items(root / "items.jsonl")
    seen = []
    answers = answer_items(
        session.model,
        session.params,
        session.context,
        items,
        root,
        batch_size=4,
        max_new_tokens=6,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (len(items), len(items))
    session.max_new_tokens = 6
    for item, answer in zip(items, answers, strict=True):
        session.reset()
        images = [root / item.image] if item.image else []
        videos = [root / item.video] if item.video else []
        list(session.ask(item.question, images, videos))
        assert session.turns[-1]["value"] == answer.lstrip(), item.id


def test_result_and_files(run_config, session, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(run_config))
    options = {"batch_size": 4, "max_new_tokens": 4}
    result = evaluate_params(run_config, session.params, tokenizer, **options)
    assert {name: group["n"] for name, group in result["groups"].items()} == {"typed": 6, "video_order": 1, "text": 2}
    limited = evaluate_params(run_config, session.params, tokenizer, groups=["typed"], limit=1, **options)
    assert limited["num_items"] == 3 and limited["limit"] == 1
    config = dataclasses.replace(run_config, run_dir=str(tmp_path))
    assert save_stage_evaluation(config, "joint", result) == tmp_path / "evaluation" / "joint.json"
    kept = (tmp_path / "evaluation" / "joint.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in kept] == result["lines"] and len(kept) == result["num_items"] == 9
    assert read_evaluation(tmp_path, "joint") == {name: part for name, part in result.items() if name != "lines"}
    assert read_evaluation(tmp_path, "naming") is None
    assert "stage joint" in format_stages(tmp_path, config)
    text = format_result(result)
    assert "floor missed by" in text and "order of digits in clips" in text


def test_what_does_not_fit_is_named(run_config, session, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(run_config))
    with pytest.raises(UserError, match="no group 'typd'"):
        evaluate_params(run_config, session.params, tokenizer, groups=["typd"])
    moved = dataclasses.replace(run_config, data=dataclasses.replace(run_config.data, folder=str(tmp_path)))
    with pytest.raises(UserError, match="items.jsonl does not exist"):
        evaluate_params(moved, session.params, tokenizer)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "final.json").write_text("{")
    with pytest.raises(UserError, match="final.json is damaged"):
        read_evaluation(tmp_path, "final")
