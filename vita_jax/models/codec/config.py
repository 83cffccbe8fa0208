"""Sizes of the codec (TiCodec, arXiv 2310.00014; the code's `ticodec/{models,vqvae}.py`), and presets.

24 kHz wave -> latent frames, each coded by one entry per codebook, and one vector for the whole utterance, coded by a
few entries. VITA's codec has one codebook of 1024 and 40 frames per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vita_jax.errors import UnsupportedOption, UserError

RESIDUAL_LAYERS = (1, 2, 4)


@dataclass(frozen=True)
class CodecConfig:
    """The codec.

    Attributes:
      upsample_rates, upsample_kernel_sizes: strides and taps of the generator's stages; the encoder has them reversed.
      upsample_initial_channel: channels before the generator's first stage, halved by each stage.
      resblock: "1" (pairs of convolutions) or "2" (single ones).
      resblock_kernel_sizes, resblock_dilation_sizes: the parallel blocks of every stage.
      latent_dim: channels of the latent frames.
      base_channels: of the encoder, doubled by each stage; `base_channels * 2 ** stages` must be `latent_dim`.
      global_feature_conv: (channels in, hidden, channels out, taps, stride) of the utterance branch; channels out is
        the width of the utterance's vector.
      group_norm_channels: channels per group of the encoder's norms.
      num_code_groups: slices of a latent frame, each with codebooks of its own.
      num_residual_layers: codebooks one behind the other; 1, 2 or 4.
      num_codes: entries of a codebook.
      num_global_codes: slices of the utterance's vector, one codebook each.
      codebook_weight, commitment_weight: of the two terms of the quantiser's loss.
      weight_norm: whether the weights are stored as direction and length.
      sampling_rate: Hz.
    """

    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    upsample_initial_channel: int = 512
    resblock: str = "1"
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    latent_dim: int = 512
    base_channels: int = 32
    global_feature_conv: tuple[int, int, int, int, int] = (128, 64, 128, 3, 1)
    group_norm_channels: int = 16
    num_code_groups: int = 1
    num_residual_layers: int = 1
    num_codes: int = 1024
    num_global_codes: int = 8
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    weight_norm: bool = True
    sampling_rate: int = 24000

    def __post_init__(self) -> None:
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes):
            raise UserError(
                f"upsample_kernel_sizes has {len(self.upsample_kernel_sizes)} entries for {len(self.upsample_rates)} "
                "upsample_rates; give one for each"
            )
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes):
            raise UserError(
                f"resblock_dilation_sizes has {len(self.resblock_dilation_sizes)} entries for "
                f"{len(self.resblock_kernel_sizes)} resblock_kernel_sizes; give one for each"
            )
        if self.resblock not in ("1", "2"):
            raise UserError(f"resblock {self.resblock!r} must be '1' or '2'")
        if self.num_residual_layers not in RESIDUAL_LAYERS:
            layers = ", ".join(map(str, RESIDUAL_LAYERS))
            raise UnsupportedOption(
                f"num_residual_layers {self.num_residual_layers} is not offered; use one of {layers}"
            )
        if self.latent_dim % self.num_code_groups:
            raise UserError(
                f"latent_dim {self.latent_dim} must be a multiple of num_code_groups {self.num_code_groups}"
            )
        if self.global_dim % self.num_global_codes:
            raise UserError(
                f"the utterance's vector of {self.global_dim} must be a multiple of num_global_codes "
                f"{self.num_global_codes}"
            )

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsample_rates)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.hop

    @property
    def num_stages(self) -> int:
        """Stages of encoder and generator."""
        return len(self.upsample_rates)

    @property
    def global_dim(self) -> int:
        """Width of the utterance's vector."""
        return self.global_feature_conv[2]

    @property
    def num_quantizers(self) -> int:
        """q: codes per frame."""
        return self.num_code_groups * self.num_residual_layers

    @property
    def global_stage(self) -> int:
        """The encoder's stage whose output the utterance branch reads."""
        return self.num_stages // 2 - 1

    def stage_channels(self, stage: int) -> int:
        """Channels after a stage of the generator."""
        return self.upsample_initial_channel // 2 ** (stage + 1)

    def check_encoder(self) -> None:
        """Raises UserError where the widths of the encoder do not fit each other (the generator alone has no need)."""
        widest = self.base_channels * 2**self.num_stages
        if widest != self.latent_dim:
            raise UserError(
                f"base_channels {self.base_channels} doubled by {self.num_stages} stages is {widest}, but latent_dim "
                f"is {self.latent_dim}; they must agree"
            )
        if self.num_stages < 2:
            raise UserError(f"the encoder needs at least 2 stages, not {self.num_stages}: give more upsample_rates")
        branch = self.base_channels * 2 ** (self.num_stages // 2)
        if self.global_feature_conv[0] != branch:
            raise UserError(
                f"global_feature_conv starts with {self.global_feature_conv[0]} channels, but the encoder's stage "
                f"{self.global_stage} has {branch}; they must agree"
            )


def ticodec_24k_320() -> CodecConfig:
    """The public TiCodec at 24 kHz: 320 samples per frame, 75 frames per second, one codebook."""
    return CodecConfig(upsample_rates=(8, 5, 4, 2), upsample_kernel_sizes=(16, 11, 8, 4))


def vita_1_5_codec() -> CodecConfig:
    """VITA-1.5's codec: 600 samples per frame, 40 frames per second, one codebook of 1024.

    How the 600 are split into stages is not published: read `codec/model.json` of a checkpoint with
    `config_from_published` where there is one.
    """
    return CodecConfig(upsample_rates=(8, 5, 5, 3), upsample_kernel_sizes=(16, 11, 11, 7))


def codec_small(
    base_channels: int = 8,
    upsample_rates: tuple[int, ...] = (8, 5, 5, 3),
    num_codes: int = 256,
    sampling_rate: int = 24000,
    resblock: str = "1",
) -> CodecConfig:
    """The same architecture with few channels, for training on a laptop.

    Args:
      base_channels: of the encoder; a quarter of the full model's by default.
      upsample_rates: their product is the hop in samples.
      num_codes: entries of the codebook.
      sampling_rate: Hz.
      resblock: "2" has half the convolutions and takes half the time.
    """
    stages = len(upsample_rates)
    latent, branch = base_channels * 2**stages, base_channels * 2 ** (stages // 2)
    return CodecConfig(
        upsample_rates=tuple(upsample_rates),
        upsample_kernel_sizes=tuple(2 * rate + rate % 2 for rate in upsample_rates),
        upsample_initial_channel=latent,
        resblock=resblock,
        resblock_kernel_sizes=(3, 7),
        resblock_dilation_sizes=((1, 3), (1, 3)),
        latent_dim=latent,
        base_channels=base_channels,
        global_feature_conv=(branch, branch, branch, 3, 1),
        group_norm_channels=min(16, 2 * base_channels),
        num_codes=num_codes,
        num_global_codes=4,
        sampling_rate=sampling_rate,
    )


def codec_small_16k() -> CodecConfig:
    """The quickstart's codec: 16 kHz, 400 samples per frame, 40 frames per second, one codebook of 1,024.

    Small strides next to the wave are what makes it cheap: few channels at the full rate use little of a CPU. Blocks of
    7 taps beside those of 3 double the time of a step and gain nothing in as many steps. Fewer entries would bound what
    it can say: the nearest of 256 mean spectra is already as far from a frame as the whole codec was with that many.
    """
    small = codec_small(upsample_rates=(5, 5, 4, 4), num_codes=1024, sampling_rate=16000, resblock="2")
    return replace(small, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),))


