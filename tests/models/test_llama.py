"""LLaMA as one of the decoder's families: sizes, published fields, names."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vita_jax.conversion.tables import flatten
from vita_jax.errors import UnsupportedOption
from vita_jax.models.language.decoder import Decoder, DecoderConfig, mixtral_8x7b, qwen2_7b
from vita_jax.models.language.decoder_weights import config_from_hf, config_to_hf, weight_table
from vita_jax.models.language.llama import llama_7b, llama_13b, vicuna_7b_v1_5, vicuna_13b_v1_5


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [(llama_7b, 6_738_415_616), (llama_13b, 13_015_864_320), (vicuna_7b_v1_5, 6_738_415_616)],
)
def test_presets_have_the_published_number_of_parameters(preset, num_parameters):
    config = preset()
    row = jnp.zeros((1, 2), jnp.int32)
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2, config.hidden_size)), row, row)
    shapes = {path: leaf.shape for path, leaf in flatten(nn.unbox(variables)["params"]).items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == num_parameters
    table = weight_table(config)
    assert shapes == {rule.path: (*rule.stack, *rule.param_shape) for rule in table.rules}
    assert len(table.torch_names) == 9 * config.num_layers + 3
    assert not any(name.endswith("bias") for name in table.torch_names)


def test_published_fields():
    """Vicuna-7B v1.5 leaves everything to the class's defaults but these; a first LLaMA has no key/value heads."""
    fields = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_key_value_heads": 32}
    assert config_from_hf(fields) == replace(vicuna_7b_v1_5(), remat="none")
    assert config_from_hf({"model_type": "llama"}) == replace(llama_7b(), remat="none")
    thirteen = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
    assert config_from_hf(fields | thirteen | {"num_key_value_heads": 40}) == replace(vicuna_13b_v1_5(), remat="none")
    for change, word in (
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ):
        with pytest.raises(UnsupportedOption, match=word):
            config_from_hf(fields | change)


@pytest.mark.parametrize("preset", [llama_13b, qwen2_7b, mixtral_8x7b])
def test_fields_go_out_and_come_back(preset):
    config: DecoderConfig = preset()
    assert config_from_hf(config_to_hf(config)) == replace(config, remat="none")


@pytest.mark.parametrize("kind", ["mpt", "gpt_neox", "opt", "gptj"])
def test_other_families_are_refused(kind):
    with pytest.raises(UnsupportedOption, match=f"model_type '{kind}' is not offered: .* one of mixtral, llama, qwen2"):
        config_from_hf({"model_type": kind})
    with pytest.raises(UnsupportedOption, match="neither Qwen2"):
        config_to_hf(replace(mixtral_8x7b(), qkv_bias=True))
