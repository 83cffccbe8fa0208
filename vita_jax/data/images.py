"""From an image file to uint8 tiles and normalised pixels, bit for bit as VITA does it.

Axes: t tiles, S side of a tile, 3 colour channels in the order red, green, blue. Tiles stay uint8 until they are inside
the model, where `normalise` (or `norm_lut`, the same numbers as a table) turns them into floats. All resizing is
Pillow's: bicubic with antialiasing on uint8, rounded between its two passes, which no resize on float arrays
reproduces.

Follows VITA's `vita/util/data_utils_video_audio_neg_patch.py` and `video_audio_demo.py` (tiling), `..._neg_frameCat.py`
(groups of five), and the public preprocessing settings of InternViT-300M-448px and CLIP ViT-L/14-336 (resize, crop,
normalise).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from vita_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# 1/255 as the original writes it; the product is taken in double precision and then rounded to float32.
RESCALE = 0.00392156862745098

# Pictures above this are refused before decoding: a few kilobytes can claim to hold terabytes. 179 megapixels is
# Pillow's own hard limit.
MAX_PIXELS = 178_956_970

# Only formats that Pillow decodes by itself: it would hand PostScript files to an external program.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow's decoders raise on damaged files, depending on the format.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    RuntimeError,  # from the AVIF library
    struct.error,
    zlib.error,
)


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How images and video frames become tiles.

    Attributes:
      image_size: side S of a tile in pixels.
      min_tiles, max_tiles: limits on columns x rows of the tile grid; the thumbnail is not counted.
      use_thumbnail: append the whole image as last tile when the grid has more than one.
      mean, std: per channel, for pixel values in 0..1.
      aspect: "pad" pastes the image on a square of the mean colour before anything else; "square" (the name the
        released VITA models use) does not pad.
      tiling: "grid" cuts an image into tiles; "crop" makes one tile of it as CLIP does, by its shortest edge and the
        central square.

    Raises:
      UserError: a value outside its range.
    """

    image_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    aspect: str = "square"
    tiling: str = "grid"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}; it must be at least 1 pixel")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise UserError(
                f"min_tiles={self.min_tiles}, max_tiles={self.max_tiles}; they must satisfy 1 <= min_tiles <= max_tiles"
            )
        if self.aspect not in ("square", "pad"):
            raise UserError(f"aspect is {self.aspect!r}; use 'square' or 'pad'")
        if self.tiling not in ("grid", "crop"):
            raise UserError(f"tiling is {self.tiling!r}; use 'grid' or 'crop'")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean={self.mean}, std={self.std}; each needs three numbers, those of std positive")

    @classmethod
    def internvit_300m_448px(cls) -> ImageConfig:
        """VITA-1.0 and VITA-1.5: 448 pixels, 1 to 12 tiles and a thumbnail, ImageNet mean and deviation."""
        return cls()

    @classmethod
    def clip(cls, image_size: int = 336, aspect: str = "square") -> ImageConfig:
        """LLaVA v1 at 224 pixels, v1.5 at 336 with `aspect="pad"`: one tile, CLIP mean and deviation."""
        return cls(image_size, max_tiles=1, mean=CLIP_MEAN, std=CLIP_STD, aspect=aspect, tiling="crop")

    @property
    def most_tiles(self) -> int:
        """The largest number of tiles one image can give, thumbnail included."""
        if self.tiling == "crop":
            return 1
        return self.max_tiles + int(self.use_thumbnail and self.max_tiles > 1)


# ---- files ----------------------------------------------------------------------------------------------------------