def config_from_published(values: Mapping[str, Any], *, weight_norm: bool = True) -> CodecConfig:
    """The configuration from the fields of a public codec's JSON (`residul_layer` is spelled so there).

    The widths that the original writes into its code may be given too: `base_channels`, `latent_dim`, `global_dim`,
    `group_norm_channels_per_group`.

    Raises:
      UnsupportedOption: a `residul_layer` that the original does not know either.
      UserError: `global_dim` contradicts `global_feature_conv`.
    """
    branch = tuple(values.get("global_feature_conv", (128, 64, 128, 3, 1)))
    if values.get("global_dim", branch[2]) != branch[2]:
        raise UserError(
            f"global_dim {values['global_dim']} must be the third entry of global_feature_conv, {branch[2]}"
        )
    return CodecConfig(
        upsample_rates=tuple(values["upsample_rates"]),
        upsample_kernel_sizes=tuple(values["upsample_kernel_sizes"]),
        upsample_initial_channel=values["upsample_initial_channel"],
        resblock=str(values["resblock"]),
        resblock_kernel_sizes=tuple(values["resblock_kernel_sizes"]),
        resblock_dilation_sizes=tuple(map(tuple, values["resblock_dilation_sizes"])),
        latent_dim=values.get("latent_dim", 512),
        base_channels=values.get("base_channels", 32),
        global_feature_conv=branch,
        group_norm_channels=values.get("group_norm_channels_per_group", 16),
        num_code_groups=values.get("n_code_groups", 1),
        num_residual_layers=values.get("residul_layer", 1),
        num_codes=values.get("n_codes", 1024),
        num_global_codes=values.get("global_code_num", 8),
        codebook_weight=values.get("codebook_loss_lambda", 1.0),
        commitment_weight=values.get("commitment_loss_lambda", 0.25),
        weight_norm=values.get("weight_norm", weight_norm),
        sampling_rate=values.get("sampling_rate", 24000),
    )


def config_to_published(config: CodecConfig) -> dict[str, Any]:
    """The fields of a codec's JSON, as `config_from_published` reads them."""
    return {
        "resblock": config.resblock,
        "upsample_rates": list(config.upsample_rates),
        "upsample_kernel_sizes": list(config.upsample_kernel_sizes),
        "upsample_initial_channel": config.upsample_initial_channel,
        "resblock_kernel_sizes": list(config.resblock_kernel_sizes),
        "resblock_dilation_sizes": [list(dilations) for dilations in config.resblock_dilation_sizes],
        "latent_dim": config.latent_dim,
        "base_channels": config.base_channels,
        "global_dim": config.global_dim,
        "global_feature_conv": list(config.global_feature_conv),
        "group_norm_channels_per_group": config.group_norm_channels,
        "n_code_groups": config.num_code_groups,
        "residul_layer": config.num_residual_layers,
        "n_codes": config.num_codes,
        "global_code_num": config.num_global_codes,
        "codebook_loss_lambda": config.codebook_weight,
        "commitment_loss_lambda": config.commitment_weight,
        "weight_norm": config.weight_norm,
        "sampling_rate": config.sampling_rate,
    }
