"""Visual instructions by a teacher: what it is shown, what of its replies becomes records."""

from __future__ import annotations

import json

import pytest

from data_pipelines.build import main as build
from data_pipelines.instruct import main, parse_kinds
from data_pipelines.instruction_prompts import (
    CONVERSATION,
    DESCRIBE_IN_DETAIL,
    DESCRIPTION,
    EXAMPLES,
    KINDS,
    REASONING,
    messages,
)
from data_pipelines.instructions import rounds_of
from data_pipelines.pictures import described_picture, read_coco
from tests.data.media import write_json, write_png
from tests.data.stub_teacher import stub_teacher
from vita_jax.data.records import RecordError, load_manifest
from vita_jax.data.teacher import ReplyError
from vita_jax.errors import UserError

DIALOGUE = "Question:\nHow many dogs?\n===\nAnswer:\nTwo.\n===\nQuestion:\nWhere?\n===\nAnswer:\nOn a pier.\n==="
REASONED = "Question:\nWhy so wet?\n===\nAnswer:\nIt rains.\n\nSo the boards are wet.\n==="


def reply_to(asked):
    """A good reply to each kind, told by its system text."""
    system = asked[0]["content"]
    if "conversation between" in system:
        return DIALOGUE
    return REASONED if "takes thinking" in system else "A pier.\n\nTwo dogs."


def write_pictures(folder, count):
    """`count` pictures and their descriptions; returns the file."""
    entries = []
    for number in range(count):
        write_png(folder / "images" / f"{number}.png")
        box = {"name": "dog", "box": [16, 12, 48, 36]}
        entries.append({"image": f"{number}.png", "captions": [f"Dog {number}.", "A pier."], "boxes": [box]})
        entries[-1]["size"] = [64, 48]
    file = folder / "pictures.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


def command(folder, url, *more):
    line = ["--pictures", str(folder / "pictures.jsonl"), "--root", str(folder / "images")]
    return [*line, "--output", str(folder / "out"), "--teacher", url, "--model", "stub", *more]


def test_a_picture_in_words():
    entry = {"image": "a.png", "captions": ["One  dog.", "A\npier."], "size": [200, 100]}
    entry["boxes"] = [{"name": "dog", "box": [50, 25, 201, 75.5]}]
    picture = described_picture(entry, "picture 0")
    assert picture.in_words(with_boxes=False) == "One dog.\nA pier."
    assert picture.in_words(with_boxes=True) == "One dog.\nA pier.\n\ndog: [0.250, 0.250, 1.000, 0.755]"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"image": ""}, "image"),
        ({"captions": []}, "captions"),
        ({"captions": ["a", 3]}, r"captions\[1\]"),
        ({"boxes": [{"name": "dog"}]}, r"boxes\[0\].box"),
        ({"boxes": [{"name": "dog", "box": [0, 0, 50, 50]}]}, r"boxes\[0\].box: \[0, 0, 50, 50\] is not inside"),
        ({"boxes": [{"name": "dog", "box": [0.5, 0, 0.2, 1]}]}, "not inside"),
        ({"size": [0, 3]}, "size"),
        ({"colour": 1}, "colour: unknown field"),
    ],
)
def test_descriptions_are_checked(change, field):
    with pytest.raises(RecordError, match=field):
        described_picture({"image": "a.png", "captions": ["x"], **change}, "picture 0")


def test_what_the_teacher_is_shown():
    entry = {"image": "a.png", "captions": ["One."], "boxes": [{"name": "dog", "box": [0.1, 0, 1, 1]}]}
    picture = described_picture(entry, "picture 0")
    for kind in KINDS:
        asked = messages(kind, picture)
        assert [turn["role"] for turn in asked] == ["system", *["user", "assistant"] * len(EXAMPLES[kind]), "user"]
        assert ("dog: [0.100, 0.000, 1.000, 1.000]" in asked[-1]["content"]) == (kind != CONVERSATION)
        for example in EXAMPLES[kind]:  # the examples are replies that would be taken
            assert rounds_of(kind, example.reply, "?")


@pytest.mark.parametrize(
    ("kind", "reply", "reason"),
    [
        (CONVERSATION, "There are two dogs.", "not in the form"),
        (CONVERSATION, "Sure!\n" + DIALOGUE, "not in the form"),
        (REASONING, DIALOGUE, "has 2 questions"),
        (CONVERSATION, "Question:\n\n===\nAnswer:\nTwo.\n===", "empty"),
        (DESCRIPTION, "As the captions say, two dogs.", "'captions'"),
        (REASONING, "Question:\nWhy?\n===\nAnswer:\nThe bounding boxes overlap.\n===", "'bounding boxes'"),
        (DESCRIPTION, "An <image> of dogs.", "placeholder <image>"),
    ],
)
def test_replies_that_cannot_be_used(kind, reply, reason):
    with pytest.raises(ReplyError, match=reason):
        rounds_of(kind, reply, "Describe.")


def test_rounds_of_good_replies():
    assert rounds_of(CONVERSATION, DIALOGUE, "?") == [("How many dogs?", "Two."), ("Where?", "On a pier.")]
    assert rounds_of(REASONING, REASONED, "?") == [("Why so wet?", "It rains.\n\nSo the boards are wet.")]
    assert rounds_of(DESCRIPTION, "A pier.", "Describe.") == [("Describe.", "A pier.")]


def test_shares_of_kinds():
    assert parse_kinds("reasoning=0.5,conversation=1") == {"reasoning": 0.5, "conversation": 1.0}
    for text, message in (("poem=1", "'poem'"), ("reasoning", "KIND=SHARE"), ("reasoning=2", "at most 1")):
        with pytest.raises(UserError, match=message):
            parse_kinds(text)


