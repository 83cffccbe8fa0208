"""A small Flamingo that learns the quickstart's pictures, clips, and names it has never read, on two CPU cores.

    python -m vita_jax.train --config=experiments/flamingo/quickstart.py
    python -m vita_jax.train --config=experiments/flamingo/quickstart.py --config.size=smoke --config.run_dir=/tmp/smoke
    python -m vita_jax.train --config=experiments/flamingo/quickstart.py --config.ablation=no_gate \\
        --config.run_dir=runs/flamingo_no_gate --config.data.folder=runs/quickstart_flamingo/data
    python -m vita_jax.evaluate --checkpoint runs/quickstart_flamingo --shots 0 4 8

Sizes: `smoke` (all stages in a minute, learns nothing) and `small`. Stages:

    lists      the language model, on lists of digits and names, and labelling pages in characters
    language   the same, on text alone: scenes in characters with questions, captions, and labels
    tower      the vision tower, on what each cell shows; stands in for CLIP's public weights
    seeing     both frozen: the resampler, the gated blocks and the embeddings of the two tags, on pages of pictures,
               captioned pictures and clips of eight frames

Aimed at: 90 % of the typed questions without shots, 85 % of the questions in which order digits appear, and an accuracy
on labelling (digits with names that are drawn anew for every page, names of the test never read before) that rises from
0 to 4 to 8 shots. Ablations, one run each (arXiv 2204.14198, section 3.3):

    no_gate                 cross-attention is added as it is, without tanh gates
    every_1 .. every_4      layers of the language model to a gated block; every_1 is the default here
    transformer, mlp        in place of the Perceiver resampler
    unfrozen                the language model trains along
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from data_pipelines.quickstart.documents import DocumentCounts, build_documents, syllables
from vita_jax.data.few_shot import FewShotOptions
from vita_jax.data.images import ImageConfig
from vita_jax.data.interleaved import END_OF_CHUNK, IMAGE
from vita_jax.data.json_lines import write_json_lines
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.data.templates import SystemTexts
from vita_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vita_jax.data.vocabulary import enlarge
from vita_jax.evaluation.few_shot import LINES, RESULT, evaluate_few_shot, format_few_shot, subject_of
from vita_jax.evaluation.results import save_result
from vita_jax.models.connectors.perceiver_resampler import ResamplerConfig
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.language.decoder import DecoderConfig
from vita_jax.models.language.gated_cross_attention import GatedCrossAttentionConfig
from vita_jax.models.vision.encoder import ViTConfig
from vita_jax.training.checkpoint import load_params
from vita_jax.training.experiment import (
    Amount,
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LogConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)
from vita_jax.training.optimizer import OptimizerConfig
from vita_jax.training.stages import Stage

Ablation = Literal["none", "no_gate", "every_1", "every_2", "every_4", "transformer", "mlp", "unfrozen"]

TAGS = (END_OF_CHUNK, IMAGE)  # in the order that open_flamingo appends them in
VOCABULARY = 1024
FRAMES = 8
# Nine pictures with a name each: eight demonstrations and a query, of about nine tokens.
PAGE_TOKENS, PAGE_PICTURES = 160, 9
EMBEDDINGS = "^language/embed_tokens/"


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in.

    Attributes:
      plan: steps and peak learning rate of every stage.
      width, num_layers, tower_width: of the language model, and of the tower.
      rows: packed rows of a step, by data set.
      counts: of data.
    """

    plan: dict[str, tuple[int, float]]
    width: int
    num_layers: int
    tower_width: int
    rows: dict[str, int]
    counts: DocumentCounts


SMALL = Size(
    plan={"lists": (1500, 3e-3), "language": (1800, 2.5e-3), "tower": (3000, 1.5e-3), "seeing": (4000, 1.5e-3)},
    width=192,
    num_layers=4,
    tower_width=96,
    rows={"lists": 8, "texts": 8, "cells": 12, "pages": 4, "captions": 2, "clips": 2},
    counts=DocumentCounts(),
)
SMOKE = Size(
    plan={"lists": (3, 1e-3), "language": (3, 1e-3), "tower": (3, 1e-3), "seeing": (3, 1e-3)},
    width=48,
    num_layers=4,
    tower_width=48,
    rows={"lists": 2, "texts": 2, "cells": 4, "pages": 2, "captions": 2, "clips": 2},
    counts=DocumentCounts(40, 40, 24, 12, 4, 12, 2, 4, 4, 12),
)


