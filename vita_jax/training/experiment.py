"""The configuration of a whole run, and the checks made once before it starts."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from vita_jax import config as config_lib
from vita_jax.data.audio import AudioConfig, AudioContext
from vita_jax.data.conversations import WritingOptions, check_template
from vita_jax.data.examples import ExampleContext
from vita_jax.data.few_shot import FewShotOptions
from vita_jax.data.images import ImageConfig
from vita_jax.data.lanes import Reading
from vita_jax.data.mixture import check_mixture
from vita_jax.data.prompts import PromptOptions
from vita_jax.data.templates import SystemTexts, get_template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.data.video import ORIGINAL_RULES
from vita_jax.errors import UserError
from vita_jax.parallel.mesh import MESH_AXES, MeshConfig, mesh_shape
from vita_jax.parallel.processes import DistributedConfig, gather, join_processes
from vita_jax.storage import is_remote, place
from vita_jax.training.families import Model, ModelConfig, family_of, make_model
from vita_jax.training.guard import RESTARTABLE, GuardConfig, validate_guard
from vita_jax.training.objectives import OBJECTIVES
from vita_jax.training.objectives.speech import SPEECH_OBJECTIVES
from vita_jax.training.optimizer import MOMENTS, OptimizerConfig
from vita_jax.training.stages import OPTIMIZERS, Stage, starts_of
from vita_jax.training.trace import ProfileConfig, validate_profile

# Frames of a clip for a Flamingo that was trained on none and tells none apart: as many as in the paper's training.
CLIP_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """Parameters are float32, activations `compute_dtype`.

    Norm statistics, softmax, rotary angles and losses are float32 whatever this says.
    """

    param_dtype: Literal["float32"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of the run.

    Attributes:
      vocab_size: entries to train; the model's own vocabulary may be larger, never smaller.
      folder: where its files are; copied to `<run_dir>/tokenizer`. None: the experiment's `prepare` puts them there.
    """

    vocab_size: int
    folder: str | None = None


@dataclasses.dataclass(frozen=True)
class Amount:
    """How many records of one kind a builder makes; the names are the builder's."""

    name: str
    count: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the training data comes from.

    Attributes:
      folder: built data; relative paths of the stages' sources are below it. None is `<run_dir>/data`.
      json: a user's own record file, for experiments that build from one.
      root: the folder its media paths start from.
      folders: a JSON table of such folders, for records that name a set.
      asr: a user's own manifest of transcribed speech, see `vita_jax.data.speech_pairs`.
      speech: a user's own manifest of a voice and its texts.
      max_bad_fraction: share of records that may be unusable before the run stops.
      cut_text: conversations without media that are longer than a row lose their end, as in the original, and do not
        count as unusable.
      num_threads: threads that read and decode, if there are no workers.
      num_workers: processes that do instead, for each lane of this process; 0 = none. Either may change when a run goes
        on.
      lanes: streams of records of which a batch takes equal parts; None = one for each process. A run may go on with
        another number of processes if it divides the lanes and their number stays.
      amounts: sizes of generated data, addressed by name: `--config.data.amounts.images.count=100`.
    """

    folder: str | None = None
    json: str | None = None
    root: str | None = None
    folders: str | None = None
    asr: str | None = None
    speech: str | None = None
    max_bad_fraction: float = 0.01
    cut_text: bool = False
    num_threads: int = 2
    num_workers: int = 0
    lanes: int | None = None
    amounts: tuple[Amount, ...] = ()

    @property
    def reading(self) -> Reading:
        """Who decodes."""
        return Reading(self.num_threads, self.num_workers)

    def amount(self, name: str) -> int:
        """Count of the entry `name` of `amounts`. Raises `UserError` if there is none."""
        for entry in self.amounts:
            if entry.name == name:
                return entry.count
        known = ", ".join(entry.name for entry in self.amounts) or "none"
        raise UserError(f"data.amounts has no entry {name!r}; entries: {known}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Every how many steps a stage saves (its end is always saved), and how many of its checkpoints are kept.

    After the steps `milestones` it saves as well, and those stay for good.
    """

    every_steps: int = 200
    keep: int = 2
    milestones: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Every how many steps metrics are written and progress is shown."""

    every_steps: int = 10


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides what a run computes. Saved as `<run_dir>/config.json` and in every checkpoint.

    Attributes:
      name: of the experiment.
      size: smoke, small or full: the size `get_config` was asked for.
      run_dir: everything the run writes is below it.
      model: the network; the class of its config says the family, see `vita_jax.training.families`.
      image: how pictures become tiles.
      template: conversation template by name; a stage may have another.
      system_texts: system text for pictures, video and plain text.
      stages: the curriculum, in order.
      video_rule: which frames of a video are taken, see `vita_jax.data.video`.
      prompt: variants of writing conversations; whose they are belongs to the family.
      audio: how sounds become features, for a model that hears.
      seed: of parameters, data order and drop path.
      guard: what is done about steps that go wrong.
      profile: which steps are profiled.
      distributed: how the processes of a run find each other.
      few_shot: how a Flamingo is measured.
    """

    name: str
    size: str
    run_dir: str
    model: ModelConfig
    image: ImageConfig
    tokenizer: TokenizerConfig
    template: str
    system_texts: SystemTexts
    data: DataConfig
    stages: tuple[Stage, ...]
    video_rule: str = "paper"
    prompt: WritingOptions = PromptOptions()
    audio: AudioConfig = AudioConfig()
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    dtypes: DTypePolicy = DTypePolicy()
    guard: GuardConfig = GuardConfig()
    profile: ProfileConfig = ProfileConfig()
    distributed: DistributedConfig = DistributedConfig()
    few_shot: FewShotOptions = FewShotOptions()

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises `UserError` naming the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"no stage {name!r}; {_nearest(name, [stage.name for stage in self.stages])}")


