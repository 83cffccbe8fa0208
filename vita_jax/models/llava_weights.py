"""Names of LLaVA checkpoints: the original's layout and the three of transformers, and their `config.json`.

    layout      tower                                            projector                    language model
    original    model.vision_tower.vision_tower.vision_model.    model.mm_projector.          model., lm_head.
    hf          vision_tower.vision_model.                       multi_modal_projector.       language_model.model., ...
    hf_5        vision_tower.                                    multi_modal_projector.       language_model.model., ...
    hf_memory   model.vision_tower.                              model.multi_modal_projector. model.language_model., ...

`hf` is what the public llava-hf files have, `hf_5` what transformers 5 writes, and `hf_memory` its state dict. All
three only have the projector of v1.5. An original checkpoint may lack the tower; then CLIP's own files fill it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vita_jax.conversion.tables import Rule, Table
from vita_jax.conversion.views import Source
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.connectors import projectors_weights
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.llava import LlavaConfig
from vita_jax.models.vision import clip_weights
from vita_jax.models.vision.clip import clip_vit_large_224px, clip_vit_large_336px
from vita_jax.models.vision.encoder import ViTConfig


@dataclass(frozen=True)
class Layout:
    """What stands before the names of each part; `language` before those of the stack, `head` before the head's."""

    tower: str
    projector: str
    language: str
    head: str


