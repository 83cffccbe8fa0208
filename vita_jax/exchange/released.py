"""A public folder, understood: which model it holds, its configuration, its tensors and the table that fits them.

Nothing is read but headers and small text files. Towers' own configurations are looked for in the folder, wherever
`config.json` says they once were: absolute paths in it name places of another machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from vita_jax import config as config_lib
from vita_jax.conversion.tables import Table
from vita_jax.conversion.torch_files import TensorInfo, TensorSource
from vita_jax.conversion.torch_pickles import open_tensors
from vita_jax.data.llava_prompts import IMAGE_END, IMAGE_START
from vita_jax.errors import UserError
from vita_jax.exchange.llava_lora import ADAPTER_CONFIG, is_lora_folder, lora_sources
from vita_jax.models import flamingo_weights, llava_weights
from vita_jax.models.audio import tower_weights
from vita_jax.models.codec import codec_weights
from vita_jax.models.codec import config as codec_config
from vita_jax.models.connectors import projectors_weights
from vita_jax.models.connectors.projectors import DEFAULT_PROJECTOR, ProjectorConfig
from vita_jax.models.flamingo import FlamingoConfig
from vita_jax.models.language import decoder_weights
from vita_jax.models.llava import llava_v1_5_7b, llava_v1_5_13b
from vita_jax.models.speech import config as speech_config
from vita_jax.models.speech import speech_decoder_weights
from vita_jax.models.vision import clip_weights, internvit_weights
from vita_jax.models.vision.clip import clip_vit_large_224px
from vita_jax.models.vita import vita_1_0, vita_1_5
from vita_jax.models.vita_hf import EMBEDDING, around, config_from_hf
from vita_jax.models.vita_weights import weight_table
from vita_jax.training.families import ModelConfig

CONFIG, TRAIN, MODEL_JSON = "config.json", "train.yaml", "model.json"
# Of how transformers prepares pictures; nothing of it is read but whether they are padded.
PROCESSORS = PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# Heads beside the speech encoder in its own file; the original passes over them, too.
OTHER_HEADS = r"(ctc|decoder|criterion|predictor)\b.*"
FLAMINGO = "flamingo"  # our sizes of a Flamingo, in the `config.json` of an export
LLAVAS = (llava_v1_5_7b, llava_v1_5_13b)
# CLIP's text half, and what joins it to the tower.
CLIP_OUT = "visual_projection.weight"
CLIP_TEXT = (r"text_model\..*", r"(text|visual)_projection\.weight", r"logit_scale")


@dataclass(frozen=True)
class Released:
    """A public folder.

    Attributes:
      model: a key of `MODELS`.
      folder: where it is.
      config: of the whole model that it holds, or that it holds a part of.
      table: from its names to paths of the whole model.
      tensors: by the names of the table.
      notes: what the user should know about how it was read.
      aspect: as in `vita_jax.data.images.ImageConfig`.
      image_markers: as in `vita_jax.data.llava_prompts.LlavaPromptOptions`.
    """

    model: str
    folder: Path
    config: ModelConfig
    table: Table
    tensors: TensorSource
    notes: tuple[str, ...] = ()
    aspect: str = "square"
    image_markers: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Torch name -> shape."""
        return shapes_of(self.tensors)


