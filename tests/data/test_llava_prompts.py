"""LLaVA's prompts: where images go, what is supervised, that no text closes a turn; tests/parity has the table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity.adapters.llava_flamingo_text import ByteTokenizer
from vita_jax.data.llava_prompts import (
    ORIGINAL_QUIRKS,
    LlavaPromptOptions,
    encode_conversation,
    encode_prompt,
    prepare,
    render,
)
from vita_jax.data.prompt_tokens import IGNORE, IMAGE_TOKEN
from vita_jax.data.templates import get_template
from vita_jax.errors import UnsupportedOption, UserError

V1, V0, LLAMA_2, PLAIN = (get_template(name) for name in ("vicuna_v1", "llava_v0", "llava_llama_2", "plain"))
TOKENIZER, SYSTEM = ByteTokenizer(), "Be kind."
RECORD = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "A cup."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]
text = st.text(st.sampled_from("ab <>/s:\n#是"), max_size=12)


def encode(record, template=V1, system=SYSTEM, **options):
    return encode_conversation(record, tokenizer=TOKENIZER, template=template, system=system, **options)


def supervised(encoded) -> str:
    return TOKENIZER.decode(encoded.labels[encoded.labels != IGNORE].tolist())


@pytest.mark.parametrize(
    ("template", "prompt", "answers"),
    [
        (
            V1,
            "Be kind. USER: <image>\nWhat is it? ASSISTANT: A cup.</s>USER: Sure? ASSISTANT: Yes.</s>",
            " A cup.</s> Yes.</s>",
        ),
        (
            V0,
            "Be kind.###Human: <image>\nWhat is it?###Assistant: A cup.###Human: Sure?###Assistant: Yes.###",
            " A cup.### Yes.###",
        ),
        (
            LLAMA_2,
            "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cup. </s>"
            "<s>[INST] Sure? [/INST] Yes. </s>",
            " A cup. </s> Yes. </s>",
        ),
    ],
)
def test_answers_are_supervised_with_their_space_and_end(template, prompt, answers):
    encoded = encode(RECORD, template)
    assert encoded.prompt == prompt and supervised(encoded) == answers
    assert TOKENIZER.decode(encoded.input_ids[1:].tolist()) == prompt
    assert encoded.input_ids.tolist().count(IMAGE_TOKEN) == len(encoded.media) == 1


def test_a_prompt_is_the_beginning_of_its_sample():
    whole = encode(RECORD)
    prompt = encode_prompt(RECORD[:3], tokenizer=TOKENIZER, template=V1, system=SYSTEM)
    np.testing.assert_array_equal(whole.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert prompt.prompt.endswith("USER: Sure? ASSISTANT:") and prompt.modality == "image"
    bare = encode_prompt("Hi", tokenizer=TOKENIZER, template=V1)
    assert bare.prompt == "USER: Hi ASSISTANT:" and bare.modality == "lang"
    with pytest.raises(UserError, match="must be from"):
        encode_prompt(RECORD, tokenizer=TOKENIZER, template=V1)


def test_stage_1_has_image_and_caption_only():
    encoded = encode(RECORD[:2], PLAIN, None)
    assert encoded.prompt == "<image>A cup.\n" and supervised(encoded) == "A cup.\n"


def test_images_first_or_in_random_order():
    many = [{"from": "human", "value": "a <image>b<image>"}, *RECORD[1:]]
    assert prepare(many)[0]["value"] == "<image>\n<image>\na b"
    assert prepare(many, ORIGINAL_QUIRKS)[0]["value"] == "<image>\na b"
    assert prepare(many, LlavaPromptOptions(image_markers=True))[0]["value"].startswith("<im_start><image><im_end>\n")
    random = LlavaPromptOptions(image_order="random")
    first = [prepare(RECORD, random, seed)[0]["value"] for seed in range(200)]
    assert set(first) == {"<image>\nWhat is it?", "What is it?\n<image>"}
    assert 70 < sum(value.startswith("<image>") for value in first) < 130
    assert first == [prepare(RECORD, random, seed)[0]["value"] for seed in range(200)]
    later = [*RECORD[:2], {"from": "human", "value": "And <image>"}, RECORD[3]]
    assert {prepare(later, random, seed)[2]["value"] for seed in range(20)} == {"<image>\nAnd"}


@given(question=text, answer=text, template=st.sampled_from([V1, V0, LLAMA_2]))
def test_text_cannot_close_a_turn(question, answer, template):
    encoded = encode([{"from": "human", "value": question}, {"from": "gpt", "value": answer}], template)
    space = " " if template is LLAMA_2 else ""
    assert supervised(encoded) == f" {answer}{space}{template.end_marker}"
    ends = encoded.input_ids.tolist().count(TOKENIZER.eos_id)
    assert ends == (0 if template is V0 else 1) and not encoded.miscounted


def test_the_original_loses_a_sample_whose_answer_opens_a_turn():
    record = [RECORD[0], {"from": "gpt", "value": "He said ASSISTANT: yes."}]
    assert supervised(encode(record)) == " He said ASSISTANT: yes.</s>"
    lost = encode(record, options=ORIGINAL_QUIRKS)
    assert lost.miscounted and supervised(lost) == ""
    with pytest.raises(UnsupportedOption, match="llava_v0"):
        encode(RECORD, V0, options=ORIGINAL_QUIRKS)


def test_what_is_refused():
    with pytest.raises(UserError, match="it holds an image"):
        encode([{"from": "gpt", "value": "<image>"}, *RECORD])
    with pytest.raises(UserError, match="turns must alternate"):
        encode([RECORD[0], RECORD[0]])
    with pytest.raises(UnsupportedOption, match="'nemo'"):
        encode(RECORD, get_template("nemo"))
    assert len(encode([RECORD[2], RECORD[3]], max_length=12).input_ids) == 12
    assert render(RECORD[:1], PLAIN, None, open_turn=True) == "What is it?\n<image>\n"
