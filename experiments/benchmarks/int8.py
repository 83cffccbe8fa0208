"""What int8 weights and an int8 cache cost, and what they save: answers, next-token distributions, bytes, tokens/s.

    python -m experiments.benchmarks.int8
    python -m experiments.benchmarks.int8 --write

The kept weights answer held-out questions, drawn anew: typed ones about pictures and clips, written ones without,
spoken ones, and sounds that are none. Once in floats, then with the language model's weights in int8, its cache, and
both.

    accuracy       of each group, as `vita_jax.evaluate` counts it
    same answers   of all answers, those that are the one of the model in floats, character by character
    divergence     KL(floats || int8) of the distributions of the next token in nats, while the answers of the model in
                   floats are fed: the mean over their positions, end included
    bytes          of all weights, and of the cache of one conversation
    tokens/s       of one row, drawn one after the other in one compiled call, which takes turns with the one in floats

Speed is also measured with a larger decoder of random weights, which is bound by what it reads from memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.quickstart.build import build_benchmark
from data_pipelines.quickstart.scans import load_scan_splits
from data_pipelines.quickstart.speech import build_speech
from data_pipelines.quickstart.speech_sets import SMOKE
from experiments.benchmarks.turns import Ratio, describe_machine, format_machine, format_table, take_turns, write_page
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.prompts import stop_ids
from vita_jax.data.tokenizer import load_tokenizer
from vita_jax.errors import UserError
from vita_jax.evaluation.answering import question_batches
from vita_jax.evaluation.benchmarks import QUICKSTART, SPEECH, Benchmark
from vita_jax.evaluation.figures import score
from vita_jax.evaluation.items import ITEMS, Item, read_items
from vita_jax.evaluation.subject import Subject
from vita_jax.inference.generate import Params, decode_step, generate, generate_from_embeds, prefill
from vita_jax.inference.quantization import MEBIBYTE, int8_parts
from vita_jax.models.int8 import change_params, int8_weights, weight_bytes
from vita_jax.models.language.decoder import Decoder, DecoderConfig, make_cache
from vita_jax.models.language.decoder_weights import weight_table
from vita_jax.models.vita import Vita, VitaInputs
from vita_jax.parallel.process import prepare_process
from vita_jax.parallel.rules import unbox
from vita_jax.training.checkpoint import load_params

WEIGHTS = Path(__file__).parents[1] / "quickstart" / "weights"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "qwix")
NOTES = "## What this says"  # from here on the written file is kept: a person's words
FLOATS = "floats"
CHOICES = {FLOATS: (), "int8 weights": ("weights",), "int8 cache": ("cache",), "both": ("weights", "cache")}
GROUPS = {QUICKSTART: ("typed", "video_order", "text"), SPEECH: ("spoken", "noise")}
SEED, SPLIT_SEED = 321, 0  # of what is drawn, which no training has seen; of the split of the scans, the training's
MAX_TOKENS, COMPARED_TOKENS = 32, 16  # of an answer; of those whose distributions are compared
PROMPT, DRAWN, SLOTS = 64, 64, 2048  # positions and tokens of what is timed; positions of a conversation
# 156 million parameters, 0.6 GB in float32.
LARGER = DecoderConfig(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=2816,
)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one choice.

    Attributes:
      accuracy: by title of the group.
      asked, same: questions, and those with the answer of the model in floats.
      positions: of answers, whose distributions were compared.
      divergence: nats, their mean.
      weights, cache: bytes.
      speeds: (tokens/s, quartiles of tokens/s over those in floats) by name of the model.
    """

    accuracy: dict[str, float]
    asked: int
    same: int
    positions: int
    divergence: float
    weights: int
    cache: int
    speeds: dict[str, tuple[float, float, float, float]]


# ---- questions ------------------------------------------------------------------------------------------------------


