"""`python -m vita_jax.latency --random small`: how long one waits for an answer, stage by stage."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vita_jax.command_line import ArgumentParser, add_int8, json_file, run_command
from vita_jax.errors import UserError
from vita_jax.parallel.huge_pages import restart_with_huge_pages

if TYPE_CHECKING:
    from vita_jax.inference.quantization import QuantizationConfig
    from vita_jax.inference.speak import Speaker
    from vita_jax.inference.timings import Timeline
    from vita_jax.models.vita import Vita, VitaConfig

EXAMPLES = """\
A question is spoken into the model block by block, an answer is written and spoken; the table says when each stage has
its first result, counted from the end of the question, and how fast the stages are that make or take sound. The words
are numbers, and a reply has always the same length, so a checkpoint and random weights of its size take equally long.
Everything is compiled in an exchange that is not counted.

examples:
  python -m vita_jax.latency --checkpoint experiments/quickstart/weights
  python -m vita_jax.latency --random small
  python -m vita_jax.latency --random full --dtype bfloat16
  python -m vita_jax.latency --random full --dtype bfloat16 --int8 weights cache
  python -m vita_jax.latency --random small --streaming full --seconds 8
  python -m vita_jax.latency --checkpoint runs/mine --output runs/mine/evaluation/latency.json
      keeps every exchange, and puts the first sound among what is published of other models (.md, .png)
