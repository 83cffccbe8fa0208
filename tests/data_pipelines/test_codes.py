"""Tokens of recordings, made once: the same as in training, and only those of the model's own codec."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.codes import build_codes, main
from tests.data.media import write_wav
from tests.training.everything import everything_run
from tests.training.tiny import stage
from tests.training.voice import CODEC, tones
from vita_jax.data.lanes import Reading
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import read_manifest
from vita_jax.data.speech_pairs import PairShape, make_pair_loader
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.models.vita import Vita
from vita_jax.training.experiment import DataConfig, tokenizer_folder
from vita_jax.training.objectives import OBJECTIVES
from vita_jax.training.portable import PortableModel, write_portable
from vita_jax.training.speech_batches import check_codes, codec_fingerprint
from vita_jax.training.stages import flatten

SHAPE = PairShape(CODEC.sampling_rate, CODEC.hop, frames=40, tokens=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder of weights, configuration, parameters)."""
    folder = tmp_path_factory.mktemp("model")
    config, params = everything_run(folder / "run")
    write_portable(folder / "kept", PortableModel(params, config, "joint", 6), folder / "run")
    return folder / "kept", config, params


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """Folder of a manifest of five recordings of different lengths."""
    folder, rng = tmp_path_factory.mktemp("voice"), np.random.default_rng(0)
    lines = []
    for number in range(5):
        samples = tones(rng, 1, 3 * CODEC.hop * (number + 2) + 7 * number)[0]
        write_wav(folder / f"{number}.wav", samples, CODEC.sampling_rate)
        lines.append({"id": number, "audio": f"{number}.wav", "text": "red " * (number + 1), "kind": "sentence"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def batch_of(folder, tokenizer):
    options = {"seed": 0, "batch_size": 5, "shuffle": False, "reading": Reading(0), "prefetch_batches": 0}
    return next(make_pair_loader([SourceConfig(str(folder))], SHAPE, tokenizer, **options))


def test_training_sees_the_same_tokens_and_loss(model, voice, tmp_path, capsys):
    kept, config, params = model
    output = tmp_path / "codes"
    assert main(["--checkpoint", str(kept), "--from", str(voice), "--output", str(output)]) == 0
    assert "5 recordings" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["sentence"] * 5
    assert [pair.audio.resolve() for pair in read_manifest(output)] == [voice / f"{n}.wav" for n in range(5)]
    tokenizer = load_tokenizer(tokenizer_folder(config))
    heard, coded = batch_of(voice, tokenizer), batch_of(output, tokenizer)
    assert "waves" not in coded and np.array_equal(heard["frames"], coded["frames"])
    assert coded["codes"].shape[1] == heard["waves"].shape[1] // CODEC.hop
    loss = OBJECTIVES["speech_decoder"].loss
    both = [
        loss(Vita(config.model), params, {k: jnp.asarray(v) for k, v in batch.items()}, jax.random.key(0))
        for batch in (heard, coded)
    ]
    np.testing.assert_allclose(both[0].loss, both[1].loss, rtol=1e-5)
    assert both[0].metrics["accuracy"] == both[1].metrics["accuracy"]


def test_codes_of_another_codec_are_noticed(model, voice, tmp_path):
    kept, config, params = model
    build_codes(str(kept), voice, tmp_path / "codes")
    config = dataclasses.replace(config, data=DataConfig(folder=str(tmp_path)))
    decoders = stage("decoders", sources=(SourceConfig("codes"),), objective="speech_decoder")
    flat = flatten(params)
    check_codes(config, decoders, flat)
    name = next(name for name in flat if name.startswith("codec/"))
    changed = {**flat, name: flat[name] + 1}
    with pytest.raises(UserError, match="codes of codes are of another codec"):
        check_codes(config, decoders, changed)
    assert codec_fingerprint(params["codec"]) == codec_fingerprint(jax.tree.map(jnp.asarray, params["codec"]))


def test_what_cannot_be_encoded_is_named(model, voice, tmp_path, capsys):
    kept, _, _ = model
    lines = (voice / "manifest.jsonl").read_text().splitlines()
    for n in range(5):
        (tmp_path / f"{n}.wav").write_bytes((voice / f"{n}.wav").read_bytes())
    (tmp_path / "3.wav").write_bytes(b"RIFF")
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    line = ["--checkpoint", str(kept), "--from", str(tmp_path / "all.jsonl"), "--output", str(tmp_path / "out")]
    assert main(line) == 2
    assert "1 of 5 recordings rejected (20.0%)" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*line, "--max-bad-fraction", "0.2"]) == 0
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert reject["place"].endswith("line 4") and reject["category"] == "damaged media"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not built here"):
        build_codes(str(kept), voice, tmp_path / "mine")
