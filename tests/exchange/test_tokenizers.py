"""A public folder's sentencepiece model as a `tokenizer.json`: the same ids as the library that trained it."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from vita_jax.data.tokenizer import JsonTokenizer, load_tokenizer
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.exchange.tokenizers import make_tokenizer

LINES = [
    "the weather was cloudy last night",
    "tom read the story twice, and then  twice more",
    "邻居的帽子是蓝色的",
    "这件裙子要两十块钱",
    "def f(x):\n    return x + 1",
    "numbers 0 1 2 3 4 5 6 7 8 9",
] * 20


def train(**options) -> bytes:
    """A small model with LLaMA's settings."""
    file = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "vocab_size": 400, "split_digits": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=file, **(settings | {"hard_vocab_limit": False} | options)
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory):
    """The library's model, and what is made of its file alone."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "tokenizer.model").write_bytes(model)
    assert make_tokenizer(folder, folder / "made") == []
    known = sentencepiece.SentencePieceProcessor()
    known.LoadFromSerializedProto(model)
    return known, load_tokenizer(folder / "made")


TEXTS = st.text(
    st.one_of(st.sampled_from(sorted(set("".join(LINES)))), st.characters(codec="utf-8", exclude_characters="\0▁")),
    min_size=1,
    max_size=30,
)


@given(TEXTS)
def test_ids_are_those_of_the_library(pair, text):
    known, made = pair
    ids = made.encode(text, allow_special=False, add_bos=False)
    assert ids == known.encode(text)
    assert made.decode(ids) == known.decode(ids)


def test_the_file_alone_makes_a_whole_tokenizer(pair):
    known, made = pair
    assert isinstance(made, JsonTokenizer)
    assert (made.bos_id, made.eos_id, made.pad_id) == (known.bos_id(), known.eos_id(), known.unk_id())
    assert made.vocab_size == known.vocab_size()
    assert made.encode("the</s>")[0] == known.bos_id()
    assert made.encode("the</s>")[-1] == known.eos_id()


def test_tokens_that_were_added_keep_their_ids(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    known = sentencepiece.SentencePieceProcessor()
    known.LoadFromSerializedProto(model)
    size = known.vocab_size()
    states = {f"<{n}>": size + n - 1 for n in (1, 2, 3)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(states))
    make_tokenizer(tmp_path, tmp_path / "made")
    made = load_tokenizer(tmp_path / "made")
    assert made.encode("<2>", add_bos=False) == [size + 1]
    assert made.vocab_size == size + 3
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<1>": size + 5}))
    with pytest.raises(UserError, match="'<1>' should have id"):
        make_tokenizer(tmp_path, tmp_path / "made")


def test_a_configuration_that_does_not_say_starts_texts_as_llama_does(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    for says, starts in (({}, True), ({"add_bos_token": False}, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **says}))
        make_tokenizer(tmp_path, tmp_path / "made")
        assert (load_tokenizer(tmp_path / "made").bos_id is not None) == starts
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json is not a JSON object"):
        make_tokenizer(tmp_path, tmp_path / "made")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, "unigram model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises its text"),
        ({"remove_extra_whitespaces": True}, "normalises its text"),
    ],
)
def test_other_models_are_refused(options, said, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(**options))
    with pytest.raises(UnsupportedOption, match=said):
        make_tokenizer(tmp_path, tmp_path / "made")
