"""Declarative weight tables: one line per tensor of a published checkpoint, read in both directions, bit exact.

A `Rule` says how one torch tensor becomes one leaf of the parameter tree: reshape to `split`, transpose by `permute`,
reshape to `shape`. Nothing else can be said, so every rule inverts. A torch name with `{i}` stands for one tensor per
layer, one with `{e}` for one per expert; they are stacked on leading axes of the leaf. Tensors are fetched one at a
time (`tensors` may be a lazy mapping, see `torch_files.py`) and leaves are yielded one at a time, so a large model
never needs a second copy of itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vita_jax.errors import UserError

LAYER = "{i}"
EXPERT = "{e}"
MAX_NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class Rule:
    """How one torch tensor, or one per layer and expert, maps to one parameter.

    Attributes:
      torch: name in the checkpoint; `{i}` is the layer index, `{e}` the index of the expert.
      path: path in the parameter tree, parts joined by "/".
      torch_shape: shape of the torch tensor.
      split: shape it is viewed as before the transposition; default `torch_shape`.
      permute: axes of the transposition; default none.
      shape: shape of the parameter, without the stacked axes; default the transposed `split`.
      layers: number of stacked layers; None where `torch` has no `{i}`.
      experts: number of stacked experts; None where `torch` has no `{e}`.
      numbers: what `{i}` counts, where that is not 0, 1, ... up to `layers`: (3, 7, 11) if every fourth layer has such
        a tensor.
    """

    torch: str
    path: str
    torch_shape: tuple[int, ...]
    split: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    layers: int | None = None
    experts: int | None = None
    numbers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for axis, mark in (("layers", LAYER), ("experts", EXPERT)):
            if (mark in self.torch) != (getattr(self, axis) is not None):
                raise ValueError(f"rule {self.torch!r}: `{axis}` goes together with {mark} in the name")
        if self.numbers is not None and len(self.numbers) != self.layers:
            raise ValueError(f"rule {self.torch!r}: {len(self.numbers)} numbers were given for {self.layers} layers")
        sizes = {math.prod(s) for s in (self.torch_shape, self.split, self.shape) if s is not None}
        if len(sizes) != 1:
            shapes = f"{self.torch_shape}, {self.split}, {self.shape}"
            raise ValueError(f"rule {self.torch!r}: the shapes {shapes} differ in size")

    @property
    def names(self) -> list[str]:
        """Torch names, in the order of the stacked axes."""
        layers, experts = (range(1 if number is None else number) for number in (self.layers, self.experts))
        layers = layers if self.numbers is None else self.numbers
        return [self.torch.replace(LAYER, str(i)).replace(EXPERT, str(e)) for i in layers for e in experts]

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the parameter: (), (l) or (l e)."""
        return tuple(number for number in (self.layers, self.experts) if number is not None)

    @property
    def _split(self) -> tuple[int, ...]:
        return self.torch_shape if self.split is None else self.split

    @property
    def _permute(self) -> tuple[int, ...]:
        return tuple(range(len(self._split))) if self.permute is None else self.permute

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Shape of the parameter, without the stacked axes."""
        return tuple(self._split[axis] for axis in self._permute) if self.shape is None else self.shape

    def to_param(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Torch layout -> parameter layout, of one tensor."""
        if tensor.shape != self.torch_shape:
            raise UserError(
                f"tensor {name}: shape {tensor.shape}, expected {self.torch_shape}; the checkpoint is of another size"
            )
        return tensor.reshape(self._split).transpose(self._permute).reshape(self.param_shape)

    def to_torch(self, param: np.ndarray) -> np.ndarray:
        """Parameter layout -> torch layout, of one tensor."""
        transposed = param.reshape(tuple(self._split[axis] for axis in self._permute))
        return np.ascontiguousarray(transposed.transpose(np.argsort(self._permute))).reshape(self.torch_shape)


@dataclass(frozen=True)
class Table:
    """The rules of one model. `ignore` are regular expressions for torch names that have no parameter here."""

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, values in (("torch name", [r.torch for r in self.rules]), ("path", [r.path for r in self.rules])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} given twice in a weight table: {', '.join(twice)}")

    def __add__(self, other: Table) -> Table:
        return Table(self.rules + other.rules, self.ignore + other.ignore)

    def prefixed(self, *, torch: str = "", path: str = "") -> Table:
        """The same table with `torch` put before every torch name and `path` ("vision/", say) before every path."""
        rules = tuple(replace(rule, torch=torch + rule.torch, path=path + rule.path) for rule in self.rules)
        return Table(rules, tuple(f"{re.escape(torch)}(?:{pattern})" for pattern in self.ignore))

    @property
    def torch_names(self) -> list[str]:
        return [name for rule in self.rules for name in rule.names]