# What may change between two starts of one run: where it lies and how it is stored, shown, laid out and carried out,
# not what it computes.
_READERS = ("data.num_threads", "data.num_workers", "data.lanes")  # the loader refuses lanes that do not fit
# The same numbers but for rounding.
_COMPUTED = ("mesh", *(f"model.language.{name}" for name in ("attention", "remat", "expert_implementation")))
_GUARDS = tuple(f"guard.{field}" for field in RESTARTABLE)
_PLACES = ("run_dir", "data.folder", "tokenizer.folder")
_AROUND = ("checkpoint", "distributed", "few_shot", "log", "profile")
RESTARTABLE_FIELDS = (*_READERS, *_COMPUTED, *_GUARDS, *_PLACES, *_AROUND)

# The recogniser's characters, in the data folder.
CTC_VOCABULARY = "ctc_vocabulary.json"

# The assistant's voices by language, in the run's folder.
VOICES = "voices.json"


def data_folder(config: ExperimentConfig) -> Path:
    """Where the built data of the run is."""
    return place(config.run_dir) / "data" if config.data.folder is None else place(config.data.folder)


def tokenizer_folder(config: ExperimentConfig) -> Path:
    """Where the tokenizer of the run is read from."""
    return place(config.run_dir) / "tokenizer" if config.tokenizer.folder is None else place(config.tokenizer.folder)


def clip_frames(config: ExperimentConfig) -> int:
    """Frames of a clip that a Flamingo is shown: as in its run's data, else as many as its resampler tells apart."""
    trained = [data.frames for stage in config.stages for data in stage.sets if data.frames > 1]
    return max(trained, default=config.model.resampler.max_frames or CLIP_FRAMES)


def build_model(config: ExperimentConfig) -> Model:
    """The network, computing in the dtype of the policy."""
    return make_model(config.model, dtype=jnp.dtype(config.dtypes.compute_dtype))


def example_context(config: ExperimentConfig, tokenizer: Tokenizer, stage: Stage | None = None) -> ExampleContext:
    """How the records of this run become examples, for training, evaluation and chat alike.

    Args:
      stage: what is trained, if it is: some stages have a template of their own, or want labels beside those of the
        language model.
    """
    model, template = config.model, config.template
    if stage is not None and stage.template is not None:
        template = stage.template
    return ExampleContext(
        tokenizer=tokenizer,
        template=get_template(template),
        system_texts=config.system_texts,
        image=config.image,
        layout=family_of(model).layout(model),
        video_rule=config.video_rule,
        options=config.prompt,
        audio=None if model.audio is None else AudioContext(config.audio, model.audio.num_tokens),
        state_labels=model.state_head.place if stage is not None and stage.state_labels else None,
        cut_text=config.data.cut_text,
    )


