"""The command `latency`: the table of a checkpoint and of random weights, and its mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vita_jax import latency
from vita_jax.inference.exchange import EVENTS, STAGES, ExchangeOptions, format_timelines
from vita_jax.inference.timings import FIRST_SAMPLE, Timeline
from vita_jax.models.vita import vita_small_with_voice

WEIGHTS = Path(__file__).parents[1] / "experiments/quickstart/weights"
SHORT = ["--seconds", "1", "--before", "20", "--reply", "3", "--piece", "2", "--repeat", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("what", [["--checkpoint", str(WEIGHTS)], ["--random", "small", "--dtype", "bfloat16"]])
def test_the_table_has_every_stage(what, capsys):
    streaming = "auto" if "--random" in what else "full"
    assert latency.main([*what, *SHORT, "--streaming", streaming]) == 0
    printed = capsys.readouterr().out
    assert f"encoder.streaming={streaming}: {'chunked, 640 ms' if streaming == 'auto' else 'full'}" in printed
    waited = [float(re.search(rf"^{event}.* ([\d.]+) ms$", printed, re.MULTILINE)[1]) for event in EVENTS[1:]]
    assert waited == sorted(waited) and waited[0] > 0
    for stage in STAGES:
        assert float(re.search(rf"^{stage} +([\d.]+)$", printed, re.MULTILINE)[1]) > 0
    assert float(re.search(r"^language model +([\d.]+) tokens/s$", printed, re.MULTILINE)[1]) > 0


@pytest.mark.slow
def test_weights_and_cache_may_be_int8(capsys):
    assert latency.main(["--random", "small", *SHORT, "--int8", "weights", "cache"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^weights: [\d.]+ MiB instead of [\d.]+$", printed, re.MULTILINE)
    assert re.search(r"^cache of 1 x 2,048 positions: [\d.]+ MiB instead of [\d.]+$", printed, re.MULTILINE)
    assert float(re.search(r"^language model +([\d.]+) tokens/s$", printed, re.MULTILINE)[1]) > 0


def test_stages_that_a_model_does_not_have_are_dashes():
    timeline = Timeline(marks={"end of speech": 1.0, "first LLM token": 1.5, "first piece of text": 1.75})
    lines = format_timelines([timeline]).splitlines()
    assert [line.split()[-2:] for line in lines[1:6]] == [
        ["-", "-"], ["500.0", "ms"], ["750.0", "ms"], ["-", "-"], ["-", "-"],
    ]  # fmt: skip
    assert "250.0 ms" in lines[3]


def test_the_first_sound_stands_among_the_published_ones(tmp_path):
    """Medians of 0.5, 0.3 and 0.4 s: between Moshi's 200 ms and LLaMA-Omni2's 583."""
    timelines = [Timeline(marks={"end of speech": 1.0, FIRST_SAMPLE: 1.0 + wait}) for wait in (0.5, 0.3, 0.4)]
    how = {"model": "mine", "device": "some machine"}
    json_file, table, picture = latency.write_timelines(tmp_path / "l.json", timelines, how, vita_small_with_voice())
    result = json.loads(json_file.read_text())
    assert result["milliseconds"][FIRST_SAMPLE] == pytest.approx([500, 300, 400]) and result["commit"] is not False
    rows = [line.split(" |")[0].strip("|* ") for line in table.read_text().splitlines() if line.startswith("| ")]
    assert rows[rows.index("mine") - 1 :][:3] == ["LLaMA-Omni", "mine", "LLaMA-Omni2"]
    assert "Median of 3, from 300.0 to 500.0 ms, on some machine." in table.read_text() and picture.is_file()
    silent = [Timeline(marks={"end of speech": 1.0})]
    assert latency.write_timelines(tmp_path / "s.json", silent, how, vita_small_with_voice()) == [tmp_path / "s.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "small", "--output", "a.txt"], "its name must end with .json"),
        ([], "--checkpoint --random is required"),
        (["--random", "huge"], "invalid choice: 'huge'"),
        (["--random", "small", "--repeat", "0"], "--repeat 0"),
        (["--random", "small", "--reply", "0"], "reply 0"),
        (["--random", "small", "--seconds", "0"], "seconds 0"),
        (["--random", "small", "--streaming", "never"], "'never' is unknown"),
        (["--random", "small", "--int8", "everything"], "invalid choice: 'everything'"),
        (["--checkpoint", "none/such"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert latency.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        latency.main(["--help"])
    assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out
    assert ExchangeOptions().reply == 24
