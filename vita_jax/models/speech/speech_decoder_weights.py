"""Names of the published speech decoder (`decoder/final.pt`)."""

from __future__ import annotations

from vita_jax.conversion.tables import Rule, Table, copy, linear, norm
from vita_jax.models.language.decoder_weights import layer_rules
from vita_jax.models.speech.config import SpeechDecoderConfig


def weight_table(config: SpeechDecoderConfig) -> Table:
    """The table of one checkpoint. The initial head, which no released file has, is written as `initial_head`."""
    c, hidden = config, (config.hidden_size,)
    rules: tuple[Rule, ...] = (
        copy("embedding.weight", "ar/embed_tokens/embedding", (c.vocab_size, c.hidden_size)),
        *(layer_rules(c.stack(c.num_nar_layers), "layers_pre_nn", "nar/layers") if c.num_nar_layers else ()),
        *layer_rules(c.stack(c.num_layers), "layers", "ar/layers"),
        *norm("norm", "ar/norm", c.hidden_size, bias=False),
        *linear("out_fnn", "ar/head", hidden, (c.vocab_size,)),
    )
    if c.prefix:
        rules += layer_rules(c.stack(c.num_layers), "layers_prefix", "prefix/layers")
    if c.initial_head:
        rules += linear("initial_head", "nar/initial_head", hidden, (c.num_codes,))
    return Table(rules)
