"""Small tokenizers of the three kinds the prompt code meets, and a folder of records of all kinds."""

import json

import pytest
import tokenizers
from hypothesis import settings
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.data.media import build, context, mixed_records
from vita_jax.data.tokenizer import JsonTokenizer, train_sentencepiece

# A busy machine is no failure.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

TEXTS = [
    "How many digits are there? There are 3 digits.",
    "Read the digits from left to right: 4 0 7.",
    "What is the largest digit? It is 9.",
    "一共有几个数字？有三个。",
    "最大的数字是几？是九。",
    "system\nLook at the picture, then reply.\nuser\nassistant\n",
]


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory):
    """A sentencepiece model of ours."""
    return train_sentencepiece(TEXTS, 360, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def qwen_like(tmp_path_factory):
    """Byte-level pairs, chat markers as added tokens, state symbols as ordinary entries of the vocabulary, no BOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS + ["☞", "☟", "☜"] * 50, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
    return _saved(tokenizer, config, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def mixtral_like(tmp_path_factory):
    """Characters with byte fallback, a space mark in front of every separate piece, BOS, added state symbols."""
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    entries += [chr(code) for code in range(33, 127)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={entry: i for i, entry in enumerate(entries)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<1>", "<2>", "<3>"])
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
    }
    return _saved(tokenizer, config, tmp_path_factory.mktemp("mixtral"))


def _saved(tokenizer, config, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return JsonTokenizer(folder)


@pytest.fixture(scope="module")
def ctx(own_tokenizer):
    return context(own_tokenizer)


@pytest.fixture(scope="module")
def media_root(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def mixed(media_root):
    """35 records of all kinds: (folder, entries)."""
    entries = mixed_records(media_root, 35)
    return build(media_root, entries, "mixed", shards=3), entries
