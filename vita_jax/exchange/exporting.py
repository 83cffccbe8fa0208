"""A run or checkpoint becomes a folder that PyTorch code loads strictly: its names, its config, its tokenizer.

What was imported goes out as it came in, bit for bit, small files included. Parts that a released checkpoint keeps in
files of their own (codec, speech decoders, the speech encoder's `train.yaml`) get folders of their own:

`DIR/`
  model.safetensors, or shards with an index; config.json; generation_config.json; the tokenizer's files
  audio_encoder/train.yaml
  codec/model.json, codec/model.safetensors;  decoder/model.json, decoder/model.safetensors

A checkpoint that holds only a part of a model (a tower) gives that part's public layout. A LLaVA has one file or
several of weights, in its original's layout or in one of transformers'.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vita_jax import config as config_lib
from vita_jax.conversion.tables import Table, flatten, iter_export, unflatten
from vita_jax.conversion.torch_files import write_tensors
from vita_jax.conversion.views import Source, joined
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.exchange.for_transformers import prepare
from vita_jax.exchange.importing import GENERATION, ORIGINAL, Progress
from vita_jax.exchange.released import CONFIG, FLAMINGO, MODEL_JSON, TRAIN, read_json
from vita_jax.models import flamingo_weights, llava_weights
from vita_jax.models.audio import ctc_head_weights, tower_weights
from vita_jax.models.codec import codec_weights
from vita_jax.models.codec import config as codec_config
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.llava import LlavaConfig
from vita_jax.models.lora import detach, merge
from vita_jax.models.speech import config as speech_config
from vita_jax.models.speech import speech_decoder_weights
from vita_jax.models.vision import clip_weights, internvit_weights
from vita_jax.models.vita import VitaConfig
from vita_jax.models.vita_hf import config_to_hf
from vita_jax.models.vita_weights import weight_table
from vita_jax.storage import absolute, on_disk
from vita_jax.training.checkpoint import find_checkpoint, load_params, read_meta
from vita_jax.training.experiment import ExperimentConfig
from vita_jax.training.objectives import OBJECTIVES
from vita_jax.training.param_store import open_params
from vita_jax.training.portable import TOKENIZER, WRITTEN, DType, as_dtype, is_portable, new_folder

DEFAULT_SHARD_BYTES = 10**9
AUDIO_FOLDER, CODEC_FOLDER, SPEECH_FOLDER = "audio_encoder", "codec", "decoder"
WHOLE = ("vision", "projector", "language")


@dataclass(frozen=True)
class Stored:
    """A checkpoint, opened.

    Attributes:
      params: nested; leaves are read when they are asked for. What a stage's objective added is left out.
      config: the configuration.
      stage, step: where in the curriculum it was saved.
      run_dir: the run it belongs to.
    """

    params: dict[str, Any]
    config: ExperimentConfig
    stage: str
    step: int
    run_dir: Path


def open_checkpoint(path: str | Path, *, merge_adapters: bool = True) -> Stored:
    """Opens a run, a checkpoint or a folder that needs no run.

    Args:
      path: of either.
      merge_adapters: adds adapters (LoRA) to what they adapt, for which the model has to be read into memory; else they
        stay leaves of their own.

    Raises:
      UserError: see `vita_jax.training.checkpoint.load_params`.
    """
    if is_portable(path):
        loaded = load_params(path)
        return Stored(loaded.params, loaded.config, loaded.stage, loaded.step, loaded.run_dir)
    folder = absolute(find_checkpoint(path))
    meta = read_meta(folder)
    config = config_lib.from_dict(ExperimentConfig, meta["config"])
    extra = OBJECTIVES[config.stage(meta["stage"]).objective].extra_names
    params = {name: tree for name, tree in open_params(folder / "params").items() if name not in extra}
    base, adapters = detach(params)
    if adapters and merge_adapters:
        params = merge(_read_all(base), _read_all(adapters))
    return Stored(params, config, meta["stage"], meta["step"], folder.parents[3])


def _read_all(tree: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten((path, np.asarray(leaf)) for path, leaf in flatten(tree).items())


@dataclass(frozen=True)
class Part:
    """A folder of the export: where it is below the export's, what it holds, and the small files beside it.

    stacks: names of the table -> where they stand in the files, if that differs; see `conversion.views.joined`.
    complete: whether `texts` are all small files of the folder, the tokenizer's included.
    """

    place: str
    table: Table
    params: Mapping[str, Any]
    texts: Mapping[str, str]
    stacks: Mapping[str, Source] | None = None
    complete: bool = False

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(torch name, array) of all."""
        tensors = iter_export(self.table, self.params)
        return tensors if self.stacks is None else joined(tensors, self.stacks)


