"""LLaVA's two stages: what trains and what stays, bit for bit; going on after a kill; measured and talked to."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.evaluation.benchmark_run import write_benchmark
from tests.training.llava import llava_config, llava_experiment, llava_records, resampled_config
from tests.training.records import prepare_records
from tests.training.test_flops import LENGTH, ROWS, VOCAB, gradient_products, of_kernels
from tests.training.test_loop import Killed, assert_same_run, interrupted, run
from tests.training.tiny import Batches, make_batch, stage
from vita_jax.data.examples import prompt_example, training_example
from vita_jax.data.records import Media, Record, RecordError
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import answer_items
from vita_jax.evaluation.items import Item
from vita_jax.evaluation.runner import evaluate_params
from vita_jax.inference.duplex import Duplex
from vita_jax.inference.session import Session
from vita_jax.models.lora import LoraConfig, detach
from vita_jax.parallel.rules import unbox
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.experiment import data_folder, example_context, tokenizer_folder
from vita_jax.training.families import make_model
from vita_jax.training.flops import stage_flops
from vita_jax.training.metrics import read_metrics
from vita_jax.training.objectives import init_model
from vita_jax.training.stages import flatten

STAGES = ("alignment", "tuning")


class OneBatch(Batches):
    """The first batch again and again."""

    def __next__(self):
        self.position = 0
        return super().__next__()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("llava")
    run(llava_experiment(run_dir))
    return run_dir


def saved(run_dir: Path, stage_name: str) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(load_params(checkpoint_folder(run_dir, stage_name)).params))


def test_only_the_projector_is_aligned_and_the_tower_never_changes(finished):
    alignment, tuning = (saved(finished, name) for name in STAGES)
    assert {path.split("/")[0] for path in alignment} == {"vision", "projector", "language"}
    drawn = jax.jit(lambda key: init_model(make_model(llava_config()), key))(jax.random.fold_in(jax.random.key(0), 0))
    start = flatten(unbox(drawn))
    for path, value in alignment.items():
        unchanged = np.asarray(start[path]).tobytes() == value.tobytes()
        assert unchanged == (not path.startswith("projector/")), path
        assert (tuning[path].tobytes() == value.tobytes()) == path.startswith("vision/"), path
    assert load_params(finished).config == llava_experiment(finished)


def test_the_loss_falls_in_both_stages(tmp_path):
    def batches(config, own):
        return OneBatch(0, own.batch_size, own.row_length, own.row_tiles)

    config = llava_experiment(tmp_path)
    stages = tuple(dataclasses.replace(own, steps=30, learning_rate=2e-2) for own in config.stages)
    run(dataclasses.replace(config, stages=stages), batches)
    records = [r for r in read_metrics(tmp_path) if r["event"] == "step"]
    alignment, tuning = ([r["loss"] for r in records if r["stage"] == name] for name in STAGES)
    assert alignment[-1] < alignment[0] - 0.03  # of one layer that looks through a frozen model
    assert tuning[-1] < 0.5 * tuning[0]


def test_killed_and_started_again_is_the_uninterrupted_run(finished, tmp_path):
    def die():
        raise Killed

    config = llava_experiment(tmp_path)
    with pytest.raises(Killed):
        run(config, interrupted("tuning", 5, die))
    assert "going on from step 4" in run(config)
    assert_same_run(tmp_path, finished, STAGES)


@pytest.mark.parametrize("trainable", [(".",), ("^projector/",), ("^projector/", "^language/")])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_flops_are_the_products_of_the_gradient(trainable, projector):
    own = stage("s", trainable=trainable, batch_size=ROWS, row_length=LENGTH)
    config = llava_experiment("unused", stages=(own,), model=llava_config(projector=projector))
    # The head is computed again in the backward pass, which is no model FLOPs.
    again = 2 * config.model.language.hidden_size * VOCAB * ROWS * LENGTH
    counted = of_kernels(stage_flops(config, own).parts) + again
    assert counted == gradient_products(config, own, make_batch(0, ROWS, LENGTH))


@pytest.mark.parametrize("trainable", [(".",), ("^projector/",), ("^resampler/", "^projector/")])
@pytest.mark.parametrize("kind", ["perceiver", "transformer", "mlp"])
def test_flops_with_a_resampler_are_the_products_of_the_gradient(kind, trainable):
    own = stage("s", trainable=trainable, batch_size=ROWS, row_length=LENGTH)
    config = llava_experiment("unused", stages=(own,), model=resampled_config(kind))
    again = 2 * config.model.language.hidden_size * VOCAB * ROWS * LENGTH
    counted = of_kernels(stage_flops(config, own).parts) + again
    assert counted == gradient_products(config, own, make_batch(0, ROWS, LENGTH))


def test_a_resampler_learns_in_front_of_the_projector_and_starts_from_parts(tmp_path):
    """A checkpoint that lacks the connector, as that of `finished` would without its projector, gives the rest."""
    naming = stage("naming", objective="cell_naming", trainable=("^vision/",), steps=1)
    first = llava_experiment(tmp_path / "first", model=llava_config(projector="linear"), stages=(naming,))
    run(first)
    connector = ("^resampler/", "^projector/")
    own = stage("seeing", trainable=connector, steps=3, start_from=str(tmp_path / "first"))
    run(llava_experiment(tmp_path / "second", model=resampled_config(), stages=(own,)))
    before, after = saved(tmp_path / "first", "naming"), saved(tmp_path / "second", "seeing")
    new = set(after) - set(before)
    assert new and {path.split("/")[0] for path in new} == {"resampler"}
    for path, value in before.items():
        assert (after[path].tobytes() == value.tobytes()) == (not path.startswith("projector/")), path


def test_adapters_train_in_place_of_the_language_model(finished, tmp_path):
    own = stage("adapted", trainable=("^projector/",), lora=LoraConfig(rank=2), start_from=str(finished), steps=2)
    run(llava_experiment(tmp_path, stages=(own,)))
    tuned, (base, adapters) = saved(finished, "tuning"), detach(load_params(tmp_path).params)
    layers = {path.rpartition("/")[0] for path in flatten(adapters)}
    assert len(layers) == 7 and all(path.startswith("language/layers/") for path in layers)
    for path, value in flatten(base).items():
        assert (np.asarray(value).tobytes() == tuned[path].tobytes()) == (not path.startswith("projector/")), path


def test_cells_may_be_named_by_its_tower(tmp_path):
    own = stage("naming", objective="cell_naming", trainable=("^vision/", "^naming_head/"), steps=2)
    run(llava_experiment(tmp_path, stages=(own,)))
    assert "naming_head" not in load_params(tmp_path).params
    flops = stage_flops(llava_experiment(tmp_path, stages=(own,)), own).parts
    assert flops["naming head"] > 0 and flops["vision"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# On records, with a tokenizer, and after that
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on record files, with benchmark data."""
    config = llava_records(tmp_path_factory.mktemp("llava_records") / "run")
    prepare_records(config, ["</s>"])
    loop.run(config, stream=io.StringIO())
    write_benchmark(data_folder(config) / "benchmarks" / "quickstart")
    return Path(config.run_dir)


