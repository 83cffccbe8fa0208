"""The parity runner itself: what it must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity import cases
from vita_jax.errors import UnsupportedOption

WANT = {"y": np.asarray([1.0, 2.0, 3.0], np.float32), "ids": np.asarray([4, 5], np.int32)}


def make_case(**overrides) -> cases.Case:
    fields = {"area": "a", "name": "c", "path": Path("a/c"), "module": "m", "outputs": WANT, "atol": 1e-3, "rtol": 0.0}
    return cases.Case(**(fields | overrides))


def status(result, case: cases.Case | None = None, **lists) -> cases.Outcome:
    case = case or make_case()
    return cases.run_case(case, {"m": lambda _: result}, lists.get("pending", {}), lists.get("unsupported", {}))


def test_right_values_pass_and_report_the_fraction_of_the_tolerance() -> None:
    outcome = status({**WANT, "y": WANT["y"] + np.float32(5e-4), "extra": np.zeros(3)})
    assert outcome.status == "pass"
    assert outcome.worst == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": WANT["y"] + np.float32(2e-3)}, "3 of 3 values differ"),
        ({"y": np.asarray([1.0, np.nan, 3.0], np.float32)}, "1 of 3 values differ"),
        ({"y": WANT["y"][:2]}, "shape (2,), expected (3,)"),
        ({"y": WANT["y"].astype(np.int32)}, "dtype int32"),
        ({"y": WANT["y"].astype(np.float16)}, "dtype float16"),
        ({"ids": np.asarray([4, 6], np.int32)}, "1 of 2 values differ"),
        ({"ids": np.asarray([4.0, 5.0], np.float32)}, "dtype float32"),
    ],
)
def test_wrong_output_fails(change: dict[str, np.ndarray], message: str) -> None:
    outcome = status(WANT | change)
    assert outcome.status == "fail"
    assert message in outcome.detail


def test_missing_output_fails() -> None:
    outcome = status({"y": WANT["y"]})
    assert (outcome.status, outcome.detail, outcome.worst) == ("fail", "ids: missing", np.inf)


def test_tolerance_zero_is_exact() -> None:
    case = make_case(atol=0.0)
    assert status(WANT, case).status == "pass"
    assert status(WANT | {"y": np.nextafter(WANT["y"], np.float32(9))}, case).status == "fail"


def test_scalars_may_have_shape_one_and_infinities_are_equal() -> None:
    case = make_case(outputs={"loss": np.asarray([np.inf], np.float32)})
    assert status({"loss": np.float32(np.inf)}, case).status == "pass"
    assert status({"loss": np.float32(1.0)}, case).status == "fail"


def test_only_valid_positions_are_compared_but_never_none() -> None:
    wrong = WANT | {"y": np.asarray([1.0, 2.0, 99.0], np.float32)}
    assert status(cases.Result(wrong, valid={"y": np.asarray([True, True, False])})).status == "pass"
    assert status(cases.Result(wrong, valid={"y": np.asarray([True, False, True])})).status == "fail"
    assert status(cases.Result(wrong, valid={"y": np.zeros(3, bool)})).status == "fail"
    assert status(cases.Result(WANT, valid={"z": np.ones(3, bool)})).status == "fail"


def test_unknown_module_fails_and_listed_one_is_pending() -> None:
    assert cases.run_case(make_case(), {}, {}, {}).status == "fail"
    assert "unknown module 'm'" in cases.run_case(make_case(), {}, {}, {}).detail
    assert cases.run_case(make_case(), {}, {"m": "not yet"}, {}).status == "pending"


def test_pending_parts_must_be_listed() -> None:
    partial = cases.Result({"y": WANT["y"]}, pending={"ids": "audio"})
    assert status(partial).status == "fail"
    assert status(partial, pending={"m:audio": "not yet"}).status == "pass"
    assert "1 of 2 outputs" in status(partial, pending={"m:audio": "not yet"}).detail
    whole = cases.Result({}, pending={"ids": "audio", "y": "audio"})
    assert status(whole, pending={"m:audio": "not yet"}).status == "pending"

    def raises(_: cases.Case) -> None:
        raise cases.Pending("audio")

    assert cases.run_case(make_case(), {"m": raises}, {}, {}).status == "fail"
    assert cases.run_case(make_case(), {"m": raises}, {"m:audio": "not yet"}, {}).status == "pending"


def test_unsupported_options_must_be_listed() -> None:
    def raises(_: cases.Case) -> None:
        raise UnsupportedOption("the tower 'eva_clip' is not available")

    with pytest.raises(UnsupportedOption):
        cases.run_case(make_case(), {"m": raises}, {}, {"other:eva_clip": "x", "m:siglip": "x"})
    assert cases.run_case(make_case(), {"m": raises}, {}, {"m:eva_clip": "x"}).status == "unsupported"


def test_tables_pass_without_mismatches_only() -> None:
    table = make_case(table={"module": "m"}, outputs={})
    assert status([], table).status == "pass"
    assert status(["row 3"], table).status == "fail"
    assert status(None, table).status == "fail"


def test_files_that_are_no_usable_case(tmp_path: Path) -> None:
    area = tmp_path / "vision"
    (area / "tokenizer").mkdir(parents=True)
    with pytest.raises(cases.CaseError, match="holds no case"):
        cases.find_case_files(tmp_path, None)
    with pytest.raises(cases.CaseError, match="does not exist"):
        cases.find_case_files(tmp_path / "nowhere", None)
    (area / "tokenizer" / "tokenizer.json").write_text("{}")  # deeper files are not cases
    (area / "README.md").write_text("not a case")
    metadata = {"module": "m", "config": "{}", "atol": "0", "rtol": "0"}
    save_file({"outputs/y": WANT["y"]}, area / "good.safetensors", metadata)
    assert cases.find_case_files(tmp_path, None) == [area / "good.safetensors"]
    assert cases.load_case(area / "good.safetensors").outputs["y"].tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(cases.CaseError, match="holds no case"):
        cases.find_case_files(tmp_path, ["vision", "vita"])

    save_file({"outputs/y": WANT["y"]}, area / "bare.safetensors")
    save_file({"weights/y": WANT["y"]}, area / "empty.safetensors", metadata)
    (area / "cut.safetensors").write_bytes((area / "good.safetensors").read_bytes()[:-1])
    (area / "list.json").write_text("[]")
    (area / "broken.json").write_text("{")
    for name, message in {
        "bare.safetensors": "metadata lacks module, config, atol, rtol",
        "empty.safetensors": "no tensor under outputs/",
        "cut.safetensors": "not a readable safetensors file",
        "list.json": "'module'",
        "broken.json": "not a readable JSON file",
    }.items():
        with pytest.raises(cases.CaseError, match=message):
            cases.load_case(area / name)


def test_listings(tmp_path: Path) -> None:
    path = tmp_path / "pending.txt"
    path.write_text("# comment\n\nmixtral: later\nvita:audio: later too\n")
    assert cases.read_listing(path) == {"mixtral": "later", "vita:audio": "later too"}
    for bad in ("mixtral\n", "a: x\na: y\n"):
        path.write_text(bad)
        with pytest.raises(cases.CaseError):
            cases.read_listing(path)


def test_shipped_listings_are_readable_and_disjoint_from_the_adapters() -> None:
    pending = cases.read_listing(cases.HERE / "pending.txt")
    cases.read_listing(cases.HERE / "unsupported.txt")
    built = cases.merge_topics({topic: cases.load_topic(topic) for topic in cases.adapter_topics()})
    assert not set(pending) & set(built), "a built module is still listed as pending"
    assert not {key.partition(":")[0] for key in pending if ":" in key} - set(built)


def test_two_adapters_may_not_claim_one_module() -> None:
    with pytest.raises(cases.CaseError, match="claimed by the adapters a and b"):
        cases.merge_topics({"a": {"m": json.loads}, "b": {"m": json.loads}})
