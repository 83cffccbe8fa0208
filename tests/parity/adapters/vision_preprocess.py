"""Golden cases of the image and video preprocessing: tiling, single tiles, normalisation, frame sampling."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vita_jax.data.images import (
    ImageConfig,
    dynamic_tiles,
    frame_cat_tiles,
    norm_lut,
    normalise,
    pad_to_square,
    single_tile,
    tile_count,
    tile_grid,
)
from vita_jax.data.video import (
    ORIGINAL_RULES,
    EmptyClipError,
    FrameRateError,
    FrameRule,
    named_rule,
    original_frame_indices,
    segment_midpoints,
)

if TYPE_CHECKING:
    from tests.parity.cases import Case

# What the original raises where this package has its own error.
ORIGINAL_ERRORS = {FrameRateError: "error:ValueError", EmptyClipError: "error:UnboundLocalError"}


def _image_config(config: dict[str, Any]) -> ImageConfig:
    return ImageConfig(
        image_size=config["image_size"],
        min_tiles=config["min_num"],
        max_tiles=config["max_num"],
        use_thumbnail=config["use_thumbnail"],
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
        aspect="pad" if config.get("pad_first", False) else "square",
    )


def _image_outputs(image: Image.Image, mode: str, config: ImageConfig) -> dict[str, np.ndarray]:
    """Every output that a case may hold for one image, without the image's name."""
    outputs: dict[str, np.ndarray] = {}
    if config.aspect == "pad":
        outputs["padded_u8"] = np.asarray(pad_to_square(image, config))
    if mode == "single":
        outputs["resized_cropped_u8"] = single_tile(image, config)
        tiles = outputs["resized_cropped_u8"][None]
    elif mode == "tiles":
        tiles = dynamic_tiles(image, config)
        if len(tiles) != tile_count(*image.size, config):
            raise AssertionError(f"{len(tiles)} tiles, but tile_count says {tile_count(*image.size, config)}")
    elif mode == "frameCat":
        tiles = frame_cat_tiles(image, config)
        outputs["num_groups"] = np.asarray(len(tiles) // 5, np.int32)
    else:
        raise ValueError(f"unknown mode {mode!r} of image_preprocess")
    outputs["tiles_u8"] = tiles
    outputs["num_tiles"] = np.asarray(len(tiles), np.int32)
    outputs["pixel_values"] = normalise(tiles, config).transpose(0, 3, 1, 2)
    return outputs


def image_preprocess(case: Case) -> dict[str, np.ndarray]:
    config = _image_config(case.config)
    results = {"norm_lut": norm_lut(config)}
    for key, pixels in case.inputs.items():
        image = Image.fromarray(np.asarray(pixels, np.uint8))
        for output, value in _image_outputs(image, case.config["mode"], config).items():
            results[output + key.removeprefix("image")] = value
    return {name: value for name, value in results.items() if name in case.outputs}


def tile_grids(case: Case) -> list[str]:
    configs = [
        ImageConfig(
            image_size=s["image_size"], min_tiles=s["min_num"], max_tiles=s["max_num"], use_thumbnail=s["use_thumbnail"]
        )
        for s in case.table["settings"]
    ]
    mismatches = []
    for row in case.table["rows"]:
        width, height = row["width"], row["height"]
        for config, want in zip(configs, row["results"], strict=True):
            got = {"grid": list(tile_grid(width, height, config)), "total": tile_count(width, height, config)}
            if got != want:
                mismatches.append(f"{width} x {height}, {config}: got {got}, want {want}")
    return mismatches


def _routine(name: str) -> FrameRule:
    """A named original rule, or the demo's with another limit (`demo_max8`) or density (`demo_fps2`)."""
    base, _, variant = name.partition("_")
    if name in ORIGINAL_RULES or base not in ORIGINAL_RULES:
        return named_rule(name)
    rule = named_rule(base)
    setting = re.fullmatch(r"(max|fps)([\d.]+)", variant)
    if setting is None:
        raise ValueError(f"unknown sampling routine {name!r}")
    if setting[1] == "max":
        return FrameRule(rule.frames_per_second, rule.min_frames, int(setting[2]))
    return FrameRule(float(setting[2]), rule.min_frames, rule.max_frames)


def video_sampling(case: Case) -> list[str]:
    mismatches = []
    for row in case.table["rows"]:
        for name in case.table["routines"]:
            try:
                clip = row.get("start"), row.get("end")
                got = original_frame_indices(row["n_frames"], row["fps"], _routine(name), *clip)
            except (FrameRateError, EmptyClipError) as error:
                got = ORIGINAL_ERRORS[type(error)]
            if got != row[name]:
                mismatches.append(f"{name}, {row['n_frames']} frames at {row['fps']}: got {got}, want {row[name]}")
    return mismatches


def image_sequence_sampling(case: Case) -> list[str]:
    mismatches = []
    for row in case.table["rows"]:
        got = segment_midpoints(row["total"], row["desired"])
        if got != row["indices"]:
            mismatches.append(f"{row['desired']} of {row['total']}: got {got}, want {row['indices']}")
    return mismatches


MODULES = {
    "image_preprocess": image_preprocess,
    "tile_grid": tile_grids,
    "video_sampling": video_sampling,
    "image_sequence_sampling": image_sequence_sampling,
}
