"""Tasks of lmms-eval on data sets of two samples in the published formats, all on this disk.

MME and LibriSpeech are lmms-eval's own tasks with other data; the others have its forms: several pictures that stand in
a message, a clip as a path, options that are ranked, and one whose clip is missing.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import lmms_eval.tasks
import numpy as np
from PIL import Image
from scipy.io import wavfile

from vita_jax.data.video import write_video

LIBRARY = Path(lmms_eval.tasks.__file__).parent
GREEDY = "generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false}"

UTILS = """
def one_clip(doc):
    return [doc["clip"]]


def messages(doc, lmms_eval_specific_kwargs=None):
    parts = [{"type": "text", "text": "First "}, {"type": "image", "url": doc["first"]}]
    parts += [{"type": "text", "text": "second "}, {"type": "image", "url": doc["second"]}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def no_visual(doc):
    return []
"""

OWN = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: {name}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0.0}}
"""


def write_tasks(folder: Path) -> None:
    """Writes the tasks tiny_mme, tiny_librispeech, tiny_pictures, tiny_clip, tiny_options and tiny_missing."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(4)]
    (folder / "utils.py").write_text(UTILS)
    picture = datasets.Image()

    def save(name: str, rows: list[dict], **features: object) -> Path:
        data = datasets.Dataset.from_list(rows)
        for column, kind in features.items():
            data = data.cast_column(column, kind)
        data.to_parquet(folder / f"{name}.parquet")
        return folder / f"{name}.parquet"

    asked = [("Is it red? Please answer yes or no.", "Yes"), ("Is it blue? Please answer yes or no.", "No")]
    rows = [
        {"question_id": "code_reasoning/0.png", "image": pictures[0], "question": q, "answer": a, "category": "count"}
        for q, a in asked
    ]
    _published(folder, "tiny_mme", "mme/mme.yaml", save("tiny_mme", rows, image=picture))

    rows = []
    for number, text in enumerate(("RED", "GREEN BLUE")):
        wave = folder / f"{number}.wav"
        wavfile.write(wave, 16_000, (9000 * np.sin(np.arange(6000) / (7 + number))).astype(np.int16))
        rows.append({"audio": str(wave), "gt": text, "source": "librispeech_test_clean", "task": "asr_en"})
    data = save("tiny_librispeech", rows, audio=datasets.Audio())
    _published(folder, "tiny_librispeech", "librispeech/librispeech_test_clean.yaml", data, "dataset_name: null")

    rows = [{"first": pictures[0], "second": pictures[n], "question": "colour?", "answer": "red"} for n in (1, 2)]
    data = save("tiny_pictures", rows, first=picture, second=picture)
    _own(folder, "tiny_pictures", data, f"doc_to_messages: !function utils.messages\n{GREEDY}")

    write_video(folder / "clip.mp4", rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), 2.0)
    for name, clip in (("tiny_clip", "clip.mp4"), ("tiny_missing", "none.mp4")):
        rows = [{"clip": str(folder / clip), "question": q, "answer": "red"} for q in ("colour?", "number?")]
        _own(folder, name, save(name, rows), f"doc_to_visual: !function utils.one_clip\n{GREEDY}")

    rows = [{"question": "number?", "choices": ["red", "blue", "7"], "answer": n} for n in (0, 2)]
    more = "doc_to_visual: !function utils.no_visual\ndoc_to_choice: choices"
    _own(folder, "tiny_options", save("tiny_options", rows), more, "multiple_choice", "acc")


def _published(folder: Path, name: str, task: str, data: Path, more: str = "") -> None:
    """A task of lmms-eval with another data set."""
    (folder / f"{name}.yaml").write_text(
        f"include: {LIBRARY / task}\ntask: {name}\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n{more}\n"
    )


def _own(
    folder: Path, name: str, data: Path, more: str, output_type: str = "generate_until", metric: str = "exact_match"
) -> None:
    target = "answer" if output_type == "multiple_choice" else "{{answer}}"
    text = OWN.format(data=data, name=name, output_type=output_type, target=target, more=more, metric=metric)
    (folder / f"{name}.yaml").write_text(text)
