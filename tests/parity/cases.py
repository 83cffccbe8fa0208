"""Golden cases: how they are found, read, dispatched and compared. A golden folder has one sub-folder per area:

`<area>/<case>.safetensors` holds `weights/*`, `inputs/*`, `outputs/*` and the metadata `module`, `config`, `atol`,
`rtol`; `<area>/<case>.json` is a table, an object whose `module` says what it tests. Files in deeper folders are not
cases.

An adapter (`tests/parity/adapters/<topic>.py`) exports `MODULES: dict[str, Callable[[Case], ...]]`. Its callables
return

* for a safetensors case: a dict of arrays, one for every name in `case.outputs`, or a `Result`;
* for a table: a list of mismatches, one readable string each; empty means that every row agrees.

`pending.txt` lists what is not built yet, `unsupported.txt` the options this package does not offer. Both have lines
`module: reason` or `module:item: reason`; see `read_listing`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from vita_jax.errors import UnsupportedOption

HERE = Path(__file__).parent
BUILT_AREAS = ("audio", "vision", "vita", "speech_out", "llava_flamingo")


class CaseError(Exception):
    """A case file that cannot be used: unreadable, or without a required field."""


class Pending(Exception):
    """Raised by an adapter when a case needs `item` (for example "audio"), which must be listed in pending.txt."""

    def __init__(self, item: str) -> None:
        super().__init__(item)
        self.item = item


@dataclass(frozen=True)
class Case:
    """One golden file. `table` is None for safetensors cases; tables have no weights, inputs and outputs."""

    area: str
    name: str
    path: Path
    module: str
    config: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    atol: float = 0.0
    rtol: float = 0.0
    table: dict[str, Any] | None = None


@dataclass(frozen=True)
class Result:
    """What an adapter computed.

    Attributes:
      outputs: an array for every name in the case's outputs.
      valid: bool masks, broadcastable to the output of that name; only True positions are compared.
      pending: output name -> item of pending.txt, for outputs that cannot be computed yet.
    """

    outputs: Mapping[str, Any]
    valid: Mapping[str, Any] = field(default_factory=dict)
    pending: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """`worst` is the largest error as a fraction of its tolerance (inf where an exact comparison failed)."""

    module: str
    status: str  # pass, fail, pending, unsupported
    worst: float
    detail: str = ""


Adapter = Callable[[Case], Any]


def find_case_files(golden_dir: Path, areas: Sequence[str] | None) -> list[Path]:
    """The case files of `areas` (None: the areas built so far, as far as they are there), sorted.

    Raises:
      CaseError: no such folder, a named area that is not there, or an area or folder without any case.
    """
    if not golden_dir.is_dir():
        raise CaseError(f"golden folder {golden_dir} does not exist; give another with --golden-dir")
    if areas is None:
        areas = [area for area in BUILT_AREAS if (golden_dir / area).is_dir()]
        if not areas:
            raise CaseError(f"{golden_dir} has none of the areas {', '.join(BUILT_AREAS)}")
    files: list[Path] = []
    for area in areas:
        in_area = sorted(p for p in (golden_dir / area).glob("*") if p.suffix in (".safetensors", ".json"))
        if not in_area:
            raise CaseError(f"{golden_dir / area} holds no case (*.safetensors or *.json)")
        files += in_area
    return files


def load_case(path: Path) -> Case:
    """Reads one case file.

    Raises:
      CaseError: unreadable, or `module`, `config`, `atol` or `rtol` is missing or malformed, or there is no output.
    """
    names = {"area": path.parent.name, "name": path.stem, "path": path}
    if path.suffix == ".json":
        return Case(**names, **_read_table(path))
    return Case(**names, **_read_tensors(path))


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CaseError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("module"), str):
        raise CaseError(f"{path}: a table must be an object with the string field 'module'")
    return {"module": table["module"], "table": table}


def _read_tensors(path: Path) -> dict[str, Any]:
    groups: dict[str, dict[str, np.ndarray]] = {"weights": {}, "inputs": {}, "outputs": {}}
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # the handle itself is not iterable
                group, _, name = key.partition("/")
                if group not in groups or not name:
                    raise CaseError(f"{path}: tensor {key!r} is not under weights/, inputs/ or outputs/")
                groups[group][name] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CaseError(f"{path}: not a readable safetensors file: {error}") from error
    missing = [key for key in ("module", "config", "atol", "rtol") if key not in metadata]
    if missing:
        raise CaseError(f"{path}: metadata lacks {', '.join(missing)}")
    try:
        config = json.loads(metadata["config"])
        atol, rtol = float(metadata["atol"]), float(metadata["rtol"])
    except ValueError as error:
        raise CaseError(f"{path}: malformed metadata: {error}") from error
    if not groups["outputs"]:
        raise CaseError(f"{path}: no tensor under outputs/")
    return {"module": metadata["module"], "config": config, "atol": atol, "rtol": rtol, **groups}


def compare_array(name: str, got: Any, case: Case, valid: Any = None) -> tuple[float, str | None]:
    """Compares one output with the golden one.

    Returns:
      (worst error as a fraction of the tolerance, None or what is wrong).
    """
    want = case.outputs[name]
    got = np.asarray(got)
    if got.shape != want.shape:
        if not (got.size == want.size == 1):  # a scalar may be stored as () or (1,)
            return np.inf, f"{name}: shape {got.shape}, expected {want.shape}"
        got = got.reshape(want.shape)
    is_float = np.issubdtype(want.dtype, np.floating)
    if is_float != np.issubdtype(got.dtype, np.floating):
        return np.inf, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    if is_float and got.dtype not in (np.float32, np.float64):
        return np.inf, f"{name}: dtype {got.dtype}; comparisons are made in float32"
    if valid is not None:
        mask = np.broadcast_to(np.asarray(valid, bool), want.shape)
        if not mask.any():
            return np.inf, f"{name}: the mask of valid positions is empty, so nothing would be compared"
        got, want = got[mask], want[mask]
    if is_float:
        # Equal first: it settles infinities, which have no finite difference.
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        with np.errstate(invalid="ignore"):
            error = np.abs(got.astype(np.float64) - want)
            tolerance = case.atol + case.rtol * np.abs(want.astype(np.float64))
    else:
        same, error, tolerance = got == want, np.full(want.shape, np.inf), np.ones(want.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(same, 0.0, error / tolerance)
    fraction = np.where(np.isnan(fraction), np.inf, fraction)
    worst = float(fraction.max(initial=0.0))
    if worst <= 1.0:
        return worst, None
    at = np.unravel_index(int(fraction.argmax()), fraction.shape)
    position = f" of the {fraction.size} valid values" if valid is not None else ""
    return worst, (
        f"{name}: {int((fraction > 1.0).sum())} of {fraction.size} values differ, "
        f"worst at {tuple(map(int, at))}{position}: got {got[at]!r}, expected {want[at]!r}, {worst:.3g} x tolerance"
    )


def compare(case: Case, result: Any, listed: Mapping[str, str]) -> Outcome:
    """Compares everything an adapter returned with the case; `listed` is the content of pending.txt."""
    if case.table is not None:
        if not isinstance(result, list):
            return Outcome(case.module, "fail", np.inf, f"the adapter returned {type(result).__name__}, not a list")
        worst = np.inf if result else 0.0
        return Outcome(case.module, "fail" if result else "pass", worst, "\n".join(map(str, result)))
    if not isinstance(result, Result):
        result = Result(result)
    errors = [f"valid names the unknown output {name!r}" for name in result.valid if name not in case.outputs]
    for name, item in result.pending.items():
        if f"{case.module}:{item}" not in listed:
            errors.append(f"{name}: pending on {item!r}, but pending.txt has no line '{case.module}:{item}'")
    if len(result.pending) == len(case.outputs) and not errors:
        return Outcome(case.module, "pending", 0.0, ", ".join(sorted(set(result.pending.values()))))
    worst = 0.0
    for name in case.outputs:
        if name in result.pending:
            continue
        if name not in result.outputs:
            errors.append(f"{name}: missing")
            continue
        fraction, error = compare_array(name, result.outputs[name], case, result.valid.get(name))
        worst = max(worst, fraction)
        if error:
            errors.append(error)
    detail = "\n".join(errors)
    if not errors and result.pending:
        items = ", ".join(sorted(set(result.pending.values())))
        detail = f"{len(case.outputs) - len(result.pending)} of {len(case.outputs)} outputs, the rest pending: {items}"
    return Outcome(case.module, "fail" if errors else "pass", np.inf if errors and worst <= 1 else worst, detail)


def run_case(
    case: Case, adapters: Mapping[str, Adapter], pending: Mapping[str, str], unsupported: Mapping[str, str]
) -> Outcome:
    """Runs a case through its adapter, in float32 with the highest matmul precision, and compares every output.

    An exception of the adapter is not caught, except `Pending` and `UnsupportedOption` where the lists name the item.
    """
    if case.module not in adapters:
        if case.module in pending:
            return Outcome(case.module, "pending", 0.0, pending[case.module])
        known = ", ".join(sorted(adapters)) or "none"
        return Outcome(case.module, "fail", np.inf, f"unknown module {case.module!r}; adapters exist for: {known}")
    try:
        with jax.default_matmul_precision("highest"):
            result = adapters[case.module](case)
    except Pending as error:
        key = f"{case.module}:{error.item}"
        if key not in pending:
            detail = f"pending on {error.item!r}, but pending.txt has no line '{key}'"
            return Outcome(case.module, "fail", np.inf, detail)
        return Outcome(case.module, "pending", 0.0, f"{error.item}: {pending[key]}")
    except UnsupportedOption as error:
        named = [key for key in unsupported if _names(key, case.module, str(error))]
        if not named:
            raise
        return Outcome(case.module, "unsupported", 0.0, str(error))
    return compare(case, result, pending)


def _names(key: str, module: str, message: str) -> bool:
    """Whether the line `module:item` of unsupported.txt names the option that `message` complains about."""
    listed_module, _, item = key.partition(":")
    return listed_module == module and bool(item) and item in message


def read_listing(path: Path) -> dict[str, str]:
    """Reads pending.txt or unsupported.txt: key -> reason.

    A line is `module: reason` or `module:item: reason` (a space follows only the last colon before the reason); `item`
      is
    a word that the adapter gives to `Pending`, or that occurs in the message of the `UnsupportedOption`. Empty lines
    and lines that start with # do not count.

    Raises:
      CaseError: a line without a reason, or a key given twice.
    """
    listing: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        key, _, reason = line.partition(": ")
        if not reason.strip():
            raise CaseError(f"{path.name}:{number}: expected 'module: reason' or 'module:item: reason', got {line!r}")
        if key in listing:
            raise CaseError(f"{path.name}:{number}: {key!r} is listed twice")
        listing[key] = reason.strip()
    return listing


def adapter_topics() -> list[str]:
    """Names of the adapter files."""
    return sorted(path.stem for path in (HERE / "adapters").glob("*.py") if path.stem != "__init__")


def load_topic(topic: str) -> dict[str, Adapter]:
    """The `MODULES` of one adapter file; every error of the import is the caller's to see."""
    return dict(importlib.import_module(f"tests.parity.adapters.{topic}").MODULES)


def merge_topics(topics: Mapping[str, Mapping[str, Adapter]]) -> dict[str, Adapter]:
    """One table of adapters.

    Raises:
      CaseError: two topics claim the same module.
    """
    merged: dict[str, Adapter] = {}
    owner: dict[str, str] = {}
    for topic, modules in topics.items():
        for module, adapter in modules.items():
            if module in merged:
                raise CaseError(f"module {module!r} is claimed by the adapters {owner[module]} and {topic}")
            merged[module], owner[module] = adapter, topic
    return merged
