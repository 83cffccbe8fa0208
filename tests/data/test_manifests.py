"""Manifests: lines are found without reading them, and read one by one."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_jax.data import manifests
from vita_jax.data.loader import SourceConfig
from vita_jax.data.manifests import Manifest, has_codes, read_manifest
from vita_jax.data.records import RecordError
from vita_jax.data.speech_pairs import PairSource
from vita_jax.errors import UserError


def written(path, entries, end="\n"):
    path.write_text(end.join(json.dumps(entry, ensure_ascii=False) for entry in entries), encoding="utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=8),
    gaps=st.lists(st.sampled_from(["", " ", "\r", "\t \r"]), max_size=8),
    last=st.booleans(),
    mark=st.booleans(),
    block=st.integers(1, 40),
)
def test_every_line_is_found_and_keeps_its_number(tmp_path_factory, texts, gaps, last, mark, block):
    lines = [json.dumps({"audio": f"{n}.wav", "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    mixed = [line for pair in zip(lines, gaps + [None] * len(lines), strict=False) for line in pair if line is not None]
    path = tmp_path_factory.mktemp("manifest") / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + ("\n".join(mixed) + "\n" * last).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "BLOCK_BYTES", block)
        manifest = Manifest(path)
    assert [pair.text for pair in manifest] == texts
    numbers = [mixed.index(line) + 1 for line in lines] if len(set(lines)) == len(lines) else None
    assert numbers is None or [int(pair.place.rpartition(" ")[2]) for pair in manifest] == numbers
    again = pickle.loads(pickle.dumps(manifest))
    assert [(pair.place, pair.audio) for pair in again] == [(pair.place, pair.audio) for pair in manifest]


def test_what_is_wrong_is_said_when_a_line_is_read(tmp_path):
    path = tmp_path / "m.jsonl"
    good = b'{"audio": "a.wav", "text": "a"}'
    bad = [b"{", b"[1]", b'{"audio": 3, "text": "a"}', b'{"audio": "a"}', b'"\xff"', b"null", b"x" * 100]
    path.write_bytes(b"\n".join([good, *bad, good]))
    manifest = Manifest(path)
    assert len(manifest) == 9 and manifest[8].text == manifest[0].text == "a"
    for number in range(1, 8):
        with pytest.raises(RecordError, match=rf'm.jsonl, line {number + 1}: expected a JSON object with "audio"'):
            manifest[number]
    with pytest.raises(UserError, match="line 2"):
        read_manifest(path)
    for codes in ([], [1, -1], [1.0], "12", [True]):
        written(path, [{"audio": "a", "text": "a", "codes": codes}])
        with pytest.raises(RecordError, match="line 1: codes: must be a list of numbers") as caught:
            Manifest(path)[0]
        assert caught.value.category == "malformed line"
        assert not has_codes(Manifest(path))
    for content in (b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n "):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is empty"):
            Manifest(path)
    with pytest.raises(UserError, match=r"no\.jsonl cannot be read"):
        Manifest(tmp_path / "no.jsonl")


def test_shares_of_several_manifests_in_one_source(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path, count in zip(paths, (20, 7), strict=True):
        written(path, [{"audio": "x.wav", "text": f"{path.stem}{n}"} for n in range(count)])
    source = PairSource([SourceConfig(str(paths[0]), ratio=0.5), SourceConfig(str(paths[1]))], seed=3)
    texts = [source[index].text for index in range(len(source))]
    expected = np.sort(np.random.default_rng([3, 0]).permutation(20)[:10])
    assert texts == [f"a{n}" for n in expected] + [f"b{n}" for n in range(7)]


def test_lines_that_differ_in_codes_are_bad_records_and_manifests_an_error(tmp_path):
    coded, plain = ({"audio": "a.wav", "text": "a"} | extra for extra in ({"codes": [1]}, {}))
    files = {name: written(tmp_path / f"{name}.jsonl", lines) for name, lines in
             {"mixed": [coded, plain, coded], "plain": [plain, coded], "coded": [coded]}.items()}  # fmt: skip
    found = PairSource([SourceConfig(str(files["mixed"]))], 0)
    assert found.coded and found[1].category == "mixed codes" and found[2].codes.tolist() == [1]
    other = PairSource([SourceConfig(str(files["plain"]))], 0)
    assert not other.coded and "not in the first" in str(other[1])
    with pytest.raises(UserError, match="some of the manifests have codes"):
        PairSource([SourceConfig(str(files[name])) for name in ("coded", "plain")], 0)
