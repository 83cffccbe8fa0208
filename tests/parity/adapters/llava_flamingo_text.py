"""Tables of LLaVA and Flamingo: prompts, labels, masks, interleaved documents, judged answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.parity.adapters.chat import Differences
from tests.parity.cases import Case
from vita_jax.data import flamingo_prompts, llava_prompts
from vita_jax.data.interleaved import (
    END_OF_CHUNK,
    IMAGE,
    NO_IMAGE,
    SINGLE_IMAGE,
    DocumentOptions,
    build_document,
    interleaved_labels,
    pair_labels,
    pair_text,
)
from vita_jax.data.prompt_tokens import IGNORE, IMAGE_TOKEN, tokenize_with_placeholders
from vita_jax.data.templates import get_template
from vita_jax.evaluation.llava_bench import parse_scores, summarise
from vita_jax.ops.media import media_attention, media_mask, media_times


class ByteTokenizer:
    """The toy tokenizer that the table of prompts describes: BOS 1, then 3 + byte; `</s>` and `<s>` are 2 and 1."""

    special_tokens = {"</s>": 2, "<s>": 1}
    pad_id, eos_id, vocab_size = 0, 2, 259

    def __init__(self, bos: bool = True) -> None:
        self.bos_id = 1 if bos else None

    def encode(self, text: str, *, allow_special: bool = True, add_bos: bool = True) -> list[int]:
        ids = [] if self.bos_id is None or not add_bos else [self.bos_id]
        for part in re.split("(</?s>)", text) if allow_special else [text]:
            if allow_special and part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                ids += [3 + byte for byte in part.encode("utf-8")]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        names = {1: b"<s>", 2: b"</s>", IMAGE_TOKEN: b"<image>"}
        return b"".join(names.get(id_) or bytes([id_ - 3]) for id_ in ids).decode("utf-8", errors="replace")


def llava_prompts_table(case: Case) -> list[str]:
    """Rendered prompts, ids and labels, and the tokenisation of prompts with images."""
    differences = Differences()
    for row in case.table["label_mask_cases"]:
        _label_row(row, differences)
    for number, row in enumerate(case.table["prompt_cases"]):
        _prompt_row(f"prompt {number}", row, differences)
    for row in case.table["tokenizer_image_token_cases"]:
        got = tokenize_with_placeholders(row["prompt"], ByteTokenizer(row["bos"]))
        differences.check(repr(row["prompt"]), "input_ids", got, row["input_ids"])
    return differences.found


def _label_row(row: Mapping[str, Any], differences: Differences) -> None:
    tokenizer, name = ByteTokenizer(), row["name"]
    options = replace(llava_prompts.ORIGINAL_QUIRKS, image_markers=row["mm_use_im_start_end"])
    encoded = llava_prompts.encode_conversation(
        row["conversations"],
        tokenizer=tokenizer,
        template=get_template(row["template"]),
        system=row["system"],
        options=options,
        max_length=row["model_max_length"],
    )
    ids, labels = encoded.input_ids, encoded.labels
    # The table's prompt is that of the ids, which may have been cut.
    prompt = encoded.prompt
    if prompt != row["prompt"]:
        prompt = tokenizer.decode(ids[1:].tolist())
    supervised = labels != IGNORE
    edges = np.flatnonzero(np.diff(np.pad(supervised, 1).astype(int)))
    answers = [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    got = {
        "after_multimodal_preprocess": llava_prompts.prepare(row["conversations"], options),
        "prompt": prompt,
        "input_ids": ids.tolist(),
        "label_mask": supervised.astype(int).tolist(),
        "supervised_text": answers,
        "all_ignored": not supervised.any(),
    }
    for field, value in got.items():
        differences.check(name, field, value, row[field])
    differences.check(name, "labels", labels[supervised].tolist(), ids[supervised].tolist())


def _prompt_row(name: str, row: Mapping[str, Any], differences: Differences) -> None:
    template = get_template(row["template"])
    messages = [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(row["messages"]) if text is not None
    ]
    got = {
        "roles": list(template.roles),
        "sep_style": template.style,
        "sep": template.sep,
        "sep2": template.sep2,
        "version": template.version,
        "prompt": llava_prompts.render(messages, template, row["system"], open_turn=row["messages"][-1] is None),
    }
    for field, value in got.items():
        differences.check(f"{name} ({template.name})", field, value, row[field])


def llava_bench_score(case: Case) -> list[str]:
    differences = Differences()
    reviews = [(row["category"], parse_scores(row["text"])) for row in case.table["reviews"]]
    for row, (_, scores) in zip(case.table["reviews"], reviews, strict=True):
        differences.check(repr(row["text"]), "parsed", list(scores), row["parsed"])
    got = {category: vars(score) for category, score in summarise(reviews).items()}
    differences.check("summary", "figures", got, case.table["summary"])
    return differences.found


def flamingo_prompts_table(case: Case) -> list[str]:
    differences, table = Differences(), case.table
    functions = {
        "vqa": flamingo_prompts.question_prompt,
        "caption": flamingo_prompts.caption_prompt,
        "imagenet": flamingo_prompts.class_prompt,
    }
    for row in table["single"]:
        task = row["name"].split("_")[0]
        if task == "hateful":
            text, *answer = row["args"]
            got = flamingo_prompts.meme_prompt(text, tuple(row["wording"]), *answer)
        else:
            got = functions[task](*row["args"])
        differences.check(row["name"], "prompt", got, row["prompt"])
    for task, demonstrations, query in (
        (
            "vqa",
            [flamingo_prompts.question_prompt(*pair) for pair in table["demos_vqa"]],
            flamingo_prompts.question_prompt(table["question"]),
        ),
        (
            "caption",
            [flamingo_prompts.caption_prompt(caption.strip()) for caption in table["demos_cap"]],
            flamingo_prompts.caption_prompt(),
        ),
    ):
        for name, pictures in (("few_shot", True), ("zero_shot", False)):
            got = flamingo_prompts.few_shot_prompt(demonstrations, query, pictures=pictures)
            differences.check(name, task, got, table[f"{name}_{task}"])
    for shots, want in table["effective_shots"].items():
        differences.check(shots, "effective_shots", flamingo_prompts.effective_shots(int(shots)), want)
    return differences.found


def flamingo_masks(case: Case) -> list[str]:
    """Which picture is seen where, by the mask and by running the attention with equal keys; and labels."""
    differences, table = Differences(), case.table
    pad, tag, end = (table[name] for name in ("pad_token_id", "media_token_id", "eoc_token_id"))
    for row in table["cases"]:
        ids = np.asarray(row["ids"])[None]
        locations = jnp.asarray(ids == tag)
        times, pictures, tokens = media_times(locations), row["T_img"], row["n_latents"]
        seen = {name: media_mask(times, pictures, all_previous=name == "all_previous") for name in _MODES}
        got = {
            "media_locations": np.asarray(locations[0], int).tolist(),
            "text_time": times[0].tolist(),
            "zeroed_rows_immediate": np.asarray(times[0] == 0, int).tolist(),
            "cached_next_token_mass_immediate": _mass(times[:, -1:], pictures, tokens, "immediate")[0],
            "labels_pair_rule": pair_labels(ids, pad, tag)[0].tolist(),
            "labels_interleaved_rule": interleaved_labels(ids, pad, tag, end)[0].tolist(),
        }
        for name in _MODES:
            got[f"allowed_{name}"] = np.asarray(seen[name][0], int).tolist()
            got[f"attention_mass_{name}"] = _mass(times, pictures, tokens, name)
        for field, value in got.items():
            differences.check(row["name"], field, value, row[field])
    return differences.found


_MODES = ("immediate", "all_previous")


def _mass(times: Any, pictures: int, tokens: int, mode: str) -> list[list[float]]:
    """Share of every picture in the attention of every position, as the table rounds it."""
    q = jnp.ones((1, times.shape[1], 1, pictures))
    k = jnp.ones((1, pictures, tokens, 1, pictures))
    v = jnp.broadcast_to(jnp.eye(pictures)[None, :, None, None], k.shape)
    out = media_attention(q, k, v, times, all_previous=mode == "all_previous", without_media="uniform")
    return [[round(float(x), 6) for x in row] for row in np.asarray(out[0, :, 0])]


def flamingo_interleave(case: Case) -> list[str]:
    """Documents with pictures, in the original's order; every word is id 7."""
    differences, table = Differences(), case.table
    eos, pairs = table["eos_token"], table["pair_texts"]
    got = [pair_text(caption, eos) for caption in pairs["captions"]]
    differences.check("pairs", "texts", got, pairs["texts"])
    special = {END_OF_CHUNK: 95, IMAGE: 96, eos: 2}

    def encode(text: str) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
        return [id_ for part in parts for id_ in ([special[part]] if part in special else [7] * len(part.split()))]

    for row in table["cases"]:
        options = DocumentOptions(
            similarity_threshold=row["sim_threshold"],
            max_images=row["max_num_images"],
            min_images=row["min_num_images"],
            max_tokens=row["max_tokens"],
            order="image",
        )
        document = build_document(
            row["sentences"],
            np.asarray(row["similarity"]),
            row["image_bytes"],
            encode=encode,
            eos=eos,
            image_token=special[IMAGE],
            pad_token=0,
            draw=row["random_draw"],
            options=options,
        )
        got = {
            "assignment_image_sentence_score": [list(item) for item in document.assignment],
            "rejected": document.rejected is not None,
            "text": document.text,
            "image_order": list(document.images),
            "n_real_images": len(document.images),
            "images_shape0": options.max_images,
        }
        if document.ids is not None:
            got |= {"ids": document.ids.tolist(), "attention_mask": document.attention_mask.tolist()}
        if row.get("reason") in (NO_IMAGE, SINGLE_IMAGE):  # the words for the other reasons are the package's own
            got["reason"] = document.rejected
        for field, value in got.items():
            if field in row:
                differences.check(row["name"], field, value, row[field])
    return differences.found


MODULES = {
    "llava_prompts": llava_prompts_table,
    "llava_bench_score": llava_bench_score,
    "flamingo_prompts": flamingo_prompts_table,
    "flamingo_masks": flamingo_masks,
    "flamingo_interleave": flamingo_interleave,
}
