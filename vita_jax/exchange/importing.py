"""A public folder becomes a run with one checkpoint, tensor by tensor: no more than one tensor is in memory at a time.

`<run>/config.json`, `<run>/tokenizer/`, `<run>/stages/imported/checkpoints/0/` as any run has them, and in
`<run>/original/` the small files of the public folder, which an export puts back.

While it is being written the run is called `<run>.partial`, which nothing loads; the same command goes on with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from vita_jax import config as config_lib
from vita_jax.conversion.tables import Rule, Table, compare, iter_parts
from vita_jax.data.audio import AudioConfig
from vita_jax.data.loader import SourceConfig
from vita_jax.data.templates import SystemTexts
from vita_jax.errors import UserError
from vita_jax.exchange.released import CONFIG as RELEASED_CONFIG
from vita_jax.exchange.released import MODEL_JSON, PROCESSORS, TRAIN, Released, find_file, read_json
from vita_jax.exchange.tokenizers import TOKENIZER_FILES, make_tokenizer
from vita_jax.training.checkpoint import CONFIG, checkpoint_folder, snapshot_meta, write_manifest
from vita_jax.training.experiment import DataConfig, DTypePolicy, ExperimentConfig, TokenizerConfig
from vita_jax.training.families import ModelConfig, family_of
from vita_jax.training.param_store import ParamWriter
from vita_jax.training.portable import TOKENIZER, DType, as_dtype, new_run
from vita_jax.training.stages import Stage

STAGE, STEP = "imported", 0
ORIGINAL, JOURNAL = "original", "journal.json"
GENERATION = "generation_config.json"
ALLOWANCES = ("missing", "unexpected", "misshapen")

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being read


def fitting_table(released: Released, allow: Iterable[str] = ()) -> tuple[Table, list[str]]:
    """The table of what can be imported, and what is left out.

    Args:
      released: the folder.
      allow: of `ALLOWANCES`: "missing" leaves out parameters whose tensors are not there (a stage that starts from the
        result draws them), "unexpected" passes over tensors that nothing uses, "misshapen" leaves out parameters with
        tensors of another shape.

    Returns:
      The table, and a line for everything that was let pass.

    Raises:
      UserError: whatever does not fit and is not allowed, all of it in one message.
    """
    found = compare(released.table, released.shapes)
    allow = set(allow)
    kept = replace(
        found,
        missing=() if "missing" in allow else found.missing,
        unused=() if "unexpected" in allow else found.unused,
        misshapen={} if "misshapen" in allow else found.misshapen,
    )
    try:
        kept.raise_any()
    except UserError as error:
        files = sorted({released.tensors.info(name).file.name for name in (*kept.unused, *kept.misshapen)})
        where = f" (in {', '.join(files[:4])})" if files else ""
        raise UserError(f"{released.folder} as --model {released.model}{where}: {error}") from None
    left_out = {*found.missing, *found.misshapen}
    rules = tuple(rule for rule in released.table.rules if not left_out.intersection(rule.names))
    notes = [f"left out: {rule.path}" for rule in released.table.rules if rule not in rules]
    notes += [f"passed over: {name}" for name in found.unused]
    # Everything that nothing uses is known by now.
    return Table(rules, (r".*",)), notes


def experiment_of(
    released: Released, run_dir: Path, *, system_texts: SystemTexts | None, half: bool, template: str | None = None
) -> ExperimentConfig:
    """The configuration of the imported run: the model, how it was talked to, and a stage that stands for its past.

    Args:
      released: the folder.
      run_dir: of the result.
      system_texts: of the prompts; None: the family's.
      half: whether the parameters are half precision; activations then are bfloat16.
      template: of the conversations; default the one of the model.
    """
    model, family = released.config, family_of(released.config)
    return ExperimentConfig(
        name=released.model,
        size="full",
        run_dir=str(run_dir),
        model=model,
        image=replace(family.image(model), aspect=released.aspect),
        tokenizer=TokenizerConfig(vocab_size=model.language.vocab_size),
        template=template or family.template(model),
        system_texts=system_texts or family.system_texts,
        prompt=family.prompts(image_markers=True) if released.image_markers else family.prompts(),
        data=DataConfig(),
        stages=(past_stage(f"imported {released.model}", model),),
        audio=AudioConfig(),
        dtypes=DTypePolicy(compute_dtype="bfloat16" if half else "float32"),
    )


def past_stage(title: str, model: ModelConfig) -> Stage:
    """A finished stage that stands for whatever the weights went through elsewhere."""
    return Stage(
        STAGE,
        title,
        trainable=(".",),
        sources=(SourceConfig("none"),),
        steps=STEP,
        learning_rate=0.0,
        batch_size=1,
        row_length=model.language.max_positions,
        row_tiles=0,
    )


def seal(partial: Path, config: ExperimentConfig, stage: str = STAGE, step: int = STEP) -> None:
    """Makes a run of a folder whose parameters are written: the rest of its checkpoint, and at last its manifest.

    Args:
      partial: the run's folder, with the parameters of one checkpoint.
      config: of the run.
      stage, step: whose checkpoint it is; the stage is over.
    """
    folder = checkpoint_folder(partial, stage) / str(step)
    meta = snapshot_meta(config, config.stage(stage), step, [0, 0], None, 0.0) | {"finished": True}
    (folder / "meta").mkdir(exist_ok=True)
    (folder / "meta" / "metadata").write_text(json.dumps(meta), encoding="utf-8")
    config_lib.save_json(config, partial / CONFIG)
    write_manifest(folder)


def import_released(
    released: Released,
    run_dir: str | Path,
    *,
    allow: Iterable[str] = (),
    dtype: DType | None = None,
    system_texts: SystemTexts | None = None,
    progress: Progress = lambda done, total, name: None,
) -> list[str]:
    """Writes the run.

    Args:
      released: the folder.
      run_dir: must not exist, or be empty. What an interrupted import of the same folder left is gone on with.
      allow: see `fitting_table`.
      dtype: of floating-point tensors; None keeps the bits.
      system_texts: of the prompts; None: the family's plain ones.
      progress: called after every tensor.

    Returns:
      Warnings: what was left out, and tensors with values that are no numbers.

    Raises:
      UserError: something does not fit, cannot be read or cannot be written. Nothing that would load is left then.
    """
    run_dir = Path(run_dir)
    table, warnings = fitting_table(released, allow)
    fingerprint = _fingerprint(released, table, dtype)
    with new_run(run_dir, keep=lambda partial: _journal(partial).get("fingerprint") == fingerprint) as partial:
        # The small files first: what is wrong with them is said before hours of copying.
        _copy_originals(released, partial)
        warnings += make_tokenizer(partial / ORIGINAL, partial / TOKENIZER)
        folder = checkpoint_folder(partial, STAGE) / str(STEP)
        warnings += _write_params(released, table, folder / "params", partial, fingerprint, dtype, progress)
        stored = dtype or released.tensors.info(table.rules[0].names[0]).dtype
        config = experiment_of(released, run_dir, system_texts=system_texts, half=stored in ("float16", "bfloat16"))
        seal(partial, config)
        (partial / JOURNAL).unlink()
    return warnings


def _write_params(
    released: Released,
    table: Table,
    folder: Path,
    partial: Path,
    fingerprint: str,
    dtype: DType | None,
    progress: Progress,
) -> list[str]:
    """Writes parameter by parameter, and notes each that is complete; returns warnings."""
    journal = _journal(partial) or {"fingerprint": fingerprint, "done": [], "warnings": []}
    writer = ParamWriter(folder)
    total = sum(_bytes_of(released, rule) for rule in table.rules)
    done = 0
    for rule in table.rules:
        if rule.path in journal["done"]:
            done += _bytes_of(released, rule)
            progress(done, total, rule.path)
            continue
        parts = iter_parts(Table((rule,), (r".*",)), released.tensors)
        for (_, index, part), name in zip(parts, rule.names, strict=True):
            if not all_finite(part):
                info = released.tensors.info(name)
                journal["warnings"].append(f"{info.file.name}: tensor {name} holds values that are no finite numbers")
            done += part.nbytes
            ((_, cast),) = as_dtype(iter([(name, part)]), dtype, smallest_rank=0)
            writer.write(rule, index, cast)
            progress(done, total, name)
        journal["done"].append(rule.path)
        (partial / JOURNAL).write_text(json.dumps(journal), encoding="utf-8")
    writer.finish(table.rules)
    return journal["warnings"]


def all_finite(array: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity among the values; integers have none."""
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}.get(array.dtype.name)
    if exponent is not None:
        return not bool(((array.view(np.uint16) & exponent) == exponent).any())
    return not np.issubdtype(array.dtype, np.floating) or bool(np.isfinite(array).all())


