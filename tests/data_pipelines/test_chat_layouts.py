"""Published chats as records: every layout, and what is refused."""

from __future__ import annotations

import json

import pytest

from data_pipelines.build import main
from data_pipelines.chat_layouts import CHAT_LAYOUTS, public_record
from data_pipelines.document_layouts import DOCUMENT_LAYOUTS
from data_pipelines.records import build_records, validate_records
from data_pipelines.sources import SOURCE_LAYOUTS, RecordsFile
from tests.data.media import talk, write_json
from vita_jax.data.records import RecordError
from vita_jax.errors import UserError

CHAT = talk("你好", "Hello!", "And you?", "好。")
PUBLISHED = {
    "messages": {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": turn["value"]} for i, turn in enumerate(CHAT)],
        "model": "any",
    },
    "sharegpt": {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": turn["value"]} for i, turn in enumerate(CHAT)]
    },
}


@pytest.mark.parametrize("layout", sorted(PUBLISHED))
def test_turns_are_kept(layout):
    assert public_record({"id": 7, **PUBLISHED[layout]}, layout, "x") == {"id": 7, "conversations": CHAT}


def test_alpaca_joins_instruction_and_input():
    for more, asked in ((None, "Add."), ("", "Add."), ("1 and 2", "Add.\n1 and 2")):
        entry = {"instruction": "Add.", "input": more, "output": "3"}
        assert public_record(entry, "alpaca", "x") == {"conversations": talk(asked, "3")}


@pytest.mark.parametrize(
    ("layout", "entry", "message"),
    [
        ("messages", [], "must be an object"),
        ("messages", {"messages": "hello"}, "messages: must be a list of turns"),
        ("messages", {"messages": [{"role": "user"}]}, r"messages\[0\]: must be an object with 'role' and 'content'"),
        ("messages", {"messages": [{"role": "system", "content": "Be brief."}]}, "is a system message"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "?"}]}, "is 'alien'; known: user"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "<image>?"}]}, "holds <image>, but chats are text"),
        ("alpaca", {"instruction": "Add.", "output": 3}, "output: must be text"),
        ("alpaca", {"instruction": "Add.", "input": [1], "output": "3"}, "input: must be text, or left out"),
    ],
)
def test_other_shapes_are_refused(layout, entry, message):
    with pytest.raises(RecordError, match=message):
        public_record(entry, layout, "file: record 0")


def test_a_file_of_chats_is_built_and_its_bad_ones_are_counted(tmp_path, capsys):
    good = PUBLISHED["messages"]
    bad = [{"messages": [{"role": "system", "content": "Be brief."}]}, {"messages": good["messages"][:3]}]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in [good, *bad, good]))
    output = tmp_path / "out"
    line = ["records", "--json", str(file), "--layout", "messages", "--output", str(output)]
    assert main([*line, "--max-bad-fraction", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "2 records, 4 rounds" in said and "format: 1, system message: 1" in said
    assert set(SOURCE_LAYOUTS) == {"vita", *CHAT_LAYOUTS, *DOCUMENT_LAYOUTS}
    with pytest.raises(UserError, match="layout 'chat' is unknown"):
        RecordsFile(file, layout="chat")


def test_the_layout_is_an_input(tmp_path):
    file = write_json(tmp_path / "a.json", [PUBLISHED["sharegpt"]])
    public = build_records(RecordsFile(file), tmp_path / "out")
    assert build_records(RecordsFile(file, layout="sharegpt"), tmp_path / "out").options != public.options
    assert validate_records(RecordsFile(file, layout="alpaca")).categories == {"format": 1}
