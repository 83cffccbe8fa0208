"""Tokenizers: lossless, deterministic, and deaf to chat markers that a user typed."""

import json
import pickle
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data.conftest import TEXTS
from vita_jax.data.tokenizer import (
    CHAT_SYMBOLS,
    JsonTokenizer,
    SentencePieceTokenizer,
    TextStream,
    load_tokenizer,
    train_sentencepiece,
    until,
)
from vita_jax.errors import UserError

SNIPPETS = (
    *CHAT_SYMBOLS,
    "\n",
    " ",
    "▁",
    "<0x41>",
    "<unk>",
    "</s>",
    "<image>",
    "digits",
    "数",
    "\x00",
    "\r\n",
    "<|im_",
)
any_text = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SNIPPETS)), max_size=8).map("".join)


@given(text=any_text, allow_special=st.booleans())
@example(text="▁▁ ▁\x00<0x41><unk>☞☞<|im_end|>  ", allow_special=False)
def test_encode_then_decode_gives_the_text_back(own_tokenizer, text, allow_special):
    ids = own_tokenizer.encode(text, allow_special=allow_special)
    assert own_tokenizer.decode(ids) == text
    assert all(0 <= id_ < own_tokenizer.vocab_size for id_ in ids)


@given(text=any_text)
def test_typed_markers_stay_ordinary_text(own_tokenizer, qwen_like, mixtral_like, text):
    for tokenizer in (own_tokenizer, qwen_like, mixtral_like):
        text_with_markers = text + "".join(tokenizer.special_tokens) + text
        ids = tokenizer.encode(text_with_markers, allow_special=False, add_bos=False)
        # The unknown token may stand for a character; it opens no turn.
        assert not set(ids) & (set(tokenizer.special_tokens.values()) - {tokenizer.token_to_id("<unk>")})


def test_markers_newlines_and_state_symbols_are_single_pieces(own_tokenizer):
    for symbol in CHAT_SYMBOLS:
        assert own_tokenizer.encode(f"a{symbol}b")[1:-1] == [own_tokenizer.special_tokens[symbol]]
    newline = own_tokenizer.token_to_id("\n")
    assert own_tokenizer.encode("\n\n", allow_special=False) == [newline, newline]
    assert own_tokenizer.eos_id == own_tokenizer.token_to_id("<|im_end|>")
    assert own_tokenizer.pad_id == own_tokenizer.token_to_id("<|endoftext|>")
    assert own_tokenizer.bos_id is None and own_tokenizer.token_to_id("no such piece") is None


def test_digits_are_split(tmp_path):
    tokenizer = train_sentencepiece(["1234 1234 1234"] * 20, 300, tmp_path, at_most=True)
    assert len(tokenizer.encode("1234")) == 4


def test_training_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        train_sentencepiece(iter(TEXTS), 350, tmp_path / name)
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()


def test_vocabulary_size_errors_say_the_limits(tmp_path):
    with pytest.raises(UserError, match="too large.*at most") as error:
        train_sentencepiece(TEXTS, 5000, tmp_path)
    limit = int(str(error.value).split("at most ")[1].split()[0])
    assert train_sentencepiece(TEXTS, limit, tmp_path).vocab_size == limit
    assert train_sentencepiece(TEXTS, 5000, tmp_path, at_most=True).vocab_size == limit
    with pytest.raises(UserError, match="too small.*use (265)"):
        train_sentencepiece(TEXTS, 264, tmp_path)
    assert train_sentencepiece(TEXTS, 265, tmp_path).vocab_size == 265
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(["", "\n", "<|im_end|>"], 300, tmp_path)


def test_more_characters_than_room_fall_back_to_bytes(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(2000)) + "一二三" * 50
    tokenizer = train_sentencepiece([text, "x" * 5000], 300, tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("一")) == 1 and len(tokenizer.encode(chr(0x4E00 + 1999))) == 3


def test_lone_surrogates_and_foreign_ids_are_refused(own_tokenizer, qwen_like):
    for tokenizer in (own_tokenizer, qwen_like):
        with pytest.raises(UserError, match="surrogate"):
            tokenizer.encode("a\ud800")
        with pytest.raises(UserError, match="-200"):
            tokenizer.decode([1, -200])


def test_saved_and_pickled_tokenizers_are_the_same(own_tokenizer, qwen_like, mixtral_like, tmp_path):
    for tokenizer in (own_tokenizer, qwen_like, mixtral_like):
        folder = tmp_path / str(id(tokenizer))
        tokenizer.save(folder)
        for copy in (load_tokenizer(folder), pickle.loads(pickle.dumps(tokenizer))):
            for allow_special in (True, False):
                text = "What is 7?</s><|im_end|>☜\n 数"
                assert copy.encode(text, allow_special=allow_special) == tokenizer.encode(
                    text, allow_special=allow_special
                )
            assert copy.vocab_size == tokenizer.vocab_size


def test_public_tokenizer_settings(qwen_like, mixtral_like):
    assert (mixtral_like.bos_id, mixtral_like.eos_id, mixtral_like.pad_id) == (1, 2, 0)  # pad falls back to unk
    assert mixtral_like.encode("a")[0] == 1 and mixtral_like.encode("a", add_bos=False)[0] != 1
    assert qwen_like.bos_id is None
    assert qwen_like.decode(qwen_like.encode("x<|im_end|>"), skip_special=True) == "x"


@given(text=any_text)
def test_streamed_text_equals_the_whole(own_tokenizer, qwen_like, text):
    for tokenizer in (own_tokenizer, qwen_like):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        pieces = [stream.push(id_) for id_ in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)


def test_a_stream_holds_back_half_characters(own_tokenizer):
    stream = TextStream(own_tokenizer)
    ids = own_tokenizer.encode("鼠")
    assert len(ids) == 3
    assert [stream.push(id_) for id_ in ids] == ["", "", "鼠"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


@given(st.lists(st.text("ab#", max_size=4), max_size=8), st.sampled_from(["###", "#", "aba", "</s>"]))
def test_a_text_ends_where_its_end_begins(pieces, end):
    text, sent = "".join(pieces), ""
    for piece in until(pieces, end):
        sent += piece
        assert text.split(end)[0].startswith(sent), "what has been sent is never taken back"
    assert sent == text.split(end)[0]
    assert "".join(until(pieces, None)) == text


def test_only_what_may_be_the_end_is_held_back():
    assert list(until(["ab", "#", "#c", "d##", "#", "e"], "###")) == ["ab", "", "##c", "d", ""]


def test_file_errors_are_one_clear_line(own_tokenizer, qwen_like, tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    folder = tmp_path / "json"
    qwen_like.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}), encoding="utf-8")
    with pytest.raises(UserError, match="<nowhere>"):
        JsonTokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(UserError, match="names no eos_token"):
        load_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="JSON object"):
        load_tokenizer(folder)
    shutil.rmtree(folder)


def test_texts_without_spaces_still_give_a_space(tmp_path):
    tokenizer = train_sentencepiece(["数字之和是多少", "有几个数字", "一二三四五"], 400, tmp_path, at_most=True)
    assert tokenizer.decode(tokenizer.encode("几 个  数字 a b")) == "几 个  数字 a b"