"""

SIZES = ("small", "full")
DTYPES = ("float32", "bfloat16")
# Codec tokens of a piece: with random weights nothing else would end it.
MAX_CODES = 80


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        prog="python -m vita_jax.latency", description="Measures a spoken exchange.", epilog=EXAMPLES
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="DIR", help="a run, a checkpoint or kept weights")
    what.add_argument(
        "--random", choices=SIZES, help="random weights: the quickstart's model, or VITA-1.5 with a voice"
    )
    parser.add_argument("--streaming", default="auto", help="how the question is heard: auto, chunked or full")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the question (default 3)")
    parser.add_argument("--before", type=int, default=64, help="positions of the conversation so far (default 64)")
    parser.add_argument("--reply", type=int, default=24, help="tokens of the answer (default 24)")
    parser.add_argument("--piece", type=int, default=8, help="tokens that are spoken together (default 8)")
    parser.add_argument("--repeat", type=int, default=3, help="exchanges that are measured (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of random weights (default float32)")
    parser.add_argument(
        "--output", type=json_file, metavar="FILE.json", help="keeps the figures; other files go beside it"
    )
    add_int8(parser)
    return parser


def latency(arguments: argparse.Namespace) -> int:
    """Measures and prints the table."""
    # Imported here so that --help and a mistyped argument answer at once.
    import jax

    from vita_jax.inference.engine import Engine
    from vita_jax.inference.exchange import ExchangeOptions, format_timelines, run_exchange
    from vita_jax.inference.listen import Listener, ListenOptions, describe_listening
    from vita_jax.inference.quantization import describe_memory, int8_parts
    from vita_jax.models.int8 import num_weights
    from vita_jax.parallel.process import prepare_process

    options = ExchangeOptions(
        seconds=arguments.seconds, before=arguments.before, reply=arguments.reply, piece=arguments.piece
    )
    listening = ListenOptions(arguments.streaming)
    if arguments.repeat < 1:
        raise UserError(f"--repeat {arguments.repeat} must be at least 1")
    int8 = int8_parts(arguments.int8)
    prepare_process()
    model, params, speaker, name = _checkpoint(arguments, int8) if arguments.checkpoint else _random(arguments, int8)
    device = jax.devices()[0]
    print(f"{name}: {num_weights(params):,} parameters, on {device.device_kind} ({device.platform})")
    listener = None
    if model.config.audio is None:
        print("this model does not hear: the question is text")
    else:
        print(describe_listening(model.config, listening))
        listener = Listener(model.config, params, listening, dtype=model.dtype)
    if speaker is None:
        print("this model does not speak: the table ends with its text")
    engine = Engine(model, params, cache_dtype=int8.cache_dtype)
    print(describe_memory(params, engine.decoder, engine.num_rows, engine.num_slots, engine.cache_dtype))
    run_exchange(engine, listener, speaker, options)
    timelines = [run_exchange(engine, listener, speaker, options) for _ in range(arguments.repeat)]
    print(
        f"question {options.seconds:g} s after {options.before} positions, reply {options.reply} tokens in pieces of "
        f"{options.piece}; median of {arguments.repeat}\n\n{format_timelines(timelines)}"
    )
    if arguments.output is not None:
        how = {"model": name, "device": f"{device.device_kind} ({device.platform})", "int8": sorted(arguments.int8)}
        how |= {"exchange": dataclasses.asdict(options), "streaming": arguments.streaming}
        written = write_timelines(Path(arguments.output), timelines, how, model.config)
        print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def write_timelines(
    output: Path, timelines: Sequence[Timeline], how: Mapping[str, Any], config: VitaConfig
) -> list[Path]:
    """Writes what was measured as JSON, and the first sound among the published figures. Returns the files.

    Args:
      output: FILE.json; FILE.md and FILE.png go beside it where the model speaks.
      how: what was measured and on what; becomes part of the result.
    """
    from vita_jax.evaluation.measured import write_pictures
    from vita_jax.evaluation.published import Own
    from vita_jax.evaluation.results import provenance, save_result
    from vita_jax.inference.timings import EVENTS, FIRST_SAMPLE, STAGES

    def milliseconds(event: str) -> list[float]:
        return [1000 * seconds for one in timelines if (seconds := one.since(event)) is not None]

    events = {event: milliseconds(event) for event in EVENTS[1:]}
    factors = {stage: [one.real_time_factor(stage) for one in timelines] for stage in STAGES}
    result = {"benchmark": "latency", "title": "a spoken exchange", **how, "milliseconds": events}
    save_result({**result, "real_time_factors": factors, **provenance(config)}, output)
    heard = events[FIRST_SAMPLE]
    if not heard:
        return [output]
    note = f"Median of {len(heard)}, from {min(heard):.1f} to {max(heard):.1f} ms, on {how['device']}."
    own = {"first_audio_ms": Own(str(how["model"]), statistics.median(heard), note=note)}
    return [output, *write_pictures(output.with_suffix(""), result, own)]


def _checkpoint(arguments: argparse.Namespace, int8: QuantizationConfig) -> tuple[Vita, Any, Speaker | None, str]:
    from vita_jax.inference.session import Session

    session = Session.load(arguments.checkpoint, quantization=int8)
    speaks = all(session.has(name) for name in ("codec", "speech"))
    return session.model, session.params, session.speaker("en") if speaks else None, arguments.checkpoint


def _random(arguments: argparse.Namespace, int8: QuantizationConfig) -> tuple[Vita, Any, Speaker | None, str]:
    import jax.numpy as jnp
    import numpy as np

    from vita_jax.inference.exchange import random_params
    from vita_jax.inference.speak import Speaker, SpeakOptions
    from vita_jax.inference.speech_tokens import SpeechSampling
    from vita_jax.models.int8 import int8_weights
    from vita_jax.models.vita import Vita, vita_1_5_with_voice, vita_small_with_voice
    from vita_jax.models.vita_weights import weight_table

    config = vita_1_5_with_voice() if arguments.random == "full" else vita_small_with_voice()
    dtype = jnp.dtype(arguments.dtype)
    params = random_params(config, dtype, int8_weights(weight_table(config)) if int8.weights else None)
    # Among all codes, so that the end is as rare as any other.
    options = SpeakOptions(SpeechSampling(top_k=config.speech.vocab_size), max_tokens=MAX_CODES)
    speaker = Speaker(config, params, np.zeros(config.codec.num_global_codes, np.int32), options)
    return Vita(config, dtype=dtype), params, speaker, f"random {arguments.random} ({arguments.dtype})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(latency, make_parser(), argv)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