def write_questions(folder: Path, per_kind: int) -> None:
    """Benchmarks below `folder`, with so many questions of each kind (rounded up to a multiple of 8 where spoken)."""
    splits = load_scan_splits(SPLIT_SEED)
    counts = {"typed": per_kind, "typed_unseen_writers": 0, "text_only": per_kind, "video_order": 2 * per_kind}
    build_benchmark(folder / "benchmarks" / QUICKSTART.name, splits, counts, SEED)
    spoken = -(-per_kind // 8) * 8
    speech = dataclasses.replace(SMOKE, benchmark_spoken=spoken, benchmark_noise=per_kind)
    build_speech(folder, splits, speech, SEED, progress=lambda line: None)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A benchmark's items, and the batches they are asked in; the media's features are the same for all choices."""

    benchmark: Benchmark
    items: list[Item]
    batches: list[tuple[list[int], VitaInputs]]


def read_questions(subject: Subject, folder: Path) -> Iterator[Asked]:
    """The groups of `GROUPS`."""
    for benchmark, names in GROUPS.items():
        root = folder / "benchmarks" / benchmark.name
        groups = tuple(group for group in benchmark.groups if group.name in names)
        items = [item for item in read_items(root / ITEMS) if item.group in names]
        batches = question_batches(subject.model, subject.params, subject.context, items, root, subject.batch_size)
        yield Asked(dataclasses.replace(benchmark, groups=groups), items, list(batches))


@partial(jax.jit, static_argnames=("model", "cache_dtype"))
def log_probabilities(
    model: Vita, params: Params, inputs: VitaInputs, answers: jax.Array, cache_dtype: jnp.dtype | None
) -> jax.Array:
    """Of every token while answers are fed: answers (b n) int32 -> (b n v), the first after the prompt."""
    embeds, language = model.apply({"params": params}, inputs, method="embed_inputs"), params["language"]
    batch, length = inputs.segment_ids.shape
    dtype = model.dtype if cache_dtype is None else cache_dtype
    cache = make_cache(model.config.language, batch, length + answers.shape[1], dtype)
    start = prefill(model.decoder, language, embeds, inputs.positions, inputs.segment_ids, cache)

    def step(carry: tuple[jax.Array, Any], token: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        return decode_step(model.decoder, language, token, carry[1]), carry[0]

    logits = jax.lax.scan(step, start, answers.T)[1]
    return jax.nn.log_softmax(jnp.swapaxes(logits, 0, 1).astype(jnp.float32))


def answer(subject: Subject, asked: Asked, cache_dtype: jnp.dtype | None) -> tuple[list[str], list[np.ndarray]]:
    """Greedy answers as text, and as (b n) tokens and their (b,) numbers for every batch, side by side (b n+1)."""
    context, texts, tokens = subject.context, [""] * len(asked.items), []
    for indices, inputs in asked.batches:
        made = generate(
            subject.model,
            subject.params,
            inputs,
            max_new_tokens=MAX_TOKENS,
            stop_tokens=stop_ids(context.tokenizer, context.template),
            pad_token=context.tokenizer.pad_id,
            cache_dtype=cache_dtype,
        )
        ids, lengths = jax.device_get((made.tokens, made.lengths))
        tokens.append(np.concatenate([ids, lengths[:, None]], axis=1))
        for row, index in enumerate(indices):
            known = [i for i in ids[row, : lengths[row]].tolist() if i < context.tokenizer.vocab_size]
            texts[index] = context.tokenizer.decode(known)
    return texts, tokens


def distributions(
    subject: Subject, questions: Sequence[Asked], answers: Sequence[Sequence[np.ndarray]], cache_dtype: jnp.dtype | None
) -> np.ndarray:
    """Logarithms of the next token's probabilities at every position of given answers, (m v); `answers` as `answer`
    gives them, for every benchmark.
    """
    found = []
    for asked, tokens in zip(questions, answers, strict=True):
        for (indices, inputs), made in zip(asked.batches, tokens, strict=True):
            ids, lengths = made[:, :COMPARED_TOKENS], made[:, -1]
            logs = np.asarray(log_probabilities(subject.model, subject.params, inputs, ids, cache_dtype))
            counted = np.arange(ids.shape[1]) <= lengths[:, None]  # what ends the answer is a token, too
            counted[len(indices) :] = False
            found.append(logs[counted])
    return np.concatenate(found)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) in nats, of logarithms (m v)."""
    return float(np.mean(np.sum(np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q), axis=-1)))


# ---- speed ----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("decoder", "count", "cache_dtype"))
def draw(decoder: Decoder, params: Params, tokens: jax.Array, count: int, cache_dtype: jnp.dtype | None) -> jax.Array:
    """`count` tokens behind a prompt (1 s): (1 count) int32."""
    embeds, ones = decoder.apply({"params": params}, tokens, method="embed"), jnp.ones_like(tokens)
    positions = jnp.arange(tokens.shape[1])[None]
    return generate_from_embeds(
        decoder, params, embeds, positions, ones, max_new_tokens=count, cache_dtype=cache_dtype
    ).tokens


def speed(decoder: Decoder, floats: Params, other: Params, cache_dtype: jnp.dtype | None, turns: int) -> Ratio:
    """Drawing tokens in floats and otherwise."""
    tokens = jnp.asarray(np.arange(PROMPT)[None] % decoder.config.vocab_size, jnp.int32)
    return take_turns(
        lambda: jax.block_until_ready(draw(decoder, floats, tokens, DRAWN, None)),
        lambda: jax.block_until_ready(draw(decoder, other, tokens, DRAWN, cache_dtype)),
        turns=turns,
        sample_seconds=0.3,
    )


def random_decoder(config: DecoderConfig) -> Params:
    """Weights of no meaning."""
    ones = jnp.ones((1, 2), jnp.int32)
    embeds = jnp.ones((1, 2, config.hidden_size))
    return unbox(jax.jit(Decoder(config).init)(jax.random.key(0), embeds, ones, ones))["params"]


# ---- all of it ------------------------------------------------------------------------------------------------------


