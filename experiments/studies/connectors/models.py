"""The arms of the study of connectors: a model around each, and all but one of them with as many parameters.

    linear          one matrix, as LLaVA v1 has: few parameters by nature
    two_matrices    the product of two, without anything between: as many parameters as the others, and no function that
                    `linear` has not. What it gains over `linear` it owes to its number of parameters in training, what
                    the others gain over it to what they can say
    mlp             two layers with GELU between, as LLaVA-1.5
    perceiver       a Perceiver resampler of as many latents as the tower has tokens, then one matrix
    perceiver_few   the same with a quarter of the latents: what a shorter row costs
    gated           gated cross-attention before every layer of the language model, behind a resampler: a Flamingo

The widths follow from the number of parameters that `gated` has; see `matched`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from experiments.llava import quickstart as llava
from experiments.quickstart import captions, mixture
from experiments.studies.arms import SHARED, Arm, component_sizes
from experiments.studies.connectors.conversations import conversation_batches, one_position
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.data.prompts import PromptOptions
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.connectors.projectors import ProjectorConfig
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.language.gated_cross_attention import GatedCrossAttentionConfig
from vita_jax.models.llava import LlavaConfig, llava_small
from vita_jax.training.experiment import (
    CheckpointConfig,
    ExperimentConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.families import ModelConfig
from vita_jax.training.stages import Stage

Language = Literal["frozen", "tuned"]
# Components -> the stage of the shared run that trains them. What else a model has is its connector.
PARTS = {"language": "language", "vision": "tower"}
VOCABULARY = 1280
# The last row of the embedding table, which the tokenizer does not use, stands where a Flamingo's picture is.
TAG = VOCABULARY - 1
STAGE, SET = "seeing", "conversations"
# Of questions and captions. Every record has one picture and fills one row, whatever the row's length is.
QUESTIONS, CAPTIONS = 0.9, 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in.

    Attributes:
      steps, rate: of every arm.
      rows: conversations of a step.
      room: positions for the text of a conversation; those of its picture are added.
      width, num_layers, tower_width: of the language model, and of the tower, which has as many layers.
      heads: of resamplers and gated blocks.
      perceiver_layers: of the Perceivers in front of a matrix.
      head_dim: of the gated blocks and their resampler.
      per_kind: questions of each kind of each group.
    """

    steps: int
    rate: float
    rows: int
    room: int
    width: int
    num_layers: int
    tower_width: int
    heads: int
    perceiver_layers: int
    head_dim: int
    per_kind: int


SMALL = Size(
    steps=1800,
    rate=1.5e-3,
    rows=12,
    room=160,
    width=192,
    num_layers=4,
    tower_width=96,
    heads=4,
    perceiver_layers=4,
    head_dim=24,
    per_kind=168,
)
SMOKE = Size(
    steps=3,
    rate=1e-3,
    rows=4,
    room=160,
    width=48,
    num_layers=2,
    tower_width=48,
    heads=2,
    perceiver_layers=1,
    head_dim=12,
    per_kind=2,
)
SIZES = {"small": SMALL, "smoke": SMOKE}


# ---- models ---------------------------------------------------------------------------------------------------------


def base_model(size: Size) -> LlavaConfig:
    """The tower's last layer is the one that is read, so that LLaVA and Flamingo see the same features."""
    model = llava_small(size.width, size.num_layers, size.tower_width, VOCABULARY)
    vision = dataclasses.replace(model.vision, image_size=llava.SIDE, patch_size=llava.PATCH)
    projector = ProjectorConfig("linear", size.tower_width, size.width)
    return dataclasses.replace(model, vision=vision, projector=projector, select_layer=-1)


def connector_parameters(model: ModelConfig) -> int:
    """Parameters that a connector adds to language model and tower; of a Flamingo also the embedding of its tag."""
    added = sum(count for part, count in component_sizes(model).items() if part not in PARTS)
    return added + (model.language.hidden_size if isinstance(model, FlamingoConfig) else 0)


def matched(make: Callable[[int], ModelConfig], count: int) -> ModelConfig:
    """The model of `make(width)` whose connector is nearest to `count` parameters, which grow evenly with the width."""
    first, second = (connector_parameters(make(width)) for width in (1, 2))
    return make(max(1, round(1 + (count - first) / (second - first))))


