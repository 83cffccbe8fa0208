"""The public record format: what is accepted, what is refused and how that is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.media import png_bytes, talk, write_json, write_png
from vita_jax.data.records import (
    RECORD_SCHEMA,
    Media,
    Record,
    RecordError,
    check_record,
    decode_record,
    encode_record,
    load_manifest,
    read_folders,
    read_json_records,
    validate_record,
)
from vita_jax.errors import UserError


@pytest.fixture
def root(tmp_path):
    """A folder with a picture, an empty file, and a picture beside (outside of) it."""
    folder = tmp_path / "root"
    write_png(folder / "a.png")
    write_png(folder / "sub" / "b.png", seed=1)
    (folder / "empty.png").write_bytes(b"")
    write_png(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def test_accepts_the_format(root):
    entry = {
        "set": "s",
        "id": 7,
        "image": ["a.png", "sub/b.png"],
        "conversations": talk("<image> and\n<image>", "Two.", "Sure?", "Yes."),
    }
    record = validate_record(entry, root)
    assert record.id == "7" and record.set == ("s",) and record.num_rounds == 2
    assert [(m.kind, m.name, m.set) for m in record.media] == [("image", "a.png", "s"), ("image", "sub/b.png", "s")]
    assert record.media[1].data == (root / "sub/b.png").read_bytes()
    assert decode_record(encode_record(record)) == record


def test_accepts_audio(root):
    entry = {
        "id": "a",
        "image": "a.png",
        "audio": ["a.png", "sub/b.png"],
        "inserted_id": 3,
        "end_tag": False,
        "conversations": talk("<image>\n<audio>", "One.", "<audio>", "Not for me."),
    }
    record = validate_record(entry, root)
    assert [(m.kind, m.name) for m in record.media] == [("image", "a.png"), ("audio", "a.png"), ("audio", "sub/b.png")]
    assert (record.inserted_id, record.end_tag) == (3, False)
    assert decode_record(encode_record(record)) == record


def test_set_and_id_are_optional_and_text_needs_no_root():
    record = validate_record({"conversations": talk("Hi", "Hello")}, None, index=3)
    assert record == Record(id="3", conversations=tuple(talk("Hi", "Hello")))


def test_sets_name_folders(root):
    entry = {"set": ["x", "y"], "image": ["a.png", "b.png"], "conversations": talk("<image><image>", "Two.")}
    record = validate_record(entry, None, folders={"x": str(root), "y": str(root / "sub")})
    assert record.media[1].data == (root / "sub" / "b.png").read_bytes()
    with pytest.raises(RecordError, match="'y' is not in the folder table"):
        validate_record(entry, root, folders={"x": str(root)})


IMAGE = talk("<image>\nWhat?", "This.")
REFUSED = [
    ([], "", "is a list; expected an object"),
    ({"conversations": talk("Hi", "Yo"), "imgae": "a.png"}, "imgae", "did you mean 'image'"),
    ({"image": "a.png"}, "conversations", "non-empty list of turns"),
    ({"conversations": []}, "conversations", "non-empty list of turns"),
    ({"conversations": talk("Hi")}, "conversations", "has no answer"),
    ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "conversations[0].from", "'human' is expected"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, "conversations[1].from", "'gpt' is expected"),
    ({"conversations": talk("Hi", " \n")}, "conversations[1].value", "the answer is empty"),
    ({"conversations": talk("", "Yo")}, "conversations[0].value", "the question is empty"),
    ({"conversations": talk("Hi", 3)}, "conversations[1].value", "is a number; expected text"),
    ({"conversations": talk("Hi", "\ud800")}, "conversations[1].value", "surrogate"),
    ({"conversations": [{"from": "human", "value": "Hi", "mood": 1}]}, "conversations[0]", "exactly the fields"),
    ({"id": None, "conversations": talk("Hi", "Yo")}, "id", "is a null"),
    ({"image": "a.png", "conversations": talk("What?", "This.")}, "image", "1 file(s) but 0 <image>"),
    ({"conversations": IMAGE}, "image", "0 file(s) but 1 <image>"),
    ({"image": ["a.png"] * 2, "conversations": IMAGE}, "image", "2 file(s) but 1 <image>"),
    ({"video": "a.mp4", "conversations": IMAGE}, "image", "0 file(s) but 1 <image>"),
    ({"image": "a.png", "conversations": talk("Draw", "<image>")}, "conversations[1].value", "in an answer"),
    ({"image": [], "conversations": IMAGE}, "image", "is empty"),
    ({"image": "", "conversations": IMAGE}, "image", "is empty"),
    ({"image": [1], "conversations": IMAGE}, "image[0]", "is a number"),
    ({"image": "none.png", "conversations": IMAGE}, "image", "no such file"),
    ({"image": "sub", "conversations": IMAGE}, "image", "no such file"),
    ({"image": "empty.png", "conversations": IMAGE}, "image", "is empty (0 bytes)"),
    ({"image": "../secret.png", "conversations": IMAGE}, "image", "outside of the root folder"),
    ({"image": "link.png", "conversations": IMAGE}, "image", "outside of the root folder"),
    ({"image": "/etc/passwd", "conversations": IMAGE}, "image", "outside of the root folder"),
    ({"image": "a\0.png", "conversations": IMAGE}, "image", "is not a file name"),
    ({"audio": "a.wav", "conversations": talk("Hi", "Hm")}, "audio", "1 file(s) but 0 <audio>"),
    ({"conversations": talk("<audio>", "Hm")}, "audio", "0 file(s) but 1 <audio>"),
    ({"audio": "a.wav", "conversations": talk("Sing", "<audio>")}, "conversations[1].value", "in an answer"),
    ({"audio": "a.png", "conversations": talk("<audio>", "Hm"), "inserted_id": 0}, "inserted_id", "of its answer"),
    ({"conversations": talk("Hi", "Yo"), "inserted_id": 2}, "inserted_id", "index of a turn, 0 to 1"),
    ({"conversations": talk("Hi", "Yo"), "end_tag": 0}, "end_tag", "true or false"),
    ({"image": "a.png", "conversations": IMAGE, "end_tag": False}, "end_tag", "record with audio"),
    ({"set": ["x", "y"], "image": "a.png", "conversations": IMAGE}, "set", "2 different keys for 1 files"),
]


@pytest.mark.parametrize(("entry", "field", "reason"), REFUSED, ids=[f"{f}-{r[:20]}" for _, f, r in REFUSED])
def test_refuses(root, entry, field, reason):
    with pytest.raises(RecordError) as caught:
        validate_record(entry, root, where="my.json", index=5)
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert "my.json: record 5" in str(caught.value) and "\n" not in str(caught.value)


def test_media_without_root_is_refused():
    with pytest.raises(RecordError, match="has no root folder"):
        validate_record({"image": "a.png", "conversations": IMAGE}, None)


def test_extra_fields_can_be_ignored():
    entry = {"conversations": talk("Hi", "Yo"), "width": 3}
    assert check_record(entry, None, ignore_fields=("width",)).record.num_rounds == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[]", "empty list"),
        (b'{"a": 1}', "holds a JSON object"),
        (b'[{"conversations": [', "is not valid JSON: line 1"),
        ('[{"id": "é"}]'.encode("latin-1"), "is not UTF-8 (byte 9)"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json_is_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json_records(path)
    assert message in str(caught.value) and "bad.json" in str(caught.value)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match="no.json cannot be read"):
        read_json_records(tmp_path / "no.json")


def test_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json_records(path) == [1]


def test_folder_table_is_relative_to_itself(tmp_path):
    path = write_json(tmp_path / "roots.json", {"a": "here", "b": "/there"})
    assert read_folders(path) == {"a": str(tmp_path / "here"), "b": "/there"}
    write_json(path, ["here"])
    with pytest.raises(UserError, match="JSON object of set: folder"):
        read_folders(path)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(texts, min_size=2, max_size=6), st.lists(st.binary(max_size=30), max_size=3), st.booleans())
def test_stored_form_round_trips(values, files, end_tag):
    record = Record(
        id="x",
        conversations=tuple(talk(*values)),
        set=("s",),
        end_tag=end_tag,
        media=tuple(Media("image", f"{i}.png", data, "s") for i, data in enumerate(files)),
    )
    assert decode_record(encode_record(record)) == record
    assert encode_record(decode_record(encode_record(record))) == encode_record(record)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x01", png_bytes(4, 4), b"\x80extra"])
def test_damaged_stored_records_are_named(data):
    with pytest.raises(UserError, match="damaged record"):
        decode_record(data)


def test_other_schema_is_refused():
    import msgpack

    with pytest.raises(UserError, match=f"this version reads {RECORD_SCHEMA}"):
        decode_record(msgpack.packb({"schema": 99}))


def test_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match="data_pipelines.build"):
        load_manifest(tmp_path)
