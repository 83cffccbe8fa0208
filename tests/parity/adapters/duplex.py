"""Duplex prompts, voice activity, spoken text, the original's packing, and the state head on the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.parity.adapters.language import vita
from tests.parity.cases import Case, Result
from vita_jax.conversion.tables import import_params
from vita_jax.data.joining import greedy_groups
from vita_jax.inference import speech_text
from vita_jax.inference.history import Request, duplex_format, merge_history, system_modality
from vita_jax.inference.vad import UtteranceState, VadOptions, VadState, listen, vad_step
from vita_jax.models import state_head

Rows = list[str]


def _differ(row: Any, name: str, got: Any, want: Any) -> Rows:
    return [] if got == want else [f"{row}: {name}: got {got!r}, expected {want!r}"]


def duplex_history(case: Case) -> Rows:
    mismatches: Rows = []
    for version, rows in case.table.items():
        if not isinstance(rows, list):
            continue
        style = duplex_format(version)
        for number, row in enumerate(rows):
            past = [_request(entry) for entry in row["history"]]
            current, at = _request(row["current"]), f"{version}[{number}]"
            system = case.table["system_texts"][system_modality(current)]
            prompt, media = merge_history(past, current, system, style)
            mismatches += _differ(at, "system", system, row["system"])
            mismatches += _differ(at, "prompt", prompt, row["prompt"])
            mismatches += _differ(at, "multi_modal_data", media, row["multi_modal_data"])
    return mismatches


def _request(entry: dict[str, Any]) -> Request:
    return Request(entry["prompt"], entry.get("multi_modal_data", {}), entry.get("response"))


def duplex_vad(case: Case) -> Rows:
    mismatches: Rows = []
    for number, row in enumerate(case.table["cases"]):
        options = VadOptions(min_silence_ms=row.get("min_silence_duration_ms", 500))
        events, dialog = [], []
        vad, listener = VadState(), UtteranceState()
        for index, probability in enumerate(row["probs"]):
            vad, event = vad_step(vad, probability, row["chunk_size"], options)
            if event is not None:
                events.append({"chunk_index": index, event.kind: event.sample})
            chunk = np.full(row["chunk_size"], index, np.float32)
            listener, event, utterance = listen(listener, chunk, probability, options)
            if utterance is not None:
                chunks = utterance.reshape(-1, row["chunk_size"])[:, 0].astype(int).tolist()
                dialog.append({"chunk_index": index, "dialog_samples": len(utterance), "dialog_chunks": chunks})
            elif event is not None:
                dialog.append({"chunk_index": index, "start_seconds": event.seconds})
        mismatches += _differ(number, "events", events, row["events"])
        mismatches += _differ(number, "dialog", dialog, row.get("dialog", dialog))
    return mismatches


def duplex_tts_text(case: Case) -> Rows:
    mismatches: Rows = []
    for row in case.table["cases"]:
        text = row["text"]
        mismatches += _differ(repr(text), "no_state", speech_text.remove_markers(text), row["no_state"])
        mismatches += _differ(repr(text), "normalised", speech_text.clean_for_speech(text), row["normalised"])
    return mismatches


def data_packing(case: Case) -> Rows:
    mismatches: Rows = []
    for number, row in enumerate(case.table["cases"]):
        got = greedy_groups(row["token_lens"], row["concat_size"])
        mismatches += _differ(number, "groups", got, row["groups"])
    return mismatches


def vita_state_head(case: Case) -> Result:
    """The whole model, then the head; each sound is preceded by learned prompt rows, which lengthen it."""
    head = {name: x for name, x in case.weights.items() if name.startswith("predictor_head.")}
    rest = {name: x for name, x in case.weights.items() if name not in head}
    prompts = case.config["extra"].get("audio_prompt_num", 0)
    audio = case.config["audio"] | {"prompt_num": prompts}
    whole = vita(replace(case, weights=rest, config=case.config | {"audio": audio}))

    hidden, labels = whole.outputs["last_hidden_state"], whole.outputs["labels"]
    config = state_head.two_class_head(hidden.shape[-1])
    params = import_params(state_head.weight_table(config), head)
    logits = state_head.StateHead(config).apply({"params": params}, hidden)
    total, weight = state_head.state_loss(logits, labels, config)
    lm_loss = whole.outputs["loss"]
    outputs = {**whole.outputs, "state_logits": logits, "lm_loss": lm_loss, "loss": lm_loss + total / weight}
    return Result(outputs, {**whole.valid, "state_logits": whole.valid["logits"]}, whole.pending)


MODULES = {
    "duplex_history": duplex_history,
    "duplex_vad": duplex_vad,
    "duplex_tts_text": duplex_tts_text,
    "data_packing": data_packing,
    "vita_state_head": vita_state_head,
}