class Renamed(Mapping[str, np.ndarray]):
    """Tensors whose names keep only what follows a marker; `mm_projector.bin` has varying words before it."""

    def __init__(self, tensors: TensorSource, marker: str) -> None:
        self._tensors = tensors
        self._names = {name.rpartition(marker)[2]: name for name in tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def info(self, name: str) -> TensorInfo:
        """See `TensorSource`."""
        return self._tensors.info(self._names[name])


class Joined(Mapping[str, np.ndarray]):
    """The tensors of several sources as those of one. Raises `UserError` if two have the same name."""

    def __init__(self, *sources: TensorSource) -> None:
        self._sources: dict[str, TensorSource] = {}
        for source in sources:
            for name in source:
                if name in self._sources:
                    raise UserError(f"tensor {name} is there twice, in {source.info(name).file} and beside it")
                self._sources[name] = source

    def __getitem__(self, name: str) -> np.ndarray:
        return self._sources[name][name]

    def __iter__(self) -> Any:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def info(self, name: str) -> TensorInfo:
        """See `TensorSource`."""
        return self._sources[name].info(name)


def shapes_of(tensors: TensorSource) -> dict[str, tuple[int, ...]]:
    """Torch name -> shape of all tensors."""
    return {name: tensors.info(name).shape for name in tensors}


def read_released(model: str, folder: str | Path) -> Released:
    """Understands a public folder.

    Args:
      model: a key of `MODELS`.
      folder: a folder, or for single files such as `mm_projector.bin` the file.

    Raises:
      UserError: the folder is not there or not that of such a model; says what is missing or does not fit.
      UnsupportedOption: a switch that is not offered.
    """
    folder = Path(folder)
    if model not in MODELS:
        raise UserError(f"--model {model!r} is unknown; use one of {', '.join(MODELS)}")
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    tensors = _open(folder)
    try:
        return MODELS[model](folder, tensors)
    except UserError as error:
        raise type(error)(f"{folder} as --model {model}: {error}") from error


def _open(folder: Path) -> TensorSource:
    if not is_lora_folder(folder):
        return open_tensors(folder)
    try:
        return Joined(*lora_sources(folder, read_json(folder / ADAPTER_CONFIG)))
    except UserError as error:
        raise type(error)(f"{folder}: {error}") from error


def guess_model(folder: str | Path) -> str:
    """The model that a public folder most likely holds. Raises `UserError` if its names are those of none."""
    folder = Path(folder)
    names = set(_open(folder))

    def has(start: str) -> bool:
        return any(start in name for name in names)

    if has("perceiver.latents"):
        return "flamingo"
    sparse = has("block_sparse_moe")
    original = llava_weights.LAYOUTS["original"]
    if has("multi_modal_projector.") or (EMBEDDING in names and has(original.tower)) or llava_weights.is_mpt(names):
        return "llava"  # which says what it does not read
    if EMBEDDING in names:
        if has(original.projector) and not has("model.vision_tower."):
            return "llava"  # its tower is in CLIP's own files
        if has("model.vision_tower."):
            return "vita_1_0" if sparse else "vita_1_5"
        return "mixtral" if sparse else "qwen2" if has(".q_proj.bias") else "llama"
    for model, start in (
        ("llava_projector", "mm_projector.weight"),  # VITA's have several layers
        ("projector", "mm_projector."),
        ("audio_adapter", "audio_encoder.adpter."),
        ("clip", "vision_model.embeddings.class_embedding"),
        ("internvit", "embeddings.class_embedding"),
        ("whale", "encoder.enc.0."),
        ("speech_decoder", "layers_pre_nn."),
        ("codec", "quantizer_modules"),
    ):
        if has(start):
            return model
    some = ", ".join(sorted(names)[:3])
    raise UserError(f"{folder}: its tensors ({some}, ...) are those of no known model; say which with --model")


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


def _vita(model: str) -> Callable[[Path, TensorSource], Released]:
    sparse = model == "vita_1_0"

    def read(folder: Path, tensors: TensorSource) -> Released:
        values = read_json(folder / CONFIG)
        train = find_file(folder, values.get("mm_audio_encoder"), TRAIN)
        tower = find_file(folder, values.get("mm_vision_tower"), CONFIG)
        config = config_from_hf(
            values,
            shapes_of(tensors),
            vision=None if tower is None else read_json(tower),
            train=None if train is None else read_yaml(train),
        )
        if (config.language.num_experts > 0) != sparse:
            other = "vita_1_5" if sparse else "vita_1_0"
            raise UserError(f"its language model is that of the other one; use --model {other}")
        notes = [] if train else [f"no {TRAIN}: the speech encoder's sizes are those of its tensors, with full context"]
        rows, said = config.language.vocab_size, values.get("vocab_size")
        if said is not None and said != rows:
            notes.append(f"{CONFIG} says {said} vocabulary rows, the tensors have {rows}: {rows} are taken")
        return Released(model, folder, config, weight_table(config), tensors, tuple(notes))

    return read


def _llava(folder: Path, tensors: TensorSource) -> Released:
    values, layout = read_json(folder / CONFIG), llava_weights.layout_of(tensors)
    tower = find_file(folder, values.get("mm_vision_tower"), CONFIG)
    config = llava_weights.config_from_hf(values, None if tower is None else read_json(tower))
    notes, said = [f"layout {layout}"], config.language.vocab_size
    embedding = f"{llava_weights.LAYOUTS[layout].language}embed_tokens.weight"
    if embedding not in tensors:
        raise UserError(f"there is no tensor {embedding}")
    rows = tensors.info(embedding).shape[0]
    if rows != said:
        notes.append(f"{CONFIG} says {said} vocabulary rows, the tensors have {rows}: {rows} are taken")
        config = replace(config, language=replace(config.language, vocab_size=rows))
    whole = llava_weights.has_tower(tensors, layout)
    table = llava_weights.weight_table(config, layout, tower=whole)
    if not whole:
        name = PurePosixPath(str(values.get("mm_vision_tower", "clip"))).name
        if not (folder / name).is_dir():
            raise UserError(
                f"it holds no vision tower ({llava_weights.LAYOUTS[layout].tower}...); put CLIP's own folder, with its "
                f"weights, into it as {name}"
            )
        clip = clip_weights.weight_table(config.vision).prefixed(path="vision/")
        table, tensors = table + clip + Table((), CLIP_TEXT), Joined(tensors, open_tensors(folder / name))
        notes.append(f"the vision tower is that of {name}")
    markers = bool(values.get(llava_weights.MARKERS))
    if markers:
        notes.append(f"{llava_weights.MARKERS}: prompts will have {IMAGE_START} and {IMAGE_END} around every picture")
    aspect = llava_weights.aspect_from_hf(values, _image_processor(folder))
    return Released("llava", folder, config, table, tensors, tuple(notes), aspect, markers)


def _image_processor(folder: Path) -> dict[str, Any]:
    """How transformers prepares pictures; its newer releases write that into the file of the whole processor."""
    if (folder / PREPROCESSOR).is_file():
        return read_json(folder / PREPROCESSOR)
    whole = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    return whole.get("image_processor") or {}


def _clip(folder: Path, tensors: TensorSource) -> Released:
    """The tower, as the part of a LLaVA that it is."""
    vision, whole = clip_weights.config_from_hf(read_json(folder / CONFIG)), llava_v1_5_7b()
    config = replace(whole, vision=vision, projector=replace(whole.projector, input_size=vision.hidden_size))
    table = clip_weights.weight_table(vision).prefixed(path="vision/") + Table((), CLIP_TEXT)
    notes = (f"{CLIP_OUT} is left out: models read the tower before it",) if CLIP_OUT in tensors else ()
    return Released("clip", folder, config, table, tensors, notes)


def _llava_projector(folder: Path, tensors: TensorSource) -> Released:
    """What LLaVA's first stage leaves (`mm_projector.bin`), as the part of a LLaVA of these widths that it is."""
    renamed = Renamed(tensors, llava_weights.PROJECTOR_MARK)
    shapes = shapes_of(renamed)
    first = "weight" if "weight" in shapes else "0.weight"
    if first not in shapes:
        raise UserError("it holds no linear and no mlp projector (...mm_projector.weight or .0.weight)")
    by_widths = {(m.projector.output_size, m.projector.input_size): m for m in (preset() for preset in LLAVAS)}
    whole = by_widths.get(shapes[first])
    if whole is None:
        raise UserError(f"its projector is of shape {shapes[first]}, which is neither that of LLaVA-7B nor of 13B")
    layers = sum(name.endswith(".weight") and name[0].isdigit() for name in shapes)
    kind = "linear" if first == "weight" else f"mlp{layers}x_gelu"
    config = replace(whole, projector=replace(whole.projector, projector_type=kind))
    table = projectors_weights.weight_table(config.projector).prefixed(path="projector/")
    # Beside it, where image markers were trained; without them nothing reads it.
    return Released("llava_projector", folder, config, table + Table((), (r"model\.embed_tokens\.weight",)), renamed)


def _flamingo(folder: Path, tensors: TensorSource) -> Released:
    """open_flamingo's checkpoint, beside the `config.json` and the tokenizer of its LLaMA: the files that it lies with
    say nothing of its sizes. What training saves is the part that trained, to start from beside the others.
    """
    viewed = flamingo_weights.view(tensors)
    values = read_json((folder if folder.is_dir() else folder.parent) / CONFIG)
    shapes = shapes_of(viewed)
    whole = flamingo_weights.is_whole(shapes)
    if FLAMINGO in values:
        config = config_lib.from_dict(FlamingoConfig, values[FLAMINGO])
    else:
        language = decoder_weights.config_from_hf(values)
        config = flamingo_weights.config_of_tensors(shapes, language, None if whole else clip_vit_large_224px())
    if whole:
        return Released("flamingo", folder, config, flamingo_weights.weight_table(config), viewed)
    note = "it holds what trained alone; language model and tower come from elsewhere, see docs/flamingo.md"
    return Released("flamingo", folder, config, flamingo_weights.trained_table(config), viewed, (note,))


def _language(model: str) -> Callable[[Path, TensorSource], Released]:
    def read(folder: Path, tensors: TensorSource) -> Released:
        values, shapes = read_json(folder / CONFIG), shapes_of(tensors)
        if EMBEDDING not in shapes:
            raise UserError(f"there is no tensor {EMBEDDING}")
        language = decoder_weights.config_from_hf({**values, "vocab_size": shapes[EMBEDDING][0]})
        config = around(vita_1_0() if language.num_experts else vita_1_5(), language=language)
        table = decoder_weights.weight_table(language).prefixed(path="language/")
        return Released(model, folder, config, table, tensors)

    return read


def _internvit(folder: Path, tensors: TensorSource) -> Released:
    vision = internvit_weights.config_from_hf(read_json(folder / CONFIG))
    table = internvit_weights.weight_table(vision).prefixed(path="vision/")
    return Released("internvit", folder, around(vita_1_5(), vision=vision), table, tensors)


def _whale(folder: Path, tensors: TensorSource) -> Released:
    shapes = shapes_of(tensors)
    train = (folder if folder.is_dir() else folder.parent) / TRAIN
    audio = tower_weights.config_of_tensors(shapes, read_yaml(train) if train.is_file() else None)
    table = tower_weights.weight_table(audio).prefixed(path="audio/") + Table((), ignore=(OTHER_HEADS,))
    return Released("whale", folder, around(vita_1_5(), audio=audio), table, tensors)


def _projector(folder: Path, tensors: TensorSource) -> Released:
    renamed = Renamed(tensors, "mm_projector.")
    shapes = shapes_of(renamed)
    layers = sorted({int(name.split(".")[0]) for name in shapes if name.split(".")[0].isdigit()})
    if not layers or "0.weight" not in shapes:
        raise UserError(f"it holds no layers of an mlp projector, {DEFAULT_PROJECTOR} say")
    output, inputs = shapes["0.weight"]
    projector = ProjectorConfig(f"mlp{len(layers)}x_gelu", inputs, output)
    table = projectors_weights.weight_table(projector).prefixed(path="projector/")
    return Released("projector", folder, around(vita_1_5(), projector=projector), table, renamed)


def _audio_adapter(folder: Path, tensors: TensorSource) -> Released:
    renamed = Renamed(tensors, "audio_encoder.")
    shapes = shapes_of(renamed)
    if "adpter.project.weight" not in shapes:
        raise UserError("there is no tensor ...adpter.project.weight")
    base = vita_1_5().audio
    adapter = replace(base.adapter, output_size=shapes["adpter.project.weight"][0])
    table = tower_weights.weight_table(replace(base, adapter=adapter))
    own = Table(tuple(rule for rule in table.rules if rule.path.startswith("adapter/"))).prefixed(path="audio/")
    config = around(vita_1_5(), audio=replace(base, adapter=adapter))
    return Released("audio_adapter", folder, config, own, renamed)


def _speech_decoder(folder: Path, tensors: TensorSource) -> Released:
    shapes = shapes_of(tensors)
    published = (folder if folder.is_dir() else folder.parent) / MODEL_JSON
    if not published.is_file():
        raise UserError(f"there is no {MODEL_JSON}, which alone tells the number of attention heads")
    heads = speech_config.config_from_published(read_json(published, list)).num_heads
    speech = speech_config.config_from_shapes(shapes, heads)
    initial = "initial_head.weight" in shapes
    speech = replace(speech, initial_head=initial)
    codec = replace(codec_config.vita_1_5_codec(), num_codes=speech.num_codes)
    # Any width of the language model that the rows of the text features fill will do.
    base = vita_1_5()
    if base.language.hidden_size % speech.hidden_size:
        base = around(base, language=replace(base.language, hidden_size=4 * speech.hidden_size))
    table = speech_decoder_weights.weight_table(speech).prefixed(path="speech/")
    return Released("speech_decoder", folder, replace(base, codec=codec, speech=speech), table, tensors)


def _codec(folder: Path, tensors: TensorSource) -> Released:
    parts = ("encoder.", "generator.", "quantizer.")
    if not all(name.startswith(parts) for name in tensors):
        stray = next(name for name in tensors if not name.startswith(parts))
        raise UserError(f"tensor {stray} is in none of the codec's parts, {', '.join(parts)}")
    values = read_json((folder if folder.is_dir() else folder.parent) / MODEL_JSON)
    normed = any(name.endswith(".weight_g") for name in tensors)
    codec = codec_config.config_from_published({**values, "weight_norm": normed})
    table = codec_weights.weight_table(codec).prefixed(path="codec/")
    return Released("codec", folder, replace(vita_1_5(), codec=codec), table, tensors)


MODELS: dict[str, Callable[[Path, TensorSource], Released]] = {
    "vita_1_5": _vita("vita_1_5"),
    "vita_1_0": _vita("vita_1_0"),
    "llava": _llava,
    "llava_projector": _llava_projector,
    "flamingo": _flamingo,
    "qwen2": _language("qwen2"),
    "mixtral": _language("mixtral"),
    "llama": _language("llama"),
    "internvit": _internvit,
    "clip": _clip,
    "whale": _whale,
    "projector": _projector,
    "audio_adapter": _audio_adapter,
    "speech_decoder": _speech_decoder,
    "codec": _codec,
}


# ---------------------------------------------------------------------------------------------------------------------
# Small files
# ---------------------------------------------------------------------------------------------------------------------


def find_file(folder: Path, said: Any, name: str) -> Path | None:
    """The file `name` of the folder that a config calls `said`: below `folder`, by the last part of its path."""
    if not isinstance(said, str) or not said:
        return None
    path = folder / PurePosixPath(said).name / name
    return path if path.is_file() else None


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file. Raises `UserError` if it is missing or something else than `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path.name}; give the whole folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path.name} holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file. Raises `UserError` if it is no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no fields")
    return content