def small_model(size: Size, ablation: Ablation = "none") -> FlamingoConfig:
    """CLIP's tower on 2 x 2 patches, one for each cell; a LLaMA; blocks as wide as in the paper."""
    vision = ViTConfig(
        hidden_size=size.tower_width,
        num_layers=4,
        num_heads=size.tower_width // 24,
        intermediate_size=4 * size.tower_width,
        image_size=32,
        patch_size=16,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    heads = max(2, size.width // 32)
    language = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_layers=size.num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size.width // heads,
        intermediate_size=size.width * 11 // 4,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        max_positions=1024,
        initializer_range=size.width**-0.5,
    )
    kind = ablation if ablation in ("transformer", "mlp") else "perceiver"
    return FlamingoConfig(
        vision,
        ResamplerConfig(
            vision.hidden_size,
            num_layers=2,
            num_heads=size.tower_width // 24,
            head_dim=24,
            num_latents=8,
            max_frames=FRAMES,
            kind=kind,
        ),
        language,
        GatedCrossAttentionConfig(
            size.width, vision.hidden_size, heads, size.width // heads, gated=ablation != "no_gate"
        ),
        cross_attention_every={"every_2": 2, "every_4": 4}.get(ablation, 1),
    )


def data_sets(size: Size) -> dict[str, DataSet]:
    """By name; weights are the paper's, but for clips, of which there are no 27 million here to be seen seldom."""
    page = {"row_length": PAGE_TOKENS, "max_tokens": PAGE_TOKENS}
    written = {
        name: DataSet(name, (SourceConfig(name),), 1.0, size.rows[name], row_length=320, row_images=0, kind="text")
        for name in ("lists", "texts")
    }
    return written | {
        "pages": DataSet(
            "pages",
            (SourceConfig("pages"),),
            1.0,
            size.rows["pages"],
            row_images=PAGE_PICTURES,
            max_images=PAGE_PICTURES,
            drop_single=0.0,
            **page,
        ),
        "captions": DataSet(
            "captions", (SourceConfig("captions"),), 0.2, size.rows["captions"], row_images=8, kind="pairs", **page
        ),
        "clips": DataSet(
            "clips",
            (SourceConfig("clips"),),
            0.5,
            size.rows["clips"],
            row_images=4,
            kind="pairs",
            frames=FRAMES,
            **page,
        ),
    }


def mixture_stage(name: str, title: str, size: Size, sets: tuple[str, ...], trainable: tuple[str, ...]) -> Stage:
    """A stage on some of the data sets."""
    (steps, rate), known = size.plan[name], data_sets(size)
    chosen = tuple(known[one] for one in sets)
    return Stage(
        name,
        title,
        trainable,
        (),
        steps,
        rate,
        batch_size=sum(data.batch_size for data in chosen),
        row_length=max(data.row_length for data in chosen),
        row_tiles=max(data.row_images for data in chosen),
        objective="flamingo",
        optimizer="muon",
        sets=chosen,
    )


def stages(size: Size, ablation: Ablation = "none") -> tuple[Stage, ...]:
    """The four stages; `prepare` fills in which tokens are new."""
    steps, rate = size.plan["tower"]
    tower = Stage(
        "tower",
        "vision tower",
        ("^vision/", "^naming_head/"),
        (SourceConfig("cells"),),
        steps,
        rate,
        batch_size=size.rows["cells"],
        row_length=64,
        row_tiles=8,
        objective="cell_naming",
        optimizer="muon",
    )
    looking = ("^resampler/", "^cross_attention/", "^language/" if ablation == "unfrozen" else EMBEDDINGS)
    seeing = mixture_stage("seeing", "seeing", size, ("pages", "captions", "clips"), looking)
    return (
        mixture_stage("lists", "lists", size, ("lists",), ("^language/",)),
        dataclasses.replace(
            mixture_stage("language", "language model", size, ("texts",), ("^language/",)), start_from="lists"
        ),
        tower,
        dataclasses.replace(seeing, start_from=("language", "tower")),
    )


def get_config(size: Literal["smoke", "small"] = "small", ablation: Ablation = "none") -> ExperimentConfig:
    """The configuration of one size and ablation."""
    plan = {"smoke": SMOKE, "small": SMALL}[size]
    model = small_model(plan, ablation)
    return ExperimentConfig(
        name="quickstart_flamingo" if ablation == "none" else f"quickstart_flamingo_{ablation}",
        size=size,
        run_dir="runs/quickstart_flamingo",
        model=model,
        image=ImageConfig.clip(model.vision.image_size),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        template="plain",
        system_texts=SystemTexts("", "", ""),
        data=DataConfig(
            num_threads=0,
            amounts=tuple(Amount(name, count) for name, count in dataclasses.asdict(plan.counts).items()),
        ),
        optimizer=OptimizerConfig(beta2=0.98),
        stages=stages(plan, ablation),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=25 if size == "small" else 1),
        # Without shots nothing at all is shown; pages have no line ends between their chunks.
        few_shot=FewShotOptions(shots=(0, 4, 8), zero_shot_texts=0, separator=""),
    )


def prepare(config: ExperimentConfig) -> ExperimentConfig:
    """Builds the data and makes the tokenizer, unless they are there; tells the last stage its new tokens."""
    folder = data_folder(config)
    build_documents(folder, DocumentCounts(**{one.name: one.count for one in config.data.amounts}), config.seed)
    if not tokenizer_folder(config).is_dir():
        lines = (folder / "tokenizer_text.txt").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line) for line in lines]
        size = config.tokenizer.vocab_size - len(TAGS)
        # Syllables as pieces: a name that was never read is made of tokens that were.
        first = train_sentencepiece(texts, size, None, at_most=True, symbols=syllables())
        enlarge(first, [], TAGS).tokenizer.save(tokenizer_folder(config))
    return with_new_tokens(config)


def with_new_tokens(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration whose stages learn no embeddings but those of the tags, where they learn any of a frozen
    language model.
    """
    special = load_tokenizer(tokenizer_folder(config)).special_tokens
    new = tuple(special[tag] for tag in TAGS)
    stages = (
        dataclasses.replace(stage, trained_tokens=new) if EMBEDDINGS in stage.trainable else stage
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=tuple(stages))


def finish(config: ExperimentConfig) -> None:
    """Measures the model with 0, 4 and 8 shots."""
    tokenizer = load_tokenizer(tokenizer_folder(config))
    subject = subject_of(config, load_params(config.run_dir).params, tokenizer, None)
    result, lines = evaluate_few_shot(subject, config.few_shot)
    folder = Path(config.run_dir) / "evaluation"
    save_result(result, folder / RESULT)
    write_json_lines(folder / LINES, lines)
    print(format_few_shot(result))
