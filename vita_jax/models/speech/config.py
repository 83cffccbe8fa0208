"""Sizes of the speech decoders, and the ids they use beside the codec's.

Codec ids are 0 .. c-1. Four more rows follow in the table and in the output layer: BOS stands before the text
features, SOS starts the speech tokens, EOS ends them, PAD fills rows and is never predicted (`decoder.py`,
`LLM2TTSCodecAR`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vita_jax.errors import UserError
from vita_jax.models.language.decoder import DecoderConfig

NUM_SPECIAL = 4
ROPE_THETA = 1e4
RMS_NORM_EPS = 1e-6


@dataclass(frozen=True)
class SpeechDecoderConfig:
    """The NAR and AR speech decoders.

    Attributes:
      num_codes: c, entries of the codec's codebook.
      hidden_size: d of all stacks. A text embedding of the language model is cut into rows of this width.
      intermediate_size: f, width of the feed-forwards.
      num_heads: n; d / n must be even.
      num_layers: layers of the AR stack, and of the prefix stack.
      nar_layers: layers of the NAR stack; None gives the original's `num_layers // 2`. 0 is no NAR decoder: the AR
        decoder reads the rows of text themselves.
      prefix: builds the third stack, which reads hidden states of the language model into the AR stack's cache.
      initial_head: builds a linear layer that reads a first guess of the speech tokens from the NAR output (the
        papers describe such a distribution; the released weights have none).
      contiguous_positions: in teacher forcing, gives the speech tokens of a row the positions that follow its own
        text, as at inference. False is the original: they follow the padded text.
      remat: what the backward pass may keep, see `decoder.REMAT_POLICIES`.
    """

    num_codes: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    nar_layers: int | None = None
    prefix: bool = False
    initial_head: bool = False
    contiguous_positions: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of {2 * self.num_heads}, 2 * num_heads")
        if self.num_nar_layers < (1 if self.nar_layers is None else 0):
            raise UserError(
                f"nar_layers is {self.nar_layers} with num_layers {self.num_layers}; give the NAR decoder 1 or more, "
                "or 0 to go without"
            )
        if self.initial_head and not self.num_nar_layers:
            raise UserError("initial_head reads the NAR output, but nar_layers is 0; set one of them")

    @property
    def bos(self) -> int:
        """Stands before the text."""
        return self.num_codes

    @property
    def sos(self) -> int:
        """Starts the speech tokens."""
        return self.num_codes + 1

    @property
    def eos(self) -> int:
        """Ends the speech tokens."""
        return self.num_codes + 2

    @property
    def pad(self) -> int:
        """Fills rows."""
        return self.num_codes + 3

    @property
    def vocab_size(self) -> int:
        """v: codec ids and the four others."""
        return self.num_codes + NUM_SPECIAL

    @property
    def num_nar_layers(self) -> int:
        """Layers of the NAR stack."""
        return self.num_layers // 2 if self.nar_layers is None else self.nar_layers

    def stack(self, num_layers: int) -> DecoderConfig:
        """One stack as a decoder: multi-head attention without biases, drawn as torch's linear layers are."""
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size,
            rope_theta=ROPE_THETA,
            rms_norm_eps=RMS_NORM_EPS,
            qkv_bias=False,
            remat=self.remat,
            initializer_range=None,
        )


def vita_1_5_speech(
    *,
    num_layers: int = 4,
    nar_layers: int | None = None,
    num_heads: int = 14,
    intermediate_size: int = 4096,
    prefix: bool = False,
) -> SpeechDecoderConfig:
    """The speech decoders of VITA-1.5 at full size: rows of 896, a quarter of Qwen2-7B's 3584, and 1024 codec ids.

    The sizes that are arguments are not published; a checkpoint settles all but `num_heads` (`config_from_shapes`).
    """
    return SpeechDecoderConfig(
        num_codes=1024,
        hidden_size=896,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_layers=num_layers,
        nar_layers=nar_layers,
        prefix=prefix,
    )


def speech_small(num_codes: int = 64, width: int = 64, num_layers: int = 4) -> SpeechDecoderConfig:
    """The same architecture for a laptop."""
    return SpeechDecoderConfig(
        num_codes=num_codes,
        hidden_size=width,
        intermediate_size=3 * width,
        num_heads=width // 16,
        num_layers=num_layers,
        contiguous_positions=True,
    )


def config_from_published(values: Sequence[Any]) -> SpeechDecoderConfig:
    """The configuration from the content of a public `decoder/model.json`: the list [idim, odim, arguments].

    Raises:
      UserError: the list is of another form, or the input, attention and output widths differ (the stacks have no
        projection between them).
    """
    if len(values) != 3 or not isinstance(values[2], Mapping):
        raise UserError("model.json: expected a list of three entries, [idim, odim, arguments]")
    args = values[2]
    width = args["transformer_attention_dim"]
    for name in ("idim", "encoder_output_dim"):
        if args.get(name, width) != width:
            raise UserError(f"model.json: {name} is {args[name]}, but the stacks have width {width}; they must agree")
    return SpeechDecoderConfig(
        num_codes=args["odim"],
        hidden_size=width,
        intermediate_size=args["transformer_linear_units"],
        num_heads=args["transformer_attention_heads"],
        num_layers=args["transformer_num_blocks"],
        prefix=bool(args.get("kv_cache_prefix_finetune", 0)),
    )


def config_to_published(config: SpeechDecoderConfig) -> list[Any]:
    """The content of a `decoder/model.json`, as `config_from_published` reads it."""
    args = {
        "idim": config.hidden_size,
        "odim": config.num_codes,
        "transformer_attention_dim": config.hidden_size,
        "transformer_linear_units": config.intermediate_size,
        "transformer_num_blocks": config.num_layers,
        "transformer_attention_heads": config.num_heads,
        "transformer_dropout_rate": 0.0,
        "encoder_output_dim": config.hidden_size,
        "encoder_criterion": "ce",
        "kv_cache_prefix_finetune": int(config.prefix),
    }
    return [config.hidden_size, config.num_codes, args]


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], num_heads: int) -> SpeechDecoderConfig:
    """The configuration that a state dict's shapes imply; only the number of heads leaves no trace in them.

    Args:
      shapes: torch name -> shape.

    Raises:
      UserError: a name that every checkpoint has is missing.
    """
    needed = ("embedding.weight", "layers.0.mlp.gate_proj.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UserError(f"not the weights of a speech decoder: {', '.join(missing)} missing")

    def depth(stack: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(f"{stack}.")})

    rows, width = shapes["embedding.weight"]
    num_layers, nar_layers = depth("layers"), depth("layers_pre_nn")
    return SpeechDecoderConfig(
        num_codes=rows - NUM_SPECIAL,
        hidden_size=width,
        intermediate_size=shapes["layers.0.mlp.gate_proj.weight"][0],
        num_heads=num_heads,
        num_layers=num_layers,
        nar_layers=None if nar_layers == num_layers // 2 else nar_layers,
        prefix=depth("layers_prefix") > 0,
    )
