"""One record to the arrays of one example."""

import dataclasses

import numpy as np
import pytest

from tests.data.media import SIDE, TOKENS_PER_TILE, context, mixed_records, png_bytes, talk, write_clip, write_png
from vita_jax.data.examples import (
    Limits,
    cell_naming_example,
    media_from_file,
    prompt_example,
    rounds_apart,
    training_example,
)
from vita_jax.data.images import dynamic_tiles, open_image
from vita_jax.data.prompts import PromptOptions
from vita_jax.data.records import Media, Record, RecordError, validate_record
from vita_jax.errors import UserError

TEXT_KEYS = ("tokens", "labels", "positions", "segment_ids", "feature_index")


@pytest.fixture(scope="module")
def ctx(own_tokenizer):
    return context(own_tokenizer)


def picture(seed=0, width=SIDE, height=SIDE, **kwargs):
    return Media("image", f"{seed}.png", png_bytes(width, height, seed), **kwargs)


def record(*texts, media=()):
    return Record(id="r", conversations=tuple(talk(*texts)), media=tuple(media))


def segments(example):
    """The example cut into its segments, each a dict of its text arrays."""
    ids = example["segment_ids"]
    return [{k: example[k][ids == s] for k in TEXT_KEYS} for s in range(1, ids.max() + 1)]


def targets(example, tokenizer):
    return tokenizer.decode([int(i) for i in example["labels"] if i != -100])


def check_invariants(example, ctx):
    length = len(example["tokens"])
    for key in TEXT_KEYS:
        assert example[key].shape == (length,) and example[key].dtype == np.int32, key
    assert example["tiles"].dtype == np.uint8 and example["tiles"].shape[1:] == (SIDE, SIDE, 3)
    is_feature = example["feature_index"] >= 0
    assert np.all(example["labels"][is_feature] == -100)
    supervised = example["labels"] != -100
    assert np.array_equal(example["labels"][supervised], example["tokens"][supervised])
    used = example["feature_index"][is_feature]
    assert set(used) == set(range(len(example["tiles"]) * ctx.layout.features_per_slot))
    for segment in segments(example):
        assert np.array_equal(segment["positions"], np.arange(len(segment["tokens"])))


def test_text_only(ctx):
    example = training_example(record("Hi", "It is 3."), ctx)
    check_invariants(example, ctx)
    assert example["tiles"].shape == (0, SIDE, SIDE, 3)
    assert targets(example, ctx.tokenizer) == "☜It is 3.<|im_end|>"


def test_pictures_with_their_own_tile_counts(ctx):
    wide, square = picture(1, 40, 20), picture(2)
    example = training_example(record("<image> or <image>", "Two.", media=[square, wide]), ctx)
    check_invariants(example, ctx)
    assert len(example["tiles"]) == 1 + 3
    assert np.array_equal(example["tiles"][:1], dynamic_tiles(open_image(square.data), ctx.image))
    assert np.array_equal(example["tiles"][1:], dynamic_tiles(open_image(wide.data), ctx.image))
    used = example["feature_index"][example["feature_index"] >= 0]
    assert np.array_equal(used, np.arange(4 * TOKENS_PER_TILE))


def test_every_kind_of_record(ctx, tmp_path):
    for entry in mixed_records(tmp_path, 5):
        for split in (False, True):
            check_invariants(training_example(validate_record(entry, tmp_path), ctx, split_rounds=split), ctx)


def test_video_has_one_tile_per_frame(ctx, tmp_path):
    write_clip(tmp_path / "c.mp4")
    clip = media_from_file(tmp_path / "c.mp4", "video")
    example = training_example(record("<video>\nOrder?", "Up.", media=[clip]), ctx)
    assert len(example["tiles"]) == 4
    brightness = example["tiles"].mean(axis=(1, 2, 3))
    assert np.all(np.diff(brightness) > 0)


def test_pictures_and_video_together(ctx, tmp_path):
    """Media are stored images first; the prompt may have them in any order."""
    write_clip(tmp_path / "c.mp4")
    clip = media_from_file(tmp_path / "c.mp4", "video")
    example = training_example(record("<video> then <image> here", "Ok.", media=[picture(1), clip]), ctx)
    used = example["feature_index"][example["feature_index"] >= 0]
    k = TOKENS_PER_TILE
    assert np.array_equal(used, np.concatenate([np.arange(k, 5 * k), np.arange(k)]))


