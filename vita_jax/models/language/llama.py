"""Sizes of the LLaMA family, the language models of LLaVA and of the first open Flamingo (arXiv 2302.13971, table 2;
arXiv 2307.09288).

They are the one decoder without biases and experts, every query head with a key/value head of its own. The sheared ones
(arXiv 2310.06694) are as wide and deep as the language models of open_flamingo's 3B and 4B.
"""

from __future__ import annotations

from dataclasses import replace

from vita_jax.models.language.decoder import DecoderConfig


def llama_7b(vocab_size: int = 32000) -> DecoderConfig:
    """LLaMA-7B, and Vicuna-7B up to v1.3."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        max_positions=2048,
        remat="full",
    )


def llama_13b(vocab_size: int = 32000) -> DecoderConfig:
    """LLaMA-13B, and Vicuna-13B up to v1.3."""
    return replace(
        llama_7b(vocab_size),
        hidden_size=5120,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        intermediate_size=13824,
    )


def vicuna_7b_v1_5(vocab_size: int = 32000) -> DecoderConfig:
    """Vicuna-7B v1.5, tuned from Llama-2: another norm epsilon and twice the context."""
    return replace(llama_7b(vocab_size), rms_norm_eps=1e-5, max_positions=4096)


def vicuna_13b_v1_5(vocab_size: int = 32000) -> DecoderConfig:
    """Vicuna-13B v1.5, tuned from Llama-2."""
    return replace(llama_13b(vocab_size), rms_norm_eps=1e-5, max_positions=4096)


def sheared_llama_1_3b(vocab_size: int = 32000) -> DecoderConfig:
    """Sheared-LLaMA-1.3B, cut out of Llama-2."""
    return replace(
        llama_7b(vocab_size),
        hidden_size=2048,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        intermediate_size=5504,
        rms_norm_eps=1e-5,
        max_positions=4096,
    )


def sheared_llama_2_7b(vocab_size: int = 32000) -> DecoderConfig:
    """Sheared-LLaMA-2.7B, cut out of Llama-2."""
    return replace(
        sheared_llama_1_3b(vocab_size),
        hidden_size=2560,
        num_layers=32,
        num_heads=20,
        num_kv_heads=20,
        intermediate_size=6912,
    )
