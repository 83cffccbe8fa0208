"""Tokenizers: our own sentencepiece models and public `tokenizer.json` files behind one small protocol.

A tokenizer never decides what a turn is: `encode(text, allow_special=False)` keeps chat markers that a user typed as
ordinary text, so only the prompt code can open or close a turn. Every model trained here decodes what it encoded
exactly, whatever the text (byte fallback, no normalisation).
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from vita_jax.data.sentencepiece_file import PieceType, read_pieces
from vita_jax.errors import UserError
from vita_jax.storage import place, write_whole

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_SYMBOLS = (END_OF_TEXT, TURN_START, TURN_END, "☞", "☟", "☜")
NEWLINE = "\n"
SENTENCEPIECE_FILE, JSON_FILE, JSON_CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"

# sentencepiece writes a space as this character, so the character itself has to travel as bytes to survive.
SPACE_MARK = "▁"
# 256 bytes, the unknown piece, the chat symbols and the newline: what every model of ours holds before any text.
FIXED_PIECES = 256 + 1 + len(CHAT_SYMBOLS) + 1
# Longer lines make the trainer slow and are skipped above its limit (in bytes; a character has at most 4).
_MAX_LINE_CHARACTERS = 1000


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer. Implementations are picklable."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""

    @property
    def pad_id(self) -> int:
        """Id that fills padded positions."""

    @property
    def bos_id(self) -> int | None:
        """Id that starts every text, or None where the tokenizer has none."""

    @property
    def eos_id(self) -> int:
        """Id that ends an answer."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Strings that are one id wherever they stand in trusted text (chat markers, added state symbols)."""

    def encode(self, text: str, *, allow_special: bool = True, add_bos: bool = True) -> list[int]:
        """Ids of `text`.

        allow_special: whether special tokens written in the text take effect; False keeps them as ordinary text.
        add_bos: start with the BOS, if the public tokenizer does so.
        """

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD. skip_special leaves special tokens out."""

    def token_to_id(self, token: str) -> int | None:
        """Id of a vocabulary entry, or None."""

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer(folder)` reads."""


class SentencePieceTokenizer:
    """A model made by `train_sentencepiece`. pad is <|endoftext|>, eos is <|im_end|>, there is no BOS.

    Special tokens are the chat symbols and what `vita_jax.data.vocabulary` has added to them.

    source: path of the `.model` file, or its bytes. Raises UserError when the file is missing, is no sentencepiece
    model, or lacks the chat symbols or byte pieces (then it was made by another program and would not be lossless).
    """

    def __init__(self, source: str | Path | bytes):
        if isinstance(source, bytes):
            name, proto = "the given bytes", source
        else:
            name, proto = str(source), _read(place(source))
        self._load(proto, name)

    def _load(self, proto: bytes, name: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise UserError(
                f"{name} is not a sentencepiece model ({error}); give a file that train_sentencepiece wrote"
            ) from error
        self._proto, self._processor = proto, processor
        unknown = processor.unk_id()
        needed = [*CHAT_SYMBOLS, NEWLINE, *(f"<0x{byte:02X}>" for byte in range(256))]
        ids = {piece: processor.piece_to_id(piece) for piece in needed}
        missing = [piece for piece, id_ in ids.items() if id_ == unknown]
        if missing:
            raise UserError(
                f"{name} has no piece {missing[0]!r} ({len(missing)} of {len(needed)} needed pieces are "
                "missing); train it with vita_jax.data.tokenizer.train_sentencepiece, or give a "
                f"{JSON_FILE} for a public tokenizer"
            )
        pieces = enumerate(read_pieces(proto, name))
        marked = {p.text: id_ for id_, p in pieces if p.type == PieceType.USER_DEFINED and p.text != NEWLINE}
        self._special = {symbol: ids[symbol] for symbol in CHAT_SYMBOLS} | marked
        self._special_ids = frozenset(self._special.values())
        self._bytes = [ids[f"<0x{byte:02X}>"] for byte in range(256)]
        self._split = _alternatives([*self._special, SPACE_MARK])

    @property
    def proto(self) -> bytes:
        """Content of the model file."""
        return self._proto

    def __getstate__(self) -> dict[str, Any]:
        return {"proto": self._proto}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["proto"], "the pickled model")

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        return self._special[END_OF_TEXT]

    @property
    def bos_id(self) -> None:
        return None

    @property
    def eos_id(self) -> int:
        return self._special[TURN_END]

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str, *, allow_special: bool = True, add_bos: bool = True) -> list[int]:
        """See `Tokenizer.encode`. Raises UserError for lone surrogates, which no encoding of text can carry."""
        del add_bos  # there is none
        _check_unicode(text)
        ids: list[int] = []
        for piece in self._split.split(text):
            if piece in self._special and allow_special:
                ids.append(self._special[piece])
            elif piece == SPACE_MARK or (piece in self._special and len(piece) == 1):
                ids.extend(self._bytes[byte] for byte in piece.encode("utf-8"))
            elif piece in self._special:
                # A user-defined piece is only matched whole, so one cut makes it ordinary text.
                ids.extend(self._processor.encode(piece[0]))
                ids.extend(self._processor.encode(piece[1:]))
            elif piece:
                ids.extend(self._processor.encode(piece))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._processor.decode(
            [id_ for id_ in _checked_ids(ids, self.vocab_size) if not (skip_special and id_ in self._special_ids)]
        )

    def token_to_id(self, token: str) -> int | None:
        id_ = self._processor.piece_to_id(token)
        return None if id_ == self._processor.unk_id() and token != self._processor.id_to_piece(id_) else id_

    def save(self, folder: str | Path) -> None:
        write_whole(place(folder) / SENTENCEPIECE_FILE, self._proto)