def check_tokenizer(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer_folder(config)} has {tokenizer.vocab_size} entries, more than "
            f"model.language.vocab_size={config.model.language.vocab_size}"
        )


def peak_learning_rate(config: ExperimentConfig, stage: Stage) -> float:
    """The stage's peak rate, or the one that `optimizer.learning_rate` sets for all stages."""
    rate = config.optimizer.learning_rate
    return stage.learning_rate if rate is None else rate


def _nearest(word: str, known: list[str]) -> str:
    if not known:
        return "there are none"
    best = max(known, key=lambda name: difflib.SequenceMatcher(None, name, word).ratio())
    return f"the nearest is {best!r}, known: {', '.join(known)}"


def join_others(config: ExperimentConfig) -> None:
    """Waits for the other processes of the run, if there are any; has to come before `validate`.

    Raises:
      UserError: they are not found; or, on all of them, their configurations differ.
    """
    join_processes(config.distributed)
    first, *others = gather(config_lib.to_dict(dataclasses.replace(config, distributed=DistributedConfig())))
    for number, other in enumerate(others, start=1):
        if changed := config_lib.differences(first, other):
            listed = "; ".join(f"{field}: {old!r} and {new!r}" for field, old, new in changed)
            raise UserError(f"processes 0 and {number} have different configurations ({listed}); give them the same")


def validate(config: ExperimentConfig, num_devices: int | None = None) -> None:
    """Checks everything that can be checked before any data is read.

    Args:
      config: the run.
      num_devices: devices of a machine that the run is only planned for, so that folders it starts from may be
        missing; None: this machine's.

    Raises:
      UserError: names the field, its value and what would fit.
    """
    planned, num_devices = num_devices is not None, num_devices or jax.device_count()
    _validate_parts(config)
    if not config.stages:
        raise UserError("stages: there must be at least one")
    names = [stage.name for stage in config.stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"stages: the name {name!r} is used {names.count(name)} times; names must be unique")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise UserError(f"stages: {name!r} is no valid name; use a letter, then letters, digits, _ and -")
    mesh = dict(zip(MESH_AXES, mesh_shape(config.mesh, num_devices), strict=True))
    for index, stage in enumerate(config.stages):
        _validate_numbers(stage)
        _validate_family(config, stage)
        _validate_times(config, stage)
        _validate_sound(config, stage)
        _validate_codebooks(config, stage)
        if not planned:
            _validate_starts(stage, names[:index])
        _validate_rows(config, stage, mesh)


