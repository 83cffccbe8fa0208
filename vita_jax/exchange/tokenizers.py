"""The tokenizer of a public folder as a folder that `vita_jax.data.tokenizer` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from vita_jax.data.sentencepiece_file import Piece, PieceType, is_byte_pair, keeps_text, read_pieces
from vita_jax.data.tokenizer import (
    CHAT_SYMBOLS,
    END_OF_TEXT,
    JSON_CONFIG_FILE,
    JSON_FILE,
    SENTENCEPIECE_FILE,
    SPACE_MARK,
    TURN_END,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from vita_jax.errors import UnsupportedOption, UserError

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
ADDED_FILE, SPECIAL_FILE = "added_tokens.json", "special_tokens_map.json"
# What public folders have; all of them go into the run and out again.
TOKENIZER_FILES = (
    JSON_FILE,
    JSON_CONFIG_FILE,
    SENTENCEPIECE_FILE,
    VOCAB_FILE,
    MERGES_FILE,
    ADDED_FILE,
    SPECIAL_FILE,
    "chat_template.jinja",
)
# How Qwen2 cuts text before it merges bytes (transformers' `tokenization_qwen2.py` has the same pattern).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(originals: Path, folder: Path) -> list[str]:
    """Writes `folder` from the files of a public one: `tokenizer.json`, else vocabulary and merges, else a
    sentencepiece model.

    Args:
      originals: the folder with the public files.
      folder: created where there is a tokenizer; a bare tower has none.

    Returns:
      A line for the user where there is no tokenizer.

    Raises:
      UserError: the files are there but no tokenizer can be made of them.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
    if (originals / JSON_FILE).is_file():
        folder.mkdir(parents=True)
        shutil.copyfile(originals / JSON_FILE, folder / JSON_FILE)
        _copy_config(originals, folder)
    elif (originals / VOCAB_FILE).is_file() and (originals / MERGES_FILE).is_file():
        folder.mkdir(parents=True)
        tokenizer_of_merges(originals).save(str(folder / JSON_FILE))
        _copy_config(originals, folder)
    elif (originals / SENTENCEPIECE_FILE).is_file():
        _from_sentencepiece(originals, folder)
    else:
        return ["no tokenizer in the folder: the result is weights to start from, not a model to talk to"]
    load_tokenizer(folder)
    return []


def _copy_config(originals: Path, folder: Path) -> None:
    if not (originals / JSON_CONFIG_FILE).is_file():
        raise UserError(f"{JSON_FILE} needs {JSON_CONFIG_FILE} beside it, which names its special tokens")
    shutil.copyfile(originals / JSON_CONFIG_FILE, folder / JSON_CONFIG_FILE)


