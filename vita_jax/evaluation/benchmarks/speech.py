"""Hearing and speaking: voices, sentences and noises that were held out of training."""

from __future__ import annotations

from vita_jax.evaluation.benchmarks.benchmark import Benchmark, Group

SPEECH = Benchmark(
    name="speech",
    title="spoken questions",
    groups=(
        Group("spoken", "spoken questions about pictures", floor=0.85, goal=0.90),
        Group("noise", "sound that is not for the model", floor=0.95, goal=0.98, measure="refusal"),
        Group("transcribe", "transcripts (1 - CER)", floor=0.90, goal=0.95, measure="transcript"),
        Group("accepted", "spoken questions accepted", 0.95, 0.97, measure="acceptance", source="spoken"),
        Group("input_head", "input head, three classes", 0.97, 0.99, measure="input_head", source="spoken"),
        Group("recognition_full", "recogniser, whole clips (1 - CER)", 0.94, 0.97, "recogniser", "transcribe"),
        Group("recognition_chunked", "recogniser, streamed (1 - CER)", 0.94, 0.97, "recogniser", "transcribe"),
        Group("voice_synthesizer", "recordings read back", measure="voice"),
        Group("voice_copy", "codec copies read back", 0.85, 0.95, measure="voice"),
        Group("voice_decoders", "texts spoken and read back", measure="voice"),
        Group("voice_answers", "spoken answers read back", 0.60, 0.80, measure="voice", source="spoken"),
    ),
)