class JsonTokenizer:
    """A public tokenizer: `tokenizer.json` with its `tokenizer_config.json` (Qwen2.5, Mixtral and their kin).

    folder: the folder with both files. pad falls back to the unknown token where the config names none, as VITA-1.0
    does. Raises UserError when a file is missing or names a token that the vocabulary lacks.
    """

    def __init__(self, folder: str | Path):
        folder = place(folder)
        self._load(
            _read(folder / JSON_FILE).decode("utf-8"), _read(folder / JSON_CONFIG_FILE).decode("utf-8"), str(folder)
        )

    def _load(self, definition: str, config: str, name: str) -> None:
        self._definition, self._config_text, self._name = definition, config, name
        self._config = _json_object(config, f"{name}/{JSON_CONFIG_FILE}")
        if "model" not in _json_object(definition, f"{name}/{JSON_FILE}"):
            raise UserError(f"{name}/{JSON_FILE} has no field 'model'; it is not a tokenizer definition")
        # Two instances, because whether special tokens are recognised is a state of the instance.
        self._trusting, self._literal = (tokenizers.Tokenizer.from_str(definition) for _ in range(2))
        self._literal.encode_special_tokens = True
        added = self._trusting.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        self._bos = self._named("bos_token")
        self._eos = self._named("eos_token")
        unknown = self._named("unk_token")
        pad = self._named("pad_token")
        self._pad = unknown if pad is None else pad
        for role, id_ in (("eos_token", self._eos), ("pad_token", self._pad)):
            if id_ is None:
                raise UserError(f"{name}/{JSON_CONFIG_FILE} names no {role}; add one that the vocabulary holds")
        starts = self._trusting.encode("").ids[:1] == [self._bos]
        self._adds_bos = self._bos is not None and self._config.get("add_bos_token", starts)

    def _named(self, role: str) -> int | None:
        token = self._config.get(role)
        if isinstance(token, Mapping):
            token = token["content"]
        if token is None:
            return None
        id_ = self._trusting.token_to_id(token)
        if id_ is None:
            raise UserError(
                f"{self._name}/{JSON_CONFIG_FILE}: {role} {token!r} is not in the vocabulary of "
                f"{JSON_FILE}; give the two files of one tokenizer"
            )
        return id_

    @classmethod
    def from_text(cls, definition: str, config: str, name: str = "the given text") -> "JsonTokenizer":
        """From the content of the two files. Raises UserError as the class does; `name` is for its messages."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(definition, config, name)
        return tokenizer

    @property
    def definition(self) -> str:
        """Content of `tokenizer.json`."""
        return self._definition

    @property
    def config_text(self) -> str:
        """Content of `tokenizer_config.json`."""
        return self._config_text

    def __getstate__(self) -> dict[str, Any]:
        return {"definition": self._definition, "config": self._config_text, "name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._load(state["definition"], state["config"], state["name"])

    @property
    def vocab_size(self) -> int:
        return self._trusting.get_vocab_size(with_added_tokens=True)

    @property
    def pad_id(self) -> int:
        return self._pad

    @property
    def bos_id(self) -> int | None:
        return self._bos if self._adds_bos else None

    @property
    def eos_id(self) -> int:
        return self._eos

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str, *, allow_special: bool = True, add_bos: bool = True) -> list[int]:
        """See `Tokenizer.encode`. Raises UserError for lone surrogates, which no encoding of text can carry."""
        _check_unicode(text)
        instance = self._trusting if allow_special else self._literal
        ids = instance.encode(text, add_special_tokens=False).ids
        return [self._bos, *ids] if add_bos and self._adds_bos else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return self._trusting.decode(_checked_ids(ids, self.vocab_size), skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        return self._trusting.token_to_id(token)

    def save(self, folder: str | Path) -> None:
        write_whole(place(folder) / JSON_FILE, self._definition)
        write_whole(place(folder) / JSON_CONFIG_FILE, self._config_text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder (`tokenizer.model` of ours, else `tokenizer.json`), or of one of these two files.

    Raises UserError when the path does not exist or holds neither file.
    """
    path = place(path)
    if path.name == JSON_FILE:
        return JsonTokenizer(path.parent)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(path / SENTENCEPIECE_FILE)
    if (path / JSON_FILE).is_file():
        return JsonTokenizer(path)
    raise UserError(f"no tokenizer at {path}: expected a folder with {SENTENCEPIECE_FILE} or {JSON_FILE}")


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path | None,
    *,
    at_most: bool = False,
    symbols: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Train a byte-pair model on `texts`, write `folder/tokenizer.model` (None: no file) and return its tokenizer.

    No normalisation, no dummy prefix, white space kept, digits split, byte fallback; newline and the chat symbols are
    single pieces. The same texts in the same order give the same bytes. When the texts have more distinct characters
    than three quarters of the free pieces, the rarest are left to the byte pieces.

    vocab_size: number of pieces, 264 of them fixed (bytes, chat symbols, newline, unknown).
    at_most: take `vocab_size` as an upper bound instead of an error when the texts do not have that many pieces.
    symbols: further single pieces, wherever they occur: neither cut nor merged with what is beside them.
    Raises UserError when vocab_size is too small, or too large for the texts (the message says the maximum).
    """
    lines, characters = _training_lines(texts, vocab_size - len(symbols))
    fixed = FIXED_PIECES + len(symbols)
    smallest = fixed + characters
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: {fixed} pieces are fixed and at least "
            f"{characters} are needed for characters; use {smallest} or more"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=not at_most,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=[*CHAT_SYMBOLS, NEWLINE, *symbols],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _MAX_LINE_CHARACTERS + 4,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        too_large = re.search(r"too high.*<= (\d+)", str(error))
        if too_large is None:
            raise
        raise UserError(
            f"vocab_size {vocab_size} is too large for the texts: they have at most "
            f"{too_large[1]} pieces; lower it, give more text, or pass at_most=True"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _training_lines(texts: Iterable[str], vocab_size: int) -> tuple[list[str], int]:
    """Lines without chat symbols and rare characters, and how many distinct characters they have."""
    cut = _alternatives([*CHAT_SYMBOLS, NEWLINE, SPACE_MARK, "\0"], keep=False)
    lines: list[str] = []
    counts: Counter[str] = Counter()
    for text in texts:
        _check_unicode(text)
        for line in filter(None, cut.split(text)):
            counts.update(line)
            lines.append(line)
    if not lines:
        raise UserError("no text to train a tokenizer on: every given text is empty")
    if " " not in counts:
        # Without a piece for the space, text that has one would come back with the trainer's mark for it.
        lines.append(" ")
        counts[" "] = max(counts.values()) + 1  # never among the rarest
    room = max(1, (vocab_size - FIXED_PIECES) * 3 // 4)
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    if len(kept) < len(counts):
        # Cutting lines at rare characters keeps them out of the vocabulary, whatever the trainer's own coverage rule.
        common = frozenset(kept)
        lines = ["".join(c if c in common else NEWLINE for c in line) for line in lines]
        lines = [part for line in lines for part in line.split(NEWLINE) if part]
    return [part for line in lines for part in _chunks(line)], len(kept)


def _chunks(line: str) -> Iterator[str]:
    return (line[start : start + _MAX_LINE_CHARACTERS] for start in range(0, len(line), _MAX_LINE_CHARACTERS))


class TextStream:
    """Turns ids that arrive one by one into text, holding back characters whose bytes are not complete yet."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token_id: int) -> str:
        """The text that is certain after this id and was not returned before (may be empty)."""
        self._ids.append(int(token_id))
        # Decoded from the start each time: some decoders treat the first piece differently, and answers are short.
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        return self._advance(text, len(text.rstrip("\ufffd")))

    def flush(self) -> str:
        """Whatever was held back, with U+FFFD for bytes that never became a character."""
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return text[start:end]


def until(pieces: Iterable[str], end: str | None) -> Iterator[str]:
    """The pieces of a text up to the first `end`, which is left out with everything behind it; None ends nothing.

    What may be the beginning of `end` is held back until that is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        if end is None:
            sent = len(held)
        elif end in held:
            yield held[: held.index(end)]
            return
        else:
            begun = next((n for n in range(min(len(end) - 1, len(held)), 0, -1) if held.endswith(end[:n])), 0)
            sent = len(held) - begun
        yield held[:sent]
        held = held[sent:]
    yield held


def _alternatives(strings: Sequence[str], keep: bool = True) -> re.Pattern[str]:
    pattern = "|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True))
    return re.compile(f"({pattern})" if keep else pattern)


def _checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    checked = [int(id_) for id_ in ids]
    for id_ in checked:
        if not 0 <= id_ < vocab_size:
            raise UserError(
                f"id {id_} is outside the vocabulary 0..{vocab_size - 1}; media placeholders and ignored "
                "labels have to be removed before decoding"
            )
    return checked


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text holds the lone surrogate {text[error.start]!r} at position {error.start}; read the file as UTF-8"
        ) from error


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} must hold a JSON object, got {type(value).__name__}")
    return value


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    return path.read_bytes()
