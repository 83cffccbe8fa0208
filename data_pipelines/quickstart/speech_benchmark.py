"""The speech part of the quickstart's benchmark: voices, statements and scans that training never has.

    items.jsonl          one item a line: id, group, kind, language, num_digits, question, answer, image, audio
    transcripts.jsonl    what is said in each item's clip, and by which voices
    speech_out/          held-out texts in the assistant's voice, as the training set of that name

Groups: `spoken` (a picture and a spoken question, `question` is empty), `noise` (something that is not for the model,
the right answer is a refusal), `transcribe` (`question` asks in writing for what is said; `kind` tells what is new).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_pipelines.quickstart.questions import KINDS, LANGUAGES, ask
from data_pipelines.quickstart.scans import ScanSplit
from data_pipelines.quickstart.scenes import MAX_DIGITS, sample_scene
from data_pipelines.quickstart.sentences import REFUSAL, TRANSCRIBE, distinct_sentences, split_of
from data_pipelines.quickstart.speech_sets import Folder, SpeechCounts, noise_clip, write_lines
from data_pipelines.speech.clips import SPEECH
from data_pipelines.speech.noises import UNSEEN_KIND
from data_pipelines.speech.voices import draw_delivery, held_out_voices, training_voices
from vita_jax.errors import UserError

# Kinds of the group `noise`, and the kind of clip each is.
NOISE_KINDS = {
    "statement": SPEECH,
    "babble": "babble",
    "second_speaker": "second_speaker",
    "hum": "hum",
    "pink": "pink",
    "chords": "chords",
    UNSEEN_KIND: UNSEEN_KIND,
}
TRANSCRIBE_KINDS = ("new_sentence", "new_voice", "both_new")

Item = dict[str, Any]
Add = Callable[..., None]


def plan_benchmark(folder: Folder, asr: Folder, scans: ScanSplit, counts: SpeechCounts) -> list[Item]:
    """Plans the clips of all items and draws their pictures.

    Args:
      folder: of the benchmark.
      asr: the transcribed training set, whose sentences the kind "new_voice" repeats.
      scans: held-out ones.

    Returns:
      The items; both languages in equal shares of every kind.

    Raises:
      UserError: fewer sentences in `asr` than the benchmark repeats.
    """
    items: list[Item] = []

    def add(group: str, kind: str, language: str, text: str, **fields: Any) -> None:
        clip = folder.clips[-1]
        item = {"id": f"{group}-{len(items)}", "group": group, "kind": kind, "language": language}
        items.append({**item, **fields})
        voices = [f"{delivery.accent}+{delivery.variant}" for _, delivery in clip.parts]
        folder.manifest.append({"id": item["id"], "audio": fields["audio"], "text": text, "voices": voices})

    _add_spoken(folder, add, scans, counts.benchmark_spoken)
    _add_noise(folder, add, scans, counts.benchmark_noise)
    _add_transcribe(folder, add, asr, counts.benchmark_transcribe)
    return items


def write_benchmark(folder: Folder, items: list[Item]) -> None:
    """Writes the items; what is said in them has another name than the manifests of training sets."""
    write_lines(folder.path / "items.jsonl", items)
    (folder.path / "manifest.jsonl").rename(folder.path / "transcripts.jsonl")


def _add_spoken(folder: Folder, add: Add, scans: ScanSplit, per_kind: int) -> None:
    for kind in KINDS:
        for index in range(per_kind):
            scene = sample_scene(folder.rng, num_digits=index % MAX_DIGITS + 1)
            language = LANGUAGES[index // MAX_DIGITS % len(LANGUAGES)]
            question = ask(scene, kind, language, folder.rng)
            delivery = draw_delivery(held_out_voices(language), folder.rng)
            audio = folder.clip(parts=((question.text, delivery),), varied=False)
            media = {"image": folder.picture(scene, scans), "audio": audio}
            add("spoken", kind, language, question.text, num_digits=len(scene.digits), question="",
                answer=question.answer, **media)  # fmt: skip


def _add_noise(folder: Folder, add: Add, scans: ScanSplit, per_kind: int) -> None:
    """Every kind alone and, each second pair, with a picture; all voices and statements are held out."""
    for kind, clip_kind in NOISE_KINDS.items():
        for index in range(per_kind):
            language = LANGUAGES[index % len(LANGUAGES)]
            audio, text = noise_clip(folder, clip_kind, language, "held_out", varied=False)
            media = {"audio": audio}
            if index // len(LANGUAGES) % 2:
                media["image"] = folder.picture(sample_scene(folder.rng), scans)
            add("noise", kind, language, text, question="", answer=REFUSAL[language], **media)


def _add_transcribe(folder: Folder, add: Add, asr: Folder, per_kind: int) -> None:
    per_language = per_kind // len(LANGUAGES)
    for language in LANGUAGES:
        # Sentences of training: those of the split, without the questions about pictures and without loose words.
        said = [e for e in asr.manifest if e["language"] == language and e["kind"] in ("sentence", "answer")]
        known = list(dict.fromkeys(entry["text"] for entry in said))
        known = [text for text in known if split_of(text) == "train"]
        if len(known) < per_language:
            raise UserError(
                f"benchmark_transcribe={per_kind} repeats {per_language} sentences of training in {language!r}, "
                f"but asr has {len(known)}; make asr larger or benchmark_transcribe smaller"
            )
        for kind in TRANSCRIBE_KINDS:
            if kind == "new_voice":
                chosen = folder.rng.permutation(len(known))[:per_language]
                texts = [known[index] for index in chosen]
            else:
                texts = distinct_sentences(language, "held_out", per_language, folder.rng)
            voices = training_voices(language) if kind == "new_sentence" else held_out_voices(language)
            for index, text in enumerate(texts):
                audio = folder.clip(parts=((text, draw_delivery(voices, folder.rng)),), varied=False)
                question = TRANSCRIBE[language][index % len(TRANSCRIBE[language])]
                add("transcribe", kind, language, text, question=question, answer=text, audio=audio)