def test_the_same_file_is_tiled_once(ctx, monkeypatch):
    calls = []
    monkeypatch.setattr("vita_jax.data.examples.open_image", lambda data, name: calls.append(name) or open_image(data))
    same = picture(1, 40, 20)
    example = training_example(record("<image> <image> x", "Same.", media=[same, same]), ctx)
    assert len(calls) == 1 and len(example["tiles"]) == 3
    used = example["feature_index"][example["feature_index"] >= 0]
    assert np.array_equal(used, np.tile(np.arange(3 * TOKENS_PER_TILE), 2))
    calls.clear()
    training_example(record("<image>\na", "1", "b", "2", "c", "3", media=[same]), ctx, split_rounds=True)
    assert len(calls) == 1


def test_rounds_apart_share_tiles_and_equal_single_rounds(ctx):
    """Splitting gives, segment by segment, the arrays of three separate records over one set of tiles."""
    shot = picture(1, 40, 20)
    together = training_example(
        record("<image>\nHow many?", "3.", "Largest?", "9.", "Sum?", "20.", media=[shot]), ctx, split_rounds=True
    )
    check_invariants(together, ctx)
    assert len(together["tiles"]) == 3
    for segment, (question, answer) in zip(
        segments(together), [("How many?", "3."), ("Largest?", "9."), ("Sum?", "20.")], strict=True
    ):
        alone = training_example(record(f"<image>\n{question}", answer, media=[shot]), ctx)
        for key in ("tokens", "labels", "positions", "feature_index"):
            assert np.array_equal(segment[key], alone[key]), key


def test_rounds_apart_show_only_earlier_media():
    rounds = list(rounds_apart(talk("a", "1", "<image>\nb", "2", "<video> c <image>", "3", "d", "4")))
    assert [r[0]["value"] for r in rounds] == [
        "a",
        "<image>\nb",
        "<image>\n<video> c <image>",
        "<image>\n<video>\n<image>\nd",
    ]
    assert [r[1]["value"] for r in rounds] == ["1", "2", "3", "4"]


def test_rounds_apart_use_the_system_text_of_what_they_show(ctx):
    example = training_example(record("a", "1", "<image>\nb", "2", media=[picture(1)]), ctx, split_rounds=True)
    first, second = (ctx.tokenizer.decode(s["tokens"][s["feature_index"] < 0].tolist()) for s in segments(example))
    assert "Reply." in first and "Look." in second


def test_ordinary_conversation_keeps_its_rounds_in_one_segment(ctx):
    example = training_example(record("<image>\na", "1", "b", "2", media=[picture(1)]), ctx)
    check_invariants(example, ctx)
    assert example["segment_ids"].max() == 1
    assert targets(example, ctx.tokenizer) == "☜1<|im_end|>☜2<|im_end|>"


def test_training_continues_the_prompt_of_inference(ctx):
    """A training sample begins with exactly the prompt that chat builds for the same question and picture."""
    shot = picture(1, 40, 20)
    prompt = prompt_example("How many?", [shot], ctx)
    sample = training_example(record("<image>\nHow many?", "3.", media=[shot]), ctx)
    n = len(prompt["tokens"])
    for key in ("tokens", "positions", "segment_ids", "feature_index"):
        assert np.array_equal(prompt[key], sample[key][:n]), key
    assert np.array_equal(prompt["tiles"], sample["tiles"])
    assert np.all(prompt["labels"] == -100) and np.all(sample["labels"][:n] == -100) and sample["labels"][n] != -100


def test_prompt_with_history(ctx):
    turns = talk("<image>\nHow many?", "3.", "Largest?")
    prompt = prompt_example(turns, [picture(1)], ctx)
    sample = training_example(
        Record(id="r", conversations=tuple([*turns, {"from": "gpt", "value": "9."}]), media=(picture(1),)), ctx
    )
    assert np.array_equal(prompt["tokens"], sample["tokens"][: len(prompt["tokens"])])
    with pytest.raises(UserError, match="1 tile_counts"):
        prompt_example(turns, [], ctx)
    with pytest.raises(UserError, match="^x.png: not a picture"):
        prompt_example("What?", [Media("image", "x.png", b"no picture")], ctx)


