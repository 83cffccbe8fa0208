"""Documents: the public format, what is refused, and the stored form."""

from __future__ import annotations

import pytest

from tests.data.media import png_bytes, write_png
from vita_jax.data.documents import DocumentRecord, check_document, decode_document, encode_document
from vita_jax.data.records import Media, Record, RecordError, decode_record, encode_record
from vita_jax.errors import UserError


def document(*pieces, **fields):
    return {"id": "d", "document": list(pieces), **fields}


def test_pieces_keep_their_order(tmp_path):
    write_png(tmp_path / "a.png", seed=1)
    write_png(tmp_path / "b.png", seed=2)
    checked = check_document(document("One.", {"image": "a.png"}, "Two.", {"image": "b.png"}), tmp_path)
    assert [file.name for file in checked.files] == ["a.png", "b.png"]
    record = checked.with_media()
    assert record.texts == ("One.", "Two.") and [media.name for media in record.media] == ["a.png", "b.png"]
    assert isinstance(record.pieces[1], Media) and record.media[1].data == png_bytes(16, 16, 2)
    assert decode_document(encode_document(record)) == record
    assert encode_document(decode_document(encode_document(record))) == encode_document(record)


def test_a_document_without_pictures_is_one():
    assert check_document({"document": ["Only text."]}, None, index=4).id == "4"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "is a list; expected an object with 'document'"),
        ({"document": []}, r"document: must be a non-empty list"),
        ({"document": ["a"], "image": "a.png"}, "image: unknown field; known: set, id, document"),
        ({"document": ["a"], "documents": []}, "did you mean 'document'"),
        (document(""), r"record 3 \(id 'd'\): document\[0\]: is an empty text"),
        (document("a", 7), r"document\[1\]: must be a text, or an object .* got a number"),
        (document({"image": "a.png", "video": "b.mp4"}), r"got \['image', 'video'\]"),
        (document({"audio": "a.wav"}), r"got \['audio'\]"),
        (document({"image": ""}), r"document\[0\].image: is empty"),
        (document({"image": 1}), r"document\[0\].image: is a number; expected text"),
        (document({"image": "../a.png"}), "lies outside of the root folder"),
        (document("see <image> here"), r"document\[0\]: holds <image>; media are pieces of their own"),
        (document("end<|endofchunk|>"), r"holds <\|endofchunk\|>"),
        (document("a \ud800 b"), "holds half a character"),
        (document({"image": "a.png"}, set="x"), "'x' is not in the folder table"),
    ],
)
def test_what_is_refused_names_record_and_field(tmp_path, entry, message):
    with pytest.raises(RecordError, match=message):
        check_document(entry, tmp_path, where="file.json", index=3, folders={"y": str(tmp_path)})


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(RecordError, match="no such file"):
        check_document(document({"image": "none.png"}), tmp_path).with_media()
    with pytest.raises(RecordError, match="is empty"):
        check_document(document({"image": "empty.png"}), tmp_path).with_media()


def test_documents_and_conversations_are_not_taken_for_each_other():
    talk = ({"from": "human", "value": "a"}, {"from": "gpt", "value": "b"})
    with pytest.raises(UserError, match="is a conversation; Flamingo's data sets hold documents"):
        decode_document(encode_record(Record("r", talk)))
    with pytest.raises(UserError, match="is a document, which only"):
        decode_record(encode_document(DocumentRecord("d", ("a",))))
    with pytest.raises(UserError, match="damaged document"):
        decode_document(b"\xc1")
