"""What the report shows of sound: recordings and replies to listen to, with their spectrograms, and what was measured.

All sections are empty strings where a result has nothing for them.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vita_jax.data.audio import MAX_SECONDS, AudioConfig, read_audio
from vita_jax.data.ctc_vocabulary import normalise_transcript
from vita_jax.data.images import open_image
from vita_jax.errors import UserError
from vita_jax.evaluation.items import ITEMS, read_items
from vita_jax.evaluation.report_html import escaped, image_tag, picture_tag, table
from vita_jax.evaluation.results import percent
from vita_jax.ops.filter_bank import RELEASED, log_mel

# Everything is shown and played as the model hears it.
HEARD = AudioConfig(max_seconds=MAX_SECONDS)
# Natural logarithms of energies: so far below the loudest is black.
DYNAMIC_RANGE = 12.0
# Inches of a spectrogram, and its dots per inch.
SPECTROGRAM_SIZE, SPECTROGRAM_DPI = (3.2, 1.15), 110
REPLY_PICTURE_SIDE = 160


def player(path: Path) -> str:
    """A sound file to look at and to listen to; one that cannot be read is shown with the reason."""
    try:
        waveform = read_audio(path, HEARD, name=path.name)
        picture = image_tag(spectrogram(waveform), "log-mel spectrogram")
    except UserError as error:
        return f"<div class=heard><span class=soft>no sound: {escaped(error)}</span></div>"
    data = base64.b64encode(wav_file(waveform)).decode("ascii")
    sound = f'<audio controls preload="metadata" src="data:audio/wav;base64,{data}"></audio>'
    return f"<div class=heard>{picture}{sound}</div>"


def wav_file(waveform: np.ndarray, rate: int = RELEASED.sample_rate) -> bytes:
    """(n,) float samples as the bytes of a 16-bit mono WAV file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.clip(np.round(waveform * 32768.0), -32768, 32767).astype("<i2").tobytes())
    return data.getvalue()


def spectrogram(waveform: np.ndarray) -> bytes:
    """PNG of the log-mel features: (n,) float32 at 16 kHz. Raises `UserError` if it is shorter than a frame."""
    features = log_mel(waveform)
    seconds = len(waveform) / RELEASED.sample_rate
    loudest = float(features.max())
    with matplotlib.rc_context({"font.size": 7}):
        figure = Figure(figsize=SPECTROGRAM_SIZE, layout="constrained")
        axis = figure.subplots()
        axis.imshow(
            features.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=loudest - DYNAMIC_RANGE,
            vmax=loudest,
            extent=(0.0, seconds, 0, features.shape[1]),
        )
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(length=2, pad=1)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=SPECTROGRAM_DPI)
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def replies(run_dir: Path, root: Path, result: Mapping[str, Any]) -> str:
    """The sounds that were kept: copies of the codec, spoken texts and answers, with the question where there is one.

    Args:
      run_dir: `<run_dir>/evaluation` has the files.
      root: the benchmark's folder.
      result: of the benchmark "speech".
    """
    sounds = result.get("sounds", [])
    if not sounds:
        return ""
    items = {item.id: item for item in read_items(root / ITEMS)} if any(s.get("item") for s in sounds) else {}
    cards = []
    for sound in sounds:
        said, heard = sound.get("text", ""), sound.get("heard", "")
        right = normalise_transcript(said) == normalise_transcript(heard)
        outcome, colour, mark = ("right", "good", "✓ read back") if right else ("wrong", "bad", "✗ misheard")
        item = items.get(sound.get("item"))
        asked = ""
        # The sound of any other item is what was said, not what was asked.
        if item is not None and item.group == "spoken":
            if item.image is not None:
                asked = f"<div class=shot>{picture_tag(open_image(root / item.image), REPLY_PICTURE_SIDE)}</div>"
            asked += f"<div class='heard soft'>question</div>{player(root / item.audio)}"
            asked += "<div class='heard soft'>reply</div>"
        cards.append(
            f"<div class='item {outcome}'>{asked}{player(run_dir / 'evaluation' / sound['file'])}<div class=said>"
            f"<span class='tag {colour}'>{mark}</span> <span class=soft>{escaped(sound.get('title', ''))}</span>"
            f"<dl><dt>text</dt><dd>{escaped(said) or '-'}</dd>"
            f"<dt>heard</dt><dd><strong>{escaped(heard) or '-'}</strong></dd></dl></div></div>"
        )
    note = "<p class=soft>What the recogniser of stage 2.1a hears in each sound; it was never trained on them.</p>"
    return f"<h2>Its voice</h2>\n{note}\n<div class='row uneven'>{''.join(cards)}</div>"


def confusion_section(result: Mapping[str, Any]) -> str:
    """The input head: what was given in rows, what it took it for in columns, darker the larger the share of a row."""
    group = result.get("groups", {}).get("input_head", {})
    if "confusion" not in group:
        return ""
    classes, counts = group["confusion"]["classes"], group["confusion"]["counts"]
    lines = ["<tr>" + "".join(f"<th>{escaped(name)}</th>" for name in ("is \\ taken for", *classes)) + "</tr>"]
    for name, row in zip(classes, counts, strict=True):
        total = max(sum(row), 1)
        cells = "".join(
            f'<td style="background:rgb(47 95 208 / {0.7 * count / total:.2f})" '
            f'title="{percent(count / total)} of {sum(row):,}">{count:,}</td>'
            for count in row
        )
        lines.append(f"<tr><td>{escaped(name)}</td>{cells}</tr>")
    return (
        f"<h2>Input head</h2>\n<p class=soft>{escaped(group['title'])}: {percent(group['accuracy'])} of "
        f"{group['n']:,}.</p>\n<div class=panel><table class=counts>{''.join(lines)}</table></div>"
    )


def real_time_section(result: Mapping[str, Any]) -> str:
    """Seconds of computing per second of sound."""
    factors = result.get("real_time")
    if not factors:
        return ""
    rows = [[name.replace("_", " "), f"{factor:.3f}", f"{1 / factor:.1f}x"] for name, factor in factors.items()]
    panel = table(["part", "seconds per second of sound", "faster than real time"], rows)
    return f"<h2>Real-time factors</h2>\n<div class=panel>{panel}</div>"


def changes_section(result: Mapping[str, Any]) -> str:
    """What the later stages did to earlier abilities: paired differences in points on the same questions."""
    changes = result.get("changes")
    if not changes:
        return ""
    entries = changes.values() if isinstance(changes, Mapping) else changes
    rows = [
        [
            entry["title"] + (f", since {entry['since']}" if "since" in entry else ""),
            f"{entry['n']:,}",
            percent(entry["before"]),
            percent(entry["after"]),
            f"{entry['difference']:+.1f}",
            f"{entry['low']:+.1f} .. {entry['high']:+.1f}",
        ]
        for entry in entries
    ]
    head = ["the same questions", "n", "before", "after", "points", "95 % interval"]
    note = "<p class=soft>What was kept while more was learnt: paired differences, mean over kinds of question.</p>"
    return f"<h2>Before and after</h2>\n{note}\n<div class=panel>{table(head, rows)}</div>"