def parts_of(stored: Stored, layout: str | None = None) -> list[Part]:
    """What the export consists of. The recogniser's head has a file of its own: the original does not know it.

    Args:
      stored: the checkpoint.
      layout: of a LLaVA, a key of `llava_weights.LAYOUTS`; None: that of the folder it came from, as far as its
        `config.json` tells, else the original's.

    Raises:
      UserError: a checkpoint with parts of a model that have no public layout by themselves.
      UnsupportedOption: a layout that the model has not.
    """
    params, model = stored.params, stored.config.model
    if isinstance(model, LlavaConfig):
        return [_llava(stored, layout or ("hf" if of_transformers(stored) else "original"))]
    if layout is None and isinstance(model, FlamingoConfig):
        return [_flamingo(model, params)]
    if layout is not None:
        raise UnsupportedOption(f"layout {layout!r} is one of LLaVA's checkpoints, and this is none; use 'pytorch'")
    voice = [name for name in ("codec", "speech") if name in params]
    rest = {name: tree for name, tree in params.items() if name not in (*voice, "ctc_head")}
    parts = []
    if set(WHOLE) <= set(rest):
        parts.append(_whole(model, rest))
    elif rest:
        parts.append(_tower(model, rest))
    if "ctc_head" in params:
        table = ctc_head_weights.weight_table(model.audio.encoder.hidden_size, model.ctc_vocab_size)
        parts.append(Part(AUDIO_FOLDER, table, params["ctc_head"], {}))
    for name in voice:
        place = CODEC_FOLDER if name == "codec" else SPEECH_FOLDER
        parts.append(_voice(name, model, params[name], place if len(params) > 1 else ""))
    return parts


def of_transformers(stored: Stored) -> bool:
    """Whether the public folder that a run came from, if it did, was written by transformers."""
    file = stored.run_dir / ORIGINAL / CONFIG
    return file.is_file() and "text_config" in read_json(file)


def _llava(stored: Stored, layout: str) -> Part:
    model, params, config = stored.config.model, stored.params, stored.config
    table = llava_weights.weight_table(model, layout)
    if set(params) == set(WHOLE):
        inputs = {"aspect": config.image.aspect, "image_markers": config.prompt.image_markers}
        dtype = {"torch_dtype": str(flatten(params)["language/norm/scale"].dtype)}
        if layout == "original" or of_transformers(stored):
            fields = llava_weights.config_to_hf(model, layout, **inputs)
            return Part("", table, params, {CONFIG: _json({**fields, **dtype})})
        ready = prepare(params, config, stored.run_dir / TOKENIZER)
        fields = {**llava_weights.config_to_hf(ready.model, layout, **inputs), **ready.fields, **dtype}
        table = llava_weights.weight_table(ready.model, layout)
        return Part("", table, ready.params, {CONFIG: _json(fields), **ready.texts}, complete=True)
    (name, *others) = params
    if others:
        raise UserError(f"the checkpoint holds {name}, {', '.join(others)}, which together are no public checkpoint")
    if name == "vision":
        text = {CONFIG: _json(clip_weights.config_to_hf(model.vision))}
        return Part("", clip_weights.weight_table(model.vision), params[name], text)
    own = Table(tuple(rule for rule in table.rules if rule.path.startswith(f"{name}/")), table.ignore)
    text = {CONFIG: _json(decoder_weights.config_to_hf(model.language))} if name == "language" else {}
    return Part("", own, params, text)


def _flamingo(model: FlamingoConfig, params: Mapping[str, Any]) -> Part:
    """open_flamingo's names, and a `config.json` as that of its LLaMA, with our sizes of the whole."""
    table = flamingo_weights.weight_table(model)
    missing = {rule.path for rule in table.rules} - set(flatten(params))
    if missing:
        raise UserError(
            f"the checkpoint holds {', '.join(params)}, which together are no open_flamingo checkpoint; "
            f"{sorted(missing)[0]} is missing"
        )
    dtype = {"torch_dtype": str(flatten(params)["language/norm/scale"].dtype)}
    values = {**decoder_weights.config_to_hf(model.language), **dtype, FLAMINGO: config_lib.to_dict(model)}
    return Part("", table, params, {CONFIG: _json(values)}, flamingo_weights.stacks(model))


def _whole(model: VitaConfig, params: Mapping[str, Any]) -> Part:
    model = replace(
        model,
        codec=None,
        speech=None,
        audio=model.audio if "audio" in params else None,
        state_head=model.state_head if "state_head" in params else None,
        ctc_vocab_size=0,
    )
    stored_dtype = flatten(params)["language/norm/scale"].dtype
    texts = {CONFIG: _json({**config_to_hf(model), "torch_dtype": str(stored_dtype)})}
    if model.audio is not None:
        texts[f"{AUDIO_FOLDER}/{TRAIN}"] = yaml.safe_dump(tower_weights.config_to_train(model.audio), sort_keys=False)
    return Part("", weight_table(model), params, texts)