def measure(folder: Path, *, turns: int, larger: DecoderConfig | None = LARGER) -> dict[str, Figures]:
    """Figures by choice.

    Args:
      folder: see `write_questions`.
      turns: samples of each side of what is timed.
      larger: a decoder that is timed, too; None = none.
    """
    loaded = load_params(WEIGHTS)
    config = dataclasses.replace(loaded.config, run_dir=str(loaded.run_dir))
    floats = Subject(config, loaded.params, load_tokenizer(loaded.run_dir / "tokenizer"))
    questions = list(read_questions(floats, folder))
    want = [answer(floats, asked, None) for asked in questions]
    fed = [tokens for _, tokens in want]
    reference = distributions(floats, questions, fed, None)
    timed = {"the kept weights": (floats.model.decoder, floats.params["language"])}
    if larger is not None:
        timed["a larger decoder"] = (Decoder(larger), random_decoder(larger))
    figures = {}
    for name, parts in CHOICES.items():
        choice = int8_parts(parts)
        other = dataclasses.replace(floats, params=load_params(WEIGHTS, change=choice.change).params)
        got = want if not parts else [answer(other, asked, choice.cache_dtype) for asked in questions]
        accuracy = {}
        for asked, (texts, _) in zip(questions, got, strict=True):
            groups = score(asked.benchmark, asked.items, texts, floats.context.template)["groups"]
            accuracy |= {group["title"]: group["accuracy"] for group in groups.values()}
        pairs = [pair for (a, _), (b, _) in zip(want, got, strict=True) for pair in zip(a, b, strict=True)]
        found = reference if not parts else distributions(other, questions, fed, choice.cache_dtype)
        dtype = floats.model.dtype if choice.cache_dtype is None else choice.cache_dtype
        language = floats.model.config.language
        figures[name] = Figures(
            accuracy=accuracy,
            asked=len(pairs),
            same=sum(a == b for a, b in pairs),
            positions=len(found),
            divergence=divergence(reference, found),
            weights=weight_bytes(other.params)[0],
            cache=jax.eval_shape(partial(make_cache, language, 1, SLOTS, dtype)).num_bytes,
            speeds={} if not parts else _speeds(timed, choice.cache_dtype, bool(choice.weights), turns),
        )
        print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    return figures


def _speeds(
    timed: Mapping[str, tuple[Decoder, Params]], cache_dtype: jnp.dtype | None, weights: bool, turns: int
) -> dict[str, tuple[float, float, float, float]]:
    """By name of the model: tokens/s, and the median and the quartiles of how many times that is what floats give."""
    found = {}
    for name, (decoder, params) in timed.items():
        other = change_params(params, int8_weights(weight_table(decoder.config))) if weights else params
        ratio = speed(decoder, params, jax.tree.map(jnp.asarray, other), cache_dtype, turns)
        times = (1 / ratio.median, 1 / ratio.upper, 1 / ratio.lower)
        found[name] = (DRAWN / ratio.other_seconds, *times)
    return found


def format_figures(figures: Mapping[str, Figures], *, markdown: bool = False) -> str:
    """The table: a column for every choice."""
    first = figures[FLOATS]

    def row(title: str, cell: Any) -> tuple[str, ...]:
        return (title, *(cell(figures[name]) for name in figures))

    def speeds(found: Figures, model: str) -> str:
        if model not in found.speeds:
            return "1"
        _, median, lower, upper = found.speeds[model]
        return f"{median:.2f} ({lower:.2f} to {upper:.2f})"

    rows = [row(title, lambda f, title=title: f"{f.accuracy[title]:.1%}") for title in first.accuracy]
    rows += [
        row(f"same answers, of {first.asked}", lambda f: f"{f.same} ({f.same / f.asked:.1%})"),
        row(f"divergence, {first.positions} positions", lambda f: f"{f.divergence:.1e} nats"),
        row("weights", lambda f: f"{f.weights / MEBIBYTE:.1f} MiB"),
        row(f"cache of {SLOTS:,} positions", lambda f: f"{f.cache / MEBIBYTE:.2f} MiB"),
    ]
    for model in figures["both"].speeds:
        rows.append(row(f"tokens/s, floats = 1: {model}", lambda f, model=model: speeds(f, model)))
    return format_table(("", *figures), rows, markdown=markdown)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    if arguments.per_kind < 1 or arguments.turns < 1:
        raise UserError("--per-kind and --turns must be at least 1")
    prepare_process()
    machine = describe_machine(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        write_questions(Path(folder), arguments.per_kind)
        figures = measure(Path(folder), turns=arguments.turns)
    print(f"{format_figures(figures)}\n{format_machine(machine)}")
    if arguments.write:
        table = format_figures(figures, markdown=True)
        text = f"# Int8 weights and cache\n\n{table}\n\n{format_machine(machine)}\n"
        content = {name: dataclasses.asdict(found) for name, found in figures.items()}
        write_page(RESULTS / "int8", text, NOTES, {"machine": machine, "figures": content})
    return 0


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks.int8", description="Measures int8 inference.", epilog=__doc__
    )
    parser.add_argument("--per-kind", type=int, default=32, help="questions of each kind (default 32)")
    parser.add_argument("--turns", type=int, default=9, help="samples of each side of what is timed (default 9)")
    parser.add_argument("--write", action="store_true", help="write results/int8.md and .json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