def test_coco_annotations(tmp_path):
    images = [{"id": 7, "file_name": "7.jpg", "width": 100, "height": 50}, {"id": 8, "file_name": "8.jpg"}]
    images[1] |= {"width": 10, "height": 10}
    captions = [{"image_id": 7, "caption": "A dog."}, {"image_id": 7, "caption": "A pet."}]
    boxes = [{"image_id": 7, "category_id": 18, "bbox": [10, 5, 40, 20]}]
    said = write_json(tmp_path / "captions.json", {"images": images, "annotations": captions})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 18, "name": "dog"}]}
    (entry,) = read_coco(said, write_json(tmp_path / "instances.json", content))
    words = described_picture(entry["picture"], "x").in_words(with_boxes=True)
    assert words == "A dog.\nA pet.\n\ndog: [0.100, 0.100, 0.500, 0.500]"
    write_png(tmp_path / "7.jpg", 100, 50)
    line = ["--coco-captions", str(said), "--coco-instances", str(tmp_path / "instances.json"), "--root", str(tmp_path)]
    with stub_teacher(reply_to) as stub:
        line += ["--output", str(tmp_path / "out"), "--teacher", stub.url, "--model", "stub"]
        assert main([*line, "--kinds", "conversation=1"]) == 0
    (record,) = json.loads((tmp_path / "out" / "records.json").read_text())
    assert (record["image"], len(record["conversations"])) == ("7.jpg", 4)
    del boxes[0]["category_id"]
    with pytest.raises(UserError, match=r"annotations\[0\] has no 'category_id'"):
        list(read_coco(said, write_json(tmp_path / "instances.json", content)))


@pytest.mark.slow
def test_instructions_become_records(tmp_path, capsys):
    write_pictures(tmp_path, 3)
    with stub_teacher(reply_to) as stub:
        assert main(command(tmp_path, stub.url, "--kinds", "conversation=1,description=1,reasoning=1")) == 0
    assert len(stub.asked) == 9 and "3 pictures, 3 conversation, 3 description, 3 reasoning, 0 rejected" in (
        capsys.readouterr().out
    )
    records = {record["id"]: record for record in json.loads((tmp_path / "out" / "records.json").read_text())}
    first = records["1-conversation"]["conversations"]
    assert [turn["value"] for turn in first] == ["<image>\nHow many dogs?", "Two.", "Where?", "On a pier."]
    question, answer = records["2-description"]["conversations"]
    assert (
        question["value"].removeprefix("<image>\n") in DESCRIBE_IN_DETAIL and answer["value"] == "A pier.\n\nTwo dogs."
    )
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["teacher"]["model"] == "stub" and recipe["counts"]["pictures"] == 3
    made = ["records", "--json", str(tmp_path / "out" / "records.json"), "--root", str(tmp_path / "images")]
    assert build([*made, "--output", str(tmp_path / "built")]) == 0
    assert load_manifest(tmp_path / "built").counts["records"] == 9


@pytest.mark.slow
def test_a_teacher_that_goes_away_leaves_what_it_wrote(tmp_path, capsys):
    """70 pictures are three parts; the teacher fails in the second one, and the same command goes on there."""
    write_pictures(tmp_path, 70)
    left = [40]

    def failing(asked):
        left[0] -= 1
        return DIALOGUE if left[0] >= 0 else 401

    arguments = ("--kinds", "conversation=1", "--requests", "1")
    with stub_teacher(failing) as stub:
        line = command(tmp_path, stub.url, *arguments)
        assert main(line) == 2 and "401" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        left[0], before = 70, len(stub.asked)
        assert main(line) == 0
        assert len(stub.asked) - before == 70 - 32
    assert len(json.loads((tmp_path / "out" / "records.json").read_text())) == 70


@pytest.mark.slow
def test_what_cannot_be_used_is_counted_and_named(tmp_path, capsys):
    """Of ten pictures one is missing, one is described badly, and one gets a reply in another form."""
    write_pictures(tmp_path, 10)
    (tmp_path / "images" / "2.png").unlink()
    lines = (tmp_path / "pictures.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("captions", "capitons")
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))

    def reply(asked):
        return "Two dogs." if "Dog 6." in asked[-1]["content"] else DIALOGUE

    with stub_teacher(reply) as stub:
        line = command(tmp_path, stub.url, "--kinds", "conversation=1")
        assert main(line) == 2
        said = capsys.readouterr().err
        assert "3 of 10 instructions rejected (30.0%)" in said and not (tmp_path / "out").exists()
        assert main([*line, "--max-bad-fraction", "0.3"]) == 0
    rejects = [json.loads(reject) for reject in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["place"], reject["category"]) for reject in rejects] == [
        (2, "missing media"),
        (4, "format"),
        (6, "reply"),
    ]
    assert "capitons: unknown field" in rejects[1]["reason"]


def test_bad_commands(tmp_path, capsys):
    write_pictures(tmp_path, 1)
    url = "http://localhost:1/v1"
    for change, message in (
        (["--kinds", "poem=1"], "'poem' is unknown"),
        (["--teacher", "localhost"], "must be a URL"),
        (["--requests", "0"], "requests 0"),
        (["--root", str(tmp_path / "none")], "is not a folder"),
        (["--coco-instances", "a.json"], "goes with --coco-captions"),
        (["--max-bad-fraction", "2"], "max_bad_fraction is 2"),
    ):
        assert main(command(tmp_path, url, *change)) == 2
        assert message in capsys.readouterr().err