def test_text_that_is_too_long_for_a_row_may_be_cut(ctx):
    text = record("What?", "A long answer.", "And then?", "Another one.")
    whole = training_example(text, ctx)
    room = len(whole["tokens"]) - 3
    cutting = dataclasses.replace(ctx, cut_text=True)
    cut = training_example(text, cutting, limits=Limits(room, 3))
    for name in ("tokens", "labels", "positions", "segment_ids", "feature_index"):
        np.testing.assert_array_equal(cut[name], whole[name][:room], err_msg=name)
    shown = record("<image>\nWhat?", "A long answer.", media=[picture(1)])
    needed = len(training_example(shown, ctx)["tokens"])
    for refused, rule in ((text, ctx), (shown, cutting)):
        with pytest.raises(RecordError, match="raise row_length or shorten it"):
            training_example(refused, rule, limits=Limits(min(room, needed - 1), 3))
    with pytest.raises(RecordError, match="gives no token to learn from"):
        training_example(text, cutting, limits=Limits(3, 3))


def test_limits_say_which_one(ctx):
    wide = record("<image>\nWhat?", "This.", media=[picture(1, 40, 20)])
    needed = len(training_example(wide, ctx)["tokens"])
    assert len(training_example(wide, ctx, limits=Limits(needed, 3))["tokens"]) == needed
    with pytest.raises(RecordError, match=f"has {needed} positions, row_length is {needed - 1}") as caught:
        training_example(wide, ctx, limits=Limits(needed - 1, 3))
    assert caught.value.category == "too long"
    with pytest.raises(RecordError, match="needs 3 tiles, row_tiles is 2") as caught:
        training_example(wide, ctx, limits=Limits(needed, 2))
    assert caught.value.category == "too many tiles"
    with pytest.raises(UserError, match="row_tiles is 2"):
        prompt_example("What?", [picture(1, 40, 20)], ctx, limits=Limits(1000, 2))


def test_damaged_media_name_the_record(ctx):
    broken = Media("image", "x.png", png_bytes(64, 64)[:200])
    with pytest.raises(RecordError, match="record 'r': image: x.png") as caught:
        training_example(record("<image>", "a", media=[broken]), ctx)
    assert caught.value.category == "damaged media"


def test_untiled_sets_stay_one_tile(ctx):
    shot = picture(1, 40, 20, set="jester")
    assert len(training_example(record("<image>\na", "1", media=[shot]), ctx)["tiles"]) == 1


def test_count_per_sentence_is_refused_where_it_cannot_work(own_tokenizer):
    quirky = context(own_tokenizer, options=PromptOptions(tiles_per="sentence"))
    both = record("<image> or <image> x", "1", media=[picture(1), picture(2, 40, 20)])
    with pytest.raises(RecordError, match="image 1 has 3 tiles but 1 placeholders|tile_counts"):
        training_example(both, quirky)


def test_cell_naming(ctx):
    shot = picture(1, 40, 20)
    names = ["red 7", "-", "blue"] * 4
    example = cell_naming_example(record("<image>\nName the cells.", " | ".join(names), media=[shot]), ctx)
    assert example["tiles"].shape == (3, SIDE, SIDE, 3)
    assert example["cell_names"].shape == (3 * TOKENS_PER_TILE, 8) and example["cell_names"].dtype == np.int32
    for name, ids in zip(names, example["cell_names"], strict=True):
        kept = [int(i) for i in ids if i >= 0]
        assert ctx.tokenizer.decode(kept) == ("" if name == "-" else name)
        assert np.all(ids[len(kept) :] == -1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("<image>", " | ".join(["a"] * 3), media=[picture(1)]), "lists 3 names; 1 tiles of 4 tokens need 4"),
        (record("<image>", "a | b |  | c", media=[picture(1)]), "name '' has 0 tokens"),
        (record("<image>", f"a | b | c | {'一' * 40}", media=[picture(1)]), "expected 1 to 8"),
        (record("<image>", "a | b | c | d", "e", "f", media=[picture(1)]), "2 rounds"),
        (record("What?", "a | b | c | d"), "0 files"),
    ],
)
def test_cell_naming_refuses(ctx, bad, message):
    with pytest.raises(RecordError, match=message.replace("|", r"\|")) as caught:
        cell_naming_example(bad, ctx)
    assert caught.value.category == "cell names"


def test_media_from_file(tmp_path):
    write_png(tmp_path / "a.png")
    assert media_from_file(tmp_path / "a.png", "image").data == (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(b"")
    for path, kind, message in (
        ("none.png", "image", "no such file"),
        ("b.png", "image", "empty"),
        (".", "image", "folder"),
        ("a.png", "sound", "unknown"),
    ):
        with pytest.raises(UserError, match=message):
            media_from_file(tmp_path / path, kind)
