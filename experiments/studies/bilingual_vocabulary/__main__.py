"""A second language with and without pieces of its own: what enlarging the vocabulary brings.

    python -m experiments.studies.bilingual_vocabulary --run_dir runs/bilingual_vocabulary
    python -m experiments.studies.bilingual_vocabulary --run_dir runs/bilingual_long --steps 1600
    python -m experiments.studies.bilingual_vocabulary --run_dir /tmp/bilingual --size smoke

VITA-1.0 gives Mixtral's vocabulary pieces of Chinese before it is trained on text in two languages (arXiv 2408.05211,
section 3.1). Here a small language model and its tokenizer first learn English alone, then both languages:

    english         what the others start from
    bytes           with the tokenizer as it is, which spells Chinese in bytes
    bytes_longer    the same, for so many steps that it has read as much text as `enlarged`
    enlarged        with new pieces and rows for them, as `python -m vita_jax.enlarge_vocabulary` makes them

The same number of steps costs the same; the same number of characters teaches the same. A tokenizer that needs more
tokens has fewer characters in a step, so no arm without the pieces can have both, and there is one for each. Size
`small` is laid out for 15 minutes of two CPU cores. The same command goes on where it was stopped; arms that are
finished are not trained again. `bytes_longer` needs the other two, whose records say how long it is.

Equal for all three: the weights they start from (new rows are means of the rows that spelt them); records and their
order, half of them in each language; rows of a step and their length; optimiser, rate and schedule; what of a text is
learnt, and with which weights (answers most, see `text_pretraining`); the questions, and how answers are drawn.

What cannot be equal: the enlarged model has more parameters, all of them rows of its tables; a step of it takes as many
tokens but more of a vocabulary; and weights of tokens fall on other stretches of text.

Leaves `<run_dir>/vocabulary.json`, `.md` and `.png`, with `--write` also in `results/` beside this file. Figures:

    answers       accuracy on questions about scenes in words that are held out, mean over the kinds, with the 95 %
                  bootstrap interval; in the second table the differences to `enlarged` in points on the same questions,
                  with the 95 % interval of the pairs
    bits          per character of held-out text, loss of everything, questions included: the same measure for all
                  tokenizers, lower is better
    tokens        per character of the same text
    records, characters   of both languages that training read
    seconds       of training, as the training reports them
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import quickstart
from experiments.benchmarks.turns import format_table
from experiments.quickstart import Rows, mixture
from experiments.quickstart_vita_1_0 import FIRST_VOCABULARY
from experiments.studies.arms import (
    RESULT,
    Arm,
    add_arguments,
    component_sizes,
    points,
    run_arms,
    run_study,
    stage_cost,
    with_interval,
    write_study,
)
from experiments.studies.bilingual_vocabulary.measures import measure
from experiments.studies.bilingual_vocabulary.texts import LANGUAGES, build_texts, characters_of
from vita_jax import enlarge_vocabulary
from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.data.loader import SourceConfig
from vita_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vita_jax.errors import UserError
from vita_jax.evaluation.comparison import compare_groups
from vita_jax.models.language.vocabulary import padded_rows
from vita_jax.parallel.huge_pages import restart_with_huge_pages
from vita_jax.training.checkpoint import load_config, load_params
from vita_jax.training.experiment import (
    Amount,
    CheckpointConfig,
    ExperimentConfig,
    TokenizerConfig,
    data_folder,
    tokenizer_folder,
)

BASE = "english"
TITLES = {
    BASE: "English only",
    "bytes": "bytes, as many steps",
    "bytes_longer": "bytes, as much text",
    "enlarged": "new pieces",
}
COMPARED = "enlarged"
ARMS = tuple(TITLES)[1:]
# Pieces that are added at most; with them there are as many as the quickstart's tokenizer has.
NEW_PIECES = 1280 - FIRST_VOCABULARY
STAGE = "bilingual"
NAME, GROWN = "vocabulary", "start_enlarged"
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Size:
    """What the sizes differ in.

    Attributes:
      base_steps, steps: in English, and of `bytes` and `enlarged`.
      rows: of a step. Long enough for any record in bytes.
      amounts: records and held-out records of each language, questions of each kind.
      per_kind: questions of each kind that are asked.
    """

    base_steps: int
    steps: int
    rows: Rows
    amounts: dict[str, int]
    per_kind: int


SMALL = Size(800, 800, Rows(3, 640), {"records": 12000, "held_out": 300, "questions": 120}, 120)
SMOKE = Size(4, 4, Rows(4, 640), {"records": 40, "held_out": 6, "questions": 8}, 8)
SIZES = {"small": SMALL, "smoke": SMOKE}


# ---- configurations -------------------------------------------------------------------------------------------------


def base_config(size: str, run_dir: str) -> ExperimentConfig:
    """The run in English: the language model of the quickstart, and nothing that sees or hears beyond its towers."""
    config, plan = quickstart.get_config(size), SIZES[size]
    language = dataclasses.replace(config.model.language, vocab_size=padded_rows(FIRST_VOCABULARY, 16))
    deaf = {"audio": None, "state_head": None, "ctc_vocab_size": 0, "codec": None, "speech": None}
    stage = dataclasses.replace(
        config.stage("language"),
        name=BASE,
        title=TITLES[BASE],
        sources=(SourceConfig(BASE),),
        steps=plan.base_steps,
        **vars(plan.rows),
    )
    return dataclasses.replace(
        config,
        name="bilingual_vocabulary",
        run_dir=str(Path(run_dir) / BASE),
        model=dataclasses.replace(config.model, language=language, **deaf),
        tokenizer=TokenizerConfig(FIRST_VOCABULARY),
        data=dataclasses.replace(
            config.data, amounts=tuple(Amount(name, count) for name, count in plan.amounts.items())
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=1),
        stages=(stage,),
    )


def bilingual_arm(base: ExperimentConfig, name: str, start: str, steps: int, run_dir: str) -> Arm:
    """A run in both languages.

    Args:
      base: whose data it has.
      start: the run that it starts from, with the tokenizer that it has.
    """
    rows = load_config(start)[0].model.language.vocab_size
    folder = Path(start) / "tokenizer"
    stage = dataclasses.replace(
        base.stages[0],
        name=STAGE,
        title=TITLES[name],
        sources=mixture(*((SourceConfig(language), 1 / len(LANGUAGES)) for language in LANGUAGES)),
        steps=steps,
        start_from=start,
    )
    config = dataclasses.replace(
        base,
        name=f"bilingual_vocabulary_{name}",
        run_dir=str(Path(run_dir) / name),
        model=dataclasses.replace(base.model, language=dataclasses.replace(base.model.language, vocab_size=rows)),
        tokenizer=TokenizerConfig(load_tokenizer(folder).vocab_size, str(folder)),
        data=dataclasses.replace(base.data, folder=str(data_folder(base))),
        stages=(stage,),
    )
    return Arm(name, TITLES[name], config)


def prepare(config: ExperimentConfig) -> None:
    """Builds the texts and learns the tokenizer from those in English, unless they are there."""
    build_texts(data_folder(config), {entry.name: entry.count for entry in config.data.amounts}, config.seed)
    if not tokenizer_folder(config).is_dir():
        texts = quickstart.tokenizer_texts(config, "system\n", "user\n", "assistant\n")
        train_sentencepiece(texts, config.tokenizer.vocab_size, tokenizer_folder(config), at_most=True)


def enlarge(base: ExperimentConfig, folder: Path) -> str:
    """The run in English with new pieces, from the Chinese that is trained on; made unless it is there."""
    if not folder.is_dir():
        lines = {name: str(data_folder(base) / f"lines_{name}.txt") for name in LANGUAGES}
        asked = ["--checkpoint", base.run_dir, "--to", str(folder), "--pieces", str(NEW_PIECES)]
        if enlarge_vocabulary.main([*asked, "--texts", lines["chinese"], "--measure", *lines.values()]):
            raise UserError(f"{base.run_dir} could not be enlarged, see above")
    return str(folder)


# ---- measuring ------------------------------------------------------------------------------------------------------


def figures(arm: Arm, per_kind: int) -> dict[str, Any]:
    """The figures of a trained arm: {"parameters": of the language model, "entries": of the tokenizer, "training": see
    `stage_cost`, with the characters that were read, "languages": see `measures.measure`}.
    """
    config, (stage,) = arm.config, arm.config.stages
    tokenizer, cost = load_tokenizer(tokenizer_folder(config)), stage_cost(config.run_dir, stage)
    sets = [characters_of(data_folder(config), source.path) for source in stage.sources]
    cost["characters"] = cost["records"] * float(np.mean([one["characters"] / one["records"] for one in sets]))
    return {
        "parameters": component_sizes(config.model)["language"],
        "entries": tokenizer.vocab_size,
        "training": cost,
        "languages": measure(config, load_params(config.run_dir).params, tokenizer, per_kind),
    }


def longer(results: Mapping[str, Mapping[str, Any]]) -> int:
    """Steps after which the tokenizer without new pieces has read as many records as the one with them.

    Raises:
      UserError: one of the two arms has no figures yet, or was too short to have any records counted.
    """
    missing = [name for name in ("bytes", COMPARED) if name not in results]
    if missing:
        raise UserError(f"bytes_longer is as long as the records of bytes and enlarged say; train {missing[0]} first")
    short, whole = (results[name]["training"] for name in ("bytes", COMPARED))
    if not short["records"]:
        raise UserError(f"--steps {short['steps']} are too few to count the records that they read; give more")
    return round(short["steps"] * whole["records"] / short["records"])


# ---- the page -------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each arm, in Markdown."""
    rows = []
    for found in results.values():
        languages, training = found["languages"], found["training"]
        cells = [found["title"], f"{found['entries']:,}", f"{found['parameters']:,}"]
        cells += [with_interval(languages[name]["answers"]) for name in LANGUAGES]
        cells += [f"{languages[name][key]:.3f}" for key in ("bits", "tokens") for name in LANGUAGES]
        cells += [f"{training[key]:,.0f}" for key in ("steps", "records", "characters", "seconds")]
        rows.append(tuple(cells))
    titles = [f"{what}, {name}" for what in ("answers", "bits", "tokens") for name in LANGUAGES]
    head = ("", "entries", "parameters", *titles, "steps", "records", "characters", "seconds")
    return format_table(head, rows, markdown=True)