def batch_texts(config, own) -> list[str]:
    """What the rows of a stage's first batch say, and what of it is supervised."""
    tokenizer = load_tokenizer(tokenizer_folder(config))
    batches = loop.record_batches(config, own, tokenizer=tokenizer)
    batch = next(batches)
    batches.close()
    texts = []
    for row in range(len(batch["tokens"])):
        text = batch["tokens"][row][(batch["feature_index"][row] < 0) & (batch["segment_ids"][row] > 0)]
        answers = batch["labels"][row][batch["labels"][row] >= 0]
        texts += [tokenizer.decode(text.tolist()), tokenizer.decode(answers.tolist())]
    return texts


def test_each_stage_writes_by_its_template(trained):
    config = load_params(trained).config
    plain, answers = batch_texts(config, config.stages[0])[:2]
    assert plain == answers and "USER" not in plain and plain.endswith("\n")
    whole, answers = batch_texts(config, config.stages[1])[:2]
    assert whole.startswith("See. USER: ") and " ASSISTANT: " in whole
    assert answers.startswith(" ") and answers.endswith("</s>") and "USER" not in answers


def test_it_is_measured_and_talked_to(trained, tmp_path):
    session = Session.load(trained)
    session.max_new_tokens = 4
    result = evaluate_params(session.config, session.params, session.tokenizer, max_new_tokens=4)
    assert set(result["groups"]) == {"typed", "text"}
    assert result["left_out"]["video_order"] == "the model sees no videos"
    Image.new("RGB", (21, 9), "red").save(tmp_path / "a.png")
    media = data_folder(session.config) / "benchmarks" / "quickstart" / "media"
    answer = "".join(session.ask("colour?", [tmp_path / "a.png"]))
    assert session.turns[0]["value"] == "<image>\ncolour?" and session.turns[1]["value"] == answer.lstrip()
    "".join(session.ask("and the number?"))
    assert len(session.turns) == 4 and session.work.reused > 0
    for wrong, message in (
        (lambda: session.ask("?", videos=[media / "clip.mp4"]), "LLaVA sees no videos"),
        (lambda: session.ask("", audio=[tmp_path / "a.png"]), "does not hear"),
        (lambda: session.speaker("en"), "does not speak"),
        (lambda: session.listener, "does not hear"),
        (lambda: Duplex.of(session, speak=False), "does not hear"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_answers_of_a_batch_are_those_of_chat(trained, tmp_path):
    session = Session.load(trained)
    session.max_new_tokens = 6
    pixels = np.random.default_rng(0).integers(0, 256, (9, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    items = [
        Item("i", "typed", "count", "en", "colour?", "", image="a.png"),
        Item("t", "text", "sum", "en", "number?", ""),
    ]
    answers = answer_items(
        session.model, session.params, session.context, items, tmp_path, batch_size=2, max_new_tokens=6
    )
    for item, answer in zip(items, answers, strict=True):
        session.reset()
        assert "".join(session.ask(item.question, [tmp_path / path for _, path in item.media])) == answer.lstrip()


def test_pictures_and_placeholders_must_agree(trained):
    config = load_params(trained).config
    context = example_context(config, load_tokenizer(tokenizer_folder(config)))
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    picture = Media("image", "a.png", file.getvalue())
    ask, reply = {"from": "human", "value": "<image>\ncolour?"}, {"from": "gpt", "value": "red"}

    def record(media: list[Media], question: str = ask["value"]) -> Record:
        return Record("r", (dict(ask, value=question), reply), tuple(media))

    example = training_example(record([picture]), context)
    assert example["tiles"].shape == (1, 8, 8, 3) and (example["feature_index"] >= 0).sum() == 4
    with pytest.raises(UserError, match="1 <image> placeholders, but there are 2 pictures"):
        prompt_example([ask], [picture, picture], context)
    for wrong, message in (
        (record([]), "1 <image> placeholders, but there are 0 pictures"),
        (record([picture], "<image><image>?"), "2 <image> placeholders, but there are 1 pictures"),
        (record([], "<video>?"), "LLaVA sees no videos"),
        (record([Media("image", "b.png", b"no picture")]), "b.png"),
    ):
        with pytest.raises(RecordError, match=message):
            training_example(wrong, context)


def test_a_tokenizer_without_the_end_marker_is_refused(trained, tmp_path):
    config = llava_records(tmp_path / "run")
    prepare_records(config)
    context = example_context(config, load_tokenizer(tokenizer_folder(config)))
    turns = ({"from": "human", "value": "number?"}, {"from": "gpt", "value": "1"})
    with pytest.raises(RecordError, match="template 'vicuna_v1' needs '</s>' as a special token"):
        training_example(Record("r", turns, ()), context)