def _bytes_of(released: Released, rule: Rule) -> int:
    itemsize = {"float32": 4, "int32": 4, "float64": 8, "int64": 8, "int8": 1, "uint8": 1, "bool": 1}
    size = itemsize.get(released.tensors.info(rule.names[0]).dtype, 2)
    return size * len(rule.names) * int(np.prod(rule.torch_shape, dtype=np.int64))


def _journal(partial: Path) -> dict:
    try:
        return json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # none, or cut off in the middle of writing: start over


def _fingerprint(released: Released, table: Table, dtype: DType | None) -> str:
    """Tells whether what an interrupted import has written is of the same tensors."""
    lines = [f"{released.model} {dtype}"]
    for rule in table.rules:
        for name in rule.names:
            info = released.tensors.info(name)
            stat = info.file.stat()
            lines.append(f"{rule.path} {name} {info.shape} {info.dtype} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _copy_originals(released: Released, partial: Path) -> None:
    """The small files of the public folder."""
    folder = released.folder if released.folder.is_dir() else released.folder.parent
    target = partial / ORIGINAL
    target.mkdir(exist_ok=True)
    for name in (RELEASED_CONFIG, TRAIN, MODEL_JSON, GENERATION, *PROCESSORS, *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    values = read_json(folder / RELEASED_CONFIG) if (folder / RELEASED_CONFIG).is_file() else {}
    for said, name in ((values.get("mm_audio_encoder"), TRAIN), (values.get("mm_vision_tower"), RELEASED_CONFIG)):
        path = find_file(folder, said, name)
        if path is not None:
            (target / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.parent.name / name)