def _validate_parts(config: ExperimentConfig) -> None:
    template = get_template(config.template)
    rules = ["paper", *ORIGINAL_RULES]
    if config.video_rule not in rules:
        raise UserError(f"video_rule={config.video_rule!r} is unknown; {_nearest(config.video_rule, rules)}")
    model, image, family = config.model, config.image, family_of(config.model)
    if not isinstance(config.prompt, family.prompts):
        raise UserError(
            f"prompt: {type(config.prompt).__name__} is not how {family.title}'s conversations are written; use "
            f"{family.prompts.__name__}"
        )
    check_template(template, config.prompt)
    if family.one_tile and image.most_tiles > 1:
        raise UserError(
            f"image: {family.title} reads a picture as one tile, but tiling={image.tiling!r} gives up to "
            f"{image.most_tiles}; use tiling='crop'"
        )
    if model.vision.image_size != image.image_size:
        raise UserError(
            f"image.image_size={image.image_size} but model.vision.image_size={model.vision.image_size}; "
            "they must be equal"
        )
    if (model.image_mean, model.image_std) != (image.mean, image.std):
        raise UserError(
            f"image.mean/std {image.mean}/{image.std} differ from "
            f"model.image_mean/std {model.image_mean}/{model.image_std}"
        )
    bins = config.audio.filter_bank.num_mel_bins
    if model.audio is not None and model.audio.encoder.input_dim != bins:
        raise UserError(
            f"audio.filter_bank.num_mel_bins={bins} but model.audio.encoder.input_dim="
            f"{model.audio.encoder.input_dim}; they must be equal"
        )
    if config.tokenizer.vocab_size > model.language.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} is more than "
            f"model.language.vocab_size={model.language.vocab_size}"
        )
    for field, value in (
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("checkpoint.keep", config.checkpoint.keep),
        ("checkpoint.milestones", min(config.checkpoint.milestones, default=1)),
        ("log.every_steps", config.log.every_steps),
        ("mesh.max_whole_mib", config.mesh.max_whole_mib),
    ):
        if value < 1:
            raise UserError(f"{field}={value}: must be at least 1")
    validate_guard(config.guard)
    validate_profile(config.profile)
    if config.profile.start is not None and is_remote(config.run_dir):
        raise UserError(
            f"profile.start={config.profile.start}, but the profiler writes to disks only, not to run_dir="
            f"{config.run_dir}; profile a run of some steps with run_dir on a disk"
        )
    if config.optimizer.moments not in MOMENTS:
        raise UserError(f"optimizer.moments={config.optimizer.moments!r} is unknown; use one of {', '.join(MOMENTS)}")
    if config.seed < 0:
        raise UserError(f"seed={config.seed}: must not be negative")
    if config.optimizer.learning_rate is not None and config.optimizer.learning_rate < 0:
        raise UserError(f"optimizer.learning_rate={config.optimizer.learning_rate}: must not be negative")


def _validate_numbers(stage: Stage) -> None:
    where = f"stages.{stage.name}"
    if stage.objective not in OBJECTIVES:
        raise UserError(
            f"{where}.objective={stage.objective!r} is unknown; {_nearest(stage.objective, list(OBJECTIVES))}"
        )
    if stage.objective == "flamingo":
        _validate_mixture(stage)
    elif not stage.sources or stage.sets:
        raise UserError(f"{where}.sources: there must be at least one, and no data `sets`, which are for 'flamingo'")
    for field in ("steps", "batch_size", "row_length", "accumulation"):
        if getattr(stage, field) < 1:
            raise UserError(f"{where}.{field}={getattr(stage, field)}: must be at least 1")
    if stage.objective in SPEECH_OBJECTIVES and stage.codec_frames < 1:
        raise UserError(f"{where}.codec_frames={stage.codec_frames}: objective {stage.objective!r} needs at least 1")
    if stage.row_tiles < 0:
        raise UserError(f"{where}.row_tiles={stage.row_tiles}: must not be negative")
    if stage.learning_rate < 0:
        raise UserError(f"{where}.learning_rate={stage.learning_rate}: must not be negative")
    if stage.optimizer not in OPTIMIZERS:
        raise UserError(f"{where}.optimizer={stage.optimizer!r} is unknown; {_nearest(stage.optimizer, OPTIMIZERS)}")
    if not 0 <= stage.warmup_ratio <= 1:
        raise UserError(f"{where}.warmup_ratio={stage.warmup_ratio}: must be between 0 and 1")


def _validate_mixture(stage: Stage) -> None:
    """The data sets of a stage, and what sums them up."""
    where = f"stages.{stage.name}"
    check_mixture(stage.sets)
    if stage.sources:
        raise UserError(f"{where}.sources: objective 'flamingo' has them in its data sets; leave them out")
    for field, value in (
        ("batch_size", sum(data.batch_size for data in stage.sets)),
        ("row_length", max(data.row_length for data in stage.sets)),
        ("row_tiles", max(data.row_images for data in stage.sets)),
    ):
        if getattr(stage, field) != value:
            raise UserError(
                f"{where}.{field}={getattr(stage, field)}, but its data sets make it {value}; set it to that"
            )


