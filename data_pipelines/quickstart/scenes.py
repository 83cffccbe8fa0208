"""Scenes: one to four handwritten digits on a sheet of coloured paper, as a picture, as a clip, and as words.

A sheet is a grid of square cells. A digit fills one cell, digits keep reading order (left to right, then top to
bottom), and the sheets have different shapes, so that dynamic tiling cuts them into one, two or three tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipelines.quickstart.scans import ScanSplit

# (columns, rows) in cells. Two by two cells make one tile of the quickstart's models. Wide sheets hold one line of
# digits and tall sheets are two cells wide, so that the order of the cells, tile after tile, is the reading order.
SHEETS = ((2, 2), (4, 2), (2, 4), (6, 2), (2, 6))
CELLS_PER_TILE_SIDE = 2
MAX_DIGITS = 4
# Cells are drawn at these sizes; up to 22 px a sheet covers less than twice the area of its grid of 32 px tiles.
CELL_PIXELS = tuple(range(16, 23))

# name in English, name in Chinese, RGB
INKS = (
    ("black", "黑色", (20, 20, 20)),
    ("red", "红色", (205, 25, 30)),
    ("blue", "蓝色", (25, 60, 215)),
    ("green", "绿色", (15, 130, 40)),
    ("purple", "紫色", (135, 25, 160)),
    ("brown", "棕色", (130, 75, 20)),
)
PAPERS = (
    ("white", "白色", (250, 250, 250)),
    ("yellow", "黄色", (255, 238, 130)),
    ("pink", "粉色", (255, 195, 210)),
    ("cyan", "青色", (165, 235, 250)),
    ("grey", "灰色", (195, 195, 195)),
    ("orange", "橙色", (255, 190, 105)),
)
COLOUR_JITTER = 8  # of 255, the same shift for a whole sheet

# One character a cell in written scenes: a digit, an empty cell, a cell of the overview that follows several tiles.
BLANK = "□"
OVERVIEW = "△"


@dataclass(frozen=True)
class Scene:
    """Digits on a sheet. `cells[i]` (in reading order) holds `digits[i]`; colours index `INKS` and `PAPERS`."""

    columns: int
    rows: int
    digits: tuple[int, ...]
    cells: tuple[int, ...]
    ink: int
    paper: int

    @property
    def num_tiles(self) -> int:
        return self.columns * self.rows // CELLS_PER_TILE_SIDE**2


def sample_scene(rng: np.random.Generator, num_digits: int | None = None) -> Scene:
    """Draws a sheet, its colours, and 1 to `MAX_DIGITS` digits (all counts equally likely) in distinct cells."""
    columns, rows = SHEETS[rng.integers(len(SHEETS))]
    if num_digits is None:
        num_digits = int(rng.integers(1, MAX_DIGITS + 1))
    if columns > rows:  # one line of digits
        line = int(rng.integers(rows))
        cells = line * columns + np.sort(rng.choice(columns, num_digits, replace=False))
    else:
        cells = np.sort(rng.choice(columns * rows, num_digits, replace=False))
    digits = rng.integers(0, 10, num_digits)
    return Scene(
        columns,
        rows,
        tuple(int(d) for d in digits),
        tuple(int(c) for c in cells),
        int(rng.integers(len(INKS))),
        int(rng.integers(len(PAPERS))),
    )


def cell_names(scene: Scene) -> list[int | None]:
    """The digit of every cell (None if empty), ordered as the visual tokens: tile after tile, rows within a tile."""
    grid: list[int | None] = [None] * (scene.columns * scene.rows)
    for cell, digit in zip(scene.cells, scene.digits, strict=True):
        grid[cell] = digit
    side = CELLS_PER_TILE_SIDE
    return [
        grid[(tile_row * side + row) * scene.columns + tile_column * side + column]
        for tile_row in range(scene.rows // side)
        for tile_column in range(scene.columns // side)
        for row in range(side)
        for column in range(side)
    ]


def transcript(scene: Scene) -> str:
    """The sheet in characters, ordered as the visual tokens; several tiles are followed by their overview."""
    cells = "".join(BLANK if digit is None else str(digit) for digit in cell_names(scene))
    return cells + (OVERVIEW * CELLS_PER_TILE_SIDE**2 if scene.num_tiles > 1 else "")


def _draw_digit(scan: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """One scan (8 8) in [0, 1] as the ink of a cell (size size) in [0, 1], slightly turned, scaled and shifted."""
    angle = np.deg2rad(rng.uniform(-9, 9))
    scale = rng.uniform(0.8, 0.95) * size / 8
    shift = rng.uniform(-0.06, 0.06, 2) * size
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    centre = size / 2 + shift
    # Pillow wants the map from output pixels to input pixels.
    matrix = (
        cos, sin, 4 - cos * centre[0] - sin * centre[1],
        -sin, cos, 4 + sin * centre[0] - cos * centre[1],
    )  # fmt: skip
    image = Image.fromarray((scan * 255).astype(np.uint8)).transform(
        (size, size), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=0
    )
    return np.asarray(image, np.float32) / 255


def _colour(rgb: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    shift = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    return np.clip(np.asarray(rgb) + shift, 0, 255).astype(np.float32)


def draw_colours(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """RGB (3) float32 in 0..255 of this sheet's ink and paper, near those of their names."""
    return _colour(INKS[scene.ink][2], rng), _colour(PAPERS[scene.paper][2], rng)


def draw_sheet(
    scene: Scene,
    scans: ScanSplit,
    rng: np.random.Generator,
    cell_pixels: int | None = None,
    colours: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, list[int]]:
    """Draws the scene with scans of one split.

    Args:
      cell_pixels: size of a cell; drawn from `CELL_PIXELS` if None.
      colours: RGB of ink and paper, see `draw_colours`; drawn if None.

    Returns:
      The picture, uint8 (height width 3), and the position in the split of the scan used for each digit.
    """
    size = int(rng.choice(CELL_PIXELS)) if cell_pixels is None else cell_pixels
    ink = np.zeros((scene.rows * size, scene.columns * size), np.float32)
    used = []
    for cell, digit in zip(scene.cells, scene.digits, strict=True):
        position = int(rng.choice(scans.of_digit(digit)))
        used.append(position)
        top, left = cell // scene.columns * size, cell % scene.columns * size
        ink[top : top + size, left : left + size] = _draw_digit(scans.ink[position], size, rng)
    ink_rgb, paper_rgb = draw_colours(scene, rng) if colours is None else colours
    picture = paper_rgb + ink[..., None] * (ink_rgb - paper_rgb)
    return np.rint(picture).astype(np.uint8), used
