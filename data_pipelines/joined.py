"""Joins records as the original packed its data (`concat_data_patch.py`): shuffled, then consecutive ones as one
conversation up to a number of tokens. What is joined shares a system prompt and attends to each other.

Training packs rows by itself and keeps conversations apart (`vita_jax.data.packing`); this is for data that is to look
as that of the released models did. Rounds of a joined record are one conversation in everything that follows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.parts import Progress
from data_pipelines.records import LONGEST_AUDIO
from data_pipelines.rejects import beside, check_budget, check_budget_bounds
from data_pipelines.sources import RecordsFile
from vita_jax.data.audio import read_audio
from vita_jax.data.images import ImageConfig, open_image, tile_count
from vita_jax.data.joining import ORIGINAL_MAX_TOKENS, estimate_tokens, greedy_groups, join_records
from vita_jax.data.records import PLACEHOLDERS, CheckedRecord, RecordError, read_media
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError
from vita_jax.ops.filter_bank import RELEASED

ALONE = ("inserted_id", "end_tag", "video")  # fields of records that cannot be joined
EVERY = 500  # records between two lines of progress


def join_file(
    source: RecordsFile,
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    max_tokens: int = ORIGINAL_MAX_TOKENS,
    seed: int = 0,
    image: ImageConfig = ImageConfig(),  # noqa: B008
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes the joined records as a JSON list, which `build records` takes like any other.

    Args:
      source: records in the public format; all of their text is held in memory.
      output: the file to write. Media stay where they are: the same root or folders belong to it.
      tokenizer: counts the tokens of text.
      max_tokens: of a joined record; longer records stay alone.
      seed: of the order in which they are joined.
      image: decides how many tiles a picture counts.
      max_bad_fraction: of the records that may be unusable; they are listed in OUTPUT.rejects.jsonl.
      progress: called with a short line now and then.

    Returns:
      Counts: records read, joined, left alone because of a field that cannot be joined, rejected, and written.

    Raises:
      UserError: the source cannot be read, or too many records are unusable.
    """
    check_budget_bounds(max_bad_fraction)
    source.check()
    usable, rejects = [], []
    for place, entry in enumerate(source.entries()):
        try:
            checked = source.checked(entry, place)
            usable.append((_with_sets(entry["record"], checked), _tokens(checked, tokenizer, image)))
        except RecordError as error:
            rejects.append({"record": place, "field": error.field, "reason": str(error)})
        if progress is not None and (place + 1) % EVERY == 0:
            progress(f"records of {source.name}: {place + 1}")
    output = Path(output)
    if rejects:
        lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
        beside(output).write_text(lines, encoding="utf-8")
    total = len(usable) + len(rejects)
    check_budget(source.name, "records", len(rejects), total, max_bad_fraction, beside(output))
    random.Random(seed).shuffle(usable)
    alone = [record for record, _ in usable if any(name in record for name in ALONE)]
    others = [(record, tokens) for record, tokens in usable if not any(name in record for name in ALONE)]
    groups = greedy_groups([tokens for _, tokens in others], max_tokens)
    joined = [joined_group([others[index][0] for index in group]) for group in groups]
    written = [record for group in joined for record in group] + alone
    output.write_text(json.dumps(written, ensure_ascii=False, indent=1), encoding="utf-8")
    return {
        "records": total,
        "joined": sum(len(group) for group, result in zip(groups, joined, strict=True) if len(result) < len(group)),
        "alone": len(alone),
        "rejected": len(rejects),
        "written": len(written),
    }


def joined_group(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The group as one record; as it was where its files could not be told apart any more: some with a set, some
    without.
    """
    if len(records) == 1:
        return list(records)
    files = sum(len(_listed(record.get(kind))) for record in records for kind in PLACEHOLDERS)
    named = sum(len(_listed(record.get("set"))) for record in records)
    if named not in (0, files):
        return list(records)
    return [{name: value for name, value in join_records(records).items() if name != "set" or value}]


def _with_sets(record: Mapping[str, Any], checked: CheckedRecord) -> dict[str, Any]:
    """The record with a set for each of its files, or none."""
    sets = [file.set for file in checked.files if file.set is not None]
    return {**{name: value for name, value in record.items() if name != "set"}, **({"set": sets} if sets else {})}


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _tokens(checked: CheckedRecord, tokenizer: Tokenizer, image: ImageConfig) -> int:
    """As the original estimates a record. Raises RecordError for media that cannot be read."""
    text = "\n".join(turn["value"] for turn in checked.record.conversations)
    tiles, seconds = 0, []
    for file in checked.files:
        media = read_media(file, checked.where)
        try:
            if file.kind == "image":
                tiles += tile_count(*open_image(media.data, name=file.name).size, image)
            elif file.kind == "audio":
                samples = read_audio(media.data, LONGEST_AUDIO, name=file.name, sample_rate=RELEASED.sample_rate)
                seconds.append(len(samples) / RELEASED.sample_rate)
        except UserError as error:
            raise RecordError(checked.where, file.kind, str(error), "damaged media") from None
    return estimate_tokens(len(tokenizer.encode(text, allow_special=False, add_bos=False)), tiles, seconds)
