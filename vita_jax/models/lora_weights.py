"""Adapters in the layout of the `peft` library: an `adapter_config.json` and two tensors per adapted layer.

Layers have the model's own names behind `base_model.model.`; `lora_A.weight` is (r, in), `lora_B.weight` (out, r). In
a model that is wrapped in memory the tensors also carry the name of the adapter (`lora_A.default.weight`), and the
layer itself is called `<name>.base_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vita_jax.conversion.tables import EXPERT, LAYER, Rule, Table, export_params, flatten, import_params, unflatten
from vita_jax.errors import UnsupportedOption, UserError
from vita_jax.models.lora import Site, linear_sites
from vita_jax.nn.layers import LORA_DOWN, LORA_SCALE, LORA_UP

PREFIX = "base_model.model."

# Options of peft that change the maths or add tensors, and the only value offered here.
FIXED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def peft_table(sites: Sequence[Site], rank: int, adapter: str | None = None) -> Table:
    """The tensors of an adapter file; paths are those of the model's parameters.

    Args:
      sites: the adapted layers.
      rank: r.
      adapter: name of the adapter, for names as in memory; None for those of a file.
    """
    rules = []
    for site in sites:
        stacked = {"layers": site.layers, "experts": site.experts}
        down, up = _names_of(site, adapter)
        size_in, size_out = math.prod(site.inputs), math.prod(site.outputs)
        shape_down, shape_up = (*site.inputs, rank), (rank, *site.outputs)
        path = f"{site.path}/{LORA_DOWN}"
        rules.append(Rule(down, path, (rank, size_in), permute=(1, 0), shape=shape_down, **stacked))
        path = f"{site.path}/{LORA_UP}"
        rules.append(Rule(up, path, (size_out, rank), permute=(1, 0), shape=shape_up, **stacked))
    return Table(tuple(rules))


def _names_of(site: Site, adapter: str | None) -> tuple[str, str]:
    middle = "" if adapter is None else f".{adapter}"
    return tuple(f"{PREFIX}{site.torch}.lora_{side}{middle}.weight" for side in "AB")


def wrapped_table(table: Table, sites: Sequence[Site]) -> Table:
    """The table of a model whose state was saved while it was wrapped by peft, without the adapters' own tensors."""
    layers = {site.torch for site in sites}

    def renamed(rule: Rule) -> Rule:
        layer, _, kind = rule.torch.rpartition(".")
        return replace(rule, torch=f"{layer}.base_layer.{kind}") if layer in layers else rule

    return Table(tuple(renamed(rule) for rule in table.rules), table.ignore).prefixed(torch=PREFIX)


def sites_of_names(table: Table, names: Iterable[str], adapter: str | None = None) -> tuple[Site, ...]:
    """The layers of a model that a file of adapters has tensors for.

    Args:
      table: the weight table of the model.
      names: names of the tensors in the file.
      adapter: see `peft_table`.

    Raises:
      UserError: for none.
    """
    names = set(names)
    sites = []
    for site in linear_sites(table):
        rules = peft_table((site,), 1, adapter).rules
        if any(name in names for rule in rules for name in rule.names):
            sites.append(site)
    if not sites:
        some = ", ".join(sorted(names)[:3]) or "nothing"
        raise UserError(
            f"no adapter fits a linear layer of this model; the file holds {some}; expected names like "
            f"{_names_of(linear_sites(table)[0], adapter)[0]}"
        )
    return tuple(sites)


def scale_from_peft(fields: Mapping[str, Any]) -> float:
    """The factor of the update from the fields of an `adapter_config.json`.

    Raises:
      UserError: `r` or `lora_alpha` is missing.
      UnsupportedOption: weight-decomposed adapters, trained biases, or ranks that differ between layers.
    """
    for name, fixed in FIXED.items():
        if fields.get(name) not in (None, fixed):
            raise UnsupportedOption(f"adapter_config.json: {name} {fields[name]!r} is not offered; only {fixed!r} is")
    for name in ("r", "lora_alpha"):
        if name not in fields:
            raise UserError(f"adapter_config.json lacks the field {name!r}; is it a LoRA adapter's?")
    rank = fields["r"]
    return fields["lora_alpha"] / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def import_adapters(
    table: Table, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any], adapter: str | None = None
) -> dict[str, Any]:
    """The tree of adapters (see `vita_jax.models.lora`) from a peft folder.

    Args:
      table: the weight table of the model.
      tensors: of the adapter file, by name; every one must be used.
      fields: content of `adapter_config.json`.
      adapter: see `peft_table`.

    Raises:
      UserError: tensors missing, unused or of another shape, or see `scale_from_peft`.
    """
    sites, scale = sites_of_names(table, tensors, adapter), scale_from_peft(fields)
    leaves = flatten(import_params(peft_table(sites, fields["r"], adapter), tensors))
    leaves |= {f"{site.path}/{LORA_SCALE}": np.full(site.stack, scale, np.float32) for site in sites}
    return unflatten(iter(leaves.items()))


def export_adapters(table: Table, adapters: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of an adapter file and the content of its `adapter_config.json`; the inverse of `import_adapters`.

    Args:
      table: the weight table of the model.
      adapters: see `vita_jax.models.lora`.

    Raises:
      UserError: adapters of different ranks or scales, or for layers that the table does not have.
    """
    leaves = flatten(adapters)
    paths = {path.rpartition("/")[0] for path in leaves}
    sites = tuple(site for site in linear_sites(table) if site.path in paths)
    ranks = {leaf.shape[-1] for path, leaf in leaves.items() if path.endswith(f"/{LORA_DOWN}")}
    scales = {float(x) for path, leaf in leaves.items() if path.endswith(f"/{LORA_SCALE}") for x in np.ravel(leaf)}
    if len(ranks) != 1 or len(scales) != 1:
        raise UserError(
            f"adapters with ranks {sorted(ranks)} and scales {sorted(scales)} do not fit in one adapter_config.json; "
            "export those of one rank and scale at a time"
        )
    (rank,), (scale,) = ranks, scales
    factors = {path: leaf for path, leaf in leaves.items() if not path.endswith(f"/{LORA_SCALE}")}
    tensors = export_params(peft_table(sites, rank), unflatten(iter(factors.items())))
    # A pattern of whole names: lists of last names, peft's other form, can hit layers outside the language model.
    patterns = sorted(site.torch.replace(".", r"\.").replace(LAYER, r"\d+").replace(EXPERT, r"\d+") for site in sites)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _alpha_of(scale, rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": "|".join(patterns),
    }
    return tensors, fields


def _alpha_of(scale: float, rank: int) -> float:
    """The alpha that gives a float32 scale again: as someone would have written it, where that does."""
    alpha = round(scale * rank, 4)
    return alpha if np.float32(alpha / rank) == np.float32(scale) else scale * rank
