"""A tokenizer with more pieces: what to add, the enlarged tokenizer, and what it saves.

VITA-1.0 added Chinese pieces to Mixtral's vocabulary, because it spells most characters as three bytes. Here:

- `train_pieces` learns pieces from text, `pieces_of_model` takes those of another sentencepiece model;
- `enlarge` puts them behind all existing ones. No id changes, and old pairs are joined before new ones, so text that
  holds no new piece is spelt as before;
- `count_tokens` says how many tokens a text takes, before and after.

Both kinds of tokenizers that join pairs of characters and fall back to bytes can grow: ours, and `tokenizer.json` files
in the manner of Llama and Mixtral.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from vita_jax.data.sentencepiece_file import Piece, PieceType, append_pieces, is_byte_pair, read_pieces
from vita_jax.data.tokenizer import (
    FIXED_PIECES,
    JSON_FILE,
    NEWLINE,
    SPACE_MARK,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from vita_jax.errors import UnsupportedOption, UserError

# Which characters the new pieces are made of. Chinese characters with the punctuation and full-width forms beside them.
_HAN = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
SCRIPTS: Mapping[str, re.Pattern[str]] = {"han": re.compile(f"[{_HAN}]+"), "any": re.compile(r".+", re.DOTALL)}


@dataclass(frozen=True)
class NewPiece:
    """A new entry: its text, and the ids that the old tokenizer spells it with."""

    text: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Enlargement:
    """What `enlarge` made.

    Attributes:
      tokenizer: with the new entries.
      first_id: id of the first of them.
      pieces: the new entries in the order of their ids; symbols come last.
      known: how many candidates were there before.
      unreachable: candidates that no pair of other pieces gives, left out.
    """

    tokenizer: Tokenizer
    first_id: int
    pieces: tuple[NewPiece, ...]
    known: int
    unreachable: tuple[str, ...]


@dataclass(frozen=True)
class TokenCount:
    """Size of some texts."""

    characters: int
    tokens: int

    @property
    def per_character(self) -> float:
        """Tokens per character."""
        return self.tokens / self.characters


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not empty. Raises UserError if there are none or it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"text file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"text file {path} is not UTF-8: {error}; convert it first") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"text file {path} holds no text")
    return lines


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenCount:
    """Characters of the texts, and their tokens without a BOS. Raises UserError if there are no characters."""
    characters = tokens = 0
    for text in texts:
        characters += len(text)
        tokens += len(tokenizer.encode(text, allow_special=False, add_bos=False))
    if not characters:
        raise UserError("tokens per character: the texts are empty; give some text")
    return TokenCount(characters, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------------------------


def script_of(name: str) -> re.Pattern[str]:
    """The entry of `SCRIPTS`. Raises UserError if there is none."""
    if name not in SCRIPTS:
        raise UserError(f"script {name!r} is unknown; expected one of {', '.join(SCRIPTS)}")
    return SCRIPTS[name]


def train_pieces(texts: Iterable[str], number: int, tokenizer: Tokenizer, script: str = "han") -> list[str]:
    """Candidates from text: byte pairs learnt on its stretches of one script, characters first.

    Args:
      texts: training text.
      number: how many new pieces are wanted; so many that it is enough even if all the tokenizer's own come again.
      tokenizer: the one to be enlarged.
      script: a name of `SCRIPTS`.

    Raises:
      UserError: `number` is not positive, the script is unknown, or the texts hold none of it.
    """
    if number < 1:
        raise UserError(f"number of new pieces {number} must be at least 1")
    pattern = script_of(script)
    runs = [run for text in texts for run in pattern.findall(text)]
    if not runs:
        raise UserError(f"the texts hold no character of script {script!r}; give other text or another script")
    known = sum(bool(pattern.fullmatch(piece)) for piece in _vocabulary(tokenizer))
    model = train_sentencepiece(runs, FIXED_PIECES + number + known, None, at_most=True)
    return pieces_of_model(model.proto, "the trained model", script)


def pieces_of_model(proto: bytes, name: str, script: str = "han") -> list[str]:
    """Candidates from a sentencepiece model of any kind: single characters, then longer pieces, best first.

    Args:
      proto: content of the model file.
      name: of the file, for messages.
      script: a name of `SCRIPTS`; every character of a candidate is of it.

    Raises:
      UserError: no sentencepiece model, or no piece of that script.
    """
    pattern = script_of(script)
    pieces = [piece for piece in read_pieces(proto, name) if piece.type == PieceType.NORMAL]
    fitting = [piece for piece in pieces if pattern.fullmatch(piece.text)]
    if not fitting:
        raise UserError(f"{name} has no piece of script {script!r}; give another model or script")
    return [piece.text for piece in sorted(fitting, key=lambda piece: (len(piece.text) > 1, -piece.score))]


# ---------------------------------------------------------------------------------------------------------------------
# The enlarged tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def enlarge(
    tokenizer: Tokenizer, candidates: Sequence[str], symbols: Sequence[str] = (), limit: int | None = None
) -> Enlargement:
    """Appends pieces, then symbols, to a tokenizer.

    A piece can only be found in text if it is one character, or two other pieces joined; the others are left out.

    Args:
      tokenizer: ours, or a `tokenizer.json` with byte fallback.
      candidates: texts of pieces, best first, a space written as sentencepiece does; those already there are skipped.
      symbols: special tokens to add, such as the state symbols `<1> <2> <3>`; those already there are skipped.
      limit: at most this many pieces.

    Raises:
      UserError: nothing new, or a symbol that is empty, has white space, or is an ordinary piece already.
      UnsupportedOption: a tokenizer that works in another way.
    """
    vocabulary = _vocabulary(tokenizer)
    symbols = _new_symbols(symbols, tokenizer, vocabulary)
    marked = [*tokenizer.special_tokens, *symbols, NEWLINE]
    usable = [piece for piece in dict.fromkeys(candidates) if piece and not any(mark in piece for mark in marked)]
    new = [piece for piece in usable if piece not in vocabulary]
    chosen, unreachable = _reachable(new, set(vocabulary), len(new) if limit is None else limit)
    if not chosen and not symbols:
        raise UserError(
            f"nothing to add: all {len(usable)} candidate pieces are in the vocabulary already or cannot be reached; "
            "give other text, or a larger number of pieces"
        )
    first_id = tokenizer.vocab_size
    if sorted(vocabulary.values()) != list(range(first_id)):
        raise UserError(f"the ids of the tokenizer are not 0 to {first_id - 1} without gaps; new ids would collide")
    spell = _speller(tokenizer)
    pieces = tuple(NewPiece(text, tuple(spell(text))) for text in (*chosen, *symbols))
    grow = _enlarge_json if isinstance(tokenizer, JsonTokenizer) else _enlarge_own
    return Enlargement(
        grow(tokenizer, chosen, symbols, vocabulary), first_id, pieces, len(usable) - len(new), tuple(unreachable)
    )


def _new_symbols(symbols: Sequence[str], tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> list[str]:
    new = [symbol for symbol in dict.fromkeys(symbols) if symbol not in tokenizer.special_tokens]
    for symbol in new:
        if not symbol or any(c.isspace() for c in symbol):
            raise UserError(f"symbol {symbol!r} must be a text without white space, such as '<1>'")
        if symbol in vocabulary:
            raise UserError(f"symbol {symbol!r} is an ordinary piece of the vocabulary; choose another one")
    return new


def _reachable(candidates: Sequence[str], vocabulary: set[str], limit: int) -> tuple[list[str], list[str]]:
    """At most `limit` candidates in an order in which each is a character or a pair of what came before; the rest."""
    chosen: list[str] = []
    waiting = list(candidates)
    while waiting and len(chosen) < limit:
        later = []
        for piece in waiting:
            if len(chosen) < limit and (len(piece) == 1 or _splits(piece, vocabulary)):
                chosen.append(piece)
                vocabulary.add(piece)
            else:
                later.append(piece)
        if len(later) == len(waiting):
            break
        waiting = later
    return chosen, waiting if len(chosen) < limit else []


def _splits(piece: str, vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Text of every entry -> id."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = read_pieces(tokenizer.proto, "the tokenizer")
        return {piece.text: id_ for id_, piece in enumerate(pieces)}
    return tokenizers.Tokenizer.from_str(_json_of(tokenizer)).get_vocab(with_added_tokens=True)


def _speller(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text of a piece -> ids, without what a tokenizer puts in front of a text."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return lambda text: tokenizer.encode(text.replace(SPACE_MARK, " "), allow_special=False)
    model = tokenizers.Tokenizer.from_str(_json_of(tokenizer)).model
    return lambda text: [token.id for token in model.tokenize(text)]


def _json_of(tokenizer: Tokenizer) -> str:
    """Raises UnsupportedOption unless it is a `tokenizer.json` of pairs of characters with byte fallback."""
    if not isinstance(tokenizer, JsonTokenizer):
        raise UnsupportedOption(f"a {type(tokenizer).__name__} cannot be enlarged")
    model = json.loads(tokenizer.definition)["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        found = {name: model.get(name) for name in ("type", "byte_fallback", "ignore_merges")}
        raise UnsupportedOption(
            f"a {JSON_FILE} with {found} cannot be enlarged: only pairs of characters with byte fallback, as in "
            "Mixtral's; byte-level vocabularies such as Qwen's hold Chinese already"
        )
    return tokenizer.definition


def _enlarge_own(
    tokenizer: SentencePieceTokenizer, pieces: Sequence[str], symbols: Sequence[str], vocabulary: Mapping[str, int]
) -> SentencePieceTokenizer:
    if not is_byte_pair(tokenizer.proto):
        raise UnsupportedOption("only sentencepiece models of type BPE can be enlarged")
    # Below all others, so that old pairs are joined first.
    lowest = min(piece.score for piece in read_pieces(tokenizer.proto, "the tokenizer"))
    added = [Piece(text, lowest - 1 - rank) for rank, text in enumerate(pieces)]
    added += [Piece(symbol, 0.0, PieceType.USER_DEFINED) for symbol in symbols]
    return SentencePieceTokenizer(append_pieces(tokenizer.proto, added, len(vocabulary) + len(added)))


def _enlarge_json(
    tokenizer: JsonTokenizer, pieces: Sequence[str], symbols: Sequence[str], vocabulary: Mapping[str, int]
) -> JsonTokenizer:
    definition: dict[str, Any] = json.loads(_json_of(tokenizer))
    model = definition["model"]
    new_ids = {text: len(vocabulary) + number for number, text in enumerate((*pieces, *symbols))}
    # Added tokens go into the vocabulary, too: the library would number those that are not in it anew. Without a pair
    # that gives them they are never found in ordinary text.
    model["vocab"] = {**vocabulary, **new_ids}
    known = model["vocab"].keys() - {*symbols, *tokenizer.special_tokens}
    pairs = [pair for piece in pieces for pair in _splits(piece, known)]
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in pairs]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    definition["added_tokens"] += [{"id": new_ids[s], "content": s, **flags, "special": True} for s in symbols]
    return JsonTokenizer.from_text(
        json.dumps(definition, ensure_ascii=False), tokenizer.config_text, "the enlarged tokenizer"
    )
