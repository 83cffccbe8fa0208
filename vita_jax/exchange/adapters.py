"""Adapters (LoRA) in the layout of `peft`: onto a checkpoint, merged or beside its weights, and out of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vita_jax.conversion.tables import Rule, Table, flatten, unflatten
from vita_jax.conversion.torch_files import SINGLE_NAME, write_tensors
from vita_jax.conversion.torch_pickles import open_tensors
from vita_jax.errors import UserError
from vita_jax.exchange.exporting import Stored
from vita_jax.exchange.importing import ORIGINAL, STAGE, STEP, past_stage, seal
from vita_jax.exchange.llava_lora import ADAPTER_CONFIG, ADAPTER_FILES, OTHER_WEIGHTS
from vita_jax.exchange.released import read_json
from vita_jax.models.lora import detach, linear_sites, merge
from vita_jax.models.lora_weights import export_adapters, import_adapters, peft_table
from vita_jax.nn.layers import LORA_DOWN, LORA_SCALE
from vita_jax.storage import on_disk
from vita_jax.training.checkpoint import checkpoint_folder
from vita_jax.training.families import weight_table
from vita_jax.training.param_store import ParamWriter
from vita_jax.training.portable import TOKENIZER, WRITTEN, new_folder


def table_of(stored: Stored) -> Table:
    """The model's table, as far as the checkpoint has its parameters."""
    paths = set(flatten(stored.params))
    table = weight_table(stored.config.model)
    return Table(tuple(rule for rule in table.rules if rule.path in paths), table.ignore)


def read_adapters(base: Stored, folder: str | Path) -> dict[str, Any]:
    """The tree of adapters from a folder of `peft`.

    Raises:
      UserError: no adapters there, or they do not fit the checkpoint; see `lora_weights.import_adapters`.
    """
    folder = on_disk(folder, "a folder of peft")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {' and no '.join(ADAPTER_FILES)}; give the folder that peft has saved")
    try:
        return import_adapters(table_of(base), open_tensors(file), read_json(folder / ADAPTER_CONFIG))
    except UserError as error:
        raise type(error)(f"{folder}: {error}") from error


def import_lora(base: Stored, folder: str | Path, run_dir: str | Path, *, merged: bool = True) -> list[str]:
    """Writes a run with the weights of `base` and the adapters of `folder`, one stack of layers in memory at a time.

    Args:
      base: the checkpoint that the adapters are for, without adapters of its own.
      folder: of `peft`.
      run_dir: must not exist, or be empty.
      merged: adds the adapters to the weights; else they are stored beside them, for `export --layout peft`.

    Returns:
      Warnings.

    Raises:
      UserError: see `read_adapters`; or the run cannot be written.
    """
    folder = on_disk(folder, "a folder of peft")
    on_disk(base.run_dir, "a run that gets adapters")
    adapters = flatten(read_adapters(base, folder))
    leaves = flatten(base.params)
    rules = list(table_of(base).rules)
    with new_folder(run_dir) as partial:
        writer = ParamWriter(checkpoint_folder(partial, STAGE) / str(STEP) / "params")
        for rule in rules:
            site = rule.path.rpartition("/")[0]
            own = {path: leaf for path, leaf in adapters.items() if path.rpartition("/")[0] == site}
            leaf = leaves[rule.path]
            if merged and own and rule.path.endswith("/kernel"):
                kernel = {rule.path: np.asarray(leaf)}
                leaf = np.asarray(flatten(merge(_tree(kernel), _tree(own)))[rule.path])
            writer.write_all(rule, leaf)
        if not merged:
            for rule in adapter_rules(base, adapters):
                writer.write_all(rule, adapters[rule.path])
                rules.append(rule)
        writer.finish(tuple(rules))
        for name in (TOKENIZER, ORIGINAL):
            if (base.run_dir / name).is_dir():
                shutil.copytree(base.run_dir / name, partial / name)
        past = past_stage(f"{base.config.name} with adapters", base.config.model)
        seal(partial, replace(base.config, run_dir=str(run_dir), stages=(past,)))
    if (folder / OTHER_WEIGHTS).is_file():
        parts = "projector, audio_adapter or, with the adapters, llava"
        return [f"{OTHER_WEIGHTS} is not read; what it holds comes in as --model {parts}"]
    return []


def adapter_rules(base: Stored, adapters: Mapping[str, Any]) -> Iterator[Rule]:
    """A rule for every leaf of the adapters; the scale has no tensor of its own, only a name here."""
    layers = {path.rpartition("/")[0] for path in adapters}
    sites = [site for site in linear_sites(table_of(base)) if site.path in layers]
    rank = next(leaf.shape[-1] for path, leaf in adapters.items() if path.endswith(f"/{LORA_DOWN}"))
    yield from peft_table(sites, rank).rules
    for site in sites:
        yield Rule(
            f"{site.torch}.{LORA_SCALE}", f"{site.path}/{LORA_SCALE}", (), layers=site.layers, experts=site.experts
        )


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten(iter(leaves.items()))


def export_lora(stored: Stored, folder: str | Path) -> list[Path]:
    """Writes the adapters of a checkpoint as `peft` does. Returns the files, relative to the folder.

    Args:
      stored: opened with its adapters beside its weights.
      folder: must not exist, or be empty.

    Raises:
      UserError: it has no adapters, or see `lora_weights.export_adapters`.
    """
    base, adapters = detach(stored.params)
    if not adapters:
        raise UserError("the checkpoint has no adapters; --layout peft is for those that were kept beside its weights")
    plain = Stored(base, stored.config, stored.stage, stored.step, stored.run_dir)
    loaded = _tree({path: np.asarray(leaf) for path, leaf in flatten(adapters).items()})
    tensors, fields = export_adapters(table_of(plain), loaded)
    folder = on_disk(folder, WRITTEN)
    with new_folder(folder) as partial:
        write_tensors(partial, tensors.items(), max_shard_bytes=1 << 62)
        (partial / SINGLE_NAME).rename(partial / ADAPTER_FILES[0])
        (partial / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.iterdir())