def arm_models(size: Size) -> dict[str, tuple[str, ModelConfig]]:
    """Name -> title in tables, and model."""
    base = base_model(size)
    tokens, gated = base.tokens_per_tile, gated_model(base, size)
    count = connector_parameters(gated)

    def projected(kind: str, width: int) -> LlavaConfig:
        projector = dataclasses.replace(base.projector, projector_type=kind, hidden_size=width)
        return dataclasses.replace(base, projector=projector)

    def resampled(latents: int, head_dim: int) -> LlavaConfig:
        resampler = ResamplerConfig(size.tower_width, size.perceiver_layers, size.heads, head_dim, latents)
        return dataclasses.replace(base, resampler=resampler)

    few = tokens // 4
    return {
        "linear": ("linear", base),
        "two_matrices": ("linear, two matrices", matched(lambda width: projected("linear", width), count)),
        "mlp": ("MLP", matched(lambda width: projected("mlp2x_gelu", width), count)),
        "perceiver": (f"Perceiver, {tokens} latents", matched(lambda width: resampled(tokens, width), count)),
        "perceiver_few": (f"Perceiver, {few} latents", matched(lambda width: resampled(few, width), count)),
        "gated": ("gated cross-attention", gated),
    }


def gated_model(base: LlavaConfig, size: Size) -> FlamingoConfig:
    """A block before every layer. Feed-forwards are as wide as the model, where the paper's are four times as wide: at
    this size the blocks would else have three quarters of the parameters of the layers between them.
    """
    resampler = ResamplerConfig(
        size.tower_width, 1, size.heads, size.head_dim, base.tokens_per_tile, feed_forward_multiple=1
    )
    blocks = GatedCrossAttentionConfig(size.width, size.tower_width, size.heads, size.head_dim, feed_forward_multiple=1)
    return FlamingoConfig(base.vision, resampler, base.language, blocks, cross_attention_every=1)


# ---- configurations -------------------------------------------------------------------------------------------------


def shared_config(size: str, run_dir: str) -> ExperimentConfig:
    """The run of the small LLaVA up to its own two stages: data, tokenizer, language model and tower."""
    config = llava.get_config(size)
    return dataclasses.replace(
        config,
        name="connectors",
        run_dir=str(Path(run_dir) / SHARED),
        model=base_model(SIZES[size]),
        tokenizer=TokenizerConfig(vocab_size=TAG),
        stages=tuple(config.stage(stage) for stage in PARTS.values()),
    )


def make_arms(
    size: str, run_dir: str, start: str, language: Language, steps: int | None = None, rate: float | None = None
) -> list[Arm]:
    """All arms; each a run in `<run_dir>/<language>/<arm>`.

    Args:
      start: a checkpoint of language model and tower.
      language: whether the language model stays as it is or trains along, at the same rate.
      steps, rate: in place of the size's.
    """
    plan, shared = SIZES[size], shared_config(size, run_dir)
    common = dataclasses.replace(
        shared,
        data=dataclasses.replace(shared.data, folder=str(data_folder(shared))),
        tokenizer=dataclasses.replace(shared.tokenizer, folder=str(tokenizer_folder(shared))),
        checkpoint=CheckpointConfig(every_steps=500, keep=1),
    )
    sources = mixture((SourceConfig("questions"), QUESTIONS), (captions(1.0), CAPTIONS))

    def arm(name: str, title: str, model: ModelConfig) -> Arm:
        parts = [part for part in component_sizes(model) if part not in PARTS]
        trainable = tuple(f"^{part}/" for part in parts) + (("^language/",) if language == "tuned" else ())
        tokens = model.tokens_per_tile if isinstance(model, LlavaConfig) else 1
        stage = Stage(
            STAGE,
            title,
            trainable,
            sources,
            steps or plan.steps,
            rate or plan.rate,
            batch_size=plan.rows,
            row_length=plan.room + tokens,
            row_tiles=1,
            start_from=start,
        )
        config = dataclasses.replace(
            common, name=f"connectors_{name}", run_dir=f"{run_dir}/{language}/{name}", model=model, stages=(stage,)
        )
        return Arm(name, title, config) if isinstance(model, LlavaConfig) else gated_arm(name, title, config, shared)

    return [arm(name, title, model) for name, (title, model) in arm_models(plan).items()]


def gated_arm(name: str, title: str, config: ExperimentConfig, shared: ExperimentConfig) -> Arm:
    """The arm of a Flamingo whose configuration still has the stage of a LLaVA: the same conversations, written the
    same way, with one position for each picture.
    """
    (stage,) = config.stages
    data = DataSet(
        SET,
        stage.sources,
        batch_size=stage.batch_size,
        row_length=stage.row_length,
        row_images=stage.row_tiles,
        max_images=stage.row_tiles,
        max_tokens=stage.row_length,
    )
    frozen = "^language/" not in stage.trainable
    trainable = (*stage.trainable, "^language/embed_tokens/") if frozen else stage.trainable
    seeing = dataclasses.replace(
        stage,
        trainable=trainable,
        sources=(),
        objective="flamingo",
        sets=(data,),
        trained_tokens=(TAG,) if frozen else (),
    )
    written = one_position(dataclasses.replace(config, model=shared.model))
    return Arm(
        name,
        title,
        dataclasses.replace(config, template="plain", prompt=PromptOptions(), stages=(seeing,)),
        lambda config, stage: conversation_batches(written, stage, TAG),
    )
