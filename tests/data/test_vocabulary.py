"""Enlarged tokenizers: old ids stay, new pieces are found, typed symbols stay text, fewer tokens; and bad input."""

import io
import pickle

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from vita_jax.data.prompts import encode_conversation, state_symbol_ids
from vita_jax.data.sentencepiece_file import Piece, PieceType, append_pieces, is_byte_pair, read_pieces
from vita_jax.data.templates import SystemTexts, get_template
from vita_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from vita_jax.data.vocabulary import (
    count_tokens,
    enlarge,
    pieces_of_model,
    read_lines,
    train_pieces,
)
from vita_jax.errors import UnsupportedOption, UserError

CHINESE = [
    "今天的天气很好，我们去公园看花。",
    "公园里的花很多，有红花和白花。",
    "我们今天看见很多红花，天气很好。",
    "明天的天气不好，我们不去公园。",
    "He said: 天气很好 and left.",
]
SYMBOLS = ("<1>", "<2>", "<3>")
KINDS = ("own_tokenizer", "mixtral_like")
mixed_text = st.lists(st.one_of(st.text(max_size=6), st.sampled_from([*CHINESE, *SYMBOLS, "天气", "▁", "\n"]))).map(
    "".join
)


@pytest.fixture(scope="session")
def grown(request, own_tokenizer, mixtral_like):
    """Old tokenizer and enlargement of every kind."""
    olds = dict(zip(KINDS, (own_tokenizer, mixtral_like), strict=True))
    return {kind: (old, enlarge(old, train_pieces(CHINESE, 60, old), SYMBOLS, 60)) for kind, old in olds.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_follow(grown, kind):
    old, result = grown[kind]
    new = result.tokenizer
    assert result.first_id == old.vocab_size and new.vocab_size == old.vocab_size + len(result.pieces)
    for id_ in range(old.vocab_size):
        assert new.decode([id_]) == old.decode([id_])
    for number, piece in enumerate(result.pieces):
        assert new.token_to_id(piece.text) == result.first_id + number
        assert old.token_to_id(piece.text) is None or piece.text in old.special_tokens
    assert (new.eos_id, new.bos_id, new.pad_id) == (old.eos_id, old.bos_id, old.pad_id)


@pytest.mark.parametrize("kind", KINDS)
def test_new_pieces_are_found_and_their_sources_spell_them(grown, kind):
    old, result = grown[kind]
    words = [piece for piece in result.pieces if piece.text not in result.tokenizer.special_tokens]
    assert len(words) >= 30 and any(piece.text == "天气" for piece in words)
    for piece in words:
        id_ = result.tokenizer.token_to_id(piece.text)
        assert id_ in result.tokenizer.encode(f"x{piece.text}x", add_bos=False), piece
        assert all(0 <= source < result.first_id for source in piece.sources)
        assert b"".join(piece_bytes(old, source) for source in piece.sources).decode() == piece.text


def piece_bytes(tokenizer, id_):
    for byte in range(256):
        if tokenizer.token_to_id(f"<0x{byte:02X}>") == id_:
            return bytes([byte])
    return tokenizer.decode([id_]).encode()


@given(text=mixed_text)
@example(text="天气很好<1>\n▁ 公园")
def test_decoding_gives_the_text_back(grown, text):
    new = grown["own_tokenizer"][1].tokenizer
    for allow_special in (True, False):
        assert new.decode(new.encode(text, allow_special=allow_special)) == text


@given(text=st.text(st.characters(max_codepoint=0x24FF, exclude_categories=["Cs"]), max_size=20))
def test_text_without_new_pieces_is_spelt_as_before(grown, text):
    for old, result in grown.values():
        assert result.tokenizer.encode(text, allow_special=False) == old.encode(text, allow_special=False)


@pytest.mark.parametrize("kind", KINDS)
def test_chinese_takes_fewer_tokens(grown, kind):
    old, result = grown[kind]
    before, after = (count_tokens(tokenizer, CHINESE) for tokenizer in (old, result.tokenizer))
    assert before.characters == after.characters == sum(map(len, CHINESE))
    assert before.tokens == sum(len(old.encode(line, add_bos=False)) for line in CHINESE)
    assert after.per_character < 0.9 < 1.5 < before.per_character


@pytest.mark.parametrize("kind", KINDS)
def test_state_symbols_are_single_tokens_that_nobody_can_type(grown, kind):
    old, result = grown[kind]
    new = result.tokenizer
    ids = {new.special_tokens[symbol] for symbol in SYMBOLS}
    assert len(ids) == 3 and all(new.encode(symbol, add_bos=False)[-1] in ids for symbol in SYMBOLS)
    assert not set(new.encode("a<1>b<2><3>", allow_special=False)) & ids
    assert set(state_symbol_ids(new, get_template("mixtral_two")).values()) == {"audio", "noise", "text"}
    if kind == "mixtral_like":  # it had them before
        assert not {piece.text for piece in result.pieces} & set(SYMBOLS)
    else:
        assert [piece.text for piece in result.pieces[-3:]] == list(SYMBOLS)
        assert old.decode(result.pieces[-1].sources) == "<3>"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_pickled_copies_are_the_same(grown, kind, tmp_path):
    new = grown[kind][1].tokenizer
    new.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(new))):
        assert copy.vocab_size == new.vocab_size and copy.special_tokens == new.special_tokens
        for line in (*CHINESE, "<1>天气<2>"):
            assert copy.encode(line) == new.encode(line)