def source_name(source: str | os.PathLike[str] | bytes, name: str | None = None) -> str:
    """What to call `source` in a message: `name` if given, else the path, else how many bytes it has."""
    if name is not None:
        return name
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def require_file(source: str | os.PathLike[str] | bytes, label: str) -> None:
    """Raises UserError unless `source` is non-empty bytes or the path of an existing, non-empty, regular file."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = Path(source)
        if path.is_dir():
            raise UserError(f"{label}: is a folder; give a file")
        if not path.is_file():
            raise UserError(f"{label}: no such file")
        size = path.stat().st_size
    if size == 0:
        raise UserError(f"{label}: the file is empty (0 bytes)")


@functools.lru_cache(maxsize=1)
def _available_formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow knows."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """Any Pillow mode -> RGB. Alpha is dropped, as in the original; 16 bit grey keeps its upper 8 bits.

    (The original leaves 16 bit grey to Pillow, which clips it to white.)
    """
    if image.mode == "F":
        raise UserError(f"{label}: has floating point pixels, whose range is unknown; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            found = f"{values.min()} to {values.max()}"
            raise UserError(f"{label}: has pixels from {found}; save it with 8 or 16 bits per channel")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_image(source: str | os.PathLike[str] | bytes, *, name: str | None = None) -> Image.Image:
    """Opens and fully decodes a picture.

    The camera's orientation tag is ignored and of an animation the first frame is taken, both as in the original.

    Args:
      source: a path, or the bytes of a picture file.
      name: what to call the picture in error messages; default the path.

    Returns:
      A Pillow image in mode RGB, detached from the file.

    Raises:
      UserError: missing, empty, truncated or damaged file, not a picture, or more than MAX_PIXELS pixels.
    """
    with _opened(source, name) as (image, label):
        return _to_rgb(image, label)


def picture_size(source: str | os.PathLike[str] | bytes, *, name: str | None = None) -> tuple[int, int]:
    """Width and height of a picture, from its head alone. Raises `UserError` as `open_image`, as far as that shows."""
    with _opened(source, name) as (image, _):
        return image.size


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | bytes, name: str | None) -> Iterator[tuple[Image.Image, str]]:
    """The file as Pillow opens it, not decoded, and what to call it; whatever is wrong with it becomes a `UserError`,
    while it is decoded, too.
    """
    label = source_name(source, name)
    require_file(source, label)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_available_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} are accepted, scale it down")
            yield image, label
    except UnidentifiedImageError as error:
        raise UserError(f"{label}: not a picture in a known format ({', '.join(_available_formats())})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{label}: more than {MAX_PIXELS} pixels, scale it down ({error})") from error
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{label}: the picture is damaged or cut off ({reason})") from error


# ---- geometry -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) within the limits by ascending area.

    Inside one area the original's order is that of a Python set of tuples, which is fixed (numbers hash to themselves),
    so the same set is built here. The order decides ties only for a few settings without a choice of areas, such as 2
    to 3 tiles.
    """
    grids = {
        (columns, rows)
        for most in range(min_tiles, max_tiles + 1)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_grid(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """The grid whose columns / rows is nearest to width / height.

    Among equally near grids the larger one wins if its area in pixels is less than twice that of the image.

    Args:
      width, height: of the image in pixels.

    Returns:
      (columns, rows), min_tiles <= columns * rows <= max_tiles.
    """
    aspect = width / height
    best, nearest = (1, 1), float("inf")
    for columns, rows in _grids(config.min_tiles, config.max_tiles):
        difference = abs(aspect - columns / rows)
        large_enough = width * height > 0.5 * config.image_size**2 * columns * rows
        if difference < nearest or (difference == nearest and large_enough):
            best, nearest = (columns, rows), difference
    return best


def tile_count(width: int, height: int, config: ImageConfig) -> int:
    """How many tiles `image_tiles` returns for an image of this size, without having its pixels."""
    if config.tiling == "crop":
        return 1
    if config.aspect == "pad":
        width = height = max(width, height)
    columns, rows = tile_grid(width, height, config)
    cells = columns * rows
    return cells + int(config.use_thumbnail and cells != 1)


def _check_area(width: int, height: int, what: str) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels, more than {MAX_PIXELS}"
        raise UserError(f"{what} would need {size}; the picture is too long and thin, crop it")


def _mean_colour(config: ImageConfig) -> tuple[int, ...]:
    return tuple(int(channel * 255) for channel in config.mean)


def pad_to_square(image: Image.Image, config: ImageConfig) -> Image.Image:
    """Pastes an RGB image in the middle of a square of the mean colour; a square image comes back unchanged.

    Raises:
      UserError: the square would have more than MAX_PIXELS pixels.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_area(side, side, f"padding a {width} x {height} picture to a square")
    square = Image.new("RGB", (side, side), _mean_colour(config))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _shaped(image: Image.Image, config: ImageConfig) -> Image.Image:
    return pad_to_square(image, config) if config.aspect == "pad" else image


def _cells(image: Image.Image, side: int) -> list[Image.Image]:
    """Cuts an image whose sides are multiples of `side` into squares, left to right, then top to bottom."""
    width, height = image.size
    return [image.crop((x, y, x + side, y + side)) for y in range(0, height, side) for x in range(0, width, side)]


def _stack(tiles: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(tile, dtype=np.uint8) for tile in tiles])


def dynamic_tiles(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Dynamic tiling: resize to the nearest grid (the aspect ratio is not kept), cut, append the thumbnail.

    Args:
      image: RGB, any size.

    Returns:
      uint8 (t S S 3): the cells row by row; last, if there is more than one and `use_thumbnail`, the whole image at
        S x S.
    """
    image = _shaped(image, config)
    side = config.image_size
    columns, rows = tile_grid(*image.size, config)
    tiles = _cells(image.resize((columns * side, rows * side)), side)
    if config.use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((side, side)))
    return _stack(tiles)


def image_tiles(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """The tiles of an RGB image as `config.tiling` says: uint8 (t S S 3). See `dynamic_tiles` and `single_tile`."""
    return single_tile(image, config)[None] if config.tiling == "crop" else dynamic_tiles(image, config)


def single_tile(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """One tile, as for video frames: bicubic resize of the shortest edge to S, then the central square.

    Args:
      image: RGB, any size.

    Returns:
      uint8 (S S 3).

    Raises:
      UserError: the picture is so thin that the resized one would have more than MAX_PIXELS pixels.
    """
    image = _shaped(image, config)
    side = config.image_size
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    _check_area(*size, f"resizing the shorter edge of a {width} x {height} picture to {side}")
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    resized = image.resize(size, resample=Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.uint8)


def frame_cat_tiles(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """VITA-1.0's "frameCat" tiling: groups of five tiles, a 2 x 2 block of cells as one tile and then its four cells.

    The image is resized to its grid, which is then filled up to even columns and rows with the mean colour at the right
    and bottom. With `use_thumbnail` the last group is five copies of the whole canvas. VITA-1.0 uses it with
    `min_tiles=2`.

    Args:
      image: RGB, any size.

    Returns:
      uint8 (5 * groups, S, S, 3).
    """
    image = _shaped(image, config)
    side = config.image_size
    columns, rows = tile_grid(*image.size, config)
    even_size = ((columns + columns % 2) * side, (rows + rows % 2) * side)
    canvas = Image.new("RGB", even_size, _mean_colour(config))
    canvas.paste(image.resize((columns * side, rows * side)), (0, 0))
    tiles: list[Image.Image] = []
    for block in _cells(canvas, 2 * side):
        tiles += [block.resize((side, side)), *_cells(block, side)]
    if config.use_thumbnail:
        tiles += [canvas.resize((side, side))] * 5
    return _stack(tiles)


# ---- normalisation --------------------------------------------------------------------------------------------------


def normalise_constants(config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std), float32 (3,) each, broadcastable to (... S S 3); usable inside jitted code."""
    return np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)


def norm_lut(config: ImageConfig) -> np.ndarray:
    """float32 (3 256): the normalised value of every uint8 value per channel, exactly as the original processor has it.

    `lut[arange(3), tiles]` normalises (... 3) tiles inside jitted code with the same bits as `normalise`.
    """
    mean, std = normalise_constants(config)
    values = (np.arange(256, dtype=np.float64) * RESCALE).astype(np.float32)
    return (values[None, :] - mean[:, None]) / std[:, None]


def normalise(tiles: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 (... 3) -> float32 (... 3), channels last; exactly the numbers of the original processor.

    Raises:
      ValueError: not uint8, or the last axis is not 3.
    """
    if tiles.dtype != np.uint8 or tiles.shape[-1:] != (3,):
        raise ValueError(f"expected uint8 (... 3), got {tiles.dtype} {tiles.shape}")
    return norm_lut(config)[np.arange(3), tiles]