def linear(
    torch: str,
    path: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    bias: bool = True,
    layers: int | None = None,
    experts: int | None = None,
) -> tuple[Rule, ...]:
    """`torch.nn.Linear` (weight (out, in), bias (out)) -> `kernel (*inputs *outputs)`, `bias (*outputs)`."""
    first_input = len(outputs)
    kernel = Rule(
        torch=f"{torch}.weight",
        path=f"{path}/kernel",
        torch_shape=(math.prod(outputs), math.prod(inputs)),
        split=(*outputs, *inputs),
        permute=(*range(first_input, first_input + len(inputs)), *range(first_input)),
        layers=layers,
        experts=experts,
    )
    if not bias:
        return (kernel,)
    flat = (math.prod(outputs),)
    return (kernel, copy(f"{torch}.bias", f"{path}/bias", outputs, flat, layers=layers, experts=experts))


def conv2d(torch: str, path: str, shape: tuple[int, int, int, int], *, bias: bool = True) -> tuple[Rule, ...]:
    """`torch.nn.Conv2d` weight (out, in/groups, kh, kw) -> `kernel (kh kw in/groups out)`; `shape` is torch's."""
    kernel = Rule(f"{torch}.weight", f"{path}/kernel", shape, permute=(2, 3, 1, 0))
    return (kernel, copy(f"{torch}.bias", f"{path}/bias", shape[:1])) if bias else (kernel,)


def conv1d(torch: str, path: str, shape: tuple[int, int, int], *, layers: int | None = None) -> tuple[Rule, ...]:
    """`torch.nn.Conv1d` weight (out, in, k) -> `kernel (k in out)`, `bias (out)`; `shape` is torch's."""
    kernel = Rule(f"{torch}.weight", f"{path}/kernel", shape, permute=(2, 1, 0), layers=layers)
    return (kernel, copy(f"{torch}.bias", f"{path}/bias", shape[:1], layers=layers))


def linear_1x1(torch: str, path: str, inputs: int, outputs: int, *, bias: bool = True) -> tuple[Rule, ...]:
    """A 1x1 `torch.nn.Conv2d` (weight (out, in, 1, 1)) used as a linear layer -> `kernel (in out)`, `bias (out)`."""
    kernel = Rule(f"{torch}.weight", f"{path}/kernel", (outputs, inputs, 1, 1), split=(outputs, inputs), permute=(1, 0))
    return (kernel, copy(f"{torch}.bias", f"{path}/bias", (outputs,))) if bias else (kernel,)


def norm(torch: str, path: str, size: int, *, bias: bool = True, layers: int | None = None) -> tuple[Rule, ...]:
    """Layer norm or RMS norm: `weight` -> `scale`, `bias` -> `bias`."""
    scale = copy(f"{torch}.weight", f"{path}/scale", (size,), layers=layers)
    return (scale, copy(f"{torch}.bias", f"{path}/bias", (size,), layers=layers)) if bias else (scale,)


def copy(
    torch: str,
    path: str,
    shape: tuple[int, ...],
    torch_shape: tuple[int, ...] | None = None,
    *,
    layers: int | None = None,
    experts: int | None = None,
) -> Rule:
    """The tensor as it is; `shape` is the parameter's where it differs from torch's."""
    if torch_shape is None:
        return Rule(torch, path, shape, layers=layers, experts=experts)
    return Rule(torch, path, torch_shape, shape=shape, layers=layers, experts=experts)


@dataclass(frozen=True)
class Mismatch:
    """How the tensors of a checkpoint and a table disagree; names with their prefix, sorted.

    Attributes:
      missing: names that the table needs.
      unused: names that no rule uses and that are not ignored.
      misshapen: name -> (shape found, shape expected).
    """

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def raise_any(self) -> None:
        """Raises `UserError` with everything that does not fit, if anything does not."""
        shapes = [f"{name} {found} instead of {expected}" for name, (found, expected) in self.misshapen.items()]
        _raise_unmatched(self.missing, self.unused, "tensors", shapes)


