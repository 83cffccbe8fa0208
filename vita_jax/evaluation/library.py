"""Every benchmark by its name, and who runs it: this package on the data of a run or of a folder, or lmms-eval.

What lmms-eval has is taken from there, with its prompts, its way to find the answer in what was said, and its metrics;
here is only which of its tasks a name stands for, and which figure of theirs is the one that papers print.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from vita_jax.errors import UserError
from vita_jax.evaluation.benchmarks import BENCHMARKS
from vita_jax.evaluation.sets import SETS

# In front of any other task of lmms-eval, and what is no set of questions, see `copies`.
ANY_TASK, COPIES = "lmms:", "copies"
JUDGED = "lmms-eval has answers read or graded by a language model: OPENAI_API_KEY, or its LLM_JUDGE settings"


@dataclass(frozen=True)
class LmmsSet:
    """A benchmark of lmms-eval.

    Attributes:
      title: as shown.
      task: its name there, of a task or of a group.
      metrics: whose values make the figure.
      combine: their "sum" or "mean", and the mean over the tasks of a group.
      scale: what the figure is multiplied by to be in the units of `column`.
      column: of the published figures, see `published`; None = there are none.
      likelihoods: whether options are ranked by their likelihood, which lmms-eval asks of "simple" models only.
      shipped: whether the task is not lmms-eval's but lies in `lmms/tasks` of this package.
      note: what has to be known about the figure.
    """

    title: str
    task: str
    metrics: tuple[str, ...] = ()
    combine: Literal["sum", "mean"] = "mean"
    scale: float = 1.0
    column: str | None = None
    likelihoods: bool = False
    shipped: bool = False
    note: str = ""


def _wer(part: str, column: str) -> LmmsSet:
    return LmmsSet(f"LibriSpeech {part} (WER)", f"librispeech_{part.replace('-', '_')}", ("wer",), column=column)


def _mer(part: str, column: str) -> LmmsSet:
    note = "lmms-eval takes the mean of the utterances' rates; papers divide all errors by all characters."
    return LmmsSet(f"WenetSpeech {part}", f"wenet_speech_{part}", ("mer",), column=column, note=note)


LMMS_SETS: Mapping[str, LmmsSet] = MappingProxyType(
    {
        # pictures
        "mme": LmmsSet("MME", "mme", ("mme_perception_score", "mme_cognition_score"), "sum", column="mme"),
        "mmbench": LmmsSet(
            "MMBench, English dev", "mmbench_en_dev", ("gpt_eval_score",), column="mmbench", note=JUDGED
        ),
        "mmbench_cn": LmmsSet("MMBench, Chinese dev", "mmbench_cn_dev", ("gpt_eval_score",), note=JUDGED),
        "mmstar": LmmsSet("MMStar", "mmstar", ("average",), scale=100, column="mmstar"),
        "mmmu": LmmsSet("MMMU, validation", "mmmu_val", ("mmmu_acc",), scale=100, column="mmmu"),
        "mathvista": LmmsSet(
            "MathVista, testmini", "mathvista_testmini_format", ("llm_as_judge_eval",), column="mathvista", note=JUDGED
        ),
        "hallusionbench": LmmsSet(
            "HallusionBench", "hallusion_bench_image", ("aAcc", "qAcc", "fAcc"), column="hallusionbench", note=JUDGED
        ),
        "ai2d": LmmsSet("AI2D", "ai2d", ("exact_match",), scale=100, column="ai2d"),
        "ocrbench": LmmsSet("OCRBench", "ocrbench", ("ocrbench_accuracy",), scale=1000, column="ocrbench"),
        "mmvet": LmmsSet("MM-Vet", "mmvet", ("gpt_eval_score",), column="mmvet", note=JUDGED),
        "scienceqa": LmmsSet("ScienceQA, test", "scienceqa", ("exact_match",), scale=100, column="scienceqa"),
        "vqav2": LmmsSet("VQAv2, validation", "vqav2_val", ("exact_match",), scale=100),
        "textvqa": LmmsSet("TextVQA, validation", "textvqa_val", ("exact_match",), scale=100),
        "okvqa": LmmsSet("OK-VQA, validation", "ok_vqa_val2014", ("exact_match",), scale=100),
        "vizwiz": LmmsSet("VizWiz, validation", "vizwiz_vqa_val", ("exact_match",), scale=100),
        "coco_captions": LmmsSet("COCO 2014 captions (CIDEr)", "coco2014_cap_val", ("coco_CIDEr",), scale=100),
        "flickr30k": LmmsSet("Flickr30k captions (CIDEr)", "flickr30k_test", ("flickr_CIDEr",), scale=100),
        # clips
        "video_mme": LmmsSet(
            "Video-MME", "videomme", ("videomme_perception_score",), column="video_mme_without_subtitles"
        ),
        "video_mme_subtitles": LmmsSet(
            "Video-MME, subtitles",
            "videomme_w_subtitle",
            ("videomme_perception_score",),
            column="video_mme_with_subtitles",
        ),
        "mvbench": LmmsSet("MVBench", "mvbench", ("mvbench_accuracy",), column="mvbench"),
        "tempcompass": LmmsSet("TempCompass", "tempcompass", ("avg_accuracy",), column="tempcompass", note=JUDGED),
        # sound
        "librispeech_dev_clean": _wer("dev-clean", "librispeech_dev_clean_wer"),
        "librispeech_dev_other": _wer("dev-other", "librispeech_dev_other_wer"),
        "librispeech_test_clean": _wer("test-clean", "librispeech_test_clean_wer"),
        "librispeech_test_other": _wer("test-other", "librispeech_test_other_wer"),
        "wenetspeech_net": _mer("test_net", "wenetspeech_net_cer"),
        "wenetspeech_meeting": _mer("test_meeting", "wenetspeech_meeting_cer"),
        # text
        "mmlu": LmmsSet("MMLU", "mmlu", ("acc",), scale=100, likelihoods=True),
        "ceval": LmmsSet("C-Eval, val, five-shot", "ceval", ("acc",), scale=100, likelihoods=True, shipped=True),
        "gsm8k": LmmsSet("GSM8K, five-shot", "gsm8k_five_shot", ("exact_match",), scale=100, shipped=True),
    }
)


def find_set(name: str) -> LmmsSet | None:
    """The set of lmms-eval of that name; None for a benchmark of this package.

    Args:
      name: of a benchmark, or `lmms:TASK` for any task of lmms-eval.

    Raises:
      UserError: there is no such benchmark; names the nearest.
    """
    if name.startswith(ANY_TASK):
        return LmmsSet(name.removeprefix(ANY_TASK), name.removeprefix(ANY_TASK))
    known = (*BENCHMARKS, *SETS, COPIES, *LMMS_SETS)
    if name not in known:
        nearest = max(known, key=lambda other: difflib.SequenceMatcher(None, other, name).ratio())
        raise UserError(
            f"unknown benchmark {name!r}; the nearest is {nearest!r}, known: {', '.join(known)}, and "
            f"{ANY_TASK}TASK for any other task of lmms-eval"
        )
    return LMMS_SETS.get(name)


def figure_of(chosen: LmmsSet, results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The figure of a set in what lmms-eval found, in the units of its column; None where it has none.

    Args:
      results: of every task and group, {"METRIC,FILTER": value} among other entries.
    """
    tasks = []
    for found in results.values():
        values = [_metric(found, metric) for metric in chosen.metrics]
        if values and None not in values:
            tasks.append(sum(values) if chosen.combine == "sum" else sum(values) / len(values))
    whole = results.get(chosen.task, {})
    own = [_metric(whole, metric) for metric in chosen.metrics]
    if own and None not in own:  # the task itself, or a group that has a figure of its own
        tasks = [sum(own) if chosen.combine == "sum" else sum(own) / len(own)]
    return chosen.scale * sum(tasks) / len(tasks) if tasks else None


def _metric(found: Mapping[str, Any], metric: str) -> float | None:
    """The value of a metric by whatever filter came first; None where there is no number."""
    for key, value in found.items():
        name, _, _ = key.partition(",")
        if name == metric and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None
