"""From stored records to batches: nothing lost, nothing mixed, everything repeatable."""

import json
from collections import Counter

import numpy as np
import pytest

from tests.data.batches import SIZES, assert_equal, batches_of
from tests.data.media import SIDE, TOKENS_PER_TILE, build, talk, write_png
from vita_jax.data.examples import training_example
from vita_jax.data.lanes import Lanes, Reading
from vita_jax.data.loader import SourceConfig, describe_sources, format_batch, make_loader
from vita_jax.data.packing import _number_segments
from vita_jax.data.records import validate_record
from vita_jax.errors import UserError

TEXT_KEYS = ("tokens", "labels", "positions", "segment_ids", "feature_index")


@pytest.fixture(scope="module")
def text_only(media_root):
    entries = [{"id": f"t{i}", "conversations": talk("How many?", f"There are {i}.")} for i in range(20)]
    return build(media_root, entries, "text")


def unpacked(batches, k=TOKENS_PER_TILE):
    """Every segment as hashable content: what it says, what it is asked, and the pixels it looks at."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            for segment in range(1, ids.max() + 1):
                at = ids == segment
                features = batch["feature_index"][row][at]
                slots = features[features >= 0]
                pixels = b"".join(batch["tiles"][row, i // k].tobytes() + bytes([i % k]) for i in slots)
                found.append(
                    (
                        batch["tokens"][row][at].tobytes(),
                        batch["labels"][row][at].tobytes(),
                        batch["positions"][row][at].tobytes(),
                        (features >= 0).tobytes(),
                        pixels,
                    )
                )
    return Counter(found)


def separate(entries, root, ctx, split):
    """The same, made without packing."""
    rows = []
    for entry in entries:
        example = training_example(validate_record(entry, root), ctx, split_rounds=split)
        rows.append({key: value[None] for key, value in example.items()})
    return unpacked(rows)


@pytest.mark.parametrize("split", [False, True])
def test_one_epoch_holds_every_record_once_and_unchanged(mixed, media_root, ctx, split):
    """Packed content equals separate content: ids, labels, positions, and the pixels behind every feature index."""
    folder, entries = mixed
    loader = make_loader([SourceConfig(folder, split_rounds=split)], ctx, num_epochs=1, drop_remainder=False, **SIZES)
    batches = batches_of(loader)
    loader.close()
    assert unpacked(batches) == separate(entries, media_root, ctx, split)
    assert loader.counts.seen == 35 and loader.counts.bad == 0


def test_shapes_padding_and_density(mixed, ctx):
    loader = make_loader([SourceConfig(mixed[0])], ctx, num_epochs=1, drop_remainder=False, **SIZES)
    batches = batches_of(loader)
    for batch in batches:
        for key in TEXT_KEYS:
            assert batch[key].shape == (2, 160) and batch[key].dtype == np.int32
        assert batch["tiles"].shape == (2, 6, SIDE, SIDE, 3) and batch["tiles"].dtype == np.uint8
        padding = batch["segment_ids"] == 0
        assert np.all(batch["tokens"][padding] == 0) and np.all(batch["labels"][padding] == -100)
        assert np.all(batch["feature_index"][padding] == -1) and np.all(batch["positions"][padding] == 0)
        assert batch["feature_index"].max() < 6 * TOKENS_PER_TILE
        for row in batch["segment_ids"]:  # numbered 1, 2, ... without gaps, padding last
            used = row[: np.count_nonzero(row)]
            assert np.all(used > 0) and np.all(np.isin(np.diff(used), (0, 1))) and (not len(used) or used[0] == 1)
    assert any(batch["segment_ids"].max() > 1 for batch in batches)


def test_equal_settings_give_equal_batches_whatever_the_threads(mixed, ctx):
    sources = [SourceConfig(mixed[0])]
    first = batches_of(make_loader(sources, ctx, **SIZES), 12)
    assert_equal(
        first, batches_of(make_loader(sources, ctx, **{**SIZES, "reading": Reading(0)}, prefetch_batches=0), 12)
    )
    other = batches_of(make_loader(sources, ctx, **{**SIZES, "seed": 4}), 1)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_epochs_are_shuffled_differently(text_only, ctx):
    def order(epochs):
        loader = make_loader(
            [SourceConfig(text_only)],
            ctx,
            num_epochs=epochs,
            packing_bins=1,
            batch_size=1,
            row_length=48,
            row_tiles=0,
            seed=0,
        )
        return [batch["tokens"].tobytes() for batch in loader]

    once, twice = order(1), order(2)
    assert len(once) == 20 and twice[:20] == once
    assert sorted(twice[20:]) == sorted(once) and twice[20:] != once


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_interrupted_equals_uninterrupted(mixed, ctx, stop, prefetch):
    """Bit for bit, across epochs, through JSON, and with bad records on the way."""
    settings = {**SIZES, "row_tiles": 3, "max_bad_fraction": 1.0, "prefetch_batches": prefetch}
    sources = [SourceConfig(mixed[0], split_rounds=True)]
    whole = make_loader(sources, ctx, **settings)
    expected = batches_of(whole, 16)
    first = make_loader(sources, ctx, **settings)
    head = batches_of(first, stop) if stop else []
    state = json.loads(json.dumps(first.get_state()))
    batches_of(first, 3)  # what happens after the state was taken must not matter
    second = make_loader(sources, ctx, **settings)
    second.set_state(state)
    assert_equal(head + batches_of(second, 16 - stop), expected)
    assert second.counts.bad > 0
    if not prefetch:  # without prefetch the counts belong to exactly this batch
        assert second.counts == whole.counts
    first.set_state(state)  # rewinding the same loader works too
    assert_equal(batches_of(first, 16 - stop), expected[stop:])


def test_sources_are_concatenated_or_weighted(mixed, text_only, ctx):
    def shares(sources, count, **settings):
        sizes = {"packing_bins": 1, "batch_size": 1, "row_length": 160, "row_tiles": 6, "seed": 0}
        loader = make_loader(sources, ctx, **sizes, **settings)
        found = Counter()
        for batch in batches_of(loader, count):
            ids = batch["segment_ids"][0]
            for segment in range(1, ids.max() + 1):
                found[bool(np.any(batch["feature_index"][0][ids == segment] >= 0))] += 1
        loader.close()
        return found

    both = [SourceConfig(mixed[0]), SourceConfig(text_only)]
    assert shares(both, None, num_epochs=1) == {True: 28, False: 27}
    only_text = SourceConfig(text_only, weight=9.0)
    weighted = shares([SourceConfig(mixed[0], weight=1.0), only_text], 200)
    assert weighted[True] / weighted.total() == pytest.approx(0.1 * 28 / 35, abs=0.03)


def test_ratio_takes_a_seeded_share(text_only, ctx):
    def taken(seed, ratio=0.35):
        loader = make_loader(
            [SourceConfig(text_only, ratio=ratio)],
            ctx,
            num_epochs=1,
            drop_remainder=False,
            batch_size=1,
            row_length=48,
            row_tiles=0,
            seed=seed,
        )
        return unpacked(batches_of(loader))

    assert taken(0).total() == 7 and max(taken(0).values()) == 1
    assert taken(0) == taken(0) and taken(0) != taken(1)
    assert taken(0, 0.001).total() == 1


def test_hosts_share_an_epoch(mixed, media_root, ctx):
    folder, entries = mixed
    parts = [
        unpacked(
            batches_of(
                make_loader(
                    [SourceConfig(folder)],
                    ctx,
                    num_epochs=1,
                    drop_remainder=False,
                    lanes=Lanes(3, (i,)),
                    **SIZES,
                )
            )
        )
        for i in range(3)
    ]
    assert parts[0] + parts[1] + parts[2] == separate(entries, media_root, ctx, False)
    assert [part.total() for part in parts] == [12, 12, 11]


def test_text_only_rows_need_no_tiles(text_only, ctx):
    batch = next(make_loader([SourceConfig(text_only)], ctx, batch_size=3, row_length=64, row_tiles=0, seed=0))
    assert batch["tiles"].shape == (3, 0, SIDE, SIDE, 3)
    batch = next(make_loader([SourceConfig(text_only)], ctx, batch_size=3, row_length=64, row_tiles=2, seed=0))
    assert batch["tiles"].shape == (3, 2, SIDE, SIDE, 3) and not batch["tiles"].any()


def test_bad_records_are_counted_and_left_out(mixed, ctx):
    """Two pictures of 1 + 3 tiles and 4 video frames do not fit into 3 slots."""
    loader = make_loader(
        [SourceConfig(mixed[0])],
        ctx,
        num_epochs=1,
        max_bad_fraction=0.5,
        drop_remainder=False,
        **{**SIZES, "row_tiles": 3},
    )
    batches_of(loader)
    counts = loader.counts
    assert (counts.seen, counts.bad, counts.reasons) == (35, 14, {"too many tiles": 14})
    assert "row_tiles is 3" in counts.first["too many tiles"] and mixed[0] in counts.first["too many tiles"]


def test_too_many_bad_records_are_an_error(mixed, ctx):
    loader = make_loader([SourceConfig(mixed[0])], ctx, max_bad_fraction=0.1, **{**SIZES, "row_tiles": 3})
    with pytest.raises(UserError, match=r"4 of the first \d+ records cannot be used \(too many tiles: 4\)") as caught:
        batches_of(loader, 50)
    assert "max_bad_fraction 0.1" in str(caught.value) and "\n" not in str(caught.value)
    hopeless = make_loader([SourceConfig(mixed[0])], ctx, **{**SIZES, "row_length": 5})
    with pytest.raises(UserError, match="row_length is 5"):
        next(hopeless)


def test_an_epoch_below_one_batch_is_an_error(text_only, ctx):
    sizes = {"batch_size": 50, "row_length": 64, "row_tiles": 0, "seed": 0}
    with pytest.raises(UserError, match="20 records do not fill one batch"):
        next(make_loader([SourceConfig(text_only)], ctx, num_epochs=1, **sizes))
    batch = next(make_loader([SourceConfig(text_only)], ctx, num_epochs=1, drop_remainder=False, **sizes))
    assert batch["tokens"].shape == (50, 64) and not batch["segment_ids"][-1].any()
    assert np.all(batch["labels"][-1] == -100) and np.all(batch["feature_index"][-1] == -1)


def test_cell_naming_batches(media_root, ctx):
    write_png(media_root / "cells.png", 40, 20, 5)
    names = [f"{i} | - | blue | red" for i in range(9)]
    entries = [
        {"id": str(i), "image": "cells.png", "conversations": talk("<image>", " | ".join([name] * 3))}
        for i, name in enumerate(names)
    ]
    loader = make_loader(
        [SourceConfig(build(media_root, entries, "cells"))],
        ctx,
        objective="cell_naming",
        num_epochs=1,
        drop_remainder=False,
        **{**SIZES, "row_tiles": 7},
    )
    batches = batches_of(loader)
    found = []
    for batch in batches:
        assert batch["tiles"].shape == (2, 7, SIDE, SIDE, 3)
        assert batch["cell_names"].shape == (2, 7 * TOKENS_PER_TILE, 8) and batch["cell_names"].dtype == np.int32
        for row in batch["cell_names"]:
            words = [ctx.tokenizer.decode([int(i) for i in ids if i >= 0]) for ids in row]
            found += [words[i : i + 12] for i in range(0, 24, 12) if any(words[i : i + 12])]
            assert np.all(row[24:] == -1)
    assert sorted(found) == [[str(i), "", "blue", "red"] * 3 for i in range(9)]
    assert "named cells" in format_batch(batches[0], ctx.tokenizer)


def test_format_batch_shows_targets_and_features(mixed, ctx):
    loader = make_loader([SourceConfig(mixed[0])], ctx, **SIZES)
    text = format_batch(next(loader), ctx.tokenizer, rows=2)
    assert "«☜" in text and "features 0.." in text and "<|im_end|>»" in text
    assert "tiles: uint8 (2, 6, 16, 16, 3)" in text


def test_describe_sources(mixed):
    line = describe_sources([SourceConfig(mixed[0], ratio=0.5, split_rounds=True)])[0]
    assert line == "mixed: 35 records, 49 rounds, 28 images, 7 videos, 7 text only; ratio 0.5; rounds apart"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"row_tiles": -1}, "row_tiles is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction is 2.0"),
        ({"objective": "cells"}, "objective 'cells' is unknown"),
        ({"lanes": Lanes(100, (7,))}, "35 records cannot be shared"),
        ({"lanes": Lanes(4, (0, 1, 2))}, "batch_size 2 cannot be shared by 3 lanes"),
    ],
)
def test_wrong_settings(mixed, ctx, changes, message):
    with pytest.raises(UserError, match=message):
        make_loader([SourceConfig(mixed[0])], ctx, **{**SIZES, **changes})


def test_wrong_sources(mixed, text_only, ctx, tmp_path):
    with pytest.raises(UserError, match="no data sources"):
        make_loader([], ctx, **SIZES)
    with pytest.raises(UserError, match="holds no records"):
        make_loader([SourceConfig(str(tmp_path))], ctx, **SIZES)
    with pytest.raises(UserError, match="to every source or to none"):
        make_loader([SourceConfig(mixed[0], weight=1.0), SourceConfig(text_only)], ctx, **SIZES)
    with pytest.raises(UserError, match="have no epochs"):
        make_loader([SourceConfig(mixed[0], weight=1.0)], ctx, num_epochs=1, **SIZES)
    for bad in ({"ratio": 0.0}, {"ratio": 1.5}, {"weight": 0.0}):
        with pytest.raises(UserError, match="it must be"):
            SourceConfig(mixed[0], **bad)


def test_damaged_shard_is_named(tmp_path, ctx):
    folder = build(tmp_path, [{"conversations": talk("Hi", "Yo")}])
    shard = next((tmp_path / "data").glob("*.array_record"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="build the data again"):
        make_loader([SourceConfig(folder)], ctx, **SIZES)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        make_loader([SourceConfig(folder)], ctx, **SIZES)


def test_number_segments():
    example = np.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    local = np.array([[1, 1, 2, 1, 1, 1, 0, 0]])
    assert _number_segments(example, local).tolist() == [[1, 1, 2, 3, 3, 4, 0, 0]]