def compare(table: Table, shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> Mismatch:
    """Holds a table against names and shapes, without any tensor being read.

    Args:
      table: the rules.
      shapes: torch name -> shape; only names that start with `prefix` are looked at.
      prefix: stands before every torch name of the table.
    """
    expected = {prefix + name: rule.torch_shape for rule in table.rules for name in rule.names}
    return Mismatch(
        missing=tuple(sorted(expected.keys() - shapes.keys())),
        unused=_unused(table, shapes, expected, prefix),
        misshapen={
            name: (tuple(shapes[name]), shape)
            for name, shape in sorted(expected.items())
            if name in shapes and tuple(shapes[name]) != shape
        },
    )


def _unused(table: Table, names: Iterable[str], expected: Container[str], prefix: str) -> tuple[str, ...]:
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignore) or r"(?!)")
    own = (name for name in names if name.startswith(prefix) and name not in expected)
    return tuple(sorted(name for name in own if not ignored.fullmatch(name[len(prefix) :])))


def iter_parts(
    table: Table, tensors: Mapping[str, np.ndarray], prefix: str = ""
) -> Iterator[tuple[Rule, tuple[int, ...], np.ndarray]]:
    """Yields (rule, place in the stack, parameter without the stacked axes), fetching one tensor at a time.

    Args:
      table: the rules.
      tensors: torch name -> array; only names that start with `prefix` are looked at.
      prefix: stands before every torch name of the table.

    Raises:
      UserError: names that the table needs and `tensors` lacks, names that no rule uses, or a tensor of another shape.
    """
    expected = {prefix + name for name in table.torch_names}
    _raise_unmatched(sorted(expected - set(tensors)), _unused(table, tensors, expected, prefix), "tensors")
    for rule in table.rules:
        for index, name in zip(np.ndindex(rule.stack), rule.names, strict=True):
            yield rule, index, rule.to_param(prefix + name, tensors[prefix + name])


def iter_import(table: Table, tensors: Mapping[str, np.ndarray], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, parameter); stacked ones have leading axes (l ...) or (l e ...). See `iter_parts`.

    Raises:
      UserError: as `iter_parts`, or layers of different dtypes.
    """
    stacked: np.ndarray | None = None
    last = {rule.path: rule.names[-1] for rule in table.rules}
    for rule, index, part in iter_parts(table, tensors, prefix):
        if not rule.stack:
            yield rule.path, np.ascontiguousarray(part).reshape(part.shape)  # it makes scalars vectors
            continue
        name = rule.names[int(np.ravel_multi_index(index, rule.stack))]
        if stacked is None:
            stacked = np.empty((*rule.stack, *rule.param_shape), part.dtype)
        if part.dtype != stacked.dtype:
            raise UserError(f"tensor {prefix}{name}: dtype {part.dtype}, but layer 0 has {stacked.dtype}")
        stacked[index] = part
        if name == last[rule.path]:
            yield rule.path, stacked
            stacked = None


def import_params(table: Table, tensors: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
    """The parameter tree, nested dicts, of `iter_import`; same arguments and errors."""
    return unflatten(iter_import(table, tensors, prefix))


def iter_export(table: Table, params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yields (torch name, array), one tensor at a time; the inverse of `iter_import`.

    Args:
      table: the rules.
      params: nested dicts of arrays (numpy or jax).
      prefix: put before every torch name.

    Raises:
      UserError: parameters that the table needs and `params` lacks, that no rule uses, or of another shape.
    """
    leaves = flatten(params)
    paths = {rule.path for rule in table.rules}
    _raise_unmatched(sorted(paths - set(leaves)), sorted(set(leaves) - paths), "parameters")
    for rule in table.rules:
        leaf = leaves[rule.path]
        want = (*rule.stack, *rule.param_shape)
        if tuple(leaf.shape) != want:
            raise UserError(f"parameter {rule.path}: shape {tuple(leaf.shape)}, expected {want}")
        for index, name in zip(np.ndindex(rule.stack), rule.names, strict=True):
            yield prefix + name, rule.to_torch(np.asarray(leaf[index] if rule.stack else leaf))


def export_params(table: Table, params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """All tensors of `iter_export` in one dict; same arguments and errors."""
    return dict(iter_export(table, params, prefix))


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with paths joined by "/"."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{path}{key}/"))
        else:
            leaves[path + key] = value
    return leaves


def unflatten(leaves: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """(path, leaf) pairs -> nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _raise_unmatched(missing: Sequence[str], unused: Sequence[str], what: str, misshapen: Sequence[str] = ()) -> None:
    problems = [
        f"{len(names)} {what} {verb}: {', '.join(names[:MAX_NAMES_IN_MESSAGE])}"
        + (", ..." if len(names) > MAX_NAMES_IN_MESSAGE else "")
        for names, verb in (
            (missing, "missing"),
            (unused, "that nothing uses"),
            (misshapen, "of another shape"),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights do not fit this model's table: {'; '.join(problems)}")
