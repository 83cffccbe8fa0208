"""Properties of tiling and normalisation, and what broken picture files are answered with."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from vita_jax.data import images
from vita_jax.data.images import (
    ImageConfig,
    dynamic_tiles,
    frame_cat_tiles,
    image_tiles,
    norm_lut,
    normalise,
    normalise_constants,
    open_image,
    pad_to_square,
    single_tile,
    tile_count,
    tile_grid,
)
from vita_jax.errors import UserError

SIDES = st.integers(1, 3000)
SMALL = ImageConfig(image_size=16)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@st.composite
def configs(draw) -> ImageConfig:
    fewest = draw(st.integers(1, 6))
    return ImageConfig(
        image_size=draw(st.sampled_from([16, 56, 336, 448])),
        min_tiles=fewest,
        max_tiles=draw(st.integers(fewest, 24)),
        use_thumbnail=draw(st.booleans()),
        aspect=draw(st.sampled_from(["square", "pad"])),
    )


# ---- tiling ---------------------------------------------------------------------------------------------------------


@given(SIDES, SIDES, configs())
def test_grid_is_within_the_limits_and_no_other_is_nearer(width, height, config):
    columns, rows = tile_grid(width, height, config)
    assert config.min_tiles <= columns * rows <= config.max_tiles
    nearest = min(
        abs(width / height - c / r)
        for c in range(1, config.max_tiles + 1)
        for r in range(1, config.max_tiles + 1)
        if config.min_tiles <= c * r <= config.max_tiles
    )
    assert abs(width / height - columns / rows) == nearest
    assert 1 <= tile_count(width, height, config) <= config.most_tiles


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([56, 448]))
def test_exact_multiples_map_to_themselves(columns, rows, side):
    config = ImageConfig(image_size=side)
    if columns * rows <= config.max_tiles:
        assert tile_grid(columns * side, rows * side, config) == (columns, rows)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((633, 633), (1, 1)),
        ((634, 634), (2, 2)),
        ((950, 950), (2, 2)),
        ((951, 951), (3, 3)),
        ((300, 200), (3, 2)),
        ((1920, 1080), (4, 2)),
        ((640, 480), (4, 3)),
    ],
)
def test_known_grids_at_448(size, grid):
    assert tile_grid(*size, ImageConfig()) == grid


@given(st.integers(1, 90), st.integers(1, 90), st.booleans(), st.sampled_from(["square", "pad"]))
@settings(deadline=None, max_examples=40)
def test_thumbnail_comes_last_and_only_beside_several_tiles(width, height, use_thumbnail, aspect):
    config = ImageConfig(image_size=16, use_thumbnail=use_thumbnail, aspect=aspect)
    image = picture(width, height)
    tiles = dynamic_tiles(image, config)
    assert tiles.dtype == np.uint8 and tiles.shape == (tile_count(width, height, config), 16, 16, 3)
    shaped = pad_to_square(image, config) if aspect == "pad" else image
    columns, rows = tile_grid(*shaped.size, config)
    has_thumbnail = use_thumbnail and columns * rows > 1
    assert len(tiles) == columns * rows + has_thumbnail
    if has_thumbnail:
        np.testing.assert_array_equal(tiles[-1], np.asarray(shaped.resize((16, 16))))
    np.testing.assert_array_equal(tiles, dynamic_tiles(image, config))


def test_cells_are_row_by_row_and_untouched_when_the_size_fits():
    pixels = np.asarray(picture(48, 32))
    tiles = dynamic_tiles(Image.fromarray(pixels), SMALL)
    assert len(tiles) == 7
    for index in range(6):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(tiles[index], pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16])


@given(st.integers(1, 120), st.integers(1, 120))
@settings(deadline=None, max_examples=40)
def test_single_tile_is_one_square(width, height):
    tile = single_tile(picture(width, height), SMALL)
    assert tile.shape == (16, 16, 3) and tile.dtype == np.uint8


@given(st.integers(16, 60), st.integers(3, 6))
@settings(deadline=None, max_examples=20)
def test_single_tile_sees_only_the_middle_of_a_long_picture(height, ratio):
    pixels = np.array(picture(ratio * height, height))
    tile = single_tile(Image.fromarray(pixels), SMALL)
    pixels[:, : height // 2] = pixels[:, -(height // 2) :] = 0
    np.testing.assert_array_equal(single_tile(Image.fromarray(pixels), SMALL), tile)
    np.testing.assert_array_equal(
        single_tile(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE), SMALL), tile.swapaxes(0, 1)
    )


def test_padding_centres_on_the_mean_colour():
    square = np.asarray(pad_to_square(picture(10, 5), ImageConfig()))
    assert square.shape == (10, 10, 3)
    np.testing.assert_array_equal(square[2:7], np.asarray(picture(10, 5)))
    assert (square[[0, 1, 7, 8, 9]] == (123, 116, 103)).all()
    clip = ImageConfig.clip()
    assert np.asarray(pad_to_square(picture(2, 1), clip))[1, 0].tolist() == [122, 116, 104]


@given(st.integers(1, 90), st.integers(1, 90), st.booleans())
@settings(deadline=None, max_examples=30)
def test_frame_cat_gives_groups_of_five(width, height, use_thumbnail):
    config = ImageConfig(image_size=16, min_tiles=2, use_thumbnail=use_thumbnail)
    columns, rows = tile_grid(width, height, config)
    tiles = frame_cat_tiles(picture(width, height), config)
    assert len(tiles) == 5 * (-(-columns // 2) * -(-rows // 2) + use_thumbnail)
    if use_thumbnail:
        assert (tiles[-5:] == tiles[-1]).all()


# ---- normalisation --------------------------------------------------------------------------------------------------


@given(st.integers(0, 255), st.sampled_from([ImageConfig(), ImageConfig.clip()]))
def test_normalised_values(value, config):
    pixels = np.full((2, 2, 3), value, np.uint8)
    got = normalise(pixels, config)
    assert got.dtype == np.float32 and got.shape == (2, 2, 3)
    np.testing.assert_array_equal(got[0, 0], norm_lut(config)[:, value])
    mean, std = normalise_constants(config)
    np.testing.assert_allclose(got[0, 0], (value / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_normalise_wants_uint8_with_channels_last():
    with pytest.raises(ValueError, match="float32"):
        normalise(np.zeros((2, 2, 3), np.float32), SMALL)
    with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
        normalise(np.zeros((3, 2, 2), np.uint8), SMALL)


# ---- files ----------------------------------------------------------------------------------------------------------


def one_line(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_image(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / "picture.tiff"
    picture(9, 7).convert(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (9, 7)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_upper_bits(format):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = open_image(encoded(Image.fromarray(values), format))
    np.testing.assert_array_equal(np.asarray(image)[..., 1], values >> 8)


def test_animation_gives_its_first_frame_and_orientation_is_ignored():
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 255, 0))
    image = open_image(encoded(first, "GIF", save_all=True, append_images=[second]))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert open_image(encoded(picture(20, 10), "JPEG", exif=exif)).size == (20, 10)


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "cat.png"
    assert f"{path}: no such file" in one_line(path)
    assert "is a folder" in one_line(tmp_path)
    path.write_bytes(b"")
    assert f"{path}: the file is empty" in one_line(str(path))
    path.write_text("not a picture\n" * 50)
    assert f"{path}: not a picture" in one_line(path)
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "not a picture" in one_line(path)
    assert one_line(b"", name="b.png").startswith("b.png: ")
    assert "floating point" in one_line(encoded(Image.new("F", (3, 3)), "TIFF"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_files_are_refused(format):
    data = encoded(picture(64, 64), format)
    message = one_line(data[: len(data) // 2], name="half")
    assert message.startswith("half: ")


@given(st.sampled_from([f for f in images.FORMATS if features.check("avif") or f != "AVIF"]), st.data())
@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on odd TIFF and ICO headers
def test_damaged_files_open_or_give_one_line(format, data):
    content = bytearray(encoded(picture(24, 24), format))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(len(content) - 1, 200) if data.draw(st.booleans()) else len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(content)).mode == "RGB"
    except UserError as error:
        assert "\n" not in str(error)


def test_huge_pictures_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert "20 x 10 pixels" in one_line(encoded(picture(20, 10), "PNG"))
    with pytest.raises(UserError, match="crop it"):
        single_tile(picture(50, 1), SMALL)
    with pytest.raises(UserError, match="crop it"):
        pad_to_square(picture(50, 1), SMALL)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "scale it down" in one_line(encoded(picture(20, 10), "PNG"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("min_tiles", 0),
        ("max_tiles", 0),
        ("aspect", "wide"),
        ("tiling", "tiles"),
        ("mean", (0.5,)),
        ("std", (0.5, 0.5, 0)),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(UserError, match=field):
        ImageConfig(**{field: value})


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["square", "pad"]))
@settings(deadline=None, max_examples=30)
def test_a_crop_is_one_tile_however_many_a_grid_would_have(width, height, aspect):
    image = picture(width, height)
    crop = ImageConfig(image_size=16, max_tiles=4, aspect=aspect, tiling="crop")
    grid = ImageConfig(image_size=16, max_tiles=4, aspect=aspect)
    np.testing.assert_array_equal(image_tiles(image, crop), single_tile(image, crop)[None])
    np.testing.assert_array_equal(image_tiles(image, grid), dynamic_tiles(image, grid))
    assert tile_count(width, height, crop) == crop.most_tiles == 1 and grid.most_tiles == 5


def test_presets():
    vita, clip = ImageConfig.internvit_300m_448px(), ImageConfig.clip()
    assert (vita.image_size, vita.most_tiles) == (448, 13)
    assert (clip.image_size, clip.most_tiles) == (336, 1)
    assert len(dynamic_tiles(picture(40, 10), clip)) == 1


def test_path_objects_and_names_agree(tmp_path):
    path = tmp_path / "a.png"
    picture(5, 6).save(path)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(open_image(Path(path).read_bytes())))
