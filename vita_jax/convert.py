"""`python -m vita_jax.convert`: weights from and to the PyTorch world, and folders that hold a model by itself."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vita_jax.command_line import ArgumentParser, run_command
from vita_jax.errors import UserError

MODELS = (
    "vita_1_5",
    "vita_1_0",
    "llava",
    "llava_projector",
    "flamingo",
    "qwen2",
    "mixtral",
    "llama",
    "internvit",
    "clip",
    "whale",
    "projector",
    "audio_adapter",
    "speech_decoder",
    "codec",
)
LORA = "lora"
LLAVA_LAYOUTS = ("original", "hf", "hf_5", "hf_memory")
ALLOWANCES = ("missing", "unexpected", "misshapen")
DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Carries weights between this package and PyTorch, bit for bit.

  import   a public folder -> a run: for chat, evaluate, and stages that start from it
  export   a run or checkpoint -> a folder for PyTorch, or one that this package loads without the run
  inspect  names, shapes, dtypes, bytes, what maps where, what would be missing
  verify   whether a checkpoint and a public folder hold the same bits
"""
EXAMPLES = """\
examples:
  python -m vita_jax.convert inspect VITA-1.5
  python -m vita_jax.convert import --model vita_1_5 --from VITA-1.5 --to runs/vita_1_5 --system-texts texts.json
  python -m vita_jax.convert verify --model vita_1_5 --from runs/vita_1_5 --against VITA-1.5
  python -m vita_jax.chat --checkpoint runs/vita_1_5 --image photo.jpg
  python -m vita_jax.convert export --from runs/quickstart --to quickstart_torch
  python -m vita_jax.convert export --layout vita_jax --dtype bfloat16 --from runs/quickstart --to kept
  python -m vita_jax.chat --checkpoint kept --text "1 + 2?"
  python -m vita_jax.convert import --model llava --from llava-1.5-7b-hf --to runs/llava
  python -m vita_jax.convert export --layout original --from runs/llava --to llava-v1.5-7b
  python -m vita_jax.convert import --model flamingo --from open_flamingo --to runs/flamingo
  python -m vita_jax.convert import --model lora --base runs/vita_1_5 --from adapters --to runs/adapted
  python -m vita_jax.convert export --layout peft --from runs/adapted --to adapters

An import that was interrupted goes on when the same command is given again. `.bin` and `.pt` files need torch
(pip install 'vita_jax[convert]'), safetensors files do not.
"""


def make_parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(prog="python -m vita_jax.convert", description=DESCRIPTION, epilog=EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    add = actions.add_parser("import", description="A public folder -> a run with one checkpoint.", epilog=EXAMPLES)
    add.add_argument("--model", metavar="NAME", choices=(*MODELS, LORA), required=True, help=", ".join((*MODELS, LORA)))
    add.add_argument("--from", dest="source", metavar="DIR", required=True, help="the public folder, or its one file")
    add.add_argument("--to", dest="target", metavar="DIR", required=True, help="the run: a new folder")
    add.add_argument("--dtype", choices=DTYPES, help="of the parameters; default: as they are")
    add.add_argument("--system-texts", metavar="FILE", help="JSON with the texts for image, video and lang")
    add.add_argument(
        "--allow",
        nargs="+",
        default=[],
        choices=ALLOWANCES,
        help="leave out what tensors are missing for or have another shape; pass over tensors that nothing uses",
    )
    add.add_argument("--base", metavar="CHECKPOINT", help="with --model lora: what the adapters are for")
    add.add_argument("--keep-adapters", action="store_true", help="with --model lora: beside the weights, not merged")
    add.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    add.set_defaults(run=import_folder)

    out = actions.add_parser("export", description="A run or checkpoint -> a folder.", epilog=EXAMPLES)
    out.add_argument("--from", dest="source", metavar="CHECKPOINT", required=True, help="a run, or one checkpoint")
    out.add_argument("--to", dest="target", metavar="DIR", required=True, help="a new folder")
    out.add_argument(
        "--layout",
        choices=("pytorch", "vita_jax", "peft", *LLAVA_LAYOUTS),
        default="pytorch",
        help="pytorch: names, config and tokenizer of public checkpoints; vita_jax: for this package, without the run; "
        "peft: the adapters (LoRA) alone, which all others merge; of a LLaVA also original, hf (the public llava-hf "
        "files), hf_5 (what transformers 5 writes), hf_memory (its state dict)",
    )
    out.add_argument("--dtype", choices=DTYPES, help="default: as they are; with --layout vita_jax of matrices only")
    out.add_argument("--shard-gb", type=float, default=1.0, metavar="N", help="largest file of weights; default 1")
    out.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")
    out.set_defaults(run=export_checkpoint)

    show = actions.add_parser("inspect", description="What is in a checkpoint, public or ours.", epilog=EXAMPLES)
    show.add_argument("path", metavar="PATH", help="a public folder or file, a run, a checkpoint, an exported folder")
    show.add_argument("--model", metavar="NAME", choices=MODELS, help="how to read it; default: by its names")
    show.set_defaults(run=inspect_path)

    check = actions.add_parser("verify", description="Compares a checkpoint with a public folder.", epilog=EXAMPLES)
    check.add_argument("--model", metavar="NAME", choices=MODELS, required=True, help="how to read the public folder")
    check.add_argument("--from", dest="source", metavar="CHECKPOINT", required=True, help="a run, or one checkpoint")
    check.add_argument("--against", metavar="DIR", required=True, help="the public folder")
    check.set_defaults(run=verify_checkpoint)
    return parser


def import_adapters(arguments: argparse.Namespace) -> int:
    """`import --model lora`."""
    from vita_jax.exchange.adapters import import_lora, read_adapters
    from vita_jax.exchange.exporting import open_checkpoint

    if arguments.base is None:
        raise UserError("--model lora needs --base, the checkpoint that the adapters are for")
    base = open_checkpoint(arguments.base)
    if arguments.dry_run:
        read_adapters(base, arguments.source)
        print("the adapters fit")
        return 0
    for warning in import_lora(base, arguments.source, arguments.target, merged=not arguments.keep_adapters):
        print(f"warning: {warning}")
    print(f"written: {arguments.target}")
    return 0


def import_folder(arguments: argparse.Namespace) -> int:
    """`import`."""
    if arguments.model == LORA:
        return import_adapters(arguments)
    if arguments.base is not None or arguments.keep_adapters:
        raise UserError("--base and --keep-adapters belong to --model lora")
    # Imported here, as below, so that --help and a mistyped argument answer at once.
    from vita_jax.data.templates import SystemTexts
    from vita_jax.exchange.importing import fitting_table, import_released
    from vita_jax.exchange.released import read_released

    texts = None if arguments.system_texts is None else SystemTexts.from_file(arguments.system_texts)
    released = read_released(arguments.model, arguments.source)
    for note in released.notes:
        print(f"note: {note}")
    if arguments.model.startswith("vita") and texts is None:
        print("note: no --system-texts: prompts will have a plain system text, not those the weights were trained with")
    if arguments.model == "llava" and texts is None:
        print("note: no --system-texts: prompts will have no system text, as those of the model card of v1.5")
    if arguments.dry_run:
        table, notes = fitting_table(released, arguments.allow)
        print("\n".join([*notes, f"{len(table.torch_names)} tensors would become {len(table.rules)} parameters"]))
        return 0
    with Bar("reading") as bar:
        warnings = import_released(
            released,
            arguments.target,
            allow=arguments.allow,
            dtype=arguments.dtype,
            system_texts=texts,
            progress=bar.show,
        )
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"written: {arguments.target} ({bar.summary()})")
    return 0


