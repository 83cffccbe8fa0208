"""The tokenizer of a public folder as a folder that `vita_jax.data.tokenizer` reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers

from vita_jax.data.tokenizer import JSON_CONFIG_FILE, JSON_FILE, SENTENCEPIECE_FILE, load_tokenizer
from vita_jax.errors import UserError

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
    """Writes `folder` from the files of a public one; `tokenizer.json` first, else vocabulary and merges.

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
        folder.mkdir(parents=True)
        shutil.copyfile(originals / SENTENCEPIECE_FILE, folder / SENTENCEPIECE_FILE)
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
    for id_, entry in listed:
        token = tokenizers.AddedToken(
            entry["content"], special=entry.get("special", False), normalized=entry.get("normalized", False)
        )
        (tokenizer.add_special_tokens if entry.get("special") else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(entry["content"]) != id_:
            raise UserError(
                f"{JSON_CONFIG_FILE}: token {entry['content']!r} should have id {id_}, but after {VOCAB_FILE} and the "
                f"tokens before it is {tokenizer.token_to_id(entry['content'])}; the files do not belong together"
            )
    return tokenizer
