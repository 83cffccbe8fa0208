"""The command as a user meets it: from a run to an enlarged one that a stage starts from, and every mistake."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data.conftest import TEXTS
from tests.data.test_vocabulary import CHINESE
from tests.training.tiny import experiment, make_batches, model_config, save_model, stage
from vita_jax import enlarge_vocabulary
from vita_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vita_jax.inference.session import Session
from vita_jax.models.vita import Vita
from vita_jax.parallel.rules import unbox
from vita_jax.training import loop
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import TokenizerConfig
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.param_store import ParamWriter

ENTRIES, ROWS = 360, 368


def model_of(rows: int):
    config = model_config()
    return dataclasses.replace(config, language=dataclasses.replace(config.language, vocab_size=rows))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run with 360 entries in 368 rows, of random weights; and texts beside it."""
    folder = tmp_path_factory.mktemp("enlarge")
    model, tokenizer = model_of(ROWS), train_sentencepiece(TEXTS, ENTRIES, None)
    init = jax.jit(lambda key: init_params(Vita(model), OBJECTIVES["language_modeling"], key))
    params = unbox(init(jax.random.key(0)))
    config = experiment(folder / "base", model=model, tokenizer=TokenizerConfig(ENTRIES))
    save_model(config, "joint", 3, params, tokenizer)
    (folder / "zh.txt").write_text("\n".join(CHINESE * 6), encoding="utf-8")
    (folder / "en.txt").write_text("How many digits?\n", encoding="utf-8")
    (folder / "few.txt").write_text("\n".join(CHINESE), encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"\xe9\xe8")
    train_sentencepiece(CHINESE, 340, folder / "other")
    return folder


def run_command(base: Path, name: str, *more: str) -> Path:
    assert enlarge_vocabulary.main(["--checkpoint", str(base / "base"), "--to", str(base / name), *more]) == 0
    return base / name


@pytest.mark.slow
def test_learn_enlarge_and_train_on(base, capsys):
    texts, symbols = ["--texts", str(base / "zh.txt"), "--pieces", "40"], ["--symbols", "<1>", "<2>", "<3>"]
    enlarged = run_command(base, "learnt", *texts, *symbols)
    printed = capsys.readouterr().out
    assert "tokenizer: 360 -> 403 entries" in printed and "vocab_size: 368 -> 416 rows" in printed
    counts = next(line.split() for line in printed.splitlines() if line.startswith("lines kept back"))
    before, after = float(counts[-2]), float(counts[-1])
    assert 0 < after < 0.8 < before < 3

    old, new = load_params(base / "base"), load_params(enlarged)
    assert (new.stage, new.step, new.run_dir) == ("joint", 3, enlarged)
    tokenizer = load_tokenizer(enlarged / "tokenizer")
    assert new.config.tokenizer.vocab_size == tokenizer.vocab_size == 403
    assert new.config.model.language.vocab_size == 416
    table, before = (x.params["language"]["embed_tokens"]["embedding"] for x in (new, old))
    np.testing.assert_array_equal(table[:ENTRIES], before[:ENTRIES])
    base_tokenizer = load_tokenizer(base / "base" / "tokenizer")
    for text in ("<2>", "天气"):
        sources = np.array(base_tokenizer.encode(text, allow_special=False))
        np.testing.assert_allclose(table[tokenizer.token_to_id(text)], before[sources].mean(axis=0), atol=1e-6)
    for name in ("vision", "projector"):
        jax.tree.map(np.testing.assert_array_equal, new.params[name], old.params[name])

    tuning = stage("text_tuning", trainable=("^language/",), steps=2, start_from=str(enlarged))
    config = experiment(base / "next", model=model_of(416), tokenizer=TokenizerConfig(403), stages=(tuning,))
    loop.run(config, make_batches=make_batches, stream=io.StringIO())
    trained = load_params(base / "next").params
    jax.tree.map(np.testing.assert_array_equal, trained["vision"], new.params["vision"])
    assert trained["language"]["embed_tokens"]["embedding"].shape == table.shape

    session = Session.load(enlarged)
    assert session.tokenizer.vocab_size == 403