def test_a_conversation_of_vita_1_0(grown):
    """The template's `</s>` and state symbols are single tokens before and after; the answer gets shorter."""
    record = [{"from": "human", "value": "天气?"}, {"from": "gpt", "value": CHINESE[0]}]
    texts = SystemTexts("i", "v", "l")
    old, result = grown["mixtral_like"]
    sizes = []
    for tokenizer in (old, result.tokenizer):
        template = get_template("mixtral_two")
        encoded = encode_conversation(record, tokenizer=tokenizer, template=template, system_texts=texts)
        answer = encoded.labels[encoded.labels >= 0].tolist()
        assert encoded.prompt == f"system:l</s>\nuser:天气?</s>\nbot:<3>{CHINESE[0]}</s>"
        assert (answer[0], answer[-1]) == (tokenizer.special_tokens["<3>"], tokenizer.special_tokens["</s>"])
        assert tokenizer.decode(answer[1:-1]).strip() == CHINESE[0]
        sizes.append(len(answer))
    assert sizes[1] < sizes[0] / 2


def test_enlarging_twice_adds_only_what_is_new(grown):
    for _, result in grown.values():
        pieces = [piece.text for piece in result.pieces if piece.text not in SYMBOLS]
        again = enlarge(result.tokenizer, [*pieces, "鼠"], SYMBOLS)
        assert [piece.text for piece in again.pieces] == ["鼠"] and again.known == len(pieces)
        with pytest.raises(UserError, match="nothing to add"):
            enlarge(result.tokenizer, pieces, SYMBOLS)


def test_pieces_of_another_model(own_tokenizer):
    """A unigram model with long pieces: only what pairs can reach is taken."""
    model = io.BytesIO()
    options = {"model_type": "unigram", "vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CHINESE * 20), model_writer=model, **options)
    candidates = pieces_of_model(model.getvalue(), "other")
    assert candidates and all(not any(c.isascii() or c == "▁" for c in piece) for piece in candidates)
    assert any(c.isascii() for piece in pieces_of_model(model.getvalue(), "other", "any") for c in piece)
    lengths = [len(piece) > 1 for piece in candidates]
    assert lengths == sorted(lengths), "characters first"
    result = enlarge(own_tokenizer, [*candidates, "鼠牛虎兔"])
    assert "鼠牛虎兔" in result.unreachable and result.unreachable[0] not in {piece.text for piece in result.pieces}
    joined = enlarge(own_tokenizer, ["鼠牛虎", "鼠牛", "鼠", "牛", "虎"])
    assert not joined.unreachable and len(joined.tokenizer.encode("鼠牛虎")) == 1
    limited = enlarge(own_tokenizer, candidates, limit=3)
    new = [piece for piece in candidates if own_tokenizer.token_to_id(piece) is None]
    assert [piece.text for piece in limited.pieces] == new[:3]


def test_pieces_never_hold_symbols_or_newlines(own_tokenizer):
    result = enlarge(own_tokenizer, ["鼠", "鼠☞", "鼠<1>", "鼠\n", "☞"], ["<1>"])
    assert [piece.text for piece in result.pieces] == ["鼠", "<1>"]


def test_appending_to_a_file_changes_nothing_before(own_tokenizer):
    proto, old = own_tokenizer.proto, read_pieces(own_tokenizer.proto, "m")
    added = [Piece("天气", -1000.5), Piece("<1>", 0.0, PieceType.USER_DEFINED)]
    new = append_pieces(proto, added, len(old) + 2)
    assert new.startswith(proto) and read_pieces(new, "m") == [*old, *added] and is_byte_pair(new)
    processor = sentencepiece.SentencePieceProcessor(model_proto=new)
    assert processor.vocab_size() == len(old) + 2 and processor.id_to_piece(len(old)) == "天气"
    assert [piece.text for piece in old] == [own_tokenizer._processor.id_to_piece(i) for i in range(len(old))]


def test_bad_files_and_arguments(own_tokenizer, qwen_like, tmp_path):
    for proto in (b"not a model", own_tokenizer.proto[:1000], b"\x0a\xff"):
        with pytest.raises(UserError, match="m.model is not a sentencepiece model"):
            pieces_of_model(proto, "m.model")
    with pytest.raises(UserError, match="has no piece of script 'han'"):
        pieces_of_model(b"", "m.model")
    with pytest.raises(UnsupportedOption, match="byte-level vocabularies such as Qwen's"):
        enlarge(qwen_like, ["鼠"])
    for symbol in ("", "a b"):
        with pytest.raises(UserError, match="without white space"):
            enlarge(own_tokenizer, ["鼠"], [symbol])
    with pytest.raises(UserError, match="'▁digit' is an ordinary piece"):
        enlarge(own_tokenizer, ["鼠"], ["▁digit"])
    with pytest.raises(UserError, match="script 'chinese' is unknown; expected one of han, any"):
        train_pieces(CHINESE, 5, own_tokenizer, "chinese")
    with pytest.raises(UserError, match="no character of script 'han'"):
        train_pieces(["only English"], 5, own_tokenizer)
    with pytest.raises(UserError, match="number of new pieces 0"):
        train_pieces(CHINESE, 0, own_tokenizer)
    with pytest.raises(UserError, match="texts are empty"):
        count_tokens(own_tokenizer, ["", ""])
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_lines(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        read_lines(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="holds no text"):
        read_lines(tmp_path / "empty.txt")


def test_a_unigram_base_is_refused(own_tokenizer, monkeypatch):
    monkeypatch.setattr("vita_jax.data.vocabulary.is_byte_pair", lambda proto: False)
    assert isinstance(own_tokenizer, SentencePieceTokenizer)
    with pytest.raises(UnsupportedOption, match="type BPE"):
        enlarge(own_tokenizer, ["鼠"])