def _validate_rows(config: ExperimentConfig, stage: Stage, mesh: Mapping[str, int]) -> None:
    """Every batch of the stage can be divided over micro-batches, devices and lanes, and every row over its devices."""
    shards = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    batches = [(f"sets.{data.name}.", data.batch_size, data.row_length) for data in stage.sets]
    for part, batch_size, row_length in batches or [("", stage.batch_size, stage.row_length)]:
        where = f"stages.{stage.name}.{part}"
        if batch_size % stage.accumulation or batch_size // stage.accumulation % shards:
            raise UserError(
                f"{where}batch_size={batch_size} must be a multiple of "
                f"accumulation ({stage.accumulation}) x the {shards} devices the batch is divided over "
                "(mesh data x fsdp x expert)"
            )
        if config.data.lanes is not None and (config.data.lanes < 1 or batch_size % config.data.lanes):
            raise UserError(f"{where}batch_size={batch_size} must be a multiple of data.lanes={config.data.lanes}")
        if row_length % mesh["context"]:
            raise UserError(f"{where}row_length={row_length} must be a multiple of mesh.context={mesh['context']}")


def _validate_times(config: ExperimentConfig, stage: Stage) -> None:
    """The resampler tells frames apart that the stage's clips have, and no pictures by their place in a packed row."""
    if stage.objective != "flamingo":
        return
    resampler = config.model.resampler
    if resampler.max_media:
        raise UserError(
            f"model.resampler.max_media={resampler.max_media}: rows hold several documents, so their pictures have no "
            "numbers of their own to be told apart by; use 0"
        )
    for data in stage.sets:
        if data.frames > max(1, resampler.max_frames):
            raise UserError(
                f"stages.{stage.name}.sets.{data.name}.frames={data.frames}, but model.resampler.max_frames="
                f"{resampler.max_frames}; raise it, so that every frame has a time embedding"
            )


def _validate_family(config: ExperimentConfig, stage: Stage) -> None:
    """What the stage asks of the model is something that its family has."""
    family, where = family_of(config.model), f"stages.{stage.name}"
    if stage.template is not None:
        check_template(get_template(stage.template), config.prompt)
    if stage.objective not in family.objectives:
        raise UserError(
            f"{where}.objective={stage.objective!r}: {family.title} has no parts that this trains; use one of "
            f"{', '.join(family.objectives)}"
        )
    if stage.objective == "cell_naming" and config.model.resampler is not None and not family.in_context:
        raise UserError(
            f"{where}.objective='cell_naming' names the tower's tokens, but model.resampler makes "
            f"{config.model.resampler.num_latents} others of them; train the tower in a run whose model.resampler is "
            "none, and start from its checkpoint"
        )


def _validate_codebooks(config: ExperimentConfig, stage: Stage) -> None:
    codebooks = config.model.codec_training.codebooks if stage.objective == "codec" else None
    if codebooks is not None and codebooks.ease_in >= stage.steps:
        raise UserError(
            f"stages.{stage.name}.steps={stage.steps}, but model.codec_training.codebooks.ease_in={codebooks.ease_in}: "
            "the codec would never be trained on whole entries; give more steps or a smaller ease_in"
        )


def _validate_sound(config: ExperimentConfig, stage: Stage) -> None:
    where, model = f"stages.{stage.name}", config.model
    if stage.row_clips < 0 or stage.clip_frames < 0:
        raise UserError(f"{where}: row_clips={stage.row_clips}, clip_frames={stage.clip_frames}: must not be negative")
    if stage.state_labels and model.state_head is None:
        raise UserError(f"{where}.state_labels: the model has no state head; set model.state_head")
    if stage.row_clips and model.audio is None:
        raise UserError(f"{where}.row_clips={stage.row_clips}, but the model does not hear; set model.audio, or use 0")
    if stage.row_clips and model.audio.num_tokens(stage.clip_frames) <= model.audio.num_tokens(0):
        raise UserError(f"{where}.clip_frames={stage.clip_frames} is too short for any sound; 100 are a second")


def _validate_starts(stage: Stage, earlier: list[str]) -> None:
    for start in starts_of(stage):
        if start in earlier or place(start).is_dir():
            continue
        raise UserError(
            f"stages.{stage.name}.start_from: {start!r} is neither an earlier stage nor an existing folder; "
            f"{_nearest(start, earlier)}"
        )
