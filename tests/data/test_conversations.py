"""Whose prompts a conversation gets, and what LLaVA's do not hold."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.media import context, png_bytes, talk
from tests.parity.adapters.llava_flamingo_text import ByteTokenizer
from vita_jax.data import llava_prompts, prompts
from vita_jax.data.conversations import encode_conversation, encode_prompt, sees_video
from vita_jax.data.examples import prompt_example, training_example
from vita_jax.data.images import ImageConfig
from vita_jax.data.llava_prompts import LlavaPromptOptions
from vita_jax.data.prompts import PromptOptions, stop_ids, stop_text
from vita_jax.data.records import Media, Record
from vita_jax.data.templates import SystemTexts, get_template
from vita_jax.errors import UserError

TURNS = talk("<image>\nWhat is it?", "A cup.")
TEXTS = SystemTexts("Look.", "Watch.", "Reply.")


def encode(turns, template="vicuna_v1", texts=TEXTS, options=LlavaPromptOptions(), **fields):  # noqa: B008 (frozen)
    return encode_conversation(
        turns,
        tokenizer=ByteTokenizer(),
        template=get_template(template),
        system_texts=texts,
        options=options,
        **{"tile_counts": [1], **fields},
    )


def test_the_options_say_whose_prompts_they_are(own_tokenizer):
    kinds = {"tokenizer": own_tokenizer, "template": get_template("qwen2p5_instruct"), "system_texts": TEXTS}
    mine = encode_conversation(TURNS, options=PromptOptions(), tile_counts=[2], **kinds)
    theirs = prompts.encode_conversation(TURNS, tile_counts=[2], **kinds)
    assert mine.prompt == theirs.prompt and "Look." in mine.prompt
    np.testing.assert_array_equal(mine.labels, theirs.labels)
    llava = encode(TURNS)
    assert llava.prompt == "Reply. USER: <image>\nWhat is it? ASSISTANT: A cup.</s>"
    kinds = {"tokenizer": ByteTokenizer(), "template": get_template("vicuna_v1"), "system": "Reply."}
    np.testing.assert_array_equal(llava.labels, llava_prompts.encode_conversation(TURNS, **kinds).labels)
    assert sees_video(PromptOptions()) and not sees_video(LlavaPromptOptions())


def test_an_empty_system_text_is_left_out():
    none = SystemTexts("Look.", "Watch.", "")
    assert encode(TURNS, texts=none).prompt.startswith("USER: <image>")
    assert encode(TURNS, "plain").prompt == "<image>A cup.\n"
    kinds = {"tokenizer": ByteTokenizer(), "template": get_template("vicuna_v1"), "options": LlavaPromptOptions()}
    prompt = encode_prompt(TURNS[:1], system_texts=none, tile_counts=[1], **kinds)
    assert prompt.prompt == "USER: <image>\nWhat is it? ASSISTANT:"


def test_the_random_order_is_the_records_own():
    options = LlavaPromptOptions(image_order="random")
    first = [encode(TURNS, options=options, seed=seed).prompt for seed in range(40)]
    assert len(set(first)) == 2
    ctx = context(ByteTokenizer(), template=get_template("vicuna_v1"), options=options, image=ImageConfig.clip(16))
    media = (Media("image", "a.png", png_bytes(20, 10)),)

    def places(name: str) -> tuple[int, ...]:
        example = training_example(Record(name, tuple(TURNS), media), ctx)
        assert (example["feature_index"] >= 0).sum() == 4
        return tuple(np.flatnonzero(example["feature_index"] == 0))

    found = {name: places(name) for name in map(str, range(20))}
    assert len(set(found.values())) == 2 and found == {name: places(name) for name in found}


@pytest.mark.parametrize(
    ("turns", "counts", "message"),
    [
        (TURNS, [], "1 <image> placeholders, but there are 0 pictures; write one placeholder for each"),
        (TURNS, [1, 1], "1 <image> placeholders, but there are 2 pictures"),
        (talk("What is it?", "A cup."), [1], "0 <image> placeholders, but there are 1 pictures"),
        (TURNS, [3], "picture 0 has 3 tiles, but LLaVA reads a picture as one; set image.tiling to 'crop'"),
        (talk("<video>\nWhat is it?", "A cup."), [], "LLaVA sees no videos"),
    ],
)
def test_what_does_not_fit(turns, counts, message):
    with pytest.raises(UserError, match=message):
        encode(turns, tile_counts=counts)


def test_several_pictures_each_take_their_place():
    ctx = context(
        ByteTokenizer(), template=get_template("vicuna_v1"), options=LlavaPromptOptions(), image=ImageConfig.clip(16)
    )
    media = [Media("image", f"{seed}.png", png_bytes(20, 10, seed)) for seed in range(3)]
    turns = talk("<image>What? <image>", "Two cups.", "And here?\n<image>")
    example = prompt_example(turns, media, ctx)
    assert example["tiles"].shape == (3, 16, 16, 3)
    index = example["feature_index"]
    assert index[index >= 0].tolist() == list(range(12))
    with pytest.raises(UserError, match="3 <image> placeholders, but there are 2 pictures"):
        prompt_example(turns, media[:2], ctx)


def test_markers_must_be_tokens(own_tokenizer):
    with pytest.raises(UserError, match="'vicuna_v1' needs '</s>' as a special token"):
        encode_conversation(
            TURNS,
            tokenizer=own_tokenizer,
            template=get_template("vicuna_v1"),
            system_texts=TEXTS,
            options=LlavaPromptOptions(),
            tile_counts=[1],
        )
    with pytest.raises(UserError, match="needs '<im_start>' as a special token"):
        encode(TURNS, options=LlavaPromptOptions(image_markers=True))


def test_ends_that_are_no_token_are_text(own_tokenizer):
    tokenizer, v1, v0 = ByteTokenizer(), get_template("vicuna_v1"), get_template("llava_v0")
    assert stop_text(tokenizer, v1) is None and stop_ids(tokenizer, v1) == (2,)
    assert stop_text(tokenizer, v0) == "###" and stop_ids(tokenizer, v0) == (2,)
    assert stop_text(own_tokenizer, get_template("qwen2p5_instruct")) is None
    assert encode(TURNS, "llava_v0").prompt.endswith("###Assistant: A cup.###")
