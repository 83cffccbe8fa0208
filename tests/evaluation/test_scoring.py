"""Which answers count as right, and which questions are asked."""

from __future__ import annotations

import json

import pytest

from vita_jax.data.templates import get_template
from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks import get_benchmark
from vita_jax.evaluation.figures import score
from vita_jax.evaluation.items import Item, parse_item, read_items, stratified
from vita_jax.evaluation.scoring import answer_key, answer_prior, is_right, normalise

TEMPLATE = get_template("qwen2p5_instruct")


def item(number: int, **fields) -> Item:
    defaults = {"group": "typed", "kind": "count", "language": "en", "question": "?", "answer": "1", "num_digits": 1}
    return Item(id=str(number), **{**defaults, **fields})


@pytest.mark.parametrize(
    ("kind", "answer", "truth", "right"),
    [
        ("colour", "☜Red.", "red", True),
        ("colour", " dark  Blue ", "dark blue", True),
        ("read", "４ ０ ７", "4 0 7", True),
        ("read", "4 0", "4 0 7", False),
        ("read", "407", "4 0 7", False),
        ("sum", "☜3+4=7", "7", True),
        ("sum", "3+3=7", "3+4 = 7", True),
        ("sum", "3+4=8", "3+4=7", False),
        ("count", "3=3", "3", False),
        ("count", "", "3", False),
        ("colour", "红色。", "红色", True),
    ],
)
def test_is_right(kind, answer, truth, right):
    assert is_right(kind, answer, truth, TEMPLATE) is right


def test_normalise_only_drops_a_leading_symbol():
    assert normalise("☜a☜b", TEMPLATE) == "a☜b"
    assert normalise("☜a") == "☜a"
    assert answer_key("sum", "1=2 = ３") == "3"


def test_prior_is_the_best_constant_answer_per_kind_and_language():
    answers = ["1", "1", "1", "2"]
    items = [item(i, answer=answer) for i, answer in enumerate(answers)]
    items += [item(9, language="zh", answer="5")]
    assert answer_prior(items) == pytest.approx(4 / 5)
    items += [item(i, kind="colour", answer=str(i)) for i in range(4)]
    assert answer_prior(items) == pytest.approx((4 / 5 + 1 / 4) / 2)


def test_score_takes_the_mean_over_kinds():
    items = [item(i) for i in range(3)] + [item(3, kind="sum", language="zh", num_digits=2, answer="1+1=2")]
    result = score(get_benchmark("quickstart"), items, ["1", "1", "0", "☜2"], TEMPLATE)
    group = result["groups"]["typed"]
    assert group["accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert group["by_num_digits"] == {"1": {"accuracy": 2 / 3, "n": 3}, "2": {"accuracy": 1.0, "n": 1}}
    assert (group["floor_reached"], group["goal_reached"]) == (False, False)
    assert list(result["groups"]) == ["typed"]
    assert len(result["examples"]) == 4
    shown = {example["id"]: (example["answer"], example["truth"], example["right"]) for example in result["examples"]}
    assert shown["3"] == ("2", "1+1=2", True)


def test_stratified_spreads_over_languages_and_digit_counts():
    items = [item(i, language=("en", "zh")[i // 50], num_digits=i % 4 + 1) for i in range(100)]
    items += [item(100 + i, kind="sum") for i in range(3)]
    chosen = stratified(items, 8)
    counts = [c for c in chosen if c.kind == "count"]
    assert len({(c.language, c.num_digits) for c in counts}) == len(counts) == 8
    assert sum(c.kind == "sum" for c in chosen) == 3
    assert [items.index(c) for c in chosen] == sorted(items.index(c) for c in chosen)
    with pytest.raises(UserError, match="at least 1"):
        stratified(items, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "answer=None"),
        ({"pitcure": "a.png"}, "unknown field 'pitcure'"),
        ({"num_digits": "3"}, "num_digits='3'"),
        ({"image": "a.png", "video": "b.mp4"}, "one of them"),
        ({"question": " "}, "no sound that asks it"),
        ({"audio": 3}, "audio=3"),
    ],
)
def test_items_are_checked(change, message):
    entry = {"id": "1", "group": "g", "kind": "k", "language": "en", "question": "?", "answer": "1"}
    assert parse_item(entry, "here").media == ()
    with pytest.raises(UserError, match=message):
        parse_item({**entry, **change}, "here")


def test_read_items_names_file_and_line(tmp_path):
    path = tmp_path / "items.jsonl"
    with pytest.raises(UserError, match="does not exist"):
        read_items(path)
    path.write_text(json.dumps({"id": "1"}) + "\n")
    with pytest.raises(UserError, match=r"items.jsonl:1: the field 'group' is missing"):
        read_items(path)
    path.write_text("{\n")
    with pytest.raises(UserError, match=r"items.jsonl:1: not JSON"):
        read_items(path)


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(UserError, match="nearest is 'quickstart'"):
        get_benchmark("quikstart")
