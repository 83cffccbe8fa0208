"""Configuration as nested frozen dataclasses: command-line overrides, JSON, printing, comparison.

A configuration is any frozen dataclass whose fields are `int`, `float`, `bool`, `str`, `Path`, `X | None`,
`Literal[...]`, tuples of these, nested dataclasses, and tuples of dataclasses. The annotations are the only source of
truth: a value from the command line or from a file is read by the annotation of its field, and anything that does not
fit is a `UserError` that names the field, the value, the type expected and the nearest existing field.

Command line: `--config=experiments/x.py --config.size=smoke --config.stages.vision_sft.steps=10`. Entries of a tuple
are addressed by index or, for dataclasses with a field `name`, by that name. A group of fields that is `None` appears,
with its defaults, when one of its fields is set: `--config.stages.vision_sft.lora.rank=16`. Where a field may be one of
several dataclasses, the names of its fields tell which one a file holds.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from vita_jax.errors import UserError
from vita_jax.storage import place, write_whole

T = TypeVar("T")

_NONE_WORDS = ("none", "null")


# ---------------------------------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name -> resolved annotation of every init field of a dataclass, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def type_name(annotation: Any) -> str:
    """An annotation as a user would write it: `float`, `int or none`, `one of smoke, small, full`."""
    origin = get_origin(annotation)
    if annotation is type(None):
        return "none"
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if _is_union(annotation):
        return " or ".join(type_name(member) for member in get_args(annotation))
    if origin is tuple:
        members = get_args(annotation)
        if _is_variadic(members):
            return f"list of {type_name(members[0])}"
        return "[" + ", ".join(type_name(member) for member in members) + "]"
    return getattr(annotation, "__name__", str(annotation))


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _is_variadic(members: tuple[Any, ...]) -> bool:
    return len(members) == 2 and members[1] is Ellipsis


def _mismatch(where: str, value: Any, annotation: Any) -> UserError:
    return UserError(f"{where}: {value!r} is not valid, expected {type_name(annotation)}")


# ---------------------------------------------------------------------------------------------------------------------
# Values from text (command line) and from plain data (JSON)
# ---------------------------------------------------------------------------------------------------------------------


def parse_text(annotation: Any, text: str, where: str) -> Any:
    """Reads one command-line value by its annotation.

    Tuples are comma separated (`a,b`), or JSON when they start with `[`; a dataclass is JSON (`{...}`).

    Raises:
      UserError: the text does not fit; names `where`, the text and the type expected.
    """
    origin = get_origin(annotation)
    if _is_union(annotation):
        return _parse_union(annotation, text, where)
    if origin is Literal:
        for value in get_args(annotation):
            if str(value) == text:
                return value
        nearest = _nearest(text, [str(value) for value in get_args(annotation)])
        raise UserError(f"{where}: {text!r} is not valid, expected {type_name(annotation)} (nearest: {nearest})")
    if origin is tuple or dataclasses.is_dataclass(annotation):
        if text[:1] in ("[", "{"):
            return from_plain(annotation, _parse_json(text, annotation, where), where)
        if dataclasses.is_dataclass(annotation):
            raise UserError(
                f"{where}: is a group of fields ({', '.join(field_types(annotation))}); "
                f"give one of them, for example {where}.{next(iter(field_types(annotation)))}=..."
            )
        return _parse_list(annotation, text, where)
    if annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{where}: {text!r} is not valid, expected bool (true or false)")
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise _mismatch(where, text, annotation) from None
    if annotation in (str, Path):
        return annotation(text)
    raise UserError(f"{where}: a field of type {type_name(annotation)} cannot be set from the command line")


def _parse_union(annotation: Any, text: str, where: str) -> Any:
    members = get_args(annotation)
    if type(None) in members and text.lower() in _NONE_WORDS:
        return None
    if text.startswith("{"):
        return from_plain(annotation, _parse_json(text, annotation, where), where)
    # A list is tried before a plain string only when the text looks like one.
    looks_like_list = "," in text or text.startswith("[")
    rest = [member for member in members if member is not type(None)]
    rest.sort(key=lambda member: (get_origin(member) is tuple) != looks_like_list)
    for member in rest:
        try:
            return parse_text(member, text, where)
        except UserError:
            if len(rest) == 1:
                raise
    raise _mismatch(where, text, annotation)


def _parse_json(text: str, annotation: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {text!r} is not valid JSON ({error}), expected {type_name(annotation)}") from None


def _parse_list(annotation: Any, text: str, where: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    members = get_args(annotation)
    kinds = [members[0]] * len(parts) if _is_variadic(members) else list(members)
    if len(kinds) != len(parts):
        raise UserError(f"{where}: {text!r} has {len(parts)} entries, expected {type_name(annotation)}")
    return tuple(
        parse_text(kind, part, f"{where}.{index}") for index, (kind, part) in enumerate(zip(kinds, parts, strict=True))
    )


def from_plain(annotation: Any, value: Any, where: str = "config") -> Any:
    """Builds the typed value from JSON-like data, strictly: unknown and missing fields and wrong types are
    `UserError`s.
    """
    origin = get_origin(annotation)
    if _is_union(annotation):
        return _union_from_plain(annotation, value, where)
    if origin is Literal:
        if value in get_args(annotation):
            return value
    elif origin is tuple:
        return _tuple_from_plain(annotation, value, where)
    elif dataclasses.is_dataclass(annotation):
        return _dataclass_from_plain(annotation, value, where)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif annotation in (int, str, bool) and type(value) is annotation:
        return value
    elif annotation is type(None) and value is None:
        return None
    raise _mismatch(where, value, annotation)


def _tuple_from_plain(annotation: Any, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _mismatch(where, value, annotation)
    members = get_args(annotation)
    kinds = [members[0]] * len(value) if _is_variadic(members) else list(members)
    if len(kinds) != len(value):
        raise UserError(f"{where}: {value!r} has {len(value)} entries, expected {type_name(annotation)}")
    return tuple(from_plain(kind, v, f"{where}.{i}") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))


def _dataclass_from_plain(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(where, value, cls)
    kinds = field_types(cls)
    for name in value:
        if name not in kinds:
            raise UserError(
                f"{where}: unknown field {name!r} of {cls.__name__}; the nearest is {_nearest(name, list(kinds))!r}"
            )
    required = {f.name for f in dataclasses.fields(cls) if f.init and not _has_default(f)}
    missing = sorted(required - set(value))
    if missing:
        raise UserError(f"{where}: {cls.__name__} needs the missing field(s) {', '.join(missing)}")
    return cls(**{name: from_plain(kinds[name], item, f"{where}.{name}") for name, item in value.items()})


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _union_from_plain(annotation: Any, value: Any, where: str) -> Any:
    members = get_args(annotation)
    if value is None and type(None) in members:
        return None
    if isinstance(value, Mapping):
        # Alternatives among dataclasses are told apart by their field names: it is the one that has most of them, of
        # several the first, and must then be it exactly.
        classes = [member for member in members if dataclasses.is_dataclass(member)]
        if classes:
            return from_plain(max(classes, key=lambda cls: len(set(value) & set(field_types(cls)))), value, where)
    for member in members:
        if dataclasses.is_dataclass(member):
            continue
        try:
            return from_plain(member, value, where)
        except UserError:
            continue
    raise _mismatch(where, value, annotation)


# ---------------------------------------------------------------------------------------------------------------------
# Overrides
# ---------------------------------------------------------------------------------------------------------------------


class _Change(typing.NamedTuple):
    """One override on its way down: the keys still to follow, the text, and the whole path for messages."""

    keys: tuple[str, ...]
    text: str
    path: str


def apply_overrides(config: T, overrides: Mapping[str, str]) -> T:
    """Returns the configuration with dotted fields replaced, e.g. `{"optimizer.beta2": "0.95"}`.

    All are applied together, so that a check across fields sees only the final values.

    Raises:
      UserError: a field does not exist (names the nearest) or its value does not fit (names the type expected).
    """
    changes = [_Change(tuple(path.split(".")), text, path) for path, text in overrides.items()]
    return _replace(config, type(config), changes, "config", config) if changes else config


def _replace(node: Any, annotation: Any, changes: Sequence[_Change], where: str, root: Any) -> Any:
    """`node` with the changes below it applied; an override of the whole node comes before those of its parts."""
    for change in changes:
        if not change.keys:
            node = parse_text(annotation, change.text, f"--{where}")
    groups: dict[str, list[_Change]] = {}
    for change in changes:
        if change.keys:
            groups.setdefault(change.keys[0], []).append(change._replace(keys=change.keys[1:]))
    if not groups:
        return node
    full = next(change.path for change in changes if change.keys)
    node = _opened(node, annotation)
    if dataclasses.is_dataclass(node):
        kinds = field_types(type(node))
        fields = {}
        for key, below in groups.items():
            if key not in kinds:
                raise _unknown_field(below[0].path, where, key, list(kinds), root)
            fields[key] = _replace(getattr(node, key), kinds[key], below, f"{where}.{key}", root)
        return dataclasses.replace(node, **fields)
    if isinstance(node, tuple):
        entries = list(node)
        for key, below in groups.items():
            index = _entry_index(node, key, where, below[0].path, root)
            entries[index] = _replace(
                entries[index], _entry_annotation(annotation, index), below, f"{where}.{key}", root
            )
        return tuple(entries)
    raise UserError(
        f"--config.{full}: {where} is a single value of type {type_name(annotation)}, it has no field "
        f"{next(iter(groups))!r}; the nearest is --config.{nearest_path(root, full)}"
    )


def _opened(node: Any, annotation: Any) -> Any:
    """The node; in place of a None that may be one dataclass whose fields all have defaults, that."""
    if node is not None or not _is_union(annotation):
        return node
    classes = [member for member in get_args(annotation) if dataclasses.is_dataclass(member)]
    if len(classes) != 1 or not all(_has_default(field) for field in dataclasses.fields(classes[0]) if field.init):
        return None
    return classes[0]()


def _entry_annotation(annotation: Any, index: int) -> Any:
    if _is_union(annotation):
        annotation = next(member for member in get_args(annotation) if get_origin(member) is tuple)
    members = get_args(annotation)
    return members[0] if _is_variadic(members) else members[index]


def _entry_index(node: tuple[Any, ...], key: str, where: str, full: str, root: Any) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    names = [getattr(entry, "name", None) for entry in node]
    if key in names:
        return names.index(key)
    known = [str(name) if name is not None else str(index) for index, name in enumerate(names)]
    raise _unknown_field(full, where, key, known, root)


def _unknown_field(full: str, where: str, key: str, known: list[str], root: Any) -> UserError:
    nearest = nearest_path(root, full)
    kind = type_name(_annotation_at(root, nearest))
    return UserError(
        f"--config.{full}: {where} has no field {key!r}; the nearest is --config.{nearest} ({kind}). "
        f"Fields of {where}: {', '.join(known) or 'none'}"
    )


def nearest_path(config: Any, wanted: str) -> str:
    """The existing dotted field most like `wanted`: by its full path, a matching last word counting most."""
    paths = list(_walk_paths(config, type(config)))
    last = wanted.split(".")[-1]

    def likeness(path: str) -> float:
        same_word = difflib.SequenceMatcher(None, path.split(".")[-1], last).ratio()
        return difflib.SequenceMatcher(None, path, wanted).ratio() + same_word

    return max(paths, key=likeness)


def _nearest(word: str, known: Sequence[str]) -> str:
    return max(known, key=lambda candidate: difflib.SequenceMatcher(None, candidate, word).ratio())


def _children(node: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(node):
        return [(name, getattr(node, name)) for name in field_types(type(node))]
    if isinstance(node, tuple):
        return [(str(getattr(entry, "name", index)), entry) for index, entry in enumerate(node)]
    return []


def _walk_paths(node: Any, annotation: Any, prefix: str = "") -> list[str]:
    paths, node = [], _opened(node, annotation)
    kinds = field_types(type(node)) if dataclasses.is_dataclass(node) else {}
    for index, (name, child) in enumerate(_children(node)):
        below = kinds[name] if kinds else _entry_annotation(annotation, index)
        paths.append(prefix + name)
        paths += _walk_paths(child, below, f"{prefix}{name}.")
    return paths


def _annotation_at(root: Any, path: str) -> Any:
    node, annotation = root, type(root)
    for key in path.split("."):
        node = _opened(node, annotation)
        if dataclasses.is_dataclass(node):
            annotation, node = field_types(type(node))[key], getattr(node, key)
        else:
            index = _entry_index(node, key, "config", path, root)
            annotation, node = _entry_annotation(annotation, index), node[index]
    return annotation


# ---------------------------------------------------------------------------------------------------------------------
# Plain data, files, printing, comparison
# ---------------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> Any:
    """The configuration as dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {name: to_dict(getattr(config, name)) for name in field_types(type(config))}
    if isinstance(config, tuple | list):
        return [to_dict(entry) for entry in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(cls: type[T], data: Any) -> T:
    """Inverse of `to_dict`. Raises `UserError` for unknown or missing fields and values of the wrong type."""
    return from_plain(cls, data)


def save_json(config: Any, path: str | Path) -> None:
    """Writes the configuration as indented JSON, on a disk or in a bucket; a reader never sees half of it."""
    write_whole(place(path), json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n")


def load_json(cls: type[T], path: str | Path) -> T:
    """Reads what `save_json` wrote. Raises `UserError` that names the file if it is missing or does not fit `cls`."""
    try:
        data = json.loads(place(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} is not valid JSON: {error}") from None
    try:
        return from_dict(cls, data)
    except UserError as error:
        raise UserError(f"configuration file {path}: {error}") from None


def format_config(config: Any, indent: int = 0) -> str:
    """The configuration as readable indented text, one field a line."""
    lines = []
    for name, child in _children(config):
        grouped = dataclasses.is_dataclass(child) or any(
            dataclasses.is_dataclass(entry) for _, entry in _children(child)
        )
        if grouped:
            lines.append(f"{'  ' * indent}{name}:")
            lines.append(format_config(child, indent + 1))
        else:
            lines.append(f"{'  ' * indent}{name}: {child}")
    return "\n".join(lines)


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """`(dotted field, old value, new value)` for everything that differs between two plain or typed configurations."""
    old, new = to_dict(old), to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = []
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            label = a.get("name", index) if isinstance(a, dict) else index
            found += differences(a, b, f"{prefix}{label}.")
        return found
    return [] if old == new else [(prefix.rstrip("."), old, new)]


# ---------------------------------------------------------------------------------------------------------------------
# Experiment files and the command line
# ---------------------------------------------------------------------------------------------------------------------


class ConfigArgs(typing.NamedTuple):
    """What a command line says about the configuration, and what is left of it."""

    file: str | None
    overrides: dict[str, str]
    rest: list[str]


def parse_config_args(argv: Sequence[str]) -> ConfigArgs:
    """Splits `--config=FILE` and `--config.a.b=v` (or with a space instead of `=`) from the other arguments.

    Raises:
      UserError: a `--config...` flag without a value.
    """
    file, overrides, rest = None, {}, []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        flag, equals, value = argument.partition("=")
        if flag != "--config" and not flag.startswith("--config."):
            rest.append(argument)
            continue
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"{flag} needs a value, for example {flag}={'FILE' if flag == '--config' else 'VALUE'}")
            value = arguments.pop(0)
        if flag == "--config":
            file = value
        else:
            overrides[flag.removeprefix("--config.")] = value
    return ConfigArgs(file, overrides, rest)


def load_module(path: str | Path) -> types.ModuleType:
    """Imports an experiment file by its path. Raises `UserError` if it is missing or is not a Python file.

    A file below a folder `experiments` can import its neighbours as `experiments.NAME`, from wherever it is run.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(
            f"--config={path}: no such Python file; give an experiment, for example experiments/quickstart.py"
        )
    for folder in path.resolve().parents:
        if folder.name == "experiments" and str(folder.parent) not in sys.path:
            sys.path.append(str(folder.parent))
    name = f"vita_jax_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of the file resolve their annotations through sys.modules.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def config_from_module(module: types.ModuleType, overrides: Mapping[str, str]) -> Any:
    """Calls the module's `get_config`, then applies the overrides.

    Overrides that name a parameter of `get_config` (such as `size`) are passed to it, read by that parameter's
    annotation.
    """
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{module.__file__}: an experiment file must define get_config(size=...)")
    parameters = inspect.signature(get_config).parameters
    hints = typing.get_type_hints(get_config)
    arguments = {
        name: parse_text(hints.get(name, str), overrides[name], f"--config.{name}")
        for name in parameters
        if name in overrides
    }
    config = get_config(**arguments)
    if "size" in overrides and "size" not in arguments:
        raise UserError(f"--config.size={overrides['size']}: {module.__file__} offers one size only")
    return apply_overrides(config, {path: text for path, text in overrides.items() if path not in arguments})


def load_config_file(path: str | Path, overrides: Mapping[str, str] | None = None) -> Any:
    """Imports `path`, calls its `get_config`, applies overrides. Raises `UserError` for anything that does not fit."""
    return config_from_module(load_module(path), overrides or {})