def export_checkpoint(arguments: argparse.Namespace) -> int:
    """`export`."""
    from vita_jax.exchange import exporting
    from vita_jax.training.checkpoint import load_params
    from vita_jax.training.portable import PortableModel, write_portable

    if arguments.shard_gb <= 0:
        raise UserError(f"--shard-gb {arguments.shard_gb:g} must be above 0")
    if arguments.dry_run:
        from vita_jax.exchange.inspecting import format_rows, stored_rows

        print("\n".join(format_rows(stored_rows(exporting.open_checkpoint(arguments.source)))))
        return 0
    if arguments.layout == "peft":
        from vita_jax.exchange.adapters import export_lora

        files = export_lora(exporting.open_checkpoint(arguments.source, merge_adapters=False), arguments.target)
    elif arguments.layout == "vita_jax":
        loaded = load_params(arguments.source)
        model = PortableModel(loaded.params, loaded.config, loaded.stage, loaded.step)
        files = write_portable(arguments.target, model, loaded.run_dir, arguments.dtype)
    else:
        stored = exporting.open_checkpoint(arguments.source)
        shard_bytes = int(arguments.shard_gb * 10**9)
        with Bar("writing") as bar:
            files = exporting.export_checkpoint(
                stored,
                arguments.target,
                layout=arguments.layout if arguments.layout in LLAVA_LAYOUTS else None,
                dtype=arguments.dtype,
                shard_bytes=shard_bytes,
                progress=bar.show,
            )
    size = sum((Path(arguments.target) / file).stat().st_size for file in files)
    print(f"written: {arguments.target}, {len(files)} files, {size / 1e6:,.1f} MB")
    return 0


def inspect_path(arguments: argparse.Namespace) -> int:
    """`inspect`."""
    from vita_jax.exchange.inspecting import inspect

    for line in inspect(arguments.path, arguments.model):
        print(line)
    return 0


def verify_checkpoint(arguments: argparse.Namespace) -> int:
    """`verify`."""
    from vita_jax.exchange.inspecting import open_and_verify

    with Bar("comparing") as bar:
        compared = open_and_verify(arguments.source, arguments.model, arguments.against, bar.show)
    print(f"the same bits in all {compared:,} tensors")
    return 0


class Bar:
    """A line on stderr, rewritten in place where that is a terminal; and the rate at the end."""

    WIDTH = 30
    EVERY_SECONDS = 0.2

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._visible = sys.stderr.isatty()
        self._start = time.monotonic()
        self._shown = 0.0
        self._done = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._visible:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int, name: str) -> None:
        """Called after every tensor."""
        self._done = done
        now = time.monotonic()
        if not self._visible or (now - self._shown < self.EVERY_SECONDS and done < total):
            return
        self._shown = now
        filled = self.WIDTH * done // max(total, 1)
        bar = "#" * filled + "-" * (self.WIDTH - filled)
        text = f"{self._verb} [{bar}] {done / 1e9:.2f} of {total / 1e9:.2f} GB  {name}"
        print(f"\r\x1b[2K{text[:118]}", end="", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Bytes and rate."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{self._done / 1e6:,.1f} MB in {seconds:.1f} s, {self._done / 1e6 / seconds:,.0f} MB/s"


def convert(arguments: argparse.Namespace) -> int:
    """Runs the chosen action."""
    return arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 bad input."""
    return run_command(convert, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