def test_pieces_of_another_model_and_files_to_measure(base, capsys):
    measure = ["--measure", str(base / "zh.txt"), str(base / "en.txt")]
    more = ["--pieces-from", str(base / "other" / "tokenizer.model"), *measure, "--multiple-of", "1"]
    enlarged = run_command(base, "merged", *more, "--initialisation", "average")
    printed = capsys.readouterr().out
    english = next(line.split() for line in printed.splitlines() if line.startswith(str(base / "en.txt")))
    assert english[-1] == english[-2], "text without new pieces takes as many tokens"
    loaded = load_params(enlarged)
    size = loaded.config.tokenizer.vocab_size
    table = loaded.params["language"]["embed_tokens"]["embedding"]
    assert table.shape[0] == max(size, ROWS) and size > ENTRIES
    np.testing.assert_allclose(table[ENTRIES], table[:ENTRIES].mean(axis=0), atol=1e-6)


def test_stacks_of_layers_go_place_by_place(base, monkeypatch):
    written, write = [], ParamWriter.write

    def spy(self, rule, index, part):
        written.append((rule.path, index))
        write(self, rule, index, part)

    monkeypatch.setattr(ParamWriter, "write", spy)
    run_command(base, "streamed", "--texts", str(base / "zh.txt"), "--pieces", "5")
    layers = model_of(ROWS).language.num_layers
    stacked = {path for path, _ in written if path.startswith("language/layers/")}
    assert len(stacked) > 5
    for path in stacked:
        assert [index for name, index in written if name == path] == [(layer,) for layer in range(layers)]


LEARN = ["--checkpoint", "{base}", "--to", "{new}", "--texts", "{zh}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--checkpoint", "{base}", "--to", "{new}"], "there is nothing to add; give --texts"),
        (LEARN, "--texts needs --pieces N"),
        ([*LEARN, "--pieces", "0"], "--pieces 0 must be at least 1"),
        ([*LEARN, "--pieces", "5", "--script", "chinese"], "script 'chinese' is unknown"),
        ([*LEARN, "--pieces", "5", "--initialisation", "mean"], "'mean' is unknown"),
        ([*LEARN, "--pieces", "5", "--multiple-of", "0"], "multiple of rows 0"),
        ([*LEARN, "--pieces", "5", "--seed", "-1"], "--seed -1"),
        ([*LEARN, "--pieces", "5", "--symbols", "a b"], "without white space"),
        (["--checkpoint", "{base}", "--to", "{base}", "--texts", "{zh}", "--pieces", "5"], "not empty"),
        (["--checkpoint", "{new}", "--to", "{new}", "--texts", "{zh}", "--pieces", "5"], "does not exist"),
        (["--checkpoint", "{base}", "--to", "{new}", "--texts", "{new}", "--pieces", "5"], "No such file"),
        (["--checkpoint", "{base}", "--to", "{new}", "--texts", "{latin}", "--pieces", "5"], "not UTF-8"),
        (["--checkpoint", "{base}", "--to", "{new}", "--texts", "{few}", "--pieces", "5"], "5 lines, too few"),
        (["--checkpoint", "{base}", "--to", "{new}", "--pieces-from", "{zh}"], "needs --measure"),
        (["--checkpoint", "{base}", "--to", "{new}", "--pieces-from", "{zh}", "--measure", "{zh}"], "not a sentence"),
        (["--checkpoint", "{base}", "--to", "{new}", "--pieces-from", "{new}", "--measure", "{zh}"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, base, capsys):
    places = {name: base / f"{name}.txt" for name in ("zh", "few", "latin")}
    places |= {"base": base / "base", "new": base / "never"}
    assert enlarge_vocabulary.main([argument.format(**places) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not (base / "never").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        enlarge_vocabulary.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and "python -m vita_jax.enlarge_vocabulary --checkpoint" in printed


def test_symbols_alone(base, capsys):
    """As Flamingo's tags are added; nothing is counted then."""
    symbols = ["--symbols", "<|endofchunk|>", "<image>", "<PAD>", "--multiple-of", "1"]
    enlarged = run_command(base, "tagged", *symbols)
    tokenizer = load_tokenizer(enlarged / "tokenizer")
    assert [tokenizer.special_tokens[s] for s in symbols[1:4]] == [ENTRIES, ENTRIES + 1, ENTRIES + 2]
    assert f"tokenizer: {ENTRIES} -> {ENTRIES + 3} entries" in capsys.readouterr().out
    table = load_params(enlarged).params["language"]["embed_tokens"]["embedding"]
    assert table.shape[0] == ROWS  # there were rows enough
    for arguments, message in (
        ([], "there is nothing to add; give --texts, --pieces-from or --symbols"),
        (["--symbols", "<x>", "--pieces", "3"], "--pieces says how many of --texts or --pieces-from"),
    ):
        assert enlarge_vocabulary.main(["--checkpoint", str(base / "base"), "--to", str(base / "no"), *arguments]) == 2
        assert message in capsys.readouterr().err
