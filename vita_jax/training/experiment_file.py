"""An experiment's file: its configuration, and its `prepare`, called as every command must call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vita_jax import config as config_lib
from vita_jax.data.tokenizer import Tokenizer, load_tokenizer
from vita_jax.errors import UserError
from vita_jax.parallel.processes import on_first
from vita_jax.storage import is_remote
from vita_jax.training.experiment import ExperimentConfig, join_others, tokenizer_folder, validate
from vita_jax.training.loop import REQUESTED, claim_run_dir
from vita_jax.training.stages import Stage


def open_experiment(
    file: str | None, overrides: Mapping[str, str], num_devices: int | None = None
) -> tuple[ModuleType, ExperimentConfig]:
    """The module of an experiment's file and its configuration, checked; joins the other processes, if there are any.

    Args:
      file: what `--config=` says; None = nothing.
      overrides: fields and their values as written.
      num_devices: of a machine it is only planned for; None: it will run on this one.

    Raises:
      UserError: no file, one without such a `get_config`, or values that do not fit.
    """
    if file is None:
        raise UserError("--config=FILE is missing, for example --config=experiments/quickstart.py; see --help")
    module = config_lib.load_module(file)
    config = config_lib.config_from_module(module, overrides)
    if not isinstance(config, ExperimentConfig):
        raise UserError(f"{file}: get_config must return an ExperimentConfig, not {type(config).__name__}")
    if num_devices is None:
        join_others(config)
    validate(config, num_devices)
    return module, config


def prepare_data(module: ModuleType, config: ExperimentConfig) -> ExperimentConfig:
    """Builds data and tokenizer, if the experiment does; returns the configuration, which it may complete. Of several
    processes, the first does it for all.

    Raises:
      UserError: the run directory belongs to another configuration, whose data must not be replaced; and as `prepare`.
    """
    prepare = getattr(module, "prepare", None)
    if prepare is None:
        return config
    if is_remote(config.run_dir):
        raise UserError(
            f"run_dir={config.run_dir}: {config.name} prepares its own data and tokenizer, on disks only; give a "
            "run_dir on a disk, or build the data first (docs/data.md), for an experiment that only trains"
        )

    def build() -> Any:
        claim_run_dir(config, REQUESTED)
        prepared = prepare(config)
        return config_lib.to_dict(config if prepared is None else prepared)

    prepared = config_lib.from_dict(type(config), on_first(build))
    return dataclasses.replace(prepared, distributed=config.distributed)


def open_stage(file: str | None, overrides: Mapping[str, str], name: str) -> tuple[ExperimentConfig, Stage, Tokenizer]:
    """A stage of an experiment, "" for the first, with data and tokenizer where they have to be.

    Raises:
      UserError: as `open_experiment` and `prepare_data`, or there is no such stage.
    """
    module, config = open_experiment(file, overrides)
    config = prepare_data(module, config)
    stage = config.stage(name) if name else config.stages[0]
    return config, stage, load_tokenizer(tokenizer_folder(config))