def _tower(model: VitaConfig, params: Mapping[str, Any]) -> Part:
    if len(params) > 1:
        raise UserError(
            f"the checkpoint holds {', '.join(params)}, which together are no public checkpoint; a whole one also has "
            f"{', '.join(name for name in WHOLE if name not in params)}"
        )
    (name, tree) = next(iter(params.items()))
    if name == "language":
        text = {CONFIG: _json(decoder_weights.config_to_hf(model.language))}
        return Part("", decoder_weights.weight_table(model.language), tree, text)
    if name == "vision":
        text = {CONFIG: _json(internvit_weights.config_to_hf(model.vision))}
        return Part("", internvit_weights.weight_table(model.vision), tree, text)
    if name == "audio":
        text = {TRAIN: yaml.safe_dump(tower_weights.config_to_train(model.audio), sort_keys=False)}
        table, paths = tower_weights.weight_table(model.audio), set(flatten(tree))
        return Part("", Table(tuple(rule for rule in table.rules if rule.path in paths), table.ignore), tree, text)
    table = weight_table(model)
    own = Table(tuple(rule for rule in table.rules if rule.path.startswith(f"{name}/")), table.ignore)
    return Part("", own, {name: tree}, {})


def _voice(name: str, model: VitaConfig, params: Mapping[str, Any], place: str) -> Part:
    if name == "codec":
        texts = {MODEL_JSON: _json(codec_config.config_to_published(model.codec))}
        return Part(place, codec_weights.weight_table(model.codec), params, texts)
    texts = {MODEL_JSON: _json(speech_config.config_to_published(model.speech))}
    return Part(place, speech_decoder_weights.weight_table(model.speech), params, texts)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def export_checkpoint(
    stored: Stored,
    folder: str | Path,
    *,
    layout: str | None = None,
    dtype: DType | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda done, total, name: None,
) -> list[Path]:
    """Writes the folder, complete or not at all.

    Args:
      stored: see `open_checkpoint`.
      folder: must not exist, or be empty.
      layout: see `parts_of`.
      dtype: of floating-point tensors; None keeps the bits.
      shard_bytes: largest file of weights; about twice this is held in memory.
      progress: called after every tensor, with bytes of the result.

    Returns:
      The files, relative to the folder.

    Raises:
      UserError: the folder is in use or cannot be written, it or the run is in a bucket, or the parameters have no
        public layout.
    """
    folder = on_disk(folder, WRITTEN)
    on_disk(stored.run_dir, "a run that is exported")
    parts = parts_of(stored, layout)
    leaves = (leaf for part in parts for leaf in flatten(part.params).values())
    total = sum(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in leaves)
    count = Counter(total, progress)
    with new_folder(folder) as partial:
        for part in parts:
            place = partial / part.place
            tensors = count.over(part.tensors())
            write_tensors(place, as_dtype(tensors, dtype, smallest_rank=0), max_shard_bytes=shard_bytes)
            for name, text in part.texts.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_text(text, encoding="utf-8")
        _small_files(stored, partial, parts)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


class Counter:
    """Counts the bytes of tensors on their way."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def over(self, tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """The same pairs; each is counted when the next is asked for."""
        for name, array in tensors:
            yield name, array
            self._done += array.nbytes
            self._progress(self._done, self._total, name)


def _small_files(stored: Stored, folder: Path, parts: Sequence[Part]) -> None:
    """The public files that the run was imported with, else the tokenizer's own and a generation config."""
    if any(part.complete for part in parts):
        return
    original = stored.run_dir / ORIGINAL
    if original.is_dir():
        shutil.copytree(original, folder, dirs_exist_ok=True)
        for part in parts:
            # A folder in another layout than the one it came from has another configuration.
            text = part.texts.get(CONFIG)
            if text is not None and ("text_config" in json.loads(text)) != of_transformers(stored):
                (folder / part.place / CONFIG).write_text(text, encoding="utf-8")
        return
    tokenizer = stored.run_dir / TOKENIZER
    if not tokenizer.is_dir() or "language" not in stored.params:
        return
    for file in sorted(tokenizer.iterdir()):
        shutil.copyfile(file, folder / file.name)
    loaded = load_tokenizer(tokenizer)
    fields = {"eos_token_id": loaded.eos_id, "pad_token_id": loaded.pad_id, "do_sample": False}
    if loaded.bos_id is not None:
        fields["bos_token_id"] = loaded.bos_id
    (folder / GENERATION).write_text(_json(fields), encoding="utf-8")