LAYOUTS: dict[str, Layout] = {
    "original": Layout("model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "model.", "lm_head."),
    "hf": Layout(
        "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."
    ),
    "hf_5": Layout("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    "hf_memory": Layout("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
}
# Transformers numbers the two layers of the projector, the original its modules with the activation between them.
HF_PROJECTOR = {"0.": "linear_1.", "2.": "linear_2."}
HF_PROJECTOR_TYPE = "mlp2x_gelu"
PROJECTOR_MARK = "mm_projector."
# How pictures become square, and whether markers stand around them; transformers passes over both.
ASPECT, MARKERS = "image_aspect_ratio", "mm_use_im_start_end"
# Buffers that hold nothing but what follows from the config.
IGNORED = (r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids")


def layout_of(names: Iterable[str]) -> str:
    """The key of `LAYOUTS` that names of a checkpoint are in.

    Raises:
      UnsupportedOption: names of a LLaVA with another language model.
      UserError: names of another model.
    """
    names = set(names)

    def has(start: str) -> bool:
        return any(name.startswith(start) for name in names)

    if has("model.language_model."):
        return "hf_memory"
    if has("language_model."):
        return "hf" if has("vision_tower.vision_model.") else "hf_5"
    if has("model.layers.") and (has("model.mm_projector.") or has(LAYOUTS["original"].tower)):
        return "original"
    if is_mpt(names):
        raise UnsupportedOption("its language model is MPT (transformer.wte, ...); only LLaVA with a LLaMA is offered")
    some = ", ".join(sorted(names)[:3])
    raise UserError(f"the tensors ({some}, ...) are not those of a LLaVA: no projector beside a language model")


def is_mpt(names: Iterable[str]) -> bool:
    """Whether they are those of an original LLaVA with MPT."""
    names = set(names)
    projector = any(name.startswith("transformer.mm_projector.") for name in names)
    return projector and any(name.startswith(("transformer.wte.", "transformer.blocks.")) for name in names)


def has_tower(names: Iterable[str], layout: str = "original") -> bool:
    """Whether a checkpoint holds its vision tower; public original ones need not."""
    return any(name.startswith(LAYOUTS[layout].tower) for name in names)


def weight_table(config: LlavaConfig, layout: str = "original", *, tower: bool = True) -> Table:
    """The table of the model in one of `LAYOUTS`.

    Args:
      config: of the model.
      layout: key of `LAYOUTS`.
      tower: False leaves the vision tower out, which is then read from CLIP's files by
        `clip_weights.weight_table(config.vision)`.

    Raises:
      UnsupportedOption: a projector that the layout cannot name, or a resampler, which none can.
      UserError: unknown layout.
    """
    if config.resampler is not None:
        raise UnsupportedOption(
            f"resampler (kind {config.resampler.kind!r}): no layout of LLaVA's checkpoints has names for one; only "
            "runs of this program hold it, without adapters, int8 weights and exports"
        )
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    prefixes = LAYOUTS[layout]
    projector = projectors_weights.weight_table(config.projector)
    if layout != "original":
        projector = _hf_projector(config.projector, projector)
    language = _renamed(
        decoder_weights.weight_table(config.language), {"model.": prefixes.language, "lm_head.": prefixes.head}
    )
    table = projector.prefixed(torch=prefixes.projector, path="projector/") + language.prefixed(path="language/")
    if tower:
        table = clip_weights.weight_table(config.vision, prefixes.tower).prefixed(path="vision/") + table
    return Table(table.rules, ignore=IGNORED)


def _hf_projector(config: ProjectorConfig, table: Table) -> Table:
    if config.projector_type != HF_PROJECTOR_TYPE:
        raise UnsupportedOption(
            f"transformers' LLaVA has no projector of projector_type {config.projector_type!r}, only "
            f"{HF_PROJECTOR_TYPE!r}; use the original layout"
        )
    return _renamed(table, HF_PROJECTOR)


def _renamed(table: Table, starts: Mapping[str, str]) -> Table:
    """The rules with the first start that a torch name has replaced by another; all names have one of them."""

    def rename(rule: Rule) -> Rule:
        start = next(start for start in starts if rule.torch.startswith(start))
        return replace(rule, torch=starts[start] + rule.torch.removeprefix(start))

    return Table(tuple(rename(rule) for rule in table.rules))


def projector_sources(names: Iterable[str]) -> dict[str, Source]:
    """What a stage 1 left (`mm_projector.bin`) -> the names of the projector's own table, for a `View`.

    The reader keeps whatever follows `mm_projector.`, and passes over an embedding table that may be beside it.
    """
    return {name.rpartition(PROJECTOR_MARK)[2]: Source(name) for name in names if PROJECTOR_MARK in name}


def plain_name(name: str) -> str:
    """A name of `non_lora_trainables.bin` as it is in a whole checkpoint; adapters put words before it."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def config_from_hf(values: Mapping[str, Any], vision: Mapping[str, Any] | None = None) -> LlavaConfig:
    """The configuration from the fields of a `config.json`, the original's or transformers'.

    Args:
      values: content of the file.
      vision: content of the tower's own `config.json`; else an original's tower is known by the name of its folder.

    Raises:
      UnsupportedOption: a language model that is no LLaMA, tiles of v1.6, or another switch that is not offered.
      UserError: the tower's sizes are not known, or parts do not fit each other.
    """
    if "text_config" in values:
        return _config_from_transformers(values)
    kind = str(values.get("model_type", ""))
    if "mpt" in kind.lower():
        raise UnsupportedOption(f"config.json: model_type {kind!r} is not offered; only LLaVA with a LLaMA is")
    if values.get("mm_patch_merge_type", "flat") != "flat":
        raise UnsupportedOption(
            f"config.json: mm_patch_merge_type {values['mm_patch_merge_type']!r} is of v1.6; only 'flat' is offered"
        )
    vision = vision or values.get("vision_config")
    language = decoder_weights.config_from_hf({**values, "model_type": "llama"})
    tower = clip_weights.config_from_hf(vision) if vision else _named_tower(str(values.get("mm_vision_tower", "")))
    return LlavaConfig(
        vision=tower,
        projector=ProjectorConfig(values.get("mm_projector_type") or "linear", tower.hidden_size, language.hidden_size),
        language=language,
        select_layer=values.get("mm_vision_select_layer", -2),
        select_feature=values.get("mm_vision_select_feature", "patch"),
    )


def aspect_from_hf(values: Mapping[str, Any], processor: Mapping[str, Any]) -> str:
    """`ImageConfig.aspect`.

    Args:
      values: content of a `config.json`.
      processor: of transformers' `preprocessor_config.json`, for folders whose `config.json` does not say.

    Raises:
      UnsupportedOption: the tiles of v1.6.
    """
    pads = "Llava" in str(processor.get("image_processor_type")) and processor.get("do_pad")
    said = values.get(ASPECT) or ("pad" if pads else "square")  # a null is written, too
    if said not in ("square", "pad"):
        raise UnsupportedOption(f"config.json: {ASPECT} {said!r} is of v1.6; only 'square' and 'pad' are offered")
    return said


def _config_from_transformers(values: Mapping[str, Any]) -> LlavaConfig:
    if values.get("projector_hidden_act", "gelu") != "gelu":
        raise UnsupportedOption(f"config.json: projector_hidden_act {values['projector_hidden_act']!r}; only 'gelu' is")
    vision = clip_weights.config_from_hf(values["vision_config"])
    language = decoder_weights.config_from_hf({"model_type": "llama", **values["text_config"]})
    strategies = {"default": "patch", "full": "cls_patch"}
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy not in strategies:
        raise UnsupportedOption(f"config.json: vision_feature_select_strategy {strategy!r}; use default or full")
    return LlavaConfig(
        vision=vision,
        projector=ProjectorConfig(HF_PROJECTOR_TYPE, vision.hidden_size, language.hidden_size),
        language=language,
        select_layer=values.get("vision_feature_layer", -2),
        select_feature=strategies[strategy],
    )


def _named_tower(name: str) -> ViTConfig:
    for word, tower in (("patch14-336", clip_vit_large_336px), ("clip-vit-large-patch14", clip_vit_large_224px)):
        if word in name:
            return tower()
    raise UserError(
        f"config.json: mm_vision_tower {name!r} is not known by name (clip-vit-large-patch14, "
        "clip-vit-large-patch14-336); give the tower's own config.json too"
    )


def config_to_hf(
    config: LlavaConfig, layout: str = "original", *, aspect: str = "square", image_markers: bool = False
) -> dict[str, Any]:
    """The fields of a `config.json`, as `config_from_hf` reads them.

    For the original layout the tower's sizes are under `vision_config`, which the original passes over.

    Args:
      config: of the model.
      layout: key of `LAYOUTS`.
      aspect: of the pictures, as in `vita_jax.data.images.ImageConfig`.
      image_markers: of the prompts, as in `vita_jax.data.llava_prompts.LlavaPromptOptions`.
    """
    language, vision = decoder_weights.config_to_hf(config.language), clip_weights.config_to_hf(config.vision)
    inputs = {ASPECT: aspect, MARKERS: image_markers}
    if layout == "original":
        return {
            **language,
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_vision_tower": f"openai/clip-vit-large-patch14{'-336' if config.vision.image_size == 336 else ''}",
            "vision_config": vision,
            "mm_projector_type": config.projector.projector_type,
            "mm_hidden_size": config.vision.hidden_size,
            "mm_vision_select_layer": config.select_layer,
            "mm_vision_select_feature": config.select_feature,
            "mm_patch_merge_type": "flat",
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            **inputs,
        }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": language,
        "vision_config": vision,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[config.select_feature],
        "image_seq_length": config.tokens_per_tile,
        **inputs,
    }
