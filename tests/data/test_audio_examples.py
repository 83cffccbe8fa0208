"""Records with sound to examples, packed rows and batches."""

from collections import Counter

import numpy as np
import pytest

from tests.data.media import SIDE, TOKENS_PER_TILE, build, context, talk, tone, write_png, write_wav
from vita_jax.data.audio import AudioConfig, AudioContext, clip_features
from vita_jax.data.examples import Limits, media_from_file, prompt_example, training_example
from vita_jax.data.lanes import Reading
from vita_jax.data.loader import SourceConfig, format_batch, make_loader
from vita_jax.data.prompts import STATE_LABELS
from vita_jax.data.records import Media, Record, RecordError, validate_record
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import audio_tokens

HEARING = AudioContext(AudioConfig(), audio_tokens)
FRAMES = 80
SLOT = audio_tokens(FRAMES)
SIZES = {"batch_size": 2, "row_length": 150, "row_tiles": 4, "row_clips": 3, "clip_frames": FRAMES, "seed": 3}


@pytest.fixture(scope="module")
def ctx(own_tokenizer):
    return context(own_tokenizer, audio=HEARING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips of different lengths and pitches, two pictures."""
    root = tmp_path_factory.mktemp("sound")
    for number, seconds in enumerate((0.3, 0.5, 0.75)):
        write_wav(root / f"{number}.wav", tone(seconds, frequency=200.0 * (number + 1)))
    write_png(root / "square.png", 16, 16, 2)
    write_png(root / "wide.png", 40, 20, 1)
    return root


def sound(root, number):
    return media_from_file(root / f"{number}.wav", "audio")


def record(*texts, media=(), **fields):
    return Record(id="r", conversations=tuple(talk(*texts)), media=tuple(media), **fields)


def mixed(count):
    """Spoken questions alone, after a picture and between typed ones, sounds that are not for the model, text."""
    shapes = [
        {"audio": "0.wav", "conversations": talk("<audio>", "Zero {i}.")},
        {
            "image": "square.png",
            "audio": ["1.wav"],
            "conversations": talk("<image>\n<audio>", "Two {i}.", "So?", "{i}"),
        },
        {"image": "wide.png", "conversations": talk("<image>\nWhat?", "Three {i}.")},
        {"audio": ["2.wav", "0.wav"], "conversations": talk("Hi", "Yo {i}", "<audio>", "Two {i}.", "<audio>", "No.")},
        {"conversations": talk("How many?", "There are {i} digits.")},
        {"audio": "1.wav", "inserted_id": 1, "conversations": talk("<audio>", "Not for me {i}.")},
    ]
    shapes[3]["inserted_id"] = 5
    records = []
    for i in range(count):
        shape = shapes[i % len(shapes)]
        turns = [{**turn, "value": turn["value"].replace("{i}", str(i))} for turn in shape["conversations"]]
        records.append({"id": str(i), **shape, "conversations": turns})
    return records


def used(example):
    return example["feature_index"][example["feature_index"] >= 0]


def test_clips_follow_the_tiles(ctx, folder):
    picture = media_from_file(folder / "square.png", "image")
    example = training_example(record("<image>\n<audio>", "Hm.", media=[picture, sound(folder, 1)]), ctx)
    clip = clip_features(folder / "1.wav", HEARING)
    assert example["audio"].shape == (1, 48, 80) and example["audio_lengths"].tolist() == [48]
    np.testing.assert_array_equal(example["audio"][0], clip.features)
    assert used(example).tolist() == list(range(TOKENS_PER_TILE + clip.num_tokens))
    assert "state_labels" not in example
    answer = ctx.tokenizer.decode([int(i) for i in example["labels"] if i >= 0])
    assert answer == "☞Hm.<|im_end|>"


def test_limits_decide_the_slots(ctx, folder):
    limits = Limits(150, 4, 3, FRAMES)
    two = record("<audio><audio>", "Hm.", media=[sound(folder, 1), sound(folder, 0)])
    example = training_example(two, ctx, limits=limits)
    assert example["audio"].shape == (2, FRAMES, 80) and example["audio_lengths"].tolist() == [48, 28]
    assert not example["audio"][0, 48:].any()
    first, second = audio_tokens(48), audio_tokens(28)
    assert used(example).tolist() == [*range(first), *range(SLOT, SLOT + second)]
    for limits, message, category in (
        (Limits(150, 4, 1, FRAMES), "needs 2 clips of sound, row_clips is 1", "too many clips"),
        (Limits(150, 4, 2, 40), "sound of 48 frames of 10 ms, clip_frames is 40", "sound too long"),
        (Limits(150, 4), "needs 2 clips of sound, row_clips is 0", "too many clips"),
    ):
        with pytest.raises(RecordError, match=message) as caught:
            training_example(two, ctx, limits=limits)
        assert caught.value.category == category
    text = training_example(record("Hi", "Yo"), ctx, limits=Limits(150, 4, 1, FRAMES))
    assert text["audio"].shape == (0, FRAMES, 80) and text["audio_lengths"].shape == (0,)
    assert "audio" not in training_example(record("Hi", "Yo"), ctx, limits=Limits(150, 4))


def test_the_same_sound_has_one_slot(ctx, folder):
    same = sound(folder, 0)
    example = training_example(record("<audio>", "a", "<audio>", "b", media=[same, same]), ctx)
    assert len(example["audio"]) == 1 and Counter(used(example).tolist()) == Counter([*range(audio_tokens(28))] * 2)


def test_what_is_not_sound_or_cannot_be_heard(ctx, own_tokenizer, folder):
    broken = record("<audio>", "a", media=[Media("audio", "b.wav", b"no sound at all, only text")])
    with pytest.raises(RecordError, match="b.wav: not a sound file") as caught:
        training_example(broken, ctx)
    assert caught.value.category == "damaged media"
    deaf = context(own_tokenizer)
    with pytest.raises(RecordError, match="does not hear") as caught:
        training_example(record("<audio>", "a", media=[sound(folder, 0)]), deaf)
    assert caught.value.category == "unsupported audio"
    with pytest.raises(UserError, match="^[^:]*0.wav: this model does not hear"):
        prompt_example("", [sound(folder, 0)], deaf)


@pytest.mark.parametrize("end_tag", [True, False])
def test_inserted_id_and_end_tag(ctx, folder, end_tag):
    heard = record("<audio>", "One.", "<audio>", "Not me.", media=[sound(folder, 0), sound(folder, 1)],
                   inserted_id=3, end_tag=end_tag)  # fmt: skip
    for split in (False, True):
        labels = training_example(heard, ctx, split_rounds=split)["labels"]
        text = ctx.tokenizer.decode([int(i) for i in labels if i >= 0])
        assert text == "☞One.<|im_end|>☟Not me." + ("<|im_end|>" if end_tag else "")


def test_rounds_apart_keep_their_sounds(ctx, folder):
    """A spoken question is heard in its own round only; the picture in all."""
    media = [media_from_file(folder / "square.png", "image"), sound(folder, 2), sound(folder, 0)]
    example = training_example(
        record("<image>\n<audio>", "a", "Typed?", "b", "<audio>", "c", media=media), ctx, split_rounds=True
    )
    start, slot = TOKENS_PER_TILE, audio_tokens(73)
    clips = [list(range(start, start + slot)), [], list(range(start + slot, start + slot + audio_tokens(28)))]
    for segment, clip in enumerate(clips, start=1):
        index = example["feature_index"][example["segment_ids"] == segment]
        assert index[index >= 0].tolist() == [*range(start), *clip]


def test_state_labels_before_the_answers(own_tokenizer, folder):
    ctx = context(own_tokenizer, audio=HEARING, state_labels="answer")
    media = [sound(folder, 0), sound(folder, 1)]
    heard = record("<audio>", "One.", "Typed?", "Two.", "<audio>", "No.", media=media, inserted_id=5)
    for split in (False, True):
        example = training_example(heard, ctx, split_rounds=split)
        at = np.flatnonzero(example["state_labels"] != -100)
        assert [int(x) for x in example["state_labels"][at]] == [STATE_LABELS[s] for s in ("audio", "text", "noise")]
        assert np.all(example["labels"][at] == -100)
        assert [own_tokenizer.decode([int(i)]) for i in example["labels"][at + 1]] == ["☞", "☜", "☟"]
        # What stands there is the end of the prompt, so a prompt's last hidden state decides.
        prompt = prompt_example("", [sound(folder, 0)], ctx)
        assert np.array_equal(prompt["tokens"][-3:], example["tokens"][at[0] - 2 : at[0] + 1])


def test_state_labels_on_the_sounds(own_tokenizer, folder):
    ctx = context(own_tokenizer, audio=HEARING, state_labels="audio")
    media = [sound(folder, 0), sound(folder, 1)]
    heard = record("<audio>", "One.", "Typed?", "Two.", "<audio>", "No.", media=media, inserted_id=5)
    for split in (False, True):
        example = training_example(heard, ctx, split_rounds=split)
        at = np.flatnonzero(example["state_labels"] != -100)
        assert example["state_labels"][at].tolist() == [STATE_LABELS["audio"], STATE_LABELS["noise"]]
        assert np.all(example["feature_index"][at] >= 0) and np.all(example["feature_index"][at + 1] == -1)
        assert np.all(example["labels"] >= -100)


def test_a_spoken_prompt_is_the_start_of_its_training_example(ctx, folder):
    media = [media_from_file(folder / "square.png", "image"), sound(folder, 1)]
    for question, text in (("", "<image>\n<audio>"), ("Repeat.", "<image>\n<audio>\nRepeat.")):
        prompt = prompt_example(question, media, ctx)
        sample = training_example(record(text, "Hm.", media=media), ctx)
        n = len(prompt["tokens"])
        for key in ("tokens", "positions", "segment_ids", "feature_index"):
            assert np.array_equal(prompt[key], sample[key][:n]), key
        assert np.array_equal(prompt["audio"], sample["audio"])


# ---- rows and batches -----------------------------------------------------------------------------------------------


def contents(batches, slots):
    """Every segment as hashable content, with what is behind each feature index: pixels, or sound and token."""
    found = []
    for batch in batches:
        for row, ids in enumerate(batch["segment_ids"]):
            for segment in range(1, ids.max() + 1):
                at = ids == segment
                behind = []
                for index in batch["feature_index"][row][at]:
                    clip, token = divmod(int(index) - slots * TOKENS_PER_TILE, SLOT)
                    if index >= 0 and clip < 0:
                        tile, place = divmod(int(index), TOKENS_PER_TILE)
                        behind.append((batch["tiles"][row, tile].tobytes(), place))
                    elif index >= 0:
                        length = batch["audio_lengths"][row, clip]
                        assert token < audio_tokens(length)
                        behind.append((batch["audio"][row, clip, :length].tobytes(), token))
                names = ("tokens", "labels", "positions", "state_labels")
                found.append((*(batch[name][row][at].tobytes() for name in names), tuple(behind)))
    return Counter(found)


@pytest.mark.parametrize("split", [False, True])
def test_rows_hold_every_record_once_and_unchanged(own_tokenizer, folder, split):
    ctx, entries = context(own_tokenizer, audio=HEARING, state_labels="answer"), mixed(18)
    path = build(folder, entries, "rows")
    loader = make_loader(
        [SourceConfig(path, split_rounds=split)], ctx, num_epochs=1, drop_remainder=False, reading=Reading(0), **SIZES
    )
    batches = list(loader)
    assert loader.counts.bad == 0
    alone = Counter()
    for entry in entries:
        example = training_example(
            validate_record(entry, folder), ctx, split_rounds=split, limits=Limits(150, 4, 3, FRAMES)
        )
        alone += contents([{key: value[None] for key, value in example.items()}], len(example["tiles"]))
    assert contents(batches, SIZES["row_tiles"]) == alone
    for batch in batches:
        assert batch["audio"].shape == (2, 3, FRAMES, 80) and batch["audio"].dtype == np.float32
        assert batch["audio_lengths"].shape == (2, 3) and batch["audio_lengths"].dtype == np.int32
        padding = batch["segment_ids"] == 0
        assert np.all(batch["state_labels"][padding] == -100) and np.all(batch["labels"][padding] == -100)
        assert not batch["audio"][batch["audio_lengths"] == 0].any()
    assert any(batch["segment_ids"].max() > 1 for batch in batches)
    assert "audio: float32 (2, 3, 80, 80)" in format_batch(batches[0], own_tokenizer)


def test_rows_without_sound_stay_as_they_are(ctx, own_tokenizer, folder):
    """A model that hears, and one that does not, get the same rows where there is no room for sound."""
    path = build(folder, [entry for entry in mixed(12) if "audio" not in entry], "silent")
    sizes = {**SIZES, "row_clips": 0, "clip_frames": 0, "reading": Reading(0)}
    both = [next(make_loader([SourceConfig(path)], c, **sizes)) for c in (ctx, context(own_tokenizer))]
    assert both[0].keys() == both[1].keys() and "audio" not in both[0] and "state_labels" not in both[0]
    for key in both[0]:
        assert np.array_equal(both[0][key], both[1][key])
    assert both[0]["tiles"].shape == (2, 4, SIDE, SIDE, 3)


def test_a_loader_with_sound_continues_exactly(ctx, folder):
    path = build(folder, mixed(18), "resumed")
    whole = make_loader([SourceConfig(path)], ctx, **SIZES)
    for _ in range(3):
        next(whole)
    state = whole.get_state()
    expected = [next(whole) for _ in range(3)]
    again = make_loader([SourceConfig(path)], ctx, **SIZES)
    again.set_state(state)
    for batch in expected:
        other = next(again)
        assert batch.keys() == other.keys()
        assert all(np.array_equal(batch[key], other[key]) for key in batch)
    whole.close()
    again.close()


def test_records_that_do_not_fit_are_counted(ctx, folder):
    path = build(folder, mixed(18), "counted")
    loader = make_loader([SourceConfig(path)], ctx, num_epochs=1, drop_remainder=False, max_bad_fraction=0.9,
                         reading=Reading(0), **{**SIZES, "row_clips": 1, "clip_frames": 40})  # fmt: skip
    list(loader)
    assert loader.counts.reasons == {"too many clips": 3, "sound too long": 6}
    assert "clip_frames is 40" in loader.counts.first["sound too long"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_clips": -1}, "neither may be negative"),
        ({"clip_frames": 5}, "too short for any sound"),
        ({"deaf": True}, "does not hear"),
    ],
)
def test_wrong_settings(ctx, own_tokenizer, folder, changes, message):
    path = build(folder, mixed(2), "settings")
    deaf = changes.pop("deaf", False)
    with pytest.raises(UserError, match=message):
        make_loader([SourceConfig(path)], context(own_tokenizer) if deaf else ctx, **{**SIZES, **changes})
