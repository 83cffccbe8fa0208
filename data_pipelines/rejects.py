"""What the builders share about what they cannot use: how much of it is allowed, and where it is written down."""

from __future__ import annotations

from pathlib import Path

from vita_jax.errors import UserError

REJECTS_NAME = "rejects.jsonl"


def check_budget_bounds(max_bad_fraction: float) -> None:
    """Raises UserError for a budget of rejects that is no share."""
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction is {max_bad_fraction}; it must be between 0 and 1")


def within_budget(bad: int, total: int, max_bad_fraction: float) -> bool:
    """Whether so many rejects are allowed; never are all."""
    return bad <= max_bad_fraction * total and bad < total


def check_budget(
    source: str, things: str, bad: int, total: int, max_bad_fraction: float, file: Path, first: str = ""
) -> None:
    """Whether a build may end with so many rejects.

    Args:
      source, things: what they come from, and what they are, for example "records".
      bad, total: how many of them were rejected.
      max_bad_fraction: the budget.
      file: where the reasons are.
      first: one of them; "" if it is not at hand.

    Raises:
      UserError: they are too many, or all there are.
    """
    if within_budget(bad, total, max_bad_fraction):
        return
    example = f"; the first: {first}" if first else ""
    raise UserError(
        f"{source}: {bad} of {total} {things} rejected ({bad / max(total, 1):.1%}), "
        f"max_bad_fraction is {max_bad_fraction:g}; all reasons are in {file}{example}"
    )


def beside(output: Path) -> Path:
    """Where the reasons are when a build fails and its folder stays as it was."""
    return output.with_name(f"{output.name}.{REJECTS_NAME}")


def check_output(output: Path, signs: tuple[str, ...]) -> None:
    """Whether a folder may be made, or replaced.

    Args:
      output: the folder.
      signs: files that an earlier build of the same command leaves, all of them.

    Raises:
      UserError: it is a file, or holds something else.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output {output} is a file; give a folder")
    if any(output.iterdir()) and not all((output / name).is_file() for name in signs):
        raise UserError(f"output folder {output} holds something that was not built here; give a new or empty folder")