def tokenizer_of_merges(folder: Path) -> tokenizers.Tokenizer:
    """Qwen2's byte-level tokenizer from `vocab.json` and `merges.txt`; added tokens are those that the config lists.

    Raises:
      UserError: the files do not belong together.
    """
    try:
        vocab = json.loads((folder / VOCAB_FILE).read_text(encoding="utf-8"))
        lines = (folder / MERGES_FILE).read_text(encoding="utf-8").splitlines()
        config = json.loads((folder / JSON_CONFIG_FILE).read_text(encoding="utf-8"))
        listed = sorted((int(id_), entry) for id_, entry in config.get("added_tokens_decoder", {}).items())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{VOCAB_FILE}, {MERGES_FILE} and {JSON_CONFIG_FILE} make no tokenizer: {error}") from error
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for merge in merges:
        unknown = [piece for piece in (*merge, "".join(merge)) if piece not in vocab]
        if len(merge) != 2 or unknown:
            raise UserError(f"{MERGES_FILE}: {' '.join(merge)!r} is no merge of two pieces of {VOCAB_FILE}")
    model = tokenizers.models.BPE(vocab, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    _add_tokens(tokenizer, listed, VOCAB_FILE)
    return tokenizer


def _from_sentencepiece(originals: Path, folder: Path) -> None:
    """A model of ours is copied; one of LLaMA's kin becomes a `tokenizer.json`, as its special tokens need one."""
    source = originals / SENTENCEPIECE_FILE
    pieces = read_pieces(source.read_bytes(), str(source))
    folder.mkdir(parents=True)
    if set(CHAT_SYMBOLS) <= {piece.text for piece in pieces}:
        shutil.copyfile(source, folder / SENTENCEPIECE_FILE)
        return
    tokenizer_of_sentencepiece(originals).save(str(folder / JSON_FILE))
    config = _plain_config(pieces) | _json_file(originals / JSON_CONFIG_FILE)
    (folder / JSON_CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _plain_config(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What holds where the configuration does not say: LLaMA's names, and a start in front of every text."""
    unknown = [piece.text for piece in pieces if piece.type == PieceType.UNKNOWN]
    return {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown[0]}


def tokenizer_of_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a byte-pair `tokenizer.model` (LLaMA, Mixtral); added tokens are those that the config or
    `added_tokens.json` lists.

    sentencepiece joins the pair that gives the piece with the highest score, so the merges are all pairs that give a
    piece, by falling score.

    Raises:
      UserError: the files do not belong together.
      UnsupportedOption: a unigram model, or one that changes the text before it cuts it.
    """
    source = folder / SENTENCEPIECE_FILE
    proto = source.read_bytes()
    pieces = read_pieces(proto, str(source))
    if not is_byte_pair(proto):
        raise UnsupportedOption(f"{source} is a unigram model; only byte-pair models are read, give a {JSON_FILE}")
    if not keeps_text(proto):
        raise UnsupportedOption(f"{source} normalises its text; only models that keep it are read, give a {JSON_FILE}")
    prefix, strip = [tokenizers.normalizers.Prepend(SPACE_MARK)], [tokenizers.decoders.Strip(" ", 1, 0)]
    return _of_pieces(pieces, _listed_tokens(folder), prefix, strip)


def as_json_tokenizer(tokenizer: Tokenizer) -> JsonTokenizer:
    """The tokenizer, with one of ours as the `tokenizer.json` that it could be. Only the character that sentencepiece
    writes a space as is another in it: it is a space.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer
    pieces = read_pieces(tokenizer.proto, "the tokenizer")
    special = {id_: {"content": text, "special": True} for text, id_ in tokenizer.special_tokens.items()}
    definition = _of_pieces(pieces, special, [], []).to_str()
    names = {"pad_token": END_OF_TEXT, "eos_token": TURN_END, "unk_token": pieces[0].text, "add_bos_token": False}
    return JsonTokenizer.from_text(definition, json.dumps(names))


def _of_pieces(
    pieces: Sequence[Piece],
    listed: Mapping[int, dict[str, Any]],
    first_normalizers: list[tokenizers.normalizers.Normalizer],
    last_decoders: list[tokenizers.decoders.Decoder],
) -> tokenizers.Tokenizer:
    """The tokenizer of byte-pair pieces in the order of their ids; `listed`: further added tokens by id."""
    ids = {piece.text: id_ for id_, piece in enumerate(pieces)}
    joined = {piece.text for piece in pieces if piece.type == PieceType.NORMAL}
    merges = [
        (left, right)
        for piece in sorted((p for p in pieces if p.type == PieceType.NORMAL), key=lambda piece: -piece.score)
        for left, right in sorted(
            ((piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text))),
            key=lambda pair: (ids.get(pair[0], 0), ids.get(pair[1], 0)),
        )
        if left in joined and right in joined
    ]
    unknown = next((piece.text for piece in pieces if piece.type == PieceType.UNKNOWN), None)
    has_bytes = sum(piece.type == PieceType.BYTE for piece in pieces) == 256
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([*first_normalizers, normalizers.Replace(" ", SPACE_MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *last_decoders]
    )
    special = (PieceType.UNKNOWN, PieceType.CONTROL)
    own = [
        (id_, {"content": piece.text, "special": piece.type in special})
        for id_, piece in enumerate(pieces)
        if piece.type in (*special, PieceType.USER_DEFINED)
    ]
    _add_tokens(tokenizer, sorted({**dict(own), **listed}.items()), SENTENCEPIECE_FILE)
    return tokenizer


def _listed_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Id -> description of the added tokens that a public folder lists."""
    added, config = _json_file(folder / ADDED_FILE), _json_file(folder / JSON_CONFIG_FILE)
    try:
        listed = {int(id_): {"content": content, "special": True} for content, id_ in added.items()}
        return listed | {int(id_): entry for id_, entry in config.get("added_tokens_decoder", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{ADDED_FILE} or {JSON_CONFIG_FILE} does not list tokens with their ids: {error}") from error


def _json_file(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file. Raises UserError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _add_tokens(tokenizer: tokenizers.Tokenizer, listed: Sequence[tuple[int, dict[str, Any]]], file: str) -> None:
    """Adds tokens in the order of their ids. Raises UserError where one gets another id than it should have."""
    for id_, entry in listed:
        token = tokenizers.AddedToken(
            entry["content"], special=entry.get("special", False), normalized=entry.get("normalized", False)
        )
        (tokenizer.add_special_tokens if entry.get("special") else tokenizer.add_tokens)([token])
        found = tokenizer.token_to_id(entry["content"])
        if found != id_:
            raise UserError(
                f"added token {entry['content']!r} should have id {id_}, but behind {file} and the tokens before it "
                f"that is {found}; the files do not belong together"
            )
