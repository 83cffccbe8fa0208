"""Clips: digits that appear one after the other, each in some cell of a small sheet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.quickstart.scans import ScanSplit
from data_pipelines.quickstart.scenes import BLANK, INKS, PAPERS, Scene, draw_colours, draw_sheet
from vita_jax.data.video import paper_frame_indices

CLIP_SIDE = 2  # cells
CLIP_CELL_PIXELS = 22
MIN_CLIP_DIGITS, MAX_CLIP_DIGITS = 2, 4
SECONDS_PER_DIGIT = (1, 2)


@dataclass(frozen=True)
class Clip:
    """`scene` holds the digits in order of appearance and their cells; each is shown alone for `seconds_each`."""

    scene: Scene
    seconds_each: int


def sample_clip(rng: np.random.Generator) -> Clip:
    """Draws 2 to 4 different digits, so that their order is beyond doubt, with a cell for each."""
    count = int(rng.integers(MIN_CLIP_DIGITS, MAX_CLIP_DIGITS + 1))
    digits = rng.choice(10, count, replace=False)
    cells = rng.integers(0, CLIP_SIDE**2, count)
    scene = Scene(
        CLIP_SIDE,
        CLIP_SIDE,
        tuple(int(d) for d in digits),
        tuple(int(c) for c in cells),
        int(rng.integers(len(INKS))),
        int(rng.integers(len(PAPERS))),
    )
    return Clip(scene, int(rng.choice(SECONDS_PER_DIGIT)))


def draw_clip(clip: Clip, scans: ScanSplit, rng: np.random.Generator, fps: int) -> np.ndarray:
    """The frames of a clip, uint8 (n h w 3), at `fps` frames per second."""
    scene = clip.scene
    colours = draw_colours(scene, rng)
    frames = []
    for digit, cell in zip(scene.digits, scene.cells, strict=True):
        alone = Scene(CLIP_SIDE, CLIP_SIDE, (digit,), (cell,), scene.ink, scene.paper)
        picture, _ = draw_sheet(alone, scans, rng, CLIP_CELL_PIXELS, colours)
        frames += [picture] * (clip.seconds_each * fps)
    return np.stack(frames)


def clip_transcript(clip: Clip, fps: int) -> str:
    """The frames that are looked at (`paper_frame_indices`) of a clip at `fps`, in characters, cell by cell."""
    scene = clip.scene
    frames_each = clip.seconds_each * fps
    text = ""
    for frame in paper_frame_indices(frames_each * len(scene.digits), fps):
        shown = frame // frames_each
        cells = [BLANK] * CLIP_SIDE**2
        cells[scene.cells[shown]] = str(scene.digits[shown])
        text += "".join(cells)
    return text