def table_of_changes(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the new pieces bring, in points on the same questions, in Markdown; "" without anything to compare."""
    if COMPARED not in results or len(results) < 2:
        return ""
    after = results[COMPARED]["languages"]
    rows = [
        (
            found["title"],
            *(
                points(compare_groups(found["languages"][name]["answers"], after[name]["answers"]))
                for name in LANGUAGES
            ),
        )
        for arm, found in results.items()
        if arm != COMPARED
    ]
    return format_table((f"{TITLES[COMPARED]}, points to", *LANGUAGES), rows, markdown=True)


def draw(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Answers with their intervals, bits and tokens per character: a panel each, a bar for each arm and language."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(12, 3.2), layout="constrained")
        panels = figure.subplots(1, 3)
        places = np.arange(len(results))[::-1]
        for at, (name, colour) in enumerate(zip(LANGUAGES, ("#8fb0e8", "#e8a48f"), strict=True)):
            languages = [found["languages"][name] for found in results.values()]
            answers = np.array([[one["answers"][key] for key in ("accuracy", "low", "high")] for one in languages])
            reach = np.maximum(np.stack([answers[:, 0] - answers[:, 1], answers[:, 2] - answers[:, 0]]), 0)
            how = {"height": 0.38, "color": colour, "label": name}
            panels[0].barh(places + 0.2 - 0.4 * at, 100 * answers[:, 0], xerr=100 * reach, capsize=2, **how)
            for panel, key in zip(panels[1:], ("bits", "tokens"), strict=True):
                panel.barh(places + 0.2 - 0.4 * at, [one[key] for one in languages], **how)
        for panel, title in zip(panels, ("answers, %", "bits per character", "tokens per character"), strict=True):
            panel.set_title(title, fontsize=9, loc="left")
            panel.set_yticks(places, [found["title"] for found in results.values()] if panel is panels[0] else [])
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_xlim(0, 100)
        panels[2].legend(frameon=False, fontsize=8)
    return figure


# ---- the command ----------------------------------------------------------------------------------------------------


def study(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes."""
    size, run_dir = SIZES[arguments.size], arguments.run_dir
    per_kind, steps = arguments.per_kind or size.per_kind, arguments.steps or size.steps
    base = base_config(arguments.size, run_dir)
    prepare(base)
    results = run_arms([Arm(BASE, TITLES[BASE], base)], None, per_kind, figures)
    starts = {"bytes": base.run_dir, "enlarged": enlarge(base, Path(run_dir) / GROWN)}
    arms = [bilingual_arm(base, name, start, steps, run_dir) for name, start in starts.items()]
    results |= run_arms(arms, arguments.only, per_kind, figures)
    wanted = arguments.only is None or "bytes_longer" in arguments.only
    if wanted or (Path(run_dir) / "bytes_longer" / RESULT).is_file():
        long = bilingual_arm(base, "bytes_longer", base.run_dir, longer(results), run_dir)
        results |= run_arms([long], arguments.only, per_kind, figures)
    results = {name: results[name] for name in TITLES if name in results}
    tables = [text for text in (table(results), table_of_changes(results)) if text]
    print("\n\n".join(tables))
    stage, asked = base.stages[0], results[BASE]["languages"]
    settings = {
        "size": arguments.size,
        "rows of a step": f"{stage.batch_size} of {stage.row_length}",
        "rate": stage.learning_rate,
        "optimiser": stage.optimizer,
        "questions": ", ".join(f"{name} {asked[name]['answers']['n']}" for name in LANGUAGES),
        "held-out records of a language": size.amounts["held_out"],
    }
    folders = [Path(run_dir), *([RESULTS] if arguments.write else [])]
    caption = "answers, bits and tokens per character"
    write_study(folders, NAME, "A vocabulary for a second language", tables, settings, results, draw(results), caption)


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    if arguments.per_kind is not None and (arguments.per_kind < 8 or arguments.per_kind % 8):
        raise UserError(
            f"--per_kind {arguments.per_kind} must be a multiple of 8, so that both languages are asked alike"
        )
    return run_study(study, arguments)


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.studies.bilingual_vocabulary",
        description="A second language with and without pieces of its own.",
        epilog=__doc__,
    )
    add_arguments(parser, "runs/bilingual_vocabulary", ARMS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for bad input, 128 + signal number when stopped."""
    return run_command(run, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
