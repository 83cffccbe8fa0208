"""What transformers needs of a LLaVA beside its weights: a token in whose places pictures stand, and how both are made.

Its language model embeds `<image>` before the pictures' features take the places, so the token must be in tokenizer and
table. As in the public llava-hf files, `<image>` and `<pad>` come behind all other tokens, and the table is filled up
to a multiple of 64 rows. Old rows keep their bits, and each new one is their mean: its logit is the mean of theirs, so
that no new token is ever the likeliest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from vita_jax.data.images import ImageConfig
from vita_jax.data.templates import get_template
from vita_jax.data.tokenizer import JSON_CONFIG_FILE, JSON_FILE, JsonTokenizer, Tokenizer, load_tokenizer
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError
from vita_jax.exchange.importing import GENERATION
from vita_jax.exchange.released import PREPROCESSOR, PROCESSOR
from vita_jax.exchange.tokenizers import as_json_tokenizer
from vita_jax.models.language.vocabulary import enlarge_vocabulary, padded_rows
from vita_jax.models.llava import LlavaConfig
from vita_jax.training.experiment import ExperimentConfig

IMAGE, PAD = "<image>", "<pad>"
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class Prepared:
    """A LLaVA that transformers can load and show pictures to.

    Attributes:
      params, model: with rows for the two tokens.
      fields: what `config.json` says about them.
      texts: name -> content of the other small files: the tokenizer's, how pictures are prepared, how answers end.
    """

    params: Mapping[str, Any]
    model: LlavaConfig
    fields: Mapping[str, Any]
    texts: Mapping[str, str]


def prepare(params: Mapping[str, Any], config: ExperimentConfig, folder: Path) -> Prepared:
    """Adds what is missing.

    Args:
      params: of the whole model.
      config: of its run.
      folder: with the run's tokenizer.

    Raises:
      UserError: there is no tokenizer, it does not fit the table, or it has one of the tokens as ordinary text.
      UnsupportedOption: a tokenizer that no token can be added to.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no tokenizer {folder}, and transformers' layouts need one with {IMAGE} in it; use --layout "
            "original, or import the weights together with their tokenizer"
        )
    tokenizer, model = as_json_tokenizer(load_tokenizer(folder)), config.model
    symbols = [symbol for symbol in (IMAGE, PAD) if symbol not in tokenizer.special_tokens]
    if symbols:
        first, rows = tokenizer.vocab_size, model.language.vocab_size
        tokenizer = enlarge(tokenizer, [], symbols).tokenizer
        if tokenizer.vocab_size > rows:
            rows = padded_rows(tokenizer.vocab_size, ROWS_MULTIPLE)
        params = {**params, "language": _with_rows(params["language"], first, len(symbols), rows)}
        model = replace(model, language=replace(model.language, vocab_size=rows))
    image_id, pad_id = (tokenizer.special_tokens[symbol] for symbol in (IMAGE, PAD))
    return Prepared(
        params,
        model,
        {"image_token_index": image_id, "pad_token_id": pad_id},
        {**_tokenizer_files(tokenizer), **_processor_files(model, config.image), **_generation_file(tokenizer, config)},
    )


def _with_rows(language: Mapping[str, Any], first: int, number: int, rows: int) -> dict[str, Any]:
    """Both tables with `rows` rows, the `number` from `first` on as new ones."""
    tables = {name: language[name] for name in ("embed_tokens", "lm_head")}
    loaded = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tables)
    grown = enlarge_vocabulary(loaded, [()] * number, first, rows, "average")
    return {**language, **jax.tree.map(np.asarray, grown)}


def _tokenizer_files(tokenizer: JsonTokenizer) -> dict[str, str]:
    """Its two files, as `PreTrainedTokenizerFast` reads them: by themselves, whatever model they once belonged to."""
    definition = tokenizers.Tokenizer.from_str(tokenizer.definition)
    config = json.loads(tokenizer.config_text)
    if tokenizer.bos_id is not None and definition.encode("").ids[:1] != [tokenizer.bos_id]:
        # Here the configuration says that texts have a start; there the definition has to.
        start = definition.id_to_token(tokenizer.bos_id)
        definition.post_processor = tokenizers.processors.TemplateProcessing(
            f"{start} $A", f"{start} $A {start} $B", [(start, tokenizer.bos_id)]
        )
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "pad_token": PAD,
        "image_token": IMAGE,
        "clean_up_tokenization_spaces": False,
    }
    return {JSON_FILE: definition.to_str(), JSON_CONFIG_FILE: _json(config)}


def _processor_files(model: LlavaConfig, image: ImageConfig) -> dict[str, str]:
    """How a picture becomes pixels, and how many places it takes."""
    pad, side = image.aspect == "pad", image.image_size
    pixels = {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.image_mean),
        "image_std": list(model.image_std),
    }
    places = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": model.vision.patch_size,
        "num_additional_image_tokens": 1,  # the class token, which `default` leaves out again
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[model.select_feature],
    }
    return {PREPROCESSOR: _json(pixels | ({"do_pad": True} if pad else {})), PROCESSOR: _json(places)}


def _generation_file(tokenizer: Tokenizer, config: ExperimentConfig) -> dict[str, str]:
    """Answers end where the template ends them, which need not be where the tokenizer ends a text."""
    marker = tokenizer.special_tokens.get(get_template(config.template).end_marker, tokenizer.eos_id)
    fields = {"eos_token_id": sorted({marker, tokenizer.eos_id}), "pad_token_id": tokenizer.special_tokens[PAD]}
    if tokenizer.bos_id is not None:
        fields["bos_token_id"] = tokenizer.bos_id
    return {GENERATION: _json({**fields, "do_sample": False})}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
