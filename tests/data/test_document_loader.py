"""Batches of documents: rows, mixtures, bad documents, and going on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.records import build_records
from data_pipelines.sources import RecordsFile
from tests.data.batches import assert_equal, batches_of
from tests.data.media import SIDE, write_clip, write_json, write_png
from vita_jax.data.document_examples import DocumentContext
from vita_jax.data.document_loader import (
    format_mixture,
    make_document_loader,
    make_mixture_loader,
    unpack_documents,
)
from vita_jax.data.images import ImageConfig
from vita_jax.data.interleaved import END_OF_CHUNK, IGNORE, IMAGE
from vita_jax.data.lanes import Reading, lanes_of_process, merge_states
from vita_jax.data.loader import SourceConfig
from vita_jax.data.mixture import DataSet
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError

OPTIONS = {"seed": 3, "reading": Reading(0), "max_bad_fraction": 1.0}


@pytest.fixture(scope="module")
def context(own_tokenizer) -> DocumentContext:
    tokenizer = enlarge(own_tokenizer, [], [END_OF_CHUNK, IMAGE]).tokenizer
    return DocumentContext(tokenizer, ImageConfig(image_size=SIDE, max_tiles=1))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, DataSet]:
    """Documents (one in ten without pictures), captioned pictures, clips."""
    folder = tmp_path_factory.mktemp("documents")
    for i in range(3):
        write_png(folder / f"{i}.png", seed=i)
    write_clip(folder / "clip.mp4")

    def page(i: int) -> list:
        shown = [piece for n in range(1 + i % 3) for piece in ({"image": f"{n}.png"}, f"It is {i}.")]
        return ["Text alone."] if i % 10 == 9 else [f"Page {i}.", *shown]

    files = {
        "pages": ("documents", [{"id": str(i), "document": page(i)} for i in range(40)]),
        "pairs": ("pairs", [{"image": f"{i % 3}.png", "caption": f"picture {i}"} for i in range(20)]),
        "clips": ("pairs", [{"video": "clip.mp4", "caption": f"clip {i}"} for i in range(4)]),
    }
    for name, (layout, entries) in files.items():
        source = RecordsFile(write_json(folder / f"{name}.json", entries), folder, layout=layout)
        build_records(source, folder / name)
    size = {"row_length": 64, "max_tokens": 64, "batch_size": 4}
    return {
        "pages": DataSet("pages", (SourceConfig(str(folder / "pages")),), row_images=4, max_images=4, **size),
        "pairs": DataSet("pairs", (SourceConfig(str(folder / "pairs")),), 0.2, kind="pairs", row_images=3, **size),
        "clips": DataSet(
            "clips", (SourceConfig(str(folder / "clips")),), 0.1, kind="pairs", row_images=2, frames=4, **size
        ),
    }


def test_rows_hold_whole_documents_with_their_own_pictures(sets, context):
    data = replace(sets["pages"], drop_single=0.0)
    loader = make_document_loader(data, context, batch_size=4, num_epochs=1, drop_remainder=False, **OPTIONS)
    batches = batches_of(loader)
    assert loader.counts.bad == 4 and loader.counts.reasons == {"no picture": 4}
    documents = 0
    for batch in batches:
        assert batch["tokens"].shape == batch["media_times"].shape == (4, 64)
        assert batch["images"].shape == (4, 4, 1, SIDE, SIDE, 3)
        for row in range(4):
            segments, times = batch["segment_ids"][row], batch["media_times"][row]
            documents += segments.max()
            tags = np.flatnonzero(batch["tokens"][row] == context.tag)
            # The tags of a row are its pictures, one after the other, and each is looked at by its own document.
            assert times[tags].tolist() == list(range(1, len(tags) + 1))
            for segment in range(1, segments.max() + 1):
                own = times[segments == segment]
                assert set(own[own > 0]) == set(times[tags][segments[tags] == segment])
            used = batch["images"][row].any(axis=(1, 2, 3, 4))
            assert used.sum() == len(tags)
            assert np.all(batch["labels"][row][segments == 0] == IGNORE) and np.all(times[segments == 0] == 0)
    assert documents == 36


def test_single_pictures_are_left_out_but_counted(sets, context):
    """So that a run that goes on knows where it was."""
    kept = {}
    for share in (0.0, 1.0):
        data = replace(sets["pages"], drop_single=share)
        loader = make_document_loader(data, context, batch_size=4, num_epochs=1, drop_remainder=False, **OPTIONS)
        kept[share] = sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches_of(loader))
        assert loader.counts.seen == 40
    assert kept == {0.0: 36, 1.0: 36 - 12}


def test_too_many_bad_documents_stop_the_run(sets, context):
    loader = make_document_loader(sets["pages"], context, batch_size=4, **{**OPTIONS, "max_bad_fraction": 0.05})
    with pytest.raises(UserError, match=r"no picture: .*document '\d*9': document: has no picture"):
        batches_of(loader, 30)


def test_a_mixture_has_a_batch_of_every_set(sets, context):
    loader = make_mixture_loader(list(sets.values()), context, **OPTIONS)
    batch = next(loader)
    loader.close()
    assert batch["pages/images"].shape == (4, 4, 1, SIDE, SIDE, 3)
    assert batch["clips/images"].shape == (4, 2, 4, SIDE, SIDE, 3)
    assert batch["pairs/tokens"].dtype == np.int32 and len(batch) == 3 * 6
    text = format_mixture(batch, context.tokenizer, rows=1)
    assert "clips, row 0: " in text and f"[1]{IMAGE}«clip" in text


def test_a_mixture_goes_on_where_it_was(sets, context):
    data = [replace(one, next_picture=0.5 if one.kind == "documents" else 0.0) for one in sets.values()]
    expected = batches_of(make_mixture_loader(data, context, **OPTIONS), 9)
    begun, gone_on = (make_mixture_loader(data, context, **OPTIONS) for _ in range(2))
    head = batches_of(begun, 4)
    gone_on.set_state(json.loads(json.dumps(begun.get_state())))
    assert_equal(head + batches_of(gone_on, 5), expected)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_processes_share_a_mixture(sets, context, before, after):
    def loaders(processes: int):
        return [
            make_mixture_loader(
                list(sets.values()), context, **OPTIONS, lanes=lanes_of_process(2, i, processes), processes=processes
            )
            for i in range(processes)
        ]

    def together(parts, count):
        taken = [batches_of(part, count) for part in parts]
        return [
            {name: np.concatenate([one[name] for one in batch]) for name in batch[0]}
            for batch in zip(*taken, strict=True)
        ]

    expected = batches_of(loaders(1)[0], 5)
    first, second = loaders(before), loaders(after)
    head = together(first, 2)
    state = merge_states([json.loads(json.dumps(loader.get_state())) for loader in first])
    for loader in second:
        loader.set_state(state)
    assert_equal(head + together(second, 3), expected)


def test_states_and_mixtures_that_do_not_fit(sets, context):
    pages, pairs = sets["pages"], sets["pairs"]
    state = make_mixture_loader([pages], context, **OPTIONS).get_state()
    with pytest.raises(UserError, match="came from pages, this run has pages, pairs"):
        make_mixture_loader([pages, pairs], context, **OPTIONS).set_state(state)
    with pytest.raises(UserError, match="data set 'pages' is there 2 times"):
        make_mixture_loader([pages, pages], context, **OPTIONS)
    with pytest.raises(UserError, match="has no data set"):
        make_mixture_loader([], context, **OPTIONS)


def test_pictures_count_through_a_row():
    """Two documents of two and one pictures: the second one's picture is the row's third."""
    columns = np.zeros((1, 6, 4), np.int32)
    columns[0, :, 3] = [0, 1, 2, 0, 1, 0]
    batch = {
        "text": columns,
        "text_segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
        "images": np.zeros((1, 4, 1, 2, 2, 3), np.uint8),
        "images_segment_ids": np.array([[1, 1, 2, 0]]),
    }
    assert unpack_documents(batch)["media_times"].tolist() == [[0, 1, 2, 0, 3, 0]]
