"""The generic configuration machinery: overrides, JSON, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vita_jax import config as config_lib
from vita_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-3
    clip: float | None = 1.0
    folder: Path = Path("a")


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    steps: int = 1
    scale: tuple[tuple[str, float], ...] = ()
    start_from: str | tuple[str, ...] | None = None
    inner: Inner | None = None
    other: Part | None = None


@dataclasses.dataclass(frozen=True)
class Widths:
    """Two fields that must agree."""

    left: int = 1
    right: int = 1

    def __post_init__(self) -> None:
        if self.left != self.right:
            raise UserError("left and right differ")


@dataclasses.dataclass(frozen=True)
class Circle:
    size: float = 1.0
    colour: str = "red"


@dataclasses.dataclass(frozen=True)
class Box:
    size: float
    depth: int = 2
    height: int = 3


@dataclasses.dataclass(frozen=True)
class Drawing:
    shape: Circle | Box = Circle()
    other: Circle | Box | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: Inner = Inner()
    widths: Widths = Widths()
    stages: tuple[Part, ...] = (Part("first"), Part("second"))
    size: Literal["smoke", "small"] = "small"
    flag: bool = False
    betas: tuple[float, float] = (0.9, 0.99)
    names: tuple[str, ...] = ()


def apply(**overrides: str) -> Config:
    return config_lib.apply_overrides(Config(), {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize(
    ("path", "text", "read"),
    [
        ("optimizer.learning_rate", "1e-4", lambda c: c.optimizer.learning_rate == 1e-4),
        ("optimizer.clip", "none", lambda c: c.optimizer.clip is None),
        ("optimizer.clip", "2", lambda c: c.optimizer.clip == 2.0),
        ("optimizer.folder", "/tmp/x", lambda c: c.optimizer.folder == Path("/tmp/x")),
        ("stages.second.steps", "10", lambda c: [s.steps for s in c.stages] == [1, 10]),
        ("stages.0.steps", "7", lambda c: [s.steps for s in c.stages] == [7, 1]),
        ("stages.0.scale", '[["^vision/", 0.1]]', lambda c: c.stages[0].scale == (("^vision/", 0.1),)),
        ("stages.0.start_from", "a,b", lambda c: c.stages[0].start_from == ("a", "b")),
        ("stages.0.start_from", "a", lambda c: c.stages[0].start_from == "a"),
        ("stages.0.start_from", "none", lambda c: c.stages[0].start_from is None),
        ("size", "smoke", lambda c: c.size == "smoke"),
        ("flag", "TRUE", lambda c: c.flag is True),
        ("betas", "0.5,1", lambda c: c.betas == (0.5, 1.0)),
        ("betas.1", "0.7", lambda c: c.betas == (0.9, 0.7)),
        ("names", "a, b", lambda c: c.names == ("a", "b")),
        ("names", "", lambda c: c.names == ()),
        ("stages", '[{"name": "only", "steps": 3}]', lambda c: c.stages == (Part("only", 3),)),
        ("stages.0.inner.clip", "3", lambda c: [s.inner for s in c.stages] == [Inner(clip=3.0), None]),
        ("stages.0.inner", '{"clip": 3.0}', lambda c: c.stages[0].inner == Inner(clip=3.0)),
    ],
)
def test_override(path, text, read):
    assert read(config_lib.apply_overrides(Config(), {path: text}))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "optimizer.learning_rat",
            "1",
            ["--config.optimizer.learning_rat", "--config.optimizer.learning_rate", "float"],
        ),
        ("learning_rate", "1", ["--config.optimizer.learning_rate"]),
        ("optimiser.learning_rate", "1", ["--config.optimizer.learning_rate"]),
        ("stages.secnd.steps", "1", ["--config.stages.second.steps", "int", "first, second"]),
        ("stages.5.steps", "1", ["--config.stages."]),
        ("optimizer.learning_rate", "fast", ["--config.optimizer.learning_rate", "'fast'", "float"]),
        ("optimizer.clip", "x", ["'x'", "float"]),
        ("stages.first.steps", "1.5", ["'1.5'", "int"]),
        ("stages.first.steps", "", ["int"]),
        ("flag", "1", ["'1'", "true or false"]),
        ("size", "smal", ["smoke, small", "nearest: small"]),
        ("betas", "0.5", ["1 entries", "[float, float]"]),
        ("optimizer", "x", ["group of fields", "learning_rate"]),
        ("flag.x", "1", ["no field 'x'"]),
        ("stages.first.inner.clup", "1", ["--config.stages.first.inner.clip (float or none)", "learning_rate, clip"]),
        ("stages.first.other.steps", "1", ["stages.first.other is a single value of type Part or none"]),
        ("stages", "[{", ["JSON"]),
        ("stages", '[{"name": "a", "stepz": 1}]', ["stepz", "steps"]),
        ("stages", '[{"steps": 1}]', ["missing", "name"]),
    ],
)
def test_override_errors_name_the_field_and_what_was_expected(path, text, expected):
    with pytest.raises(UserError) as error:
        config_lib.apply_overrides(Config(), {path: text})
    for part in expected:
        assert part in str(error.value)


def test_fields_that_must_agree_can_be_overridden_together():
    assert apply(widths__left="3", widths__right="3").widths == Widths(3, 3)
    with pytest.raises(UserError, match="differ"):
        apply(widths__left="3")


def test_untouched_fields_stay():
    changed = apply(stages__first__steps="5")
    assert changed.optimizer is Config().optimizer or changed.optimizer == Config().optimizer
    assert dataclasses.replace(changed, stages=Config().stages) == Config()


@given(
    rate=st.floats(allow_nan=False, allow_infinity=False),
    clip=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    names=st.lists(st.text(max_size=5), max_size=3),
    start=st.none() | st.text(max_size=4) | st.lists(st.text(max_size=3), max_size=2).map(tuple),
)
def test_dict_round_trip(rate, clip, flag, names, start):
    config = Config(Inner(rate, clip), flag=flag, names=tuple(names), stages=(Part("x", start_from=start),))
    assert config_lib.from_dict(Config, config_lib.to_dict(config)) == config


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "folder" / "config.json"
    config = Config(names=("ü", "b"))
    config_lib.save_json(config, path)
    assert config_lib.load_json(Config, path) == config
    path.write_text(path.read_text().replace('"learning_rate"', '"learning_rat"'))
    with pytest.raises(UserError, match="learning_rat'.*nearest is 'learning_rate'"):
        config_lib.load_json(Config, path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        config_lib.load_json(Config, path)
    with pytest.raises(UserError, match="does not exist"):
        config_lib.load_json(Config, tmp_path / "none.json")


def test_alternatives_are_told_by_their_fields():
    for drawing in (Drawing(), Drawing(Box(4.0)), Drawing(Circle(2.0), Box(1.0)), Drawing(Box(1.0), Circle())):
        assert config_lib.from_dict(Drawing, config_lib.to_dict(drawing)) == drawing
    assert config_lib.from_dict(Drawing, {"shape": {"size": 3.0}}).shape == Circle(3.0)  # the first of several
    for shape, message in (
        ({"size": 1.0, "depth": 2, "heigth": 3}, "unknown field 'heigth' of Box; the nearest is 'height'"),
        ({"size": 1.0, "color": "blue"}, "unknown field 'color' of Circle"),
        ({"depth": 1}, "Box needs the missing field.s. size"),
        ({"size": "a", "depth": 1}, "shape.size: 'a' is not valid, expected float"),
        ("box", "expected Circle or Box"),
    ):
        with pytest.raises(UserError, match=message):
            config_lib.from_dict(Drawing, {"shape": shape})
    boxed = config_lib.apply_overrides(Drawing(), {"shape": '{"size": 5, "depth": 7}', "shape.height": "9"})
    assert boxed.shape == Box(5.0, 7, 9)
    with pytest.raises(UserError, match="no field 'depth'; the nearest"):
        config_lib.apply_overrides(Drawing(), {"shape.depth": "1"})


def test_from_dict_is_strict_about_types():
    for bad in ({"flag": 1}, {"betas": [0.1]}, {"size": "huge"}, {"stages": {}}, {"optimizer": {"learning_rate": "1"}}):
        with pytest.raises(UserError):
            config_lib.from_dict(Config, bad)


def test_parse_config_args():
    args = config_lib.parse_config_args(["--config=x.py", "--config.a.b=1=2", "--config.c", "3", "--other", "y"])
    assert args == ("x.py", {"a.b": "1=2", "c": "3"}, ["--other", "y"])
    assert config_lib.parse_config_args(["--config", "x.py"]).file == "x.py"
    for bad in (["--config.a"], ["--config"], ["--config.a", "--config.b=1"]):
        with pytest.raises(UserError, match="needs a value"):
            config_lib.parse_config_args(bad)


def test_load_config_file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import dataclasses\nfrom typing import Literal\n"
        "@dataclasses.dataclass(frozen=True)\nclass C:\n    size: str\n    steps: int = 1\n"
        "def get_config(size: Literal['smoke', 'small'] = 'small'):\n    return C(size)\n"
    )
    loaded = config_lib.load_config_file(path, {"size": "smoke", "steps": "4"})
    assert (loaded.size, loaded.steps) == ("smoke", 4)
    assert config_lib.load_config_file(path).size == "small"
    with pytest.raises(UserError, match="smoke, small"):
        config_lib.load_config_file(path, {"size": "full"})
    with pytest.raises(UserError, match="steps"):
        config_lib.load_config_file(path, {"stepz": "4"})
    with pytest.raises(UserError, match="no such Python file"):
        config_lib.load_config_file(tmp_path / "y.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="get_config"):
        config_lib.load_config_file(tmp_path / "empty.py")


def test_differences_and_printing():
    old, new = Config(), apply(stages__second__steps="9", optimizer__learning_rate="0.5")
    assert config_lib.differences(old, new) == [("optimizer.learning_rate", 1e-3, 0.5), ("stages.second.steps", 1, 9)]
    assert config_lib.differences(old, old) == []
    text = config_lib.format_config(new)
    assert "  second:\n" in text and "    steps: 9" in text and "learning_rate: 0.5" in text
