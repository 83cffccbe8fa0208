"""Chat templates, prompts, ids and labels against the golden tables. All inputs come from the table itself."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.parity.cases import Case
from vita_jax.data import prompts
from vita_jax.data.templates import TEMPLATES, SystemTexts, get_template
from vita_jax.data.tokenizer import Tokenizer, load_tokenizer
from vita_jax.errors import UnsupportedOption

REAL_TOKENIZER_VARIABLE = "VITA_JAX_QWEN_TOKENIZER"


class Differences:
    """Collects what does not agree, with the row it belongs to."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def check(self, row: str, name: str, got: Any, want: Any) -> None:
        """Records a difference."""
        if got != want:
            self.found.append(f"{row}: {name}: got {got!r}, expected {want!r}")


def chat_templates(case: Case) -> list[str]:
    """Every template of the table, field by field."""
    differences = Differences()
    table = case.table["templates"]
    for name, want in table.items():
        if name not in TEMPLATES:
            differences.check(name, "template", None, want)
            continue
        template = get_template(name)
        got = {
            "system_slots": template.system_slots,
            "roles": list(template.roles),
            "sep": template.sep,
            "sep2": template.sep2,
            "sep_style": template.style,
            "version": template.version,
        }
        for field, value in want.items():
            differences.check(name, field, got.get(field, "no such field"), value)
    return differences.found


def chat_prompts(case: Case) -> list[str]:
    """Training and inference rows, from the record to the labels."""
    tokenizer = load_tokenizer(case.path.parent / case.table["tokenizer"])
    return _compare(case.table, case.table, tokenizer, prompts.ORIGINAL_QUIRKS)


def chat_state_labels(case: Case) -> list[str]:
    """The state-head variant: no state symbol in the text, one label for each sound."""
    tokenizer = load_tokenizer(case.path.parent / case.table["tokenizer"])
    options = replace(prompts.ORIGINAL_QUIRKS, state_symbols=False)
    return _compare(case.table, case.table, tokenizer, options)


def chat_real_ids(case: Case) -> list[str]:
    """The rows of the tiny-tokenizer table beside it, with the public vocabulary."""
    folder = os.environ.get(REAL_TOKENIZER_VARIABLE)
    if not folder:
        raise UnsupportedOption(
            f"chat_real_ids: needs the public tokenizer files; set {REAL_TOKENIZER_VARIABLE} to a folder with them"
        )
    tokenizer = load_tokenizer(folder)
    records = json.loads((case.path.parent / "conversation_qwen2p5_instruct.json").read_text(encoding="utf-8"))
    found = _compare(case.table, records, tokenizer, prompts.ORIGINAL_QUIRKS)
    differences = Differences()
    for token, want in {**case.table["state_token_ids"], **case.table["special_ids"]}.items():
        differences.check(token, "id", tokenizer.encode(token, add_bos=False), [want])
    return found + differences.found


def _compare(
    table: Mapping[str, Any], records: Mapping[str, Any], tokenizer: Tokenizer, options: prompts.PromptOptions
) -> list[str]:
    """Rows of `table` (what is expected) for the rows of the same name in `records` (what is given)."""
    differences = Differences()
    template = get_template(table["template"])
    for name, got in (
        ("pad_token_id", tokenizer.pad_id),
        ("bos_token_id", tokenizer.bos_id),
        ("eos_token_id", tokenizer.eos_id),
        ("image_token_index", prompts.IMAGE_TOKEN),
        ("audio_token_index", prompts.AUDIO_TOKEN),
        ("ignore_index", prompts.IGNORE),
    ):
        differences.check("header", name, got, table.get(name, got))
    system_texts = SystemTexts.from_dict(table["system_texts"])
    common = {"tokenizer": tokenizer, "template": template, "system_texts": system_texts, "options": options}
    for key, compare_row in (("cases", _training_row), ("inference_cases", _inference_row)):
        given = {row["name"]: row for row in records.get(key, ())}
        for want in table.get(key, ()):
            row = given[want["name"]]
            differences.check(want["name"], "system", system_texts.select(row["modality"]), want["system"])
            got = compare_row(row, common, records.get("model_max_length"))
            for field in set(want) - {"name", "modality", "system", "conversations", "args", "note", "question"}:
                differences.check(want["name"], field, got.get(field, "not computed"), want[field])
    return differences.found


def _training_row(row: Mapping[str, Any], common: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    conversations, args = row["conversations"], row["args"]
    inserted_id = args.get("inserted_id")
    media = _media_counts(conversations, args)
    encoded = prompts.encode_conversation(
        conversations,
        **common,
        **media,
        modality=row["modality"],
        inserted_id=inserted_id,
        end_tag=args.get("end_tag", True),
        max_length=max_length,
    )
    return {
        "sources_after_preprocess_multimodal": prompts.preprocess_multimodal(
            conversations, common["template"], **media, inserted_id=inserted_id, options=common["options"]
        ),
        "prompt": encoded.prompt,
        "input_ids": encoded.input_ids.tolist(),
        "labels": encoded.labels.tolist(),
        "tokenization_mismatch": encoded.miscounted,
        "state_labels": prompts.state_labels(conversations, inserted_id),
    }


def _media_counts(conversations: Sequence[Mapping[str, str]], args: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    images, videos, _ = prompts.count_placeholders(conversations)
    # The original's defaults: one tile, one frame.
    return {
        "tile_counts": args.get("patch_num", [1]) if images else (),
        "frame_counts": [args.get("image_token_num", 1)] * videos,
    }


def _inference_row(row: Mapping[str, Any], common: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    encoded = prompts.encode_prompt(row["question"], **common, modality=row["modality"], prepared=True)
    return {"prompt": encoded.prompt, "input_ids": encoded.input_ids.tolist()}


MODULES = {
    "chat_templates": chat_templates,
    "chat_prompts": chat_prompts,
    "chat_real_ids": chat_real_ids,
    "chat_state_labels": chat_state_labels,
}
