"""A small VITA-1.0 that learns the quickstart's data: a mixture of experts, a vocabulary enlarged for Chinese, and a
state token in front of every answer.

    python -m vita_jax.train --config=experiments/quickstart_vita_1_0.py
    python -m vita_jax.train --config=experiments/quickstart_vita_1_0.py --config.size=smoke --config.run_dir=/tmp/smoke

Sizes: `smoke` (all stages in a minute or two, learns nothing) and `small` (two CPU cores). The curriculum at full size
is `experiments/vita_1_0`. The data is that of `experiments/quickstart.py`, whose run can lend it:
`--config.data.folder=runs/quickstart/data`.

What the VITA-1.0 paper (arXiv 2408.05211, section 3) has and the small VITA-1.5 has not:

- Every layer has four experts half as wide as the quickstart's feed-forward, of which a token goes to two, so a token
  costs what it costs there.
- The tokenizer is learnt from the texts without Chinese, then enlarged by pieces of Chinese and by the tokens below.
- An answer begins with `<1>` to speech that is meant for the model, with `<2>` to sound that is not, which is then not
  answered, and with `<3>` to text. There is no input head.
- It speaks through a synthesiser, if at all: there is no codec and there are no speech decoders.

Stages, after those of the paper; the tower stands in for public weights, and the recogniser, too:

    1    the language model, on scenes and sentences in both languages
    1b   the vision tower, on what each cell shows
    2.1  the visual adapter, on 20 % of the captions
    2.2  tower, adapter and language model, on all captions
    2.3  all three, on all questions and 20 % of the captions
    2.4  the speech encoder, on transcripts by CTC; the speech adapter along with it
    2.5  speech adapter and language model, on speech and its transcripts
    3    the same: questions, half of them spoken, some captions, text, and sounds that are no questions

Experts can be spread over devices, each of which then needs a row of every batch:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m vita_jax.train \\
        --config=experiments/quickstart_vita_1_0.py --config.mesh.expert=4 \\
        --config.stages.speech_encoder.batch_size=4 --config.stages.speech_alignment.batch_size=4 \\
        --config.stages.audio_sft.batch_size=4
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from experiments import quickstart
from experiments.own_data_vita_1_0 import BALANCE, SYMBOLS
from experiments.quickstart import ASR, NEGATIVES, QUESTIONS, SPOKEN, TEXT, Rows, Size, captions, mixture
from vita_jax.data.tokenizer import train_sentencepiece
from vita_jax.data.vocabulary import Enlargement, enlarge, script_of, train_pieces
from vita_jax.models.vita import VitaConfig
from vita_jax.training.experiment import ExperimentConfig, tokenizer_folder
from vita_jax.training.stages import Stage

NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
# Entries of the tokenizer before it is enlarged, 264 of which every tokenizer has.
FIRST_VOCABULARY = 824
# More text and more sounds that are no questions than in the quickstart: experts forget more of the one, and a token of
# the answer learns the other more slowly than a head.
LAST_MIX = mixture(
    (SPOKEN, 0.3), (NEGATIVES, 0.14), (ASR, 0.08), (QUESTIONS, 0.28), (TEXT, 0.16), (captions(0.2), 0.04)
)

# Rows without sound are as many as four devices need. The stages with sound keep the quickstart's few long rows, which
# get a small model further.
SMALL = dataclasses.replace(quickstart.SMALL, seen=Rows(4, 312, row_tiles=12))  # three conversations
SMOKE = dataclasses.replace(quickstart.SMOKE, clips=4)

TITLES = {
    "language": "1 bilingual text",
    "tower": "1b vision tower",
    "vision_alignment": "2.1 vision alignment",
    "vision_understanding": "2.2 vision understanding",
    "vision_sft": "2.3 vision SFT",
    "speech_encoder": "2.4 speech encoder",
    "speech_alignment": "2.5 speech alignment",
    "audio_sft": "3 instruction tuning",
}
# What is measured after a stage, see `quickstart.EVALUATED`; the last one is measured when the run ends.
EVALUATED = {name: groups for name, groups in quickstart.EVALUATED.items() if name not in ("audio_sft", "codec")}


def stages(size: Size) -> tuple[Stage, ...]:
    """The quickstart's stages but for its voice, under the names that VITA-1.0 gives them."""
    *earlier, last = (*quickstart.vision_stages(size), *quickstart.audio_stages(size))
    # The state is a token of the answer and not a label of a head.
    last = dataclasses.replace(last, trainable=("^audio/adapter/", "^language/"), state_labels=False, sources=LAST_MIX)
    return tuple(dataclasses.replace(stage, title=TITLES[stage.name]) for stage in (*earlier, last))


def with_experts(model: VitaConfig) -> VitaConfig:
    """A model of the quickstart without voice and input head, its language model a mixture of experts."""
    language = dataclasses.replace(
        model.language,
        qkv_bias=False,
        num_experts=NUM_EXPERTS,
        experts_per_token=EXPERTS_PER_TOKEN,
        intermediate_size=model.language.intermediate_size // EXPERTS_PER_TOKEN,
        router_aux_loss_coef=BALANCE,
    )
    return dataclasses.replace(model, language=language, state_head=None, codec=None, speech=None)


def get_config(size: Literal["smoke", "small"] = "small") -> ExperimentConfig:
    """The configuration of one size."""
    base = quickstart.get_config(size)
    return dataclasses.replace(
        base,
        name="quickstart_vita_1_0",
        run_dir="runs/quickstart_vita_1_0",
        model=with_experts(base.model),
        template="mixtral_two",
        stages=stages({"smoke": SMOKE, "small": SMALL}[size]),
    )


def make_tokenizer(config: ExperimentConfig) -> Enlargement:
    """A tokenizer of the texts without Chinese, and what enlarges it: pieces of Chinese, end marker, state tokens."""
    texts = quickstart.tokenizer_texts(config, "system:", "user:", "bot:")
    han = script_of("han")
    first = train_sentencepiece([text for text in texts if not han.search(text)], FIRST_VOCABULARY, None, at_most=True)
    room = config.tokenizer.vocab_size - first.vocab_size - len(SYMBOLS)
    return enlarge(first, train_pieces(texts, room, first), SYMBOLS, room)


def prepare(config: ExperimentConfig) -> None:
    """Builds the data and makes the tokenizer, unless they are there."""
    quickstart.build_data(config)
    if not tokenizer_folder(config).is_dir():
        grown = make_tokenizer(config)
        grown.tokenizer.save(tokenizer_folder(config))
        print(f"tokenizer: {grown.first_id} -> {grown.tokenizer.vocab_size} entries", flush=True)


def after_stage(config: ExperimentConfig, stage: Stage, params: Any) -> None:
    """Measures the model on a part of what was held out."""
    quickstart.after_stage(config, stage, params, EVALUATED)


# Measures the final model on everything that was held out and writes the report.
finish = quickstart.finish
