"""The families of models that one house trains, evaluates, converts and talks to: what each is asked for.

A run's configuration holds the config of a model, and the class of that config says the family. What differs between
families is an entry here; only `vita_jax.exchange`, which knows the files of each, asks for one by name. A new family
is a config, a module and a weight table in `vita_jax.models`, and an entry of `FAMILIES`.

A config may lack parts that another family has (`audio`, `codec`, ...): it then says None for them, and whoever needs
one tells the user that it is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from vita_jax.conversion.tables import Table
from vita_jax.data.images import ImageConfig
from vita_jax.data.llava_prompts import LlavaPromptOptions
from vita_jax.data.prompts import PromptOptions
from vita_jax.data.splice import FeatureLayout
from vita_jax.data.templates import SystemTexts
from vita_jax.models import flamingo_weights, llava_weights, vita_weights
from vita_jax.models.flamingo import Flamingo, FlamingoConfig, FlamingoInputs, text_inputs
from vita_jax.models.llava import Llava, LlavaConfig
from vita_jax.models.vita import Vita, VitaConfig, VitaInputs

Model = Vita | Llava | Flamingo
ModelConfig = VitaConfig | LlavaConfig | FlamingoConfig


@dataclass(frozen=True)
class Family:
    """What differs between families of models.

    Attributes:
      title: its name in messages.
      module: the network's class; takes `config` and `dtype`.
      inputs: config -> the smallest inputs whose forward pass uses every parameter that all stages share.
      weight_table: config -> the names of a whole checkpoint in the original's layout.
      layout: config -> how the feature table of a row is laid out; of a family without such a table, as if its tower's
        tokens stood in one.
      tower_size: config -> width of what the module's `tower_features` gives.
      objectives: what its stages may minimise.
      prompts: the options that its conversations are written with.
      template, system_texts: of a checkpoint that comes without a run: config -> name, and texts.
      image: config -> how the pictures of such a checkpoint become tiles.
      one_tile: whether every picture is one tile.
      in_context: whether it continues documents, and is measured and talked to by examples, instead of conversations.
    """

    title: str
    module: type[Model]
    inputs: Callable[[Any], Any]
    weight_table: Callable[[Any], Table]
    layout: Callable[[Any], FeatureLayout]
    tower_size: Callable[[Any], int]
    objectives: tuple[str, ...]
    prompts: type
    template: Callable[[Any], str]
    system_texts: SystemTexts
    image: Callable[[Any], ImageConfig]
    one_tile: bool = False
    in_context: bool = False


def _one_tile(config: VitaConfig | LlavaConfig) -> VitaInputs:
    """Two positions of text and a picture that none of them looks at."""
    size, row = config.vision.image_size, jnp.zeros((1, 2), jnp.int32)
    return VitaInputs(row, row, row, row - 1, jnp.zeros((1, 1, size, size, 3), jnp.uint8))


def _text(config: FlamingoConfig) -> FlamingoInputs:
    """Two positions of text; `init` makes the parameters of what would look at pictures, too."""
    return text_inputs(jnp.zeros((1, 2), jnp.int32), image_size=config.vision.image_size)


# The released weights were trained with texts that are not public domain; a user who has them gives them in a file.
PLAIN_TEXTS = SystemTexts(*("You are a helpful assistant.",) * 3)
LANGUAGE = ("language_modeling", "text_pretraining", "cell_naming")

FAMILIES: Mapping[type, Family] = MappingProxyType(
    {
        VitaConfig: Family(
            title="VITA",
            module=Vita,
            inputs=_one_tile,
            weight_table=vita_weights.weight_table,
            layout=lambda config: FeatureLayout(config.vision.tokens_per_tile, config.pooled_grids),
            tower_size=lambda config: config.vision.output_size,
            objectives=(*LANGUAGE, "ctc", "codec", "speech_decoder"),
            prompts=PromptOptions,
            template=lambda config: "mixtral_two" if config.language.num_experts else "qwen2p5_instruct",
            system_texts=PLAIN_TEXTS,
            image=lambda config: ImageConfig(image_size=config.vision.image_size),
        ),
        LlavaConfig: Family(
            title="LLaVA",
            module=Llava,
            inputs=_one_tile,
            weight_table=llava_weights.weight_table,
            layout=lambda config: FeatureLayout(config.tokens_per_tile),
            tower_size=lambda config: config.vision.hidden_size,
            objectives=LANGUAGE,
            prompts=LlavaPromptOptions,
            template=lambda config: "vicuna_v1",
            system_texts=SystemTexts("", "", ""),  # as the model card of v1.5 writes its prompts
            image=lambda config: ImageConfig.clip(config.vision.image_size),
            one_tile=True,
        ),
        FlamingoConfig: Family(
            title="Flamingo",
            module=Flamingo,
            inputs=_text,
            weight_table=flamingo_weights.weight_table,
            layout=lambda config: FeatureLayout(config.vision.num_patches),
            tower_size=lambda config: config.vision.hidden_size,
            objectives=("flamingo", "cell_naming"),
            prompts=PromptOptions,
            template=lambda config: "plain",  # there are no conversations
            system_texts=SystemTexts("", "", ""),
            image=lambda config: ImageConfig.clip(config.vision.image_size),
            one_tile=True,
            in_context=True,
        ),
    }
)


def family_of(config: ModelConfig) -> Family:
    """The family of a model's config."""
    return FAMILIES[type(config)]


def make_model(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Model:
    """The network of a config; `dtype`: of its activations."""
    return family_of(config).module(config, dtype=dtype)


def weight_table(config: ModelConfig) -> Table:
    """The names of a whole checkpoint, in the layout of the family's original."""
    return family_of(config).weight_table(config)
