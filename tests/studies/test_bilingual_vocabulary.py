"""The study of vocabularies: texts in one language, figures that can be counted by hand, a run of a few steps."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.quickstart.sentences import split_of
from experiments.studies.bilingual_vocabulary import __main__ as study
from experiments.studies.bilingual_vocabulary.measures import bits_per_character, in_language
from experiments.studies.bilingual_vocabulary.texts import LANGUAGES, draw_records, held_out_turns, turns_of
from vita_jax.data.examples import training_example
from vita_jax.data.loader import RecordSource, SourceConfig
from vita_jax.data.records import decode_record
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.data.vocabulary import script_of
from vita_jax.errors import UserError
from vita_jax.evaluation.items import Item
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import data_folder, example_context, tokenizer_folder, validate

HAN = script_of("han")


# ---- texts and figures ----------------------------------------------------------------------------------------------


def test_every_record_is_in_one_language_and_held_out_sentences_are_others():
    for language in ("en", "zh"):
        for held_out in (False, True):
            records = draw_records(60, language, held_out, np.random.default_rng(3))
            turns = [list(turns_of([record])) for record in records]
            assert [any(HAN.search(turn) for turn in one) for one in turns] == [language == "zh"] * 60
            # Of the records with sentences every answer is one.
            answers = [answer for one in turns[5::6] for answer in one[1::2]]
            assert len(answers) == 40 and {split_of(text) for text in answers} == {"held_out" if held_out else "train"}


def test_answers_by_language_are_means_over_kinds():
    items = [
        Item(f"{kind}-{number}", "text", kind, "en" if number < 2 else "zh", "?", "!")
        for kind in ("count", "sum")
        for number in range(4)
    ]
    right = {"count": {"count-0": True, "count-1": True, "count-2": False, "count-3": False}}
    right["sum"] = {"sum-0": True, "sum-1": False, "sum-2": True}
    found = {name: in_language({"title": "t", "outcomes": right}, items, name) for name in ("en", "zh")}
    assert (found["en"]["accuracy"], found["en"]["n"]) == (0.75, 4) and found["en"]["outcomes"]["count"] == {
        "count-0": True,
        "count-1": True,
    }
    # One kind all wrong, one all right: whatever is drawn, the mean is a half.
    assert (found["zh"]["accuracy"], found["zh"]["low"], found["zh"]["high"], found["zh"]["n"]) == (0.5, 0.5, 0.5, 3)
    with pytest.raises(UserError, match="every kind must have an item"):
        in_language({"title": "t", "outcomes": {"sum": {"sum-0": True}}}, items, "zh")


def test_as_much_text_takes_as_many_more_steps_as_records_are_fewer():
    results = {
        "bytes": {"training": {"steps": 800, "records": 5000}},
        "enlarged": {"training": {"steps": 800, "records": 9000}},
    }
    assert study.longer(results) == 1440
    with pytest.raises(UserError, match="train enlarged first"):
        study.longer({"bytes": results["bytes"]})
    with pytest.raises(UserError, match="--steps 800 are too few"):
        study.longer({**results, "bytes": {"training": {"steps": 800, "records": 0}}})


@pytest.mark.parametrize("size", ["smoke", "small"])
def test_the_first_run_is_in_english(size, tmp_path):
    base = study.base_config(size, str(tmp_path))
    validate(base, num_devices=1)
    (stage,) = base.stages
    assert [source.path for source in stage.sources] == ["english"] and stage.objective == "text_pretraining"
    assert base.model.language.vocab_size == 832 and base.model.audio is None


# ---- a run ----------------------------------------------------------------------------------------------------------


def asked(run_dir: Path, *options: str) -> argparse.Namespace:
    return study.make_parser().parse_args(["--run_dir", str(run_dir), "--size", "smoke", *options])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bilingual")
    assert study.main(["--run_dir", str(folder), "--size", "smoke"]) == 0
    return folder


@pytest.mark.slow
def test_figures_are_those_of_the_tokenizers_and_of_the_runs(run_dir):
    arms = json.loads((run_dir / "vocabulary.json").read_text(encoding="utf-8"))["arms"]
    assert list(arms) == ["english", "bytes", "bytes_longer", "enlarged"]
    tokenizers = {name: load_tokenizer(run_dir / name / "tokenizer") for name in arms}
    data = data_folder(study.base_config("smoke", str(run_dir)))
    for name, found in arms.items():
        for language in LANGUAGES:
            turns = held_out_turns(data, language)
            tokens = sum(len(tokenizers[name].encode(turn)) for turn in turns)
            assert found["languages"][language]["tokens"] == pytest.approx(tokens / sum(map(len, turns)))
        assert found["entries"] == tokenizers[name].vocab_size
    assert len(tokenizers["bytes"].encode("数字")) == 6 and len(tokenizers["enlarged"].encode("数字")) <= 2
    tokens = {name: {one: found["languages"][one]["tokens"] for one in LANGUAGES} for name, found in arms.items()}
    assert tokens["english"] == tokens["bytes"] == tokens["bytes_longer"]
    assert tokens["enlarged"]["english"] == tokens["bytes"]["english"]
    assert tokens["enlarged"]["chinese"] < 0.7 * tokens["bytes"]["chinese"]
    # New rows in both tables, each as wide as the model.
    more = load_params(run_dir / "enlarged").config.model.language.vocab_size - 832
    assert arms["enlarged"]["parameters"] - arms["bytes"]["parameters"] == 2 * more * 48 > 0
    training = {name: found["training"] for name, found in arms.items()}
    assert training["bytes"]["steps"] == training["enlarged"]["steps"] == 4
    assert training["bytes"]["positions"] == training["enlarged"]["positions"] == 4 * 4 * 640
    assert training["bytes"]["records"] < training["enlarged"]["records"]
    assert training["bytes_longer"]["steps"] == study.longer(arms)
    sets = json.loads((data / "texts.json").read_text(encoding="utf-8"))["sets"]
    mean = np.mean([sets[name]["characters"] / sets[name]["records"] for name in LANGUAGES])
    assert training["enlarged"]["characters"] == pytest.approx(training["enlarged"]["records"] * mean)


@pytest.mark.slow
def test_bits_of_a_model_that_knows_nothing_are_those_of_its_entries(run_dir):
    """Every next token then costs the logarithm of the rows, whatever it is."""
    config = study.base_config("smoke", str(run_dir))
    tokenizer, params = load_tokenizer(tokenizer_folder(config)), load_params(config.run_dir).params
    params["language"]["lm_head"] = jax.tree.map(lambda leaf: 0 * leaf, params["language"]["lm_head"])
    context = example_context(config, tokenizer)
    for name in LANGUAGES:
        turns = held_out_turns(data_folder(config), name)
        records = RecordSource(SourceConfig(str(data_folder(config) / f"held_out_{name}")), 0, 0)
        examples = [training_example(decode_record(records[index][1]), context) for index in range(6)]
        assert len(records) == 6
        # The first token of a conversation is given.
        targets = sum(len(example["tokens"]) - 1 for example in examples)
        by_hand = targets * math.log2(832) / sum(map(len, turns))
        assert bits_per_character(config, params, tokenizer, name) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_the_page_has_every_row_and_nothing_is_trained_twice(run_dir, capsys):
    page = (run_dir / "vocabulary.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    titles = list(study.TITLES.values())
    assert [row[0] for row in rows[2:6]] == titles and [row[0] for row in rows[8:11]] == titles[:3]
    assert {len(row) for row in rows[:6]} == {13} and {len(row) for row in rows[6:]} == {3}
    assert "outcomes" not in (run_dir / "vocabulary.json").read_text(encoding="utf-8")
    assert (run_dir / "vocabulary.png").read_bytes().startswith(b"\x89PNG")
    metrics = {name: (run_dir / name / "metrics.jsonl").read_bytes() for name in study.TITLES}
    capsys.readouterr()
    study.study(asked(run_dir, "--only", "bytes"))
    assert "step 1/" not in capsys.readouterr().out
    assert metrics == {name: (run_dir / name / "metrics.jsonl").read_bytes() for name in study.TITLES}
    assert (run_dir / "vocabulary.md").read_text(encoding="utf-8").splitlines()[:14] == page.splitlines()[:14]
    with pytest.raises(UserError, match="has 8 questions of each kind, and 16 are asked for"):
        study.study(asked(run_dir, "--per_kind", "16"))


def test_what_cannot_be_is_one_line(capsys):
    for options, message in (
        (["--per_kind", "12"], "--per_kind 12 must be a multiple of 8"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--only", "english"], "invalid choice: 'english'"),
    ):
        assert study.main(options) == 2
        assert message in capsys.readouterr().err
